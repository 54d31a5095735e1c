//! Tests against a real sshd on the loopback interface.

use crate::api::exec::{Exit, Pty, PtySize};
use crate::error::{Error, Kind, Result};
use crate::guest::SshTransport;
use crate::guest::io::fifo::{Direction, accept};
use crate::guest::io::{BytesSource, ChunkSource, FdSink, FdSource, VecSink};
use crate::guest::test_sshd::Sshd;
use crate::guest::{
    Control, ExecSpec, Sink, Streams, Target, Transport, command_line, control_queue,
};
use crate::host::thread::spawn;
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use rustix::pipe::{PipeFlags, pipe_with};
use sha2::{Digest, Sha256};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// Limit of the time to notice a ready guest: the designed latency plus some room for a busy
/// machine.
const SOON: Duration = Duration::from_millis(100);

fn cancel() -> Cancel {
    Cancel::try_new().unwrap()
}
fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}
fn spec(command: &str) -> ExecSpec {
    ExecSpec {
        command: command.into(),
        deadline: Some(later()),
        ..ExecSpec::default()
    }
}
fn sh(script: &str) -> ExecSpec {
    spec(&command_line(&["sh".into(), "-c".into(), script.into()], &[], None).unwrap())
}
fn ready(config: &str) -> (Sshd, Target) {
    let sshd = Sshd::start_with(config);
    let target = sshd.target();
    SshTransport
        .wait_ready(&target, later(), &cancel())
        .unwrap();
    (sshd, target)
}
fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}
fn sink(fd: OwnedFd) -> FdSink {
    FdSink::new(accept(fd, Direction::Write).unwrap())
}
fn source(fd: OwnedFd) -> FdSource {
    FdSource::new(accept(fd, Direction::Read).unwrap())
}
fn run(target: &Target, spec: &ExecSpec, stdin: &[u8]) -> Result<(Exit, Vec<u8>, Vec<u8>)> {
    let (mut stdin, mut stdout, mut stderr) = (
        BytesSource::new(stdin),
        VecSink::new(1 << 20),
        VecSink::new(1 << 20),
    );
    let streams = Streams {
        stdin: Some(&mut stdin),
        stdout: Some(&mut stdout),
        stderr: Some(&mut stderr),
        ..Streams::default()
    };
    let exit = SshTransport.exec(target, spec, streams, &cancel())?;
    Ok((exit, stdout.bytes, stderr.bytes))
}

/// Runs `body` on a thread and waits for the command's first byte on stdout, which shows that the
/// command runs. Returns the read end of its stdout, and the thread.
fn begin(
    body: impl FnOnce(FdSink) -> Result<Exit> + Send + 'static,
) -> (OwnedFd, crate::sched::JoinHandle<Result<Exit>>) {
    let (r, w) = pipe();
    let thread = spawn("exec", move || body(sink(w))).unwrap();
    assert_eq!(rustix::io::read(&r, &mut [0; 1]), Ok(1), "the command runs");
    (r, thread)
}

#[test]
fn exec_returns_exits_and_keeps_streams_separate() {
    let (_sshd, target) = ready("");
    let exit = |spec: &ExecSpec| run(&target, spec, b"").unwrap().0;
    for status in [0, 1, 7, 125, 255] {
        assert_eq!(exit(&sh(&format!("exit {status}"))), Exit::Status(status));
    }
    assert_eq!(exit(&sh("kill -TERM $$")), Exit::Status(143));
    // sshd has no name for this signal.
    assert_eq!(exit(&sh("kill -BUS $$")), Exit::Status(135));
    assert_eq!(exit(&spec("kill -KILL $$")), Exit::Signal("KILL".into()));
    assert_eq!(
        exit(&spec(
            &command_line(&["no-such-command".into()], &[], None).unwrap()
        )),
        Exit::Status(127)
    );
    assert_eq!(
        exit(&spec(
            &command_line(&["/etc/passwd".into()], &[], None).unwrap()
        )),
        Exit::Status(126)
    );
    let output = run(&target, &sh("cat; echo err >&2; exit 3"), b"\0in\xff\n").unwrap();
    assert_eq!(
        output,
        (Exit::Status(3), b"\0in\xff\n".to_vec(), b"err\n".to_vec())
    );
    let long = format!(
        "exit 4 # {}",
        "x".repeat(crate::api::exec::COMMAND_BYTES_MAX - 100)
    );
    assert_eq!(exit(&sh(&long)), Exit::Status(4));
}

