//! The helper's side: drops its privileges, takes one job, speaks SSH for the job, and exits.

use super::protocol::{
    FROM_HELPER_BYTES_MAX, Failure, Input, Job, Order, Reply, TO_HELPER_BYTES_MAX,
};
use crate::error::Kind;
use crate::guest::io::{FdSink, FdSource};
use crate::guest::ssh::{Identity, LogInError, Pump, log_in, start};
use crate::guest::wait::Wait;
use crate::guest::{Control, Controls, Sink, Source, Streams};
use crate::host::confine::{Allowed, Asked, Call, Channel, Profile};
use crate::host::wait::poll_until;
use crate::locks::Cancel;
use nix::poll::{PollFd, PollFlags};
use std::io;
use std::net::TcpStream;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The memory limit of a helper. A session's buffers and libssh2's window take 3 MiB. If output
/// arrives in small messages, libssh2 needs several times the size of the output.
const MEMORY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// The limit of a helper's open files. It is enough for the standard streams, the socket, three
/// passed streams, an eventfd, and file descriptors that are received before an earlier one is
/// closed.
const OPEN_FILES_MAX: u64 = 16;

const PROFILE: Profile = Profile {
    memory_bytes_max: MEMORY_BYTES_MAX,
    open_files_max: OPEN_FILES_MAX,
    has_threads: false,
    has_network: false,
    readable: &[],
    file_bytes_max: 0,
    calls: &[Call(libc::SYS_eventfd2, Allowed::Always)],
};

/// Runs this process as the helper of one session.
pub fn run(asked: &Asked) -> ExitCode {
    let channel = Arc::new(Channel::inherited());
    if let Err(e) = asked.confine(&PROFILE) {
        let _ = say(
            &channel,
            &Reply::Failed(Failure::Confinement, e.to_string()),
        );
        return ExitCode::FAILURE;
    }
    match serve(&channel) {
        Ok(reply) => say(&channel, &reply).map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS),
        Err(NoReply) => ExitCode::FAILURE,
    }
}

/// The reason why no reply is sent: the daemon no longer waits for one, or it sent something that
/// is not a job.
struct NoReply;

impl From<io::Error> for NoReply {
    fn from(_: io::Error) -> Self {
        NoReply
    }
}

fn serve(channel: &Arc<Channel>) -> Result<Reply, NoReply> {
    let (job, mut fds) = receive_job(channel)?;
    let cancel = Cancel::try_new()?;
    // The daemon enforces the deadlines by killing this process.
    let wait = Wait::new(&cancel);
    let socket = TcpStream::from(fds.next().ok_or(NoReply)?);
    let who = Identity {
        user: &job.user,
        private_key: &job.private_key,
        host_key: &job.host_key,
    };
    let shared = match log_in(socket, &who, &wait) {
        Ok(shared) => shared,
        Err(e) => return failed(e),
    };
    let Some(command) = &job.command else {
        return Ok(Reply::Started);
    };
    let ended = Arc::new(AtomicBool::new(command.stdin == Input::Direct));
    let mut next = |is_there: bool| {
        if is_there {
            fds.next().ok_or(NoReply).map(Some)
        } else {
            Ok(None)
        }
    };
    let mut stdin = next(command.stdin != Input::Empty)?.map(|fd| PipeSource {
        inner: FdSource::new(fd),
        ended: ended.clone(),
    });
    let mut stdout = next(command.has_stdout)?.map(FdSink::new);
    let mut stderr = next(command.has_stderr)?.map(FdSink::new);
    let mut controls = Orders {
        channel: channel.clone(),
        ended,
    };
    let channel_to_command = match start(&shared, command.pty.as_ref(), &command.line, &wait) {
        Ok(started) => started,
        Err(e) => return failed(e),
    };
    say(channel, &Reply::Started)?;
    let streams = Streams {
        stdin: stdin.as_mut().map(|s| s as &mut dyn Source),
        stdout: stdout.as_mut().map(|s| s as &mut dyn Sink),
        stderr: stderr.as_mut().map(|s| s as &mut dyn Sink),
        controls: Some(&mut controls),
        hangup: None,
    };
    let pump = Pump::new(
        shared,
        channel_to_command,
        command.pty.is_some(),
        streams,
        wait,
    );
    match pump.no_wait_children(command.no_wait_children).run() {
        Ok(exit) => Ok(Reply::Exited(exit)),
        Err(e) => match e.kind() {
            Kind::GuestLost => Ok(Reply::Failed(Failure::Lost, e.message().to_owned())),
            Kind::Cancelled => Err(NoReply),
            _ => Ok(Reply::Failed(Failure::Stream, e.to_string())),
        },
    }
}

fn failed(e: LogInError) -> Result<Reply, NoReply> {
    Ok(match e {
        LogInError::HostKeyMismatch => Reply::Failed(Failure::HostKeyMismatch, String::new()),
        LogInError::KeyRefused(what) => Reply::Failed(Failure::KeyRefused, what),
        LogInError::Unavailable(what) => Reply::Failed(Failure::Unavailable, what),
        LogInError::Ended => return Err(NoReply),
    })
}

fn receive_job(channel: &Channel) -> Result<(Job, impl Iterator<Item = OwnedFd> + use<>), NoReply> {
    let mut buffer = vec![0; TO_HELPER_BYTES_MAX];
    wait_for(channel, PollFlags::POLLIN);
    let received = channel.receive_with_fds(&mut buffer)?;
    let job = Job::decode(&buffer[..received.len]).ok_or(NoReply)?;
    Ok((job, received.fds.into_iter()))
}

/// Waits until the channel is ready. No deadline is needed, because this process is killed when the
/// daemon dies.
fn wait_for(channel: &Channel, events: PollFlags) {
    let _ = poll_until(&mut [PollFd::new(channel.fd(), events)], None);
}

fn say(channel: &Channel, reply: &Reply) -> io::Result<()> {
    loop {
        match channel.send(&reply.encode(), &[]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                wait_for(channel, PollFlags::POLLOUT)
            }
            sent => return sent,
        }
    }
}

/// Input whose end may need the daemon's confirmation; see [`Input::Pumped`].
struct PipeSource {
    inner: FdSource,
    ended: Arc<AtomicBool>,
}

impl Source for PipeSource {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.fd()
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer)? {
            // Either the confirmation is on its way or the daemon is gone. The next round reads the
            // channel and finds out which.
            0 if !self.ended.load(Ordering::Relaxed) => Err(io::ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }
}

/// Receives the daemon's orders.
struct Orders {
    channel: Arc<Channel>,
    ended: Arc<AtomicBool>,
}

impl Controls for Orders {
    fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
    fn next(&mut self) -> Option<Control> {
        let mut buffer = [0; FROM_HELPER_BYTES_MAX];
        loop {
            let order = match self.channel.receive(&mut buffer) {
                Ok(len) => Order::decode(&buffer[..len]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return None,
                Err(_) => None,
            };
            match order {
                Some(Order::Resize(size)) => return Some(Control::Resize(size)),
                Some(Order::Signal(name)) => return Some(Control::Signal(name)),
                Some(Order::InputEnded) => self.ended.store(true, Ordering::Relaxed),
                Some(Order::HangUp) => return Some(Control::HangUp),
                // The daemon is gone. The input so far must not be taken for the whole input.
                None => std::process::exit(1),
            }
        }
    }
}
