//! Runs a copy's command in a guest. Its standard input and output are pipes of this process, and
//! what it writes to stderr is collected.

use super::super::exec::{Spec, as_text, words};
use super::super::pipes::{self, End};
use crate::api::exec::{ExecStart, ExecStartRequest, Stream};
use crate::client::{Client, Result};
use crate::error::Error;
use crate::host::thread;
use crate::locks::{Cancel, CancelCause};
use crate::workspace::copy::script;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

/// The user who copies, unless another one is named. This is explicit, because an image may name
/// another user for its commands.
const ROOT: &str = "0";
/// How much of a command's stderr is kept.
const STDERR_BYTES_MAX: usize = 16 * 1024;

/// A command of a copy.
pub(super) struct Command<'a> {
    pub vm: &'a str,
    pub user: Option<&'a str>,
    pub words: Vec<Vec<u8>>,
    /// The daemon's end of the pipe for the tar: the command's input or its output.
    pub tar: OwnedFd,
    pub stream: Stream,
}

/// Runs the command until it has ended, and returns what it wrote to stderr. Every status other
/// than 0 is an error.
pub(super) fn run(client: &mut Client, command: Command<'_>, stop: &Cancel) -> Result<Vec<u8>> {
    let vm = command.vm.to_owned();
    let (stderr, theirs) = pipes::from_daemon(stop)?;
    let collector = thread::spawn("stderr", move || collect(stderr))?;
    let (mut streams, mut fds) = (
        vec![command.stream, Stream::Stderr],
        vec![command.tar, theirs],
    );
    let spec = Spec {
        argv: command.words.into_iter().map(OsString::from_vec).collect(),
        env: Vec::new(),
        workdir: Some("/".into()),
        user: None,
        stdin: false,
        term: None,
        no_wait_children: false,
        ssh_agent: None,
    };
    let text = match as_text(&spec) {
        Some(text) => text,
        None => {
            let (mut to, theirs) = pipes::to_daemon(stop)?;
            let bytes = words(spec).encode();
            // If the daemon stops reading, its reply says why.
            thread::spawn("command", move || drop(to.write_all(&bytes)))?;
            streams.push(Stream::Command);
            fds.push(theirs);
            Default::default()
        }
    };
    let request = ExecStartRequest {
        vm: vm.clone(),
        argv: text.argv,
        env: Vec::new(),
        workdir: text.workdir,
        user: Some(command.user.unwrap_or(ROOT).to_owned()),
        pty: None,
        streams,
        no_wait_children: false,
    };
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let in_flight = client.begin::<ExecStart>(&request, &borrowed);
    drop(borrowed);
    drop(fds);
    let reply = in_flight.and_then(|call| call.finish(&mut |_| Ok(())));
    if reply.is_err() {
        stop.cancel(CancelCause::CommandEnded);
    }
    let said = collector
        .join()
        .map_err(|_| Error::internal("a thread panicked"))?;
    match reply?.exit.shell_status() {
        0 => Ok(said),
        status => Err(script::explain(&vm, status, &said).into()),
    }
}

/// Reads to the end, and returns at most the first [`STDERR_BYTES_MAX`] bytes.
fn collect(mut from: End) -> Vec<u8> {
    let (mut kept, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = from.read(&mut piece) {
        let room = STDERR_BYTES_MAX - kept.len();
        kept.extend_from_slice(&piece[..n.min(room)]);
    }
    kept
}