#[test]
fn exec_lost_connection_is_never_an_exit() {
    let (_sshd, target) = ready("");
    // `$PPID` of the login shell is sshd.
    for script in [
        "kill -9 $PPID; sleep 5",
        "echo out; exec >&- 2>&-; kill -9 $PPID; exit 0",
    ] {
        let e = run(&target, &spec(script), b"").unwrap_err();
        assert_eq!(e.kind(), Kind::GuestLost, "{e}");
        assert!(e.hint_text().is_some());
    }
}

#[test]
fn exec_flood_on_stderr_does_not_block_stdout() {
    let (_sshd, target) = ready("");
    let script =
        "head -c 10000000 /dev/zero >&2 & head -c 10000000 /dev/zero; wait; echo end; exit 5";
    struct Count(usize);
    impl Sink for Count {
        fn fd(&self) -> Option<BorrowedFd<'_>> {
            None
        }
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
    }
    let (mut stdout, mut stderr) = (Count(0), Count(0));
    let streams = Streams {
        stdout: Some(&mut stdout),
        stderr: Some(&mut stderr),
        ..Streams::default()
    };
    assert_eq!(
        SshTransport
            .exec(&target, &sh(script), streams, &cancel())
            .unwrap(),
        Exit::Status(5)
    );
    assert_eq!((stdout.0, stderr.0), (10_000_004, 10_000_000));
    // The result is the same if nobody reads either stream.
    assert_eq!(
        SshTransport
            .exec(&target, &sh(script), Streams::default(), &cancel())
            .unwrap(),
        Exit::Status(5)
    );
}

#[test]
fn exec_reads_available_data_without_waiting() {
    let (sshd, target) = ready("LogLevel DEBUG1");
    for _ in 0..3 {
        let flood = sh(
            "head -c 10000000 /dev/zero >&2 & head -c 10000000 /dev/zero; wait; echo end; exit 5",
        );
        assert_eq!(
            SshTransport
                .exec(&target, &flood, Streams::default(), &cancel())
                .unwrap(),
            Exit::Status(5)
        );
    }
    // A reader that waits for more data would send a keepalive request after a while.
    let log = sshd.log();
    assert!(
        log.contains("Starting session") && !log.contains("keepalive@"),
        "{log}"
    );
}

#[test]
fn exec_unread_sink_does_not_block_the_other_stream() {
    let (_sshd, target) = ready("");
    let ((_stuck, stdout), (stderr_read, stderr)) = (pipe(), pipe());
    let cancel = cancel();
    let there = cancel.clone();
    let thread = spawn("exec", move || {
        let (mut stdout, mut stderr) = (sink(stdout), sink(stderr));
        let streams = Streams {
            stdout: Some(&mut stdout),
            stderr: Some(&mut stderr),
            ..Streams::default()
        };
        SshTransport.exec(
            &target,
            &sh("head -c 500000 /dev/zero; head -c 500000 /dev/zero >&2; sleep 60"),
            streams,
            &there,
        )
    })
    .unwrap();
    std::fs::File::from(stderr_read)
        .read_exact(&mut vec![0; 500_000])
        .unwrap();
    cancel.cancel(CancelCause::Requested);
    assert_eq!(thread.join().unwrap().unwrap_err().kind(), Kind::Cancelled);
}

