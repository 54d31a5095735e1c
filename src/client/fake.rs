//! A fake daemon for tests. It has a thread per connection, and a closure answers the calls.

use crate::api::frame::{Note, Notification, Version};
use crate::api::limits::FDS_MAX;
use crate::api::{Fault, VERSION_MAJOR, VERSION_MINOR};
use crate::error::Error;
use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One request, with methods to answer it.
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) params: Value,
    pub(crate) more: bool,
    pub(crate) fds: Vec<OwnedFd>,
    id: Value,
    stream: UnixStream,
}

impl Request {
    pub(crate) fn raw(&mut self, line: &str) {
        // The error is ignored because tests let the client disconnect.
        let _ = self.stream.write_all(format!("{line}\n").as_bytes());
    }
    pub(crate) fn note(&mut self, note: Note) {
        let line = serde_json::to_string(&Notification {
            jsonrpc: Version::V2,
            note,
        })
        .unwrap();
        self.raw(&line);
    }
    pub(crate) fn result(mut self, result: impl Serialize) {
        let line = json!({"jsonrpc": "2.0", "id": self.id, "result": result}).to_string();
        self.raw(&line);
    }
    /// Answers with a result and a descriptor.
    pub(crate) fn result_with(self, result: impl Serialize, fd: &OwnedFd) {
        let line = json!({"jsonrpc": "2.0", "id": self.id, "result": result}).to_string() + "\n";
        super::connection::write_with_fds(&self.stream, line.as_bytes(), &[fd.as_fd()]).unwrap();
    }
    pub(crate) fn fault(mut self, error: Error) {
        let fault = Fault::from(error);
        let line = json!({"jsonrpc": "2.0", "id": self.id, "error": {"code": -32000, "message": fault.message, "data": fault}});
        self.raw(&line.to_string());
    }
    /// Closes the connection without an answer.
    pub(crate) fn hang_up(self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    /// Blocks until the client hangs up.
    pub(crate) fn wait_for_hangup(&mut self) {
        assert_eq!(
            self.stream.read(&mut [0]).unwrap_or(0),
            0,
            "the client sent more"
        );
    }
}

/// A fake daemon that answers `fcd.info` itself and passes all other requests to a closure.
pub(crate) struct Fake {
    dir: tempfile::TempDir,
    calls: Receiver<String>,
}

type Handler = dyn Fn(Request) + Send + Sync;

impl Fake {
    pub(crate) fn start(handler: impl Fn(Request) + Send + Sync + 'static) -> Self {
        Self::with_version(VERSION_MAJOR, VERSION_MINOR, handler)
    }

    pub(crate) fn with_version(
        major: u32,
        minor: u32,
        handler: impl Fn(Request) + Send + Sync + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("fcd.sock")).unwrap();
        let (sender, calls) = unbounded();
        let handler: Arc<Handler> = Arc::new(handler);
        let info = json!({"api": {"major": major, "minor": minor}, "version": env!("CARGO_PKG_VERSION"), "features": [],
            "pid": 1, "uid": 0, "state_dir": "/s", "uptime_s": 1, "guest_roots": ["/root"]});
        spawn(move || {
            for stream in listener.incoming() {
                let (handler, info, sender) = (handler.clone(), info.clone(), sender.clone());
                spawn(move || serve(stream.unwrap(), &info, &*handler, &sender));
            }
        });
        Self { dir, calls }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("fcd.sock")
    }
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }
    /// Takes the calls since the last look, except `fcd.info`, such as `vm.stop {"vm":"a"}`.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.try_iter().collect()
    }
    /// Takes the calls since the last look, and returns their methods without parameters.
    pub(crate) fn methods(&self) -> String {
        let methods: Vec<_> = self
            .calls
            .try_iter()
            .map(|c| c.split(' ').next().unwrap().to_owned())
            .collect();
        methods.join(" ")
    }
}

#[allow(clippy::disallowed_methods)] // The client layer must not import `host`.
pub(super) fn spawn(body: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::spawn(body)
}

fn serve(stream: UnixStream, info: &Value, handler: &Handler, calls: &Sender<String>) {
    while let Some((line, fds)) = read_request(&stream) {
        let value: Value = serde_json::from_str(&line).expect("a request is JSON");
        let method = value["method"].as_str().expect("a method").to_owned();
        let request = Request {
            params: value["params"].clone(),
            more: value["more"] == json!(true),
            id: value["id"].clone(),
            stream: stream.try_clone().unwrap(),
            method,
            fds,
        };
        if request.method == "fcd.info" {
            request.result(info);
            continue;
        }
        let _ = calls.send(format!("{} {}", request.method, request.params));
        handler(request);
    }
}

/// Reads a line and the descriptors that came with its first byte. Returns `None` if the connection
/// ends or fails first.
fn read_request(stream: &UnixStream) -> Option<(String, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let mut line = Vec::new();
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let got = rustix::net::recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .ok()?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                assert!(line.is_empty(), "descriptors come with the first byte");
                fds.extend(received);
            }
        }
        match (got.bytes, byte[0]) {
            (0, _) => return None,
            (_, b'\n') => return Some((String::from_utf8(line).unwrap(), fds)),
            (_, b) => line.push(b),
        }
    }
}
