//! Tests with helpers that a hostile guest controls. Any misbehavior of a helper must soon become
//! an error of its own session.

use super::protocol::{Failure, Reply, TO_HELPER_BYTES_MAX};
use super::session::Session;
use crate::api::exec::Exit;
use crate::error::{Error, Kind};
use crate::guest::io::{BytesSource, VecSink};
use crate::guest::wait::Wait;
use crate::guest::{Control, ExecSpec, Streams, Target, control_queue};
use crate::host::confine::{self, Channel};
use crate::locks::{Cancel, CancelCause};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

pub const NAME: &str = "hostile";

/// Runs a helper that does what the command says. It is not confined, because the daemon must
/// behave the same without confinement.
pub fn run() -> ExitCode {
    let channel = Channel::inherited();
    let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
    wait_for_message(&channel);
    let Ok(received) = channel.receive_with_fds(&mut buffer) else {
        return ExitCode::FAILURE;
    };
    let job = super::protocol::Job::decode(&buffer[..received.len]).expect("a job");
    let command = job.command.expect("a command").line;
    let say = |reply: Reply| channel.send(&reply.encode(), &[]).expect("say something");
    match command.as_slice() {
        b"die" => return ExitCode::SUCCESS,
        b"garbage" => channel.send(&[0xff; 100], &[]).expect("say something"),
        b"too much" => channel.send(&[1; 60_000], &[]).expect("say something"),
        b"exit before the start" => say(Reply::Exited(Exit::Status(0))),
        b"start twice" => [
            Reply::Started,
            Reply::Started,
            Reply::Exited(Exit::Status(0)),
        ]
        .into_iter()
        .for_each(say),
        b"die after the start" => {
            say(Reply::Started);
            return ExitCode::SUCCESS;
        }
        b"escape" => say(Reply::Failed(Failure::Lost, "\x1b[31mred\u{202e}".into())),
        b"keep everything after the end" => [Reply::Started, Reply::Exited(Exit::Status(3))]
            .into_iter()
            .for_each(say),
        b"pass a descriptor" => channel
            .send(&Reply::Started.encode(), &[channel.fd()])
            .expect("say something"),
        b"never end" => say(Reply::Started),
        other => panic!("unknown command {:?}", String::from_utf8_lossy(other)),
    }
    // Keep running with every received descriptor open.
    loop {
        let _ = poll(&mut [], PollTimeout::NONE);
    }
}

fn wait_for_message(channel: &Channel) {
    let _ = poll(
        &mut [PollFd::new(channel.fd(), PollFlags::POLLIN)],
        PollTimeout::NONE,
    );
}

struct Stage {
    _listener: TcpListener,
    target: Target,
    cancel: Cancel,
}

fn stage() -> Stage {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let target = Target {
        addr,
        user: "root".into(),
        private_key: String::new(),
        host_key: Vec::new(),
        owner: None,
    };
    Stage {
        _listener: listener,
        target,
        cancel: Cancel::try_new().unwrap(),
    }
}

fn spec(command: &str) -> ExecSpec {
    ExecSpec {
        command: command.into(),
        deadline: Some(Instant::now() + Duration::from_secs(30)),
        ..ExecSpec::default()
    }
}

impl Stage {
    fn exec(&self, spec: &ExecSpec, streams: Streams<'_>) -> Result<Exit, Error> {
        let helper = confine::spawn(NAME, None).unwrap();
        let wait = Wait::new(&self.cancel)
            .deadline(spec.deadline)
            .hangup(streams.hangup);
        Session::start_with(helper, &self.target, spec, streams, wait)?.run()
    }
}

#[track_caller]
fn check(command: &str, wanted: &str) {
    let (mut stdin, mut stdout) = (BytesSource::new(vec![0; 1 << 20]), VecSink::new(100));
    let streams = Streams {
        stdin: Some(&mut stdin),
        stdout: Some(&mut stdout),
        ..Streams::default()
    };
    let e = stage().exec(&spec(command), streams).unwrap_err();
    assert_eq!(
        (e.kind(), e.to_string().as_str()),
        (Kind::GuestLost, wanted),
        "{command}"
    );
}

#[test]
fn helper_that_breaks_the_protocol_is_guest_lost() {
    let nonsense = "the connection to the guest broke: its helper process sent an invalid reply";
    for command in [
        "garbage",
        "too much",
        "exit before the start",
        "start twice",
    ] {
        check(command, nonsense);
    }
    check(
        "escape",
        "the connection to the guest broke: \\u{1b}[31mred\\u{202e}",
    );
}

#[test]
fn helper_that_dies_is_guest_lost_with_the_cause() {
    let died = "the connection to the guest broke: the helper process that speaks SSH with it failed (exit status 0)";
    check("die", died);
    check("die after the start", died);
}

#[test]
fn helper_that_keeps_its_pipes_open_does_not_delay_the_end() {
    let (mut stdin, mut stdout) = (BytesSource::new(""), VecSink::new(100));
    let streams = Streams {
        stdin: Some(&mut stdin),
        stdout: Some(&mut stdout),
        ..Streams::default()
    };
    assert_eq!(
        stage()
            .exec(&spec("keep everything after the end"), streams)
            .unwrap(),
        Exit::Status(3)
    );
}

#[test]
fn helper_that_never_ends_is_ended_by_every_limit() {
    for command in ["never end", "pass a descriptor"] {
        let soon = ExecSpec {
            deadline: Some(Instant::now() + Duration::from_millis(100)),
            ..spec(command)
        };
        assert_eq!(
            stage().exec(&soon, Streams::default()).unwrap_err().kind(),
            Kind::Timeout
        );
        let idle = ExecSpec {
            idle: Some(Duration::from_millis(100)),
            ..spec(command)
        };
        let mut stdin = BytesSource::new(vec![0; 1 << 20]);
        let streams = Streams {
            stdin: Some(&mut stdin),
            ..Streams::default()
        };
        assert_eq!(
            stage().exec(&idle, streams).unwrap_err().kind(),
            Kind::TransferIdle
        );
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let streams = Streams {
            hangup: Some(ours.as_fd()),
            ..Streams::default()
        };
        assert_eq!(
            stage().exec(&spec(command), streams).unwrap_err().kind(),
            Kind::Cancelled
        );
        let cancelled = stage();
        cancelled.cancel.cancel(CancelCause::VmStopped);
        let e = cancelled
            .exec(&spec(command), Streams::default())
            .unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (Kind::Cancelled, "cancelled: the VM was stopped")
        );
    }
}

#[test]
fn helper_that_reads_no_orders_has_a_bounded_queue() {
    let (sender, mut controls) = control_queue().unwrap();
    let feeder = crate::host::thread::spawn("feeder", move || {
        let mut sent = 0u32;
        // The loop ends when the command ends and closes the queue.
        loop {
            match sender.send(Control::Signal("USR1".into())) {
                Ok(()) => sent += 1,
                Err(e) if e.kind() == Kind::Busy => std::thread::yield_now(),
                Err(_) => return sent,
            }
        }
    })
    .unwrap();
    let spec = ExecSpec {
        deadline: Some(Instant::now() + Duration::from_millis(500)),
        ..spec("never end")
    };
    let streams = Streams {
        controls: Some(&mut controls),
        ..Streams::default()
    };
    assert_eq!(
        stage().exec(&spec, streams).unwrap_err().kind(),
        Kind::Timeout
    );
    drop(controls);
    // At most a full socket buffer and a full queue of orders can be sent to the helper.
    assert!(feeder.join().unwrap() < 100_000);
}