/// Sends data through pipes in both directions at the same time, to a server with this
/// configuration. Returns the time that this took.
fn round_trip(config: &str, bytes: usize) -> Duration {
    let (_sshd, target) = ready(config);
    let (stdin, stdin_write) = pipe();
    let (stdout_read, stdout) = pipe();
    let block: Vec<u8> = (0..1_000_003u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut sent = Sha256::new();
    let writer = spawn("writer", move || {
        let mut out = std::fs::File::from(stdin_write);
        let mut left = bytes;
        while left > 0 {
            let piece = &block[..left.min(block.len())];
            out.write_all(piece).unwrap();
            sent.update(piece);
            left -= piece.len();
        }
        sent.finalize()
    })
    .unwrap();
    let reader = spawn("reader", move || {
        let (mut digest, mut buffer, mut from) = (
            Sha256::new(),
            vec![0; 1 << 16],
            std::fs::File::from(stdout_read),
        );
        loop {
            match from.read(&mut buffer).unwrap() {
                0 => return digest.finalize(),
                n => digest.update(&buffer[..n]),
            }
        }
    })
    .unwrap();
    let started = Instant::now();
    let (mut stdin, mut stdout) = (source(stdin), sink(stdout));
    let streams = Streams {
        stdin: Some(&mut stdin),
        stdout: Some(&mut stdout),
        ..Streams::default()
    };
    let exit = SshTransport
        .exec(&target, &spec("cat"), streams, &cancel())
        .unwrap();
    drop(stdout);
    assert_eq!(exit, Exit::Status(0));
    assert_eq!(writer.join().unwrap(), reader.join().unwrap());
    started.elapsed()
}

#[test]
fn exec_twenty_megabytes_both_ways() {
    round_trip("", 20_000_000);
}

#[test]
fn exec_survives_rekeying_by_the_server() {
    // The bug that this test guards against appeared in about every second run.
    for _ in 0..3 {
        round_trip("RekeyLimit 1M", 20_000_000);
    }
}

#[test]
fn exec_terminal_gets_its_size_and_resizes() {
    // The terminal is tested with and without input.
    for has_stdin in [true, false] {
        resized(has_stdin);
    }
}

fn resized(has_stdin: bool) {
    let (_sshd, target) = ready("");
    let (sender, mut controls) = control_queue().unwrap();
    let (stdout_read, stdout) = pipe();
    let size = |rows, cols| PtySize { rows, cols };
    let script =
        "echo $TERM; trap 'stty size; exit 6' WINCH; stty size; while :; do sleep 0.05; done";
    let pty = Some(Pty {
        size: size(24, 80),
        term: "xterm-256color".into(),
    });
    let spec = ExecSpec { pty, ..sh(script) };
    let thread = spawn("exec", move || {
        let (stdin, _writer) = pipe();
        let (mut stdin, mut stdout) = (source(stdin), sink(stdout));
        let streams = Streams {
            stdout: Some(&mut stdout),
            controls: Some(&mut controls),
            ..Streams::default()
        };
        let stdin = has_stdin.then_some(&mut stdin as &mut dyn crate::guest::Source);
        SshTransport.exec(&target, &spec, Streams { stdin, ..streams }, &cancel())
    })
    .unwrap();
    let mut out = std::fs::File::from(stdout_read);
    let first = "xterm-256color\r\n24 80\r\n";
    let mut got = vec![0; first.len()];
    out.read_exact(&mut got).unwrap();
    assert_eq!(String::from_utf8(got).unwrap(), first);
    sender.send(Control::Resize(size(50, 132))).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!(
        (rest.as_str(), thread.join().unwrap().unwrap()),
        ("50 132\r\n", Exit::Status(6))
    );
}

#[test]
fn exec_signals_reach_the_command_by_name() {
    let (_sshd, target) = ready("");
    let traps = "trap 'echo one' USR1; trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done";
    for (script, signals, wanted) in [
        (traps, &["USR1", "INT"][..], Exit::Status(9)),
        ("echo ready; exec sleep 60", &["TERM"], Exit::Status(143)),
    ] {
        let (sender, mut controls) = control_queue().unwrap();
        let target = target.clone();
        let (_stdout, thread) = begin(move |mut stdout| {
            let streams = Streams {
                stdout: Some(&mut stdout),
                controls: Some(&mut controls),
                ..Streams::default()
            };
            SshTransport.exec(&target, &sh(script), streams, &cancel())
        });
        for signal in signals {
            sender.send(Control::Signal((*signal).to_owned())).unwrap();
        }
        assert_eq!(thread.join().unwrap().unwrap(), wanted);
    }
}

/// After the command has ended, a background program keeps its output open. One signal ends the
/// wait for the output without waiting for the next keepalive.
#[test]
fn exec_signal_after_the_command_ended_ends_the_wait_for_output() {
    let (_sshd, target) = ready("");
    // sshd reports the exit status when it reaps the shell. It forwards the later output only after
    // that.
    let script = "p=$$; (while kill -0 $p; do sleep 0.02; done 2> /dev/null; echo late; exec sleep 20) & exit 3";
    let (sender, mut controls) = control_queue().unwrap();
    let (_stdout, thread) = begin(move |mut stdout| {
        let streams = Streams {
            stdout: Some(&mut stdout),
            controls: Some(&mut controls),
            ..Streams::default()
        };
        let spec = ExecSpec {
            deadline: Some(Instant::now() + Duration::from_secs(10)),
            ..spec(script)
        };
        SshTransport.exec(&target, &spec, streams, &cancel())
    });
    sender.send(Control::Signal("TERM".to_owned())).unwrap();
    assert_eq!(thread.join().unwrap().unwrap(), Exit::Status(3));
}

#[test]
fn exec_cancel_ends_every_wait_at_once() {
    let (_sshd, target) = ready("");
    // The cases are an idle command, a guest that does not read, a client that does not read, and a
    // client that does not write.
    for (script, feeds) in [
        ("sleep 60", false),
        ("sleep 60", true),
        ("yes", false),
        ("cat", false),
    ] {
        let cancel = cancel();
        let (there, target) = (cancel.clone(), target.clone());
        let (_stdout, thread) = begin(move |mut stdout| {
            let mut endless = BytesSource::new(vec![0; 16 << 20]);
            let (silent, _writer) = pipe();
            let mut silent = source(silent);
            let stdin: &mut dyn crate::guest::Source =
                if feeds { &mut endless } else { &mut silent };
            let streams = Streams {
                stdin: Some(stdin),
                stdout: Some(&mut stdout),
                ..Streams::default()
            };
            SshTransport.exec(&target, &sh(&format!("echo; {script}")), streams, &there)
        });
        let started = Instant::now();
        cancel.cancel(CancelCause::VmStopped);
        let e = thread.join().unwrap().unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (Kind::Cancelled, "cancelled: the VM was stopped")
        );
        assert!(
            started.elapsed() < SOON,
            "{script}: {:?}",
            started.elapsed()
        );
    }
}

