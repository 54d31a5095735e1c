use super::super::tests::{Ran, Start, fcctl, fcctl_from, file_with};
use crate::client::fake::{Fake, Request};
use crate::error::{Error, Kind};
use crossbeam_channel::{Sender, bounded};
use signal_hook::consts::signal::SIGINT;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);
const STACK_BYTES: usize = 8 << 20;

/// An input that does not end while `_writer` is open.
struct Endless {
    stdin: File,
    _writer: std::io::PipeWriter,
}

impl Endless {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        Self {
            stdin: OwnedFd::from(reader).into(),
            _writer: writer,
        }
    }
}

/// Runs fcctl on a thread. Returns `None` if it does not end in time.
fn ran(fake: &Arc<Fake>, start: Start, args: &[&str]) -> Option<Ran> {
    let (to, from) = bounded(1);
    let fake = fake.clone();
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    // Use the stack size of the main thread, on which fcctl normally runs.
    #[allow(clippy::disallowed_methods)]
    std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let _ = to.send(fcctl_from(&fake, start, &args));
        })
        .unwrap();
    from.recv_timeout(PATIENCE).ok()
}

fn refusing() -> Arc<Fake> {
    Arc::new(Fake::start(|r| {
        r.fault(Error::new(Kind::InvalidArgument, "no such platform"));
    }))
}

/// Starts a daemon that never answers. Sends the signal once it has received the call.
fn silent(signals: Sender<i32>) -> Arc<Fake> {
    Arc::new(Fake::start(move |mut r: Request| {
        let _ = signals.send(SIGINT);
        r.wait_for_hangup();
    }))
}

#[test]
fn refused_pull_ends_before_stdin_does() {
    let input = Endless::new();
    let start = Start {
        stdin: input.stdin.try_clone().unwrap(),
        ..Start::default()
    };
    let ran = ran(&refusing(), start, &["image", "pull", "-"]).expect("fcctl waits for stdin");
    assert_eq!(ran.status, 2);
    assert!(ran.err.contains("no such platform"), "{}", ran.err);
}

#[test]
fn signal_ends_pull_that_waits_for_stdin() {
    let input = Endless::new();
    let (send, signals) = bounded(1);
    let start = Start {
        stdin: input.stdin.try_clone().unwrap(),
        signals,
        ..Start::default()
    };
    let ran = ran(&silent(send), start, &["image", "pull", "-"]).expect("fcctl waits for stdin");
    assert_eq!((ran.status, ran.err.contains("interrupted")), (130, true));
}

#[test]
fn pull_from_fifo_without_writer_ends_with_the_call() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let source = format!("docker-archive:{}", fifo.display());
    let args = ["image", "pull", &source];
    let ran = ran(&refusing(), Start::default(), &args).expect("fcctl waits for the FIFO");
    assert!(ran.err.contains("no such platform"), "{}", ran.err);
}

#[test]
fn archive_cannot_come_from_terminal() {
    let pty = nix::pty::openpty(None, None).unwrap();
    let start = Start {
        stdin: pty.slave.into(),
        ..Start::default()
    };
    let ran = ran(&refusing(), start, &["image", "pull", "-"]).expect("fcctl reads the terminal");
    assert!(
        ran.err.contains("stdin is a terminal")
            && ran
                .err
                .contains("hint: docker save NAME | fcctl image pull -"),
        "{}",
        ran.err
    );
}

/// Starts a daemon that records the request of a pull and reads what is sent with it.
fn accepting() -> Fake {
    Fake::start(|mut r: Request| {
        if let Some(fd) = r.fds.pop() {
            std::io::copy(&mut File::from(fd), &mut std::io::sink()).unwrap();
        }
        r.fault(Error::new(Kind::InvalidArgument, "that is all"));
    })
}

#[test]
fn path_is_pulled_as_archive_of_either_kind() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("app.tar");
    std::fs::write(&file, "no tar").unwrap();
    let fake = accepting();
    let ran = fcctl(&fake, &["image", "pull", file.to_str().unwrap()]);
    assert!(ran.err.contains("that is all"), "{}", ran.err);
    assert_eq!(fake.calls(), [r#"image.pull {"source":{"archive":{}}}"#]);
}

#[test]
fn path_that_cannot_be_pulled_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    for (path, why) in [
        (path(""), "hint: a directory must be an OCI layout"),
        (path("absent.tar"), "absent.tar: No such file"),
    ] {
        let fake = accepting();
        let ran = fcctl(&fake, &["image", "pull", &path]);
        assert!(ran.err.contains(why), "{}", ran.err);
        assert_eq!(fake.methods(), "");
    }
}

#[test]
fn archive_with_other_compression_is_refused_before_it_is_sent() {
    const XZ: &[u8] = b"\xfd7zXZ\0\0 and so on";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("app.tar.xz");
    std::fs::write(&file, XZ).unwrap();
    let path = file.to_str().unwrap();
    let archive = format!("docker-archive:{path}");
    let named = format!("{archive}:team/app:1");
    for (arg, hint) in [
        (
            "-",
            "hint: decompress it: ... | xz -dc | fcctl image pull -",
        ),
        (path, &format!("hint: xz -dc {path} | fcctl image pull -")),
        (
            &archive,
            &format!("hint: xz -dc {path} | fcctl image pull -"),
        ),
        (
            &named,
            &format!(
                "hint: xz -dc {path} | fcctl image pull docker-archive:/dev/stdin:team/app:1\n"
            ),
        ),
    ] {
        let start = Start {
            stdin: file_with(XZ),
            ..Start::default()
        };
        let ran = fcctl_from(&accepting(), start, &["image", "pull", arg]);
        assert!(
            ran.err.contains("is compressed with xz") && ran.err.contains(hint),
            "{}",
            ran.err
        );
    }
}
