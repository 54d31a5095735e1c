mod bench;
mod descriptors;
mod limits;
mod malformed;
mod socket_file;

use super::*;
use crate::api::frame::{Note, RpcError};
use crate::api::vm::LogChunk;
use crate::error::Kind;
use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);

/// A handler with the methods that the tests call.
#[derive(Default)]
struct Probe {
    calls: AtomicUsize,
    hung_up: AtomicUsize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    n: u32,
}

impl Handler for Probe {
    fn call(&self, mut call: IncomingCall<'_>, connection: &Connection) -> CallResult {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let reply = |v: Value| Ok(to_raw_value(&v).unwrap());
        let invalid = |e| call.invalid_params(e);
        match call.method {
            "echo" => Ok(RawValue::from_string(call.params.to_owned()).unwrap()),
            "meta" => reply(
                json!({"more": call.more, "key": call.key, "uid": call.peer.uid, "pid": call.peer.pid}),
            ),
            "value" => reply(serde_json::from_str(call.params).map_err(invalid)?),
            "typed" => reply(json!(
                serde_json::from_str::<Typed>(call.params)
                    .map_err(invalid)?
                    .n
            )),
            "panic" => panic!("boom"),
            "fail" => Err(Error::new(Kind::VmNotFound, "no VM web")
                .hint("fcctl ps -a")
                .into()),
            "big" => reply(json!("x".repeat(FRAME_BYTES_MAX))),
            "notes" => {
                for n in 0..3 {
                    connection
                        .notify(Note::Log(LogChunk {
                            text: n.to_string(),
                        }))
                        .unwrap();
                }
                reply(json!("done"))
            }
            // Sends notes until the connection counts as broken.
            "flood" => {
                let chunk = Note::Log(LogChunk {
                    text: "x".repeat(60_000),
                });
                while connection.notify(chunk.clone()).is_ok() {}
                self.hung_up.fetch_add(1, Ordering::SeqCst);
                reply(json!("never seen"))
            }
            // The handler answers when the caller hangs up.
            "hold" => {
                connection
                    .notify(Note::Log(LogChunk {
                        text: "held".into(),
                    }))
                    .unwrap();
                let mut fds = [nix::poll::PollFd::new(
                    connection.fd(),
                    nix::poll::PollFlags::empty(),
                )];
                let hung_up = nix::poll::poll(&mut fds, DEADLINE.as_millis() as u16).unwrap();
                assert_eq!(hung_up, 1);
                self.hung_up.fetch_add(1, Ordering::SeqCst);
                reply(json!(null))
            }
            // Returns the number of descriptors, whether all of them are close-on-exec, and the
            // content of the first one.
            "fds" => {
                let cloexec = |fd: &OwnedFd| {
                    let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
                    flags & libc::FD_CLOEXEC != 0
                };
                let all = call.fds.iter().all(cloexec);
                let mut text = String::new();
                if let Some(fd) = call.fds.first() {
                    std::fs::File::from(fd.try_clone().unwrap())
                        .read_to_string(&mut text)
                        .unwrap();
                }
                reply(json!({"count": call.fds.len(), "cloexec": all, "text": text}))
            }
            "nofds" => call.take_fds::<0>().and_then(|_| reply(json!(0))),
            other => Err(CallError::unknown_method(other)),
        }
    }
}

struct Fixture {
    _dir: TempDir,
    path: PathBuf,
    server: Server,
    probe: Arc<Probe>,
}

fn fixture_with(limits: Limits) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let probe = Arc::new(Probe::default());
    let server = Server::bind(&path, limits, probe.clone()).unwrap();
    Fixture {
        _dir: dir,
        path,
        server,
        probe,
    }
}

fn fixture() -> Fixture {
    fixture_with(Limits::default())
}

struct Client {
    reader: BufReader<UnixStream>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    id: Value,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    params: Value,
    #[serde(default)]
    result: Value,
    error: Option<RpcError>,
}

impl Answer {
    #[track_caller]
    fn kind(&self) -> (i32, &str) {
        let e = self.error.as_ref().expect("the answer is an error");
        (
            e.code,
            &e.data.as_ref().expect("the error has a fault").kind,
        )
    }
}

/// Waits for a condition that only the server can observe.
#[track_caller]
fn until(holds: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline);
        let _ = nix::poll::poll(&mut [], 1u8);
    }
}

impl Fixture {
    fn client(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Client {
            reader: BufReader::new(stream),
        }
    }
}

impl Client {
    fn stream(&mut self) -> &mut UnixStream {
        self.reader.get_mut()
    }
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream().write_all(bytes.as_ref()).unwrap();
    }
    /// Returns the next answer, or `None` if the server has closed the connection.
    fn next(&mut self) -> Option<Answer> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => None,
            // The server closed the connection before it read everything.
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => None,
            r => {
                r.unwrap();
                Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line:?}: {e}")))
            }
        }
    }
    fn answer(&mut self) -> Answer {
        self.next().expect("the server answers")
    }
    fn call(&mut self, method: &str, params: Value) -> Answer {
        self.send(format!(
            "{}\n",
            json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        ));
        self.answer()
    }
    #[track_caller]
    fn check_alive(&mut self) {
        assert_eq!(
            self.call("echo", json!({"still": "here"})).result,
            json!({"still": "here"})
        );
    }
    #[track_caller]
    fn check_closed(&mut self) {
        assert!(self.next().is_none());
    }
}