#[test]
fn exec_is_idle_only_if_no_byte_moves() {
    let (_sshd, target) = ready("");
    let idle = |script: &str, ms| ExecSpec {
        idle: Some(Duration::from_millis(ms)),
        ..sh(script)
    };
    let steps = idle("for i in 1 2 3 4 5 6 7 8; do echo; sleep 0.2; done", 1000);
    assert_eq!(run(&target, &steps, b"").unwrap().0, Exit::Status(0));
    let e = run(&target, &idle("echo; sleep 60", 300), b"").unwrap_err();
    assert_eq!(e.kind(), Kind::TransferIdle);
    let deadline = ExecSpec {
        deadline: Some(Instant::now() + Duration::from_secs(1)),
        ..sh("sleep 60")
    };
    assert_eq!(
        run(&target, &deadline, b"").unwrap_err().kind(),
        Kind::Timeout
    );
}

#[test]
fn exec_changed_host_key_is_refused_before_authentication() {
    let (sshd, target) = ready("LogLevel DEBUG1");
    let logins = || sshd.log().matches("Accepted publickey").count();
    let before = logins();
    let other = Target {
        host_key: Sshd::prepare("").target().host_key,
        ..target
    };
    for result in [
        run(&other, &sh("exit 0"), b"").map(drop),
        SshTransport.wait_ready(&other, later(), &cancel()),
    ] {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), Kind::HostKeyMismatch);
        assert!(e.hint_text().unwrap().contains("fcctl restart"));
    }
    assert_eq!(logins(), before);
}

#[test]
fn exec_unauthorized_key_is_unavailable() {
    let (_sshd, target) = ready("");
    let other = Target {
        private_key: Sshd::prepare("").target().private_key,
        ..target
    };
    let is_told =
        |e: Error| e.kind() == Kind::GuestUnavailable && e.to_string().contains("refuses our key");
    assert!(is_told(run(&other, &sh("exit 0"), b"").unwrap_err()));
    assert!(is_told(
        SshTransport
            .wait_ready(&other, later(), &cancel())
            .unwrap_err()
    ));
}

/// Starts a server that accepts every connection and runs `serve` with it. Returns a target with
/// the server's address.
fn listener(serve: impl Fn(std::net::TcpStream) + Send + 'static) -> Target {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    // This thread ends with the process.
    spawn("listener", move || {
        listener.incoming().for_each(|c| serve(c.unwrap()))
    })
    .unwrap();
    Target {
        addr,
        ..Sshd::prepare("").target()
    }
}

