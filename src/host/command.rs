//! Host commands: an argv, a cleared environment, a deadline, a cancel token, bounded output.

use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Rank, region};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Most of a command's output that is kept, for each of the two streams; the rest is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 1024 * 1024;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// Between a look at the child and the next, where its pipes stay open without it.
const TICK: Duration = Duration::from_millis(50);

/// One host command. Arguments go as an array; no shell is between.
#[derive(Debug, Clone)]
pub struct Command {
    pub program: OsString,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: Option<PathBuf>,
    /// uid and gid to drop to.
    pub credentials: Option<(u32, u32)>,
    pub stdin: Vec<u8>,
    pub deadline: Duration,
}

/// What a command left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    pub status: i32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Command {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: vec![("PATH".into(), PATH.into()), ("LC_ALL".into(), "C.UTF-8".into())],
            cwd: None,
            credentials: None,
            stdin: Vec::new(),
            deadline: DEFAULT_DEADLINE,
        }
    }
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }
    #[must_use]
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
    fn shown(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }
}

/// The seam: tests put a fake here.
pub trait Commands: Send + Sync {
    /// Runs to the end. An exit status other than 0 is an error that carries the end of stderr.
    /// `on_line` sees each line of either stream as it comes.
    fn run(&self, command: &Command, cancel: &Cancel, on_line: &mut dyn FnMut(&str)) -> Result<Output>;
}

pub struct HostCommands;

impl Commands for HostCommands {
    fn run(&self, command: &Command, cancel: &Cancel, on_line: &mut dyn FnMut(&str)) -> Result<Output> {
        let _blocking = region(Rank::HostCmd);
        let output = run_any_status(command, cancel, on_line)?;
        if output.status == 0 {
            return Ok(output);
        }
        let tail = last_lines(&output.stderr);
        Err(Error::new(Kind::CommandFailed, format!("{} failed with status {}: {tail}", command.shown(), output.status)))
    }
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(3)..].join("; ").escape_debug().to_string()
}

/// Runs to the end whatever the status: 128+n where signal n killed it.
pub fn run_any_status(command: &Command, cancel: &Cancel, on_line: &mut dyn FnMut(&str)) -> Result<Output> {
    let mut child = start(command)?;
    let pid = Pid::from_raw(child.id() as i32);
    let result = attend(command, &mut child, cancel, on_line);
    if result.is_err() {
        let _ = killpg(pid, Signal::SIGKILL);
        let _ = child.wait();
    }
    result
}

#[allow(clippy::disallowed_methods)] // The one place.
pub(super) fn start(command: &Command) -> Result<std::process::Child> {
    let mut c = std::process::Command::new(&command.program);
    c.args(&command.args).env_clear().envs(command.env.iter().cloned()).process_group(0);
    c.stdin(if command.stdin.is_empty() { Stdio::null() } else { Stdio::piped() });
    c.stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(dir) = &command.cwd {
        c.current_dir(dir);
    }
    if let Some((uid, gid)) = command.credentials {
        c.uid(uid).gid(gid);
    }
    c.spawn().map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            Error::new(Kind::CommandMissing, format!("{} is not installed", command.shown())).hint("run fcctl doctor")
        } else {
            Error::io(format!("run {}", command.shown()), e)
        }
    })
}

struct Stream {
    fd: Option<OwnedFd>,
    kept: Vec<u8>,
    line: Vec<u8>,
}

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        Self { fd: Some(fd), kept: Vec::new(), line: Vec::new() }
    }
    fn take(&mut self, on_line: &mut dyn FnMut(&str)) -> std::io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let mut buffer = [0u8; 16 * 1024];
        let n = nix::unistd::read(fd, &mut buffer)?;
        if n == 0 {
            self.fd = None;
        }
        let room = OUTPUT_BYTES_MAX.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&buffer[..n.min(room)]);
        for &byte in &buffer[..n] {
            if byte == b'\n' || self.line.len() >= 4096 {
                on_line(&String::from_utf8_lossy(&self.line));
                self.line.clear();
            }
            if byte != b'\n' {
                self.line.push(byte);
            }
        }
        if n == 0 && !self.line.is_empty() {
            on_line(&String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
        Ok(())
    }
}

