use super::super::tests::{Start, check, fcctl, fcctl_from, file_with};
use super::*;
use crate::client::fake::{Fake, Request};
use crossbeam_channel::{Receiver, bounded, unbounded};
use expect_test::expect;
use serde_json::{Value, json};
use signal_hook::consts::signal::{SIGINT, SIGTERM, SIGWINCH};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's ends of the streams that the client passed with `exec.start`.
pub(crate) struct Guest {
    pub(crate) stdin: Option<File>,
    pub(crate) stdout: Option<File>,
    pub(crate) stderr: Option<File>,
}

impl Guest {
    pub(crate) fn take(r: &mut Request) -> Self {
        let names: Vec<String> = serde_json::from_value(r.params["streams"].clone()).unwrap();
        let mut guest = Guest {
            stdin: None,
            stdout: None,
            stderr: None,
        };
        for (name, fd) in names.iter().zip(std::mem::take(&mut r.fds)) {
            let slot = match name.as_str() {
                "stdin" => &mut guest.stdin,
                "stdout" => &mut guest.stdout,
                _ => &mut guest.stderr,
            };
            *slot = Some(File::from(fd));
        }
        guest
    }
}

pub(crate) fn begin(r: &mut Request) -> Guest {
    assert!(r.more);
    let guest = Guest::take(r);
    r.note(Note::Session {
        session: "00000000abcd".parse().unwrap(),
    });
    guest
}

pub(crate) fn status(n: u8) -> Value {
    json!({"exit": {"status": n}})
}

