//! Runs host commands whose output is too large to keep in memory. A closure receives it in pieces.

use super::command::{self, Command, Output};
use super::wait::{is_readable, poll_until, set_nonblocking};
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ChildStdout};
use std::time::Duration;

const PIECE_BYTES: usize = 256 * 1024;
/// How much of stderr is kept.
const STDERR_BYTES_MAX: usize = 64 * 1024;
const TICK: Duration = Duration::from_millis(50);

/// Runs a command to its end and passes all of its stdout to `on_stdout`, whose error ends the
/// command. `Output::stdout` is empty and `Output::stderr` holds the first 64 KiB.
///
/// # Errors
/// `command_missing`, `cancelled`, `timeout`, `host`, or the closure's error.
pub fn run_piped(
    command: &Command,
    cancel: &Cancel,
    on_stdout: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Output> {
    let _blocking = region(Rank::HostCmd);
    let mut child = command::start(command)?;
    let pid = Pid::from_raw(child.id() as i32);
    let result = pump_output(command, &mut child, cancel, on_stdout);
    if result.is_err() {
        let _ = killpg(pid, Signal::SIGKILL);
        let _ = child.wait();
    }
    result
}

struct Streams {
    out: Option<ChildStdout>,
    err: Option<ChildStderr>,
    kept: Vec<u8>,
    buffer: Vec<u8>,
}

impl Streams {
    fn take(&mut self, on_stdout: &mut dyn FnMut(&[u8]) -> Result<()>, doing: &str) -> Result<()> {
        if let Some(pipe) = self.out.as_mut().filter(|p| is_readable(&**p)) {
            let n = pipe
                .read(&mut self.buffer)
                .map_err(|e| Error::io(doing, e))?;
            if n == 0 {
                self.out = None;
            } else {
                on_stdout(&self.buffer[..n])?;
            }
        }
        if let Some(pipe) = self.err.as_mut().filter(|p| is_readable(&**p)) {
            let n = pipe
                .read(&mut self.buffer)
                .map_err(|e| Error::io(doing, e))?;
            if n == 0 {
                self.err = None;
            }
            let room = STDERR_BYTES_MAX.saturating_sub(self.kept.len());
            self.kept.extend_from_slice(&self.buffer[..n.min(room)]);
        }
        Ok(())
    }
}

fn pump_output(
    command: &Command,
    child: &mut Child,
    cancel: &Cancel,
    on_stdout: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Output> {
    let doing = format!("run {}", command.program.to_string_lossy());
    let deadline = Instant::now() + command.deadline;
    let mut input = child.stdin.take().map(|pipe| (pipe, 0usize));
    if let Some((pipe, _)) = &input {
        set_nonblocking(pipe).map_err(|e| Error::io(&doing, e))?;
    }
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let mut streams = Streams {
        out,
        err,
        kept: Vec::new(),
        buffer: vec![0; PIECE_BYTES],
    };
    loop {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("{doing}: cancelled: {cause}"),
            ));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(
                Kind::Timeout,
                format!(
                    "{doing}: not finished after {} s",
                    command.deadline.as_secs()
                ),
            ));
        }
        if streams.out.is_none()
            && streams.err.is_none()
            && let Some(status) = child.try_wait().map_err(|e| Error::io(&doing, e))?
        {
            let code = status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            return Ok(Output {
                status: code,
                stdout: Vec::new(),
                stderr: streams.kept,
            });
        }
        let mut fds = vec![PollFd::new(cancel.fd(), PollFlags::POLLIN)];
        fds.extend(
            streams
                .out
                .as_ref()
                .map(|p| PollFd::new(p.as_fd(), PollFlags::POLLIN)),
        );
        fds.extend(
            streams
                .err
                .as_ref()
                .map(|p| PollFd::new(p.as_fd(), PollFlags::POLLIN)),
        );
        fds.extend(
            input
                .as_ref()
                .map(|(p, _)| PollFd::new(p.as_fd(), PollFlags::POLLOUT)),
        );
        // Once both streams are closed, the command is about to exit, but no descriptor here
        // reports the exit. Poll more often then.
        let tick = if fds.len() == 1 {
            Duration::from_millis(1)
        } else {
            TICK
        };
        poll_until(&mut fds, Some(Instant::now() + left.min(tick)))
            .map_err(|e| Error::io(&doing, e))?;
        command::feed(&mut input, &command.stdin).map_err(|e| Error::io(&doing, e))?;
        streams.take(on_stdout, &doing)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_output_arrives_completely_and_in_order() {
        let c = Command::new("sh").args(["-c", "seq 1 400000; echo oops >&2; exit 3"]);
        let mut seen = Vec::new();
        let out = run_piped(&c, &Cancel::try_new().unwrap(), &mut |b| {
            seen.extend_from_slice(b);
            Ok(())
        })
        .unwrap();
        assert_eq!((out.status, out.stderr.as_slice()), (3, &b"oops\n"[..]));
        let text = String::from_utf8(seen).unwrap();
        assert!(text.len() > 2 * 1024 * 1024);
        assert!(
            text.lines()
                .enumerate()
                .all(|(i, l)| l == (i + 1).to_string())
        );
    }

    #[test]
    fn closure_error_ends_the_command() {
        let c = Command::new("yes");
        let e = run_piped(&c, &Cancel::try_new().unwrap(), &mut |_| {
            Err(Error::internal("enough"))
        })
        .unwrap_err();
        assert_eq!(e.message(), "enough");
    }
}