fn attend(command: &Command, child: &mut std::process::Child, cancel: &Cancel, on_line: &mut dyn FnMut(&str)) -> Result<Output> {
    let doing = || format!("run {}", command.shown());
    let deadline = Instant::now() + command.deadline;
    let mut input = child.stdin.take().map(|pipe| (pipe, 0usize));
    if let Some((pipe, _)) = &input {
        set_nonblocking(pipe).map_err(|e| Error::io(doing(), e))?;
    }
    let mut streams =
        [Stream::new(child.stdout.take().expect("piped").into()), Stream::new(child.stderr.take().expect("piped").into())];
    loop {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(Kind::Cancelled, format!("{}: cancelled: {cause}", doing())));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(Kind::Timeout, format!("{}: not finished after {} s", doing(), command.deadline.as_secs())));
        }
        if streams.iter().all(|s| s.fd.is_none())
            && let Some(status) = child.try_wait().map_err(|e| Error::io(doing(), e))?
        {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            let [out, err] = streams;
            return Ok(Output { status: code, stdout: out.kept, stderr: err.kept });
        }
        wait_for_any(&streams, input.as_ref().map(|(p, _)| p), cancel, left.min(TICK)).map_err(|e| Error::io(doing(), e))?;
        feed(&mut input, &command.stdin).map_err(|e| Error::io(doing(), e))?;
        for stream in &mut streams {
            if stream.fd.as_ref().is_some_and(readable) {
                stream.take(on_line).map_err(|e| Error::io(doing(), e))?;
            }
        }
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

fn wait_for_any(
    streams: &[Stream; 2],
    input: Option<&std::process::ChildStdin>,
    cancel: &Cancel,
    timeout: Duration,
) -> std::io::Result<()> {
    let mut fds = vec![PollFd::new(cancel.fd(), PollFlags::POLLIN)];
    fds.extend(streams.iter().filter_map(|s| s.fd.as_ref()).map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
    fds.extend(input.map(|p| PollFd::new(p.as_fd(), PollFlags::POLLOUT)));
    match poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

pub(super) fn feed(input: &mut Option<(std::process::ChildStdin, usize)>, bytes: &[u8]) -> std::io::Result<()> {
    let Some((pipe, sent)) = input else { return Ok(()) };
    match pipe.write(&bytes[*sent..]) {
        Ok(n) => *sent += n,
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
        // The command has read what it wants.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => *sent = bytes.len(),
        Err(e) => return Err(e),
    }
    if *sent == bytes.len() {
        *input = None;
    }
    Ok(())
}

pub(super) fn set_nonblocking(fd: impl AsFd) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    Ok(())
}

/// Reads all of a small file, or as much as `max` bytes of it.
pub fn read_bounded(mut from: impl Read, max: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.by_ref().take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cancel() -> Cancel {
        Cancel::try_new().unwrap()
    }

    #[test]
    fn output_status_and_input() {
        let c = Command::new("sh").args(["-c", "cat; echo err >&2; exit 3"]).stdin("in\n");
        let mut lines = Vec::new();
        let out = run_any_status(&c, &cancel(), &mut |l| lines.push(l.to_owned())).unwrap();
        assert_eq!((out.status, out.stdout.as_slice(), out.stderr.as_slice()), (3, &b"in\n"[..], &b"err\n"[..]));
        lines.sort();
        assert_eq!(lines, ["err", "in"]);
    }

    #[test]
    fn a_cancelled_command_is_killed_with_its_children() {
        let cancel = cancel();
        let c = Command::new("sh").args(["-c", "sleep 1000 & echo $!; wait"]);
        let seen = std::cell::RefCell::new(String::new());
        let e = run_any_status(&c, &cancel, &mut |l| {
            *seen.borrow_mut() = l.to_owned();
            cancel.cancel("tired");
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled);
        let pid = Pid::from_raw(seen.borrow().parse().unwrap());
        let gone = (0..100).any(|_| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return true;
            }
            let _ = poll(&mut [], PollTimeout::from(20u8));
            false
        });
        assert!(gone);
    }

    #[test]
    fn a_missing_program_says_so() {
        let e = run_any_status(&Command::new("no-such-program"), &cancel(), &mut |_| {}).unwrap_err();
        assert_eq!(e.kind(), Kind::CommandMissing);
    }

    #[test]
    fn a_deadline_ends_it() {
        let c = Command::new("sleep").arg("1000").deadline(Duration::from_millis(50));
        assert_eq!(run_any_status(&c, &cancel(), &mut |_| {}).unwrap_err().kind(), Kind::Timeout);
    }
}