#[test]
fn exec_silent_or_flooding_server_costs_bounded_time() {
    let silent = listener(std::mem::forget);
    let flood = listener(|mut c| {
        let _ = spawn(
            "flood",
            move || while c.write_all(&[b'x'; 65536]).is_ok() {},
        );
    });
    let gone = listener(drop);
    for target in [silent, flood, gone] {
        let cancel = cancel();
        let at = Instant::now() + Duration::from_millis(700);
        let e = SshTransport.wait_ready(&target, at, &cancel).unwrap_err();
        assert_eq!(e.kind(), Kind::BootTimeout, "{e}");
        let spec = ExecSpec {
            deadline: Some(Instant::now() + Duration::from_millis(300)),
            ..sh("exit 0")
        };
        let e = run(&target, &spec, b"").unwrap_err();
        assert!(
            matches!(e.kind(), Kind::Timeout | Kind::GuestUnavailable),
            "{e}"
        );
        let there = cancel.clone();
        let thread = spawn("wait", move || {
            SshTransport.wait_ready(&target, later(), &there)
        })
        .unwrap();
        let started = Instant::now();
        cancel.cancel(CancelCause::VmStopped);
        assert_eq!(thread.join().unwrap().unwrap_err().kind(), Kind::Cancelled);
        assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    }
}

#[test]
fn wait_ready_finds_a_guest_that_comes_up_late() {
    let mut sshd = Sshd::prepare("");
    let target = sshd.target();
    let mute = TcpListener::bind(target.addr).unwrap();
    let there = target.clone();
    let thread = spawn("wait", move || {
        SshTransport.wait_ready(&there, later(), &cancel())
    })
    .unwrap();
    // Until sshd runs, the listener behaves like QEMU's user-mode networking: it accepts the
    // connection and never answers.
    let kept = mute.accept().unwrap();
    drop(mute);
    sshd.launch();
    thread.join().unwrap().unwrap();
    drop(kept);
}

#[test]
fn exec_hang_up_ends_the_call_and_the_command() {
    let (_sshd, target) = ready("");
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = format!(
        "exec 2>/dev/null; trap 'echo hup > {}; exit' HUP; echo ready; while :; do sleep 0.05; done",
        fifo.display()
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_stdout, thread) = begin(move |mut stdout| {
        let streams = Streams {
            stdout: Some(&mut stdout),
            hangup: Some(ours.as_fd()),
            ..Streams::default()
        };
        SshTransport.exec(&target, &sh(&script), streams, &cancel())
    });
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(!thread.is_finished(), "a half-close is not a hang-up");
    drop(theirs);
    let e = thread.join().unwrap().unwrap_err();
    assert_eq!(
        (e.kind(), e.to_string().as_str()),
        (Kind::Cancelled, "cancelled: the caller hung up")
    );
    assert_eq!(std::fs::read_to_string(&fifo).unwrap(), "hup\n");
}

#[test]
fn exec_broken_stream_never_looks_like_its_end() {
    let (_sshd, target) = ready("");
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("complete");
    let script = format!("echo $$; cat; : > {}", marker.display());
    let (stdin, stdin_write) = pipe();
    let (r, w) = pipe();
    let thread = spawn("exec", move || {
        let (mut stdin, mut stdout) = (ChunkSource::new(source(stdin), Arc::default()), sink(w));
        let streams = Streams {
            stdin: Some(&mut stdin),
            stdout: Some(&mut stdout),
            ..Streams::default()
        };
        SshTransport.exec(&target, &sh(&script), streams, &cancel())
    })
    .unwrap();
    let mut stdin = std::fs::File::from(stdin_write);
    stdin.write_all(b"\0\0\0\x05hello").unwrap();
    let mut lines = BufReader::new(std::fs::File::from(r));
    let mut pid = String::new();
    lines.read_line(&mut pid).unwrap();
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    drop(stdin);
    assert_eq!(
        thread.join().unwrap().unwrap_err().kind(),
        Kind::StreamIncomplete
    );
    let mut fds = [nix::poll::PollFd::new(
        pidfd.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(
        nix::poll::poll(&mut fds, 10_000u16),
        Ok(1),
        "the command ends"
    );
    assert!(!marker.exists());
}

#[test]
fn exec_unread_output_is_dropped() {
    let (_sshd, target) = ready("");
    let (r, w) = pipe();
    let mut stdout = sink(w);
    drop(r);
    let streams = Streams {
        stdout: Some(&mut stdout),
        ..Streams::default()
    };
    assert_eq!(
        SshTransport
            .exec(&target, &sh("seq 300000; exit 4"), streams, &cancel())
            .unwrap(),
        Exit::Status(4)
    );
}

#[test]
#[ignore = "a measurement: cargo test --release -- --ignored"]
fn throughput() {
    let took = round_trip("", 1 << 30);
    println!("1 GiB there and back at once: {took:?}");
}