fn bytes(n: usize, seed: u32) -> Vec<u8> {
    (0..n as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

#[test]
fn exec_binary_streams_stay_separate_and_complete() {
    let fake = Fake::start(|mut r| {
        let mut guest = begin(&mut r);
        let mut input = Vec::new();
        guest.stdin.take().unwrap().read_to_end(&mut input).unwrap();
        let (mut out, mut err) = (guest.stdout.take().unwrap(), guest.stderr.take().unwrap());
        // This is more than a pipe can buffer, so the relay must read.
        out.write_all(&bytes(3_000_000, 1)).unwrap();
        err.write_all(b"to stderr\n").unwrap();
        out.write_all(&input).unwrap();
        drop((out, err));
        r.result(status(0));
    });
    let input = bytes(2_000_000, 2);
    let start = Start {
        stdin: file_with(&input),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["exec", "web", "-i", "--", "cat"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, "to stderr\n"));
    assert!(ran.out == [bytes(3_000_000, 1), input].concat());
}

#[test]
fn exec_reply_before_last_output_loses_nothing() {
    let fake = Fake::start(|mut r| {
        let mut guest = begin(&mut r);
        let (mut out, done) = (guest.stdout.take().unwrap(), bytes(200_000, 3));
        r.result(status(4));
        out.write_all(&done).unwrap();
    });
    let ran = fcctl(&fake, &["exec", "web", "--", "x"]);
    assert_eq!((ran.status, ran.out == bytes(200_000, 3)), (4, true));
}

#[test]
fn exec_options_map_to_request() {
    let fake = Fake::start(|mut r| {
        drop(begin(&mut r));
        r.result(status(0));
    });
    let dir = tempfile::tempdir().unwrap();
    let env = dir.path().join("env");
    std::fs::write(&env, "FILE=1\n").unwrap();
    let env = env.to_str().unwrap();
    check(
        &fake,
        &[
            "exec",
            "web",
            "-w",
            "/tmp",
            "-u",
            "dev:adm",
            "-e",
            "A=b c",
            "-e",
            "MINE",
            "-e",
            "ABSENT",
            "--env-file",
            env,
            "--",
            "ls",
            "-la",
            "--x",
        ],
        expect![[r#"
        > exec.start {"argv":["ls","-la","--x"],"env":[["FILE","1"],["A","b c"],["MINE","from me"]],"streams":["stdout","stderr"],"user":"dev:adm","vm":"web","workdir":"/tmp"}
        status 0
    "#]],
    );
    check(
        &fake,
        &["exec", "web", "-i"],
        expect![[r#"
        > exec.start {"argv":[],"env":[],"streams":["stdin","stdout","stderr"],"vm":"web"}
        status 0
    "#]],
    );
    check(
        &fake,
        &["exec", "-t", "web", "--", "top"],
        expect![[r#"
        > exec.start {"argv":["top"],"env":[],"pty":{"size":{"cols":80,"rows":24},"term":"xterm"},"streams":["stdout"],"vm":"web"}
        status 0
    "#]],
    );
}

#[test]
fn exec_exits_with_command_status() {
    for (exit, expected) in [
        (json!({"status": 0}), 0),
        (json!({"status": 1}), 1),
        (json!({"status": 126}), 126),
        (json!({"status": 255}), 255),
        (json!({"signal": "KILL"}), 137),
        (json!({"signal": "TERM"}), 143),
    ] {
        let answer = exit.clone();
        let fake = Fake::start(move |mut r| {
            drop(begin(&mut r));
            r.result(json!({"exit": answer}));
        });
        let ran = fcctl(&fake, &["exec", "web", "--", "x"]);
        assert_eq!((ran.status, ran.err.as_str()), (expected, ""), "{exit}");
    }
    // fcctl's own failures never exit with 0 or a status of the guest's command.
    let fake = Fake::start(|mut r| {
        drop(begin(&mut r));
        r.hang_up();
    });
    let ran = fcctl(&fake, &["exec", "web", "--", "x"]);
    assert_eq!(ran.status, 125);
    assert!(
        ran.err
            .contains("exec.start: the daemon closed the connection"),
        "{}",
        ran.err
    );
}

#[test]
fn exec_without_i_leaves_stdin_unread() {
    let fake = Fake::start(|mut r| {
        assert!(begin(&mut r).stdin.is_none());
        r.result(status(0));
    });
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"mine").unwrap();
    let mut kept = reader.try_clone().unwrap();
    let start = Start {
        stdin: File::from(OwnedFd::from(reader)),
        ..Start::default()
    };
    assert_eq!(
        fcctl_from(&fake, start, &["exec", "web", "--", "x"]).status,
        0
    );
    drop(writer);
    assert_eq!(std::io::read_to_string(&mut kept).unwrap(), "mine");
}

#[test]
fn exec_open_stdin_does_not_delay_exit() {
    let fake = Fake::start(|mut r| {
        drop(begin(&mut r));
        r.result(status(3));
    });
    let (reader, writer) = std::io::pipe().unwrap();
    let start = Start {
        stdin: File::from(OwnedFd::from(reader)),
        ..Start::default()
    };
    assert_eq!(
        fcctl_from(&fake, start, &["exec", "web", "-i", "--", "x"]).status,
        3
    );
    drop(writer);
}

#[test]
fn exec_reader_exits_ends_command_quietly() {
    let fake = Fake::start(|mut r| {
        let mut guest = begin(&mut r);
        let mut out = guest.stdout.take().unwrap();
        // Writes until the stream has no reader, as yes(1) does.
        while out.write_all(&[b'y'; 4096]).is_ok() {}
        r.wait_for_hangup();
    });
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let start = Start {
        stdout: File::from(OwnedFd::from(writer)),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["exec", "web", "--", "yes"]);
    assert_eq!((ran.status, ran.err.as_str()), (141, ""));
}

#[test]
fn exec_full_disk_exits_125() {
    let fake = Fake::start(|mut r| {
        let mut guest = begin(&mut r);
        guest.stdout.take().unwrap().write_all(b"x").unwrap();
        r.wait_for_hangup();
    });
    let start = Start {
        stdout: File::options().write(true).open("/dev/full").unwrap(),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["exec", "web", "--", "x"]);
    assert_eq!(ran.status, 125);
    assert!(
        ran.err
            .starts_with("fcctl: write the command's stdout: No space left"),
        "{}",
        ran.err
    );
}

/// Returns a pty pair: the side of the user and the side of the program.
fn terminal(rows: u16, cols: u16) -> (File, File) {
    let pty = nix::pty::openpty(None, None).unwrap();
    let terminal = File::from(pty.slave);
    resize(&terminal, rows, cols);
    (File::from(pty.master), terminal)
}

fn resize(terminal: &File, rows: u16, cols: u16) {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size).unwrap();
}

/// Runs a command on a terminal, and sends it `signals` after the first resize, which shows that
/// the session exists. `after` receives the signals that reached the session and decides how the
/// command ends.
fn signalled(
    signals: &'static [i32],
    after: impl Fn(Request, &Receiver<String>) + Send + Sync + 'static,
) -> (u8, String) {
    let (began_tx, began) = unbounded();
    let (control_tx, controls) = unbounded();
    let fake = Fake::start(move |mut r| match r.method.as_str() {
        "exec.start" => {
            let _guest = begin(&mut r);
            after(r, &controls);
        }
        "exec.resize" => {
            began_tx.send(()).unwrap();
            r.result(json!({}));
        }
        _ => {
            control_tx
                .send(format!("{} {}", r.method, r.params))
                .unwrap();
            r.result(json!({}));
        }
    });
    let (_keyboard, stdout) = terminal(24, 80);
    let start = Start {
        stdout,
        signals: send_after(began, signals),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["exec", "web", "-t", "--", "sleep", "9"]);
    (ran.status, ran.err)
}

fn send_after(began: Receiver<()>, signals: &'static [i32]) -> Receiver<i32> {
    let (sender, receiver) = unbounded();
    thread::spawn("sender", move || {
        began.recv_timeout(PATIENCE).unwrap();
        signals.iter().for_each(|s| sender.send(*s).unwrap());
        // The receiver must not see the channel close.
        std::mem::forget(sender);
    })
    .unwrap();
    receiver
}

#[test]
fn exec_signals_are_forwarded_and_status_returned() {
    let (status, err) = signalled(&[SIGINT, SIGTERM], |r, controls| {
        let seen = [
            controls.recv_timeout(PATIENCE).unwrap(),
            controls.recv_timeout(PATIENCE).unwrap(),
        ];
        assert_eq!(
            seen,
            [
                r#"exec.signal {"session":"00000000abcd","signal":"INT"}"#,
                r#"exec.signal {"session":"00000000abcd","signal":"TERM"}"#
            ]
        );
        r.result(json!({"exit": {"signal": "INT"}}));
    });
    assert_eq!((status, err.as_str()), (130, ""));
}

#[test]
fn exec_third_signal_detaches() {
    let (status, err) = signalled(&[SIGINT, SIGINT, SIGINT], |mut r, _| r.wait_for_hangup());
    assert_eq!(status, 130);
    assert_eq!(
        err,
        "fcctl: detached from the command; VM web keeps running (fcctl exec web, fcctl stop web)\n"
    );
}

#[test]
fn exec_signal_before_start_cancels() {
    let (asked, began) = bounded(1);
    let fake = Fake::start(move |mut r| {
        asked.send(()).unwrap();
        r.wait_for_hangup();
    });
    let start = Start {
        signals: send_after(began, &[SIGTERM]),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["exec", "web", "--", "x"]);
    assert_eq!(
        (ran.status, ran.err.as_str(), fake.methods().as_str()),
        (143, "fcctl: interrupted\n", "exec.start")
    );
}

#[test]
fn exec_terminal_is_raw_and_forwards_resizes() {
    use rustix::termios::{LocalModes, tcgetattr};
    let is_raw = |t: &File| {
        !tcgetattr(t)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON)
    };
    let (mut person, terminal) = terminal(50, 100);
    let (typist, window) = (person.try_clone().unwrap(), terminal.try_clone().unwrap());
    let (signals_tx, signals) = unbounded();
    let (resize_tx, resizes) = unbounded();
    let fake = Fake::start(move |mut r| {
        if r.method != "exec.start" {
            resize_tx.send(r.params["size"].clone()).unwrap();
            return r.result(json!({}));
        }
        assert_eq!(r.params["pty"]["size"], json!({"rows": 50, "cols": 100}));
        assert!(is_raw(&window));
        let mut guest = begin(&mut r);
        assert!(guest.stderr.is_none());
        // In raw mode Ctrl-C is an ordinary byte.
        (&typist).write_all(&[3]).unwrap();
        let mut typed = [0];
        guest
            .stdin
            .as_mut()
            .unwrap()
            .read_exact(&mut typed)
            .unwrap();
        assert_eq!(typed, [3]);
        assert_eq!(
            resizes.recv_timeout(PATIENCE).unwrap(),
            json!({"rows": 50, "cols": 100})
        );
        resize(&window, 10, 20);
        signals_tx.send(SIGWINCH).unwrap();
        assert_eq!(
            resizes.recv_timeout(PATIENCE).unwrap(),
            json!({"rows": 10, "cols": 20})
        );
        guest.stdout.take().unwrap().write_all(b"bye").unwrap();
        r.result(status(0));
    });
    let start = Start {
        stdin: terminal.try_clone().unwrap(),
        stdout: terminal.try_clone().unwrap(),
        signals,
    };
    let ran = fcctl_from(&fake, start, &["exec", "web"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
    assert!(
        tcgetattr(&terminal)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO)
    );
    let mut shown = [0; 16];
    let n = person.read(&mut shown).unwrap();
    assert_eq!(&shown[..n], b"bye");
}