#[test]
fn calls_notes_and_ids_round_trip() {
    let f = fixture();
    let mut c = f.client();
    c.check_alive();
    c.send(
        "{\"jsonrpc\":\"2.0\",\"id\":\"a b\",\"method\":\"meta\",\"more\":true,\"key\":\"k\"}\r\n",
    );
    let a = c.answer();
    let me = (rustix::process::geteuid().as_raw(), std::process::id());
    assert_eq!(
        (a.id, a.result),
        (
            json!("a b"),
            json!({"more": true, "key": "k", "uid": me.0, "pid": me.1})
        )
    );
    for n in 0..3 {
        let note = if n == 0 {
            c.call("notes", json!({}))
        } else {
            c.answer()
        };
        assert_eq!(
            (note.method.as_deref(), note.params),
            (Some("log"), json!({"text": n.to_string()}))
        );
    }
    assert_eq!(c.answer().result, json!("done"));
    let failed = c.call("fail", json!({}));
    assert_eq!(failed.kind(), (-32000, "vm_not_found"));
    assert_eq!(
        failed.error.unwrap().data.unwrap().hint.as_deref(),
        Some("fcctl ps -a")
    );
}

#[test]
fn panic_is_answered_with_internal_error() {
    let f = fixture();
    let mut c = f.client();
    assert_eq!(c.call("panic", json!({})).kind(), (-32603, "internal"));
    c.check_alive();
    f.client().check_alive();
}

#[test]
fn pipelined_calls_are_answered_in_order() {
    let f = fixture();
    let mut c = f.client();
    let line = |n: u32| format!("{}\n", json!({"jsonrpc": "2.0", "id": n, "method": "echo"}));
    c.send((0..50).map(line).collect::<String>());
    (0..50).for_each(|n| assert_eq!(c.answer().id, json!(n)));
}

#[test]
fn half_close_is_not_a_hang_up() {
    let f = fixture();
    let mut c = f.client();
    c.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"hold\"}\n");
    assert_eq!(c.answer().method.as_deref(), Some("log"));
    c.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(f.probe.hung_up.load(Ordering::SeqCst), 0);
    drop(c);
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
    assert_eq!(f.probe.hung_up.load(Ordering::SeqCst), 1);
    let mut c = f.client();
    c.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"echo\"}\n");
    c.stream().shutdown(Shutdown::Write).unwrap();
    assert_eq!(c.answer().id, json!(1));
    c.check_closed();
}

#[test]
fn stop_ends_idle_connections_and_lets_calls_finish() {
    let f = fixture();
    let (mut idle, mut busy) = (f.client(), f.client());
    idle.check_alive();
    busy.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"hold\"}\n{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"echo\"}\n");
    assert_eq!(busy.answer().method.as_deref(), Some("log"));
    f.server.stop_accepting();
    idle.check_closed();
    assert!(!f.path.exists());
    assert!(UnixStream::connect(&f.path).is_err());
    assert_eq!(
        f.server.drain(Instant::now() + Duration::from_millis(20)),
        1
    );
    assert_eq!(
        f.probe.hung_up.load(Ordering::SeqCst),
        0,
        "a call in progress continues"
    );
    f.server.hang_up();
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
    assert_eq!(f.probe.hung_up.load(Ordering::SeqCst), 1);
}

#[test]
fn drain_ends_with_the_last_connection() {
    const ROUNDS: u32 = 50;
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        let f = fixture();
        let mut busy = f.client();
        busy.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"hold\"}\n");
        assert_eq!(busy.answer().method.as_deref(), Some("log"));
        f.server.stop_accepting();
        std::thread::scope(|scope| {
            let drained = scope.spawn(|| f.server.drain(begun + DEADLINE));
            std::thread::yield_now();
            f.server.hang_up();
            assert_eq!(drained.join().unwrap(), 0);
        });
        assert!(begun.elapsed() < DEADLINE, "the drain missed the end");
    }
}

#[test]
fn pipelined_call_gets_shutting_down() {
    let f = fixture();
    let mut c = f.client();
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    let line = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"fds\"}\n";
    descriptors::send_with(c.stream(), line.as_bytes(), &[&read_end]);
    c.send("{\"jsonrpc\":\"2.0\",\"id\":2,\"method\":\"echo\"}\n");
    until(|| f.probe.calls.load(Ordering::SeqCst) > 0);
    f.server.stop_accepting();
    drop(write_end); // Now the first call can be answered.
    assert_eq!(c.answer().id, json!(1));
    assert_eq!(c.answer().kind(), (-32000, "shutting_down"));
    c.check_closed();
}
