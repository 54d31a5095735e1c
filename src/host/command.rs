//! Runs host commands to their end: a cleared environment, no shell, a deadline, a cancel token and
//! bounded output. Tests replace [`Commands`] with a fake.

use super::Credentials;
use super::text::printable;
use super::wait::{
    WaitResult, cancelled, is_readable, set_nonblocking, wait_any, wait_uncancelled,
};
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// How much of each output stream is kept. The rest is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 1024 * 1024;
/// The search path of every program that the daemon starts.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// How long to wait for more output after a command has exited. A child that it left behind may
/// keep the pipes open for ever.
const PIPES_GRACE: Duration = Duration::from_millis(200);

/// One host command. The arguments are passed as an array, without a shell.
#[derive(Debug, Clone)]
pub struct Command {
    pub program: OsString,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: Option<PathBuf>,
    /// The user and the group to run as. None means the daemon's own.
    pub credentials: Option<Credentials>,
    /// The largest file that the command may write (`RLIMIT_FSIZE`). If it writes more, the kernel
    /// kills it with SIGXFSZ.
    pub file_bytes_max: Option<u64>,
    pub stdin: Vec<u8>,
    pub deadline: Duration,
    /// The time between SIGTERM and SIGKILL on a cancel or at the deadline, for commands that have
    /// to clean up. If zero, SIGKILL is sent immediately.
    pub term_grace: Duration,
}

/// The exit status and the output of a command.
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
            env: vec![
                ("PATH".into(), PATH.into()),
                ("LC_ALL".into(), "C.UTF-8".into()),
            ],
            cwd: None,
            credentials: None,
            file_bytes_max: None,
            stdin: Vec::new(),
            deadline: DEFAULT_DEADLINE,
            term_grace: Duration::ZERO,
        }
    }
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((key.as_ref().to_owned(), value.as_ref().to_owned()));
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
    #[must_use]
    #[cfg(any(test, feature = "fakes"))]
    pub fn term_grace(mut self, grace: Duration) -> Self {
        self.term_grace = grace;
        self
    }
    #[must_use]
    pub fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.file_bytes_max = Some(bytes);
        self
    }
    fn shown(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }
}

/// The end of a failed program's stderr, as the source of an error.
#[derive(Clone, Debug)]
pub struct Complaint(pub String);

impl Complaint {
    /// Returns the text of the complaint, which is empty if the error does not come from a program.
    pub fn of(error: &Error) -> &str {
        error
            .source_as::<Self>()
            .map_or("", |complaint| &complaint.0)
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Complaint {}

/// Runs host commands. Tests use a fake instead of [`HostCommands`].
pub trait Commands: Send + Sync {
    /// Runs a command to its end and calls `on_line` for each line of either stream as it arrives.
    ///
    /// # Errors
    /// `command_failed`, with the end of stderr, if the exit status is not 0; otherwise
    /// `command_missing`, `cancelled`, `timeout` or `host`.
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output>;
}

pub struct HostCommands;

impl Commands for HostCommands {
    fn run(
        &self,
        command: &Command,
        cancel: &Cancel,
        on_line: &mut dyn FnMut(&str),
    ) -> Result<Output> {
        let output = run_any_status(command, cancel, on_line)?;
        if output.status == 0 {
            return Ok(output);
        }
        let tail = last_lines(&output.stderr);
        let message = format!("{} failed with status {}", command.shown(), output.status);
        Err(Error::new(Kind::CommandFailed, message).with_source(Complaint(tail)))
    }
}

fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<_> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    printable(&lines[lines.len().saturating_sub(3)..].join("; "))
}

/// Runs a command to its end and returns its output and its status, which need not be 0. The status
/// is 128+n if signal n killed the command. Processes that it leaves behind in its process group
/// are killed.
pub fn run_any_status(
    command: &Command,
    cancel: &Cancel,
    on_line: &mut dyn FnMut(&str),
) -> Result<Output> {
    let _blocking = region(Rank::HostCmd);
    let mut child = start(command)?;
    let group = Pid::from_raw(child.id().cast_signed());
    let result = collect_output(command, &mut child, cancel, on_line);
    if result.is_err() && !command.term_grace.is_zero() {
        let _ = killpg(group, Signal::SIGTERM);
        let _ = wait_exited(&child, command.term_grace);
    }
    // This cannot hit another group: the group's id is not reused while its leader is unreaped.
    let _ = killpg(group, Signal::SIGKILL);
    let status = child
        .wait()
        .map_err(|e| Error::io(format!("run {}", command.shown()), e))?;
    let (stdout, stderr) = result?;
    Ok(Output {
        status: status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        stdout,
        stderr,
    })
}

fn pidfd(child: &std::process::Child) -> std::io::Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    Ok(rustix::process::pidfd_open(
        pid,
        rustix::process::PidfdFlags::empty(),
    )?)
}

fn wait_exited(child: &std::process::Child, patience: Duration) -> std::io::Result<WaitResult> {
    let exited = pidfd(child)?;
    wait_uncancelled(
        &[(exited.as_fd(), PollFlags::POLLIN)],
        Instant::now() + patience,
    )
}

#[allow(clippy::disallowed_methods)] // One of the few places that may start processes.
pub(super) fn start(command: &Command) -> Result<std::process::Child> {
    crate::locks::may_block("file access");
    let mut c = std::process::Command::new(&command.program);
    c.args(&command.args)
        .env_clear()
        .envs(command.env.iter().cloned())
        .process_group(0);
    c.stdin(if command.stdin.is_empty() {
        Stdio::null()
    } else {
        Stdio::piped()
    });
    c.stdout(Stdio::piped()).stderr(Stdio::piped());
    limit(&mut c, command.file_bytes_max);
    if let Some(dir) = &command.cwd {
        c.current_dir(dir);
    }
    if let Some(Credentials { uid, gid }) = command.credentials {
        c.uid(uid).gid(gid);
    }
    c.spawn().map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound
            && command.cwd.as_ref().is_none_or(|dir| dir.is_dir())
        {
            Error::new(
                Kind::CommandMissing,
                format!("{} is not installed", command.shown()),
            )
            .hint("run fcctl doctor")
        } else {
            Error::io(format!("run {}", command.shown()), e)
        }
    })
}

/// Makes the command die with the daemon and limits the size of its files. The kernel sends the
/// death signal when the starting thread ends; that thread waits for the command, so it lives long
/// enough.
#[allow(unsafe_code)]
fn limit(command: &mut std::process::Command, file_bytes_max: Option<u64>) {
    // SAFETY: the closure runs between fork and exec; it makes async-signal-safe calls only and
    // does not allocate.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let Some(bytes) = file_bytes_max else {
                return Ok(());
            };
            let most = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: bytes,
            };
            if libc::setrlimit(libc::RLIMIT_FSIZE, &raw const most) == 0 {
                Ok(())
            } else {
                Err(std::io::Error::last_os_error())
            }
        });
    }
}

struct Stream {
    fd: Option<OwnedFd>,
    kept: Vec<u8>,
    line: Vec<u8>,
}

impl Stream {
    fn new(fd: OwnedFd) -> Self {
        Self {
            fd: Some(fd),
            kept: Vec::new(),
            line: Vec::new(),
        }
    }
    fn take(&mut self, on_line: &mut dyn FnMut(&str)) -> std::io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let mut buffer = [0u8; 16 * 1024];
        let n = match nix::unistd::read(fd, &mut buffer) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
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

/// Writes stdin, and reads stdout and stderr until the command has exited and both are complete,
/// but for at most [`PIPES_GRACE`] after the exit. Fails at the deadline and when `cancel` fires.
fn collect_output(
    command: &Command,
    child: &mut std::process::Child,
    cancel: &Cancel,
    on_line: &mut dyn FnMut(&str),
) -> Result<(Vec<u8>, Vec<u8>)> {
    let doing = || format!("run {}", command.shown());
    let io = |e: std::io::Error| Error::io(format!("run {}", command.shown()), e);
    let deadline = Instant::now() + command.deadline;
    let exited = pidfd(child).map_err(io)?;
    let mut input = child.stdin.take().map(|pipe| (pipe, 0usize));
    if let Some((pipe, _)) = &input {
        set_nonblocking(pipe).map_err(io)?;
    }
    let mut streams = [
        Stream::new(child.stdout.take().expect("piped").into()),
        Stream::new(child.stderr.take().expect("piped").into()),
    ];
    loop {
        let has_exited = is_readable(&exited);
        if has_exited && streams.iter().all(|s| s.fd.is_none()) {
            break;
        }
        let until = if has_exited {
            deadline.min(Instant::now() + PIPES_GRACE)
        } else {
            deadline
        };
        let mut fds: Vec<_> = streams
            .iter()
            .filter_map(|s| s.fd.as_ref())
            .map(|fd| (fd.as_fd(), PollFlags::POLLIN))
            .collect();
        if !has_exited {
            fds.push((exited.as_fd(), PollFlags::POLLIN));
            fds.extend(
                input
                    .as_ref()
                    .map(|(pipe, _)| (pipe.as_fd(), PollFlags::POLLOUT)),
            );
        }
        match wait_any(&fds, until, cancel).map_err(io)? {
            WaitResult::Ready => {}
            WaitResult::Cancelled => return Err(cancelled(&doing(), cancel)),
            WaitResult::Deadline if has_exited => break,
            WaitResult::Deadline => {
                return Err(Error::new(
                    Kind::Timeout,
                    format!(
                        "{}: not finished after {} s",
                        doing(),
                        command.deadline.as_secs()
                    ),
                ));
            }
        }
        feed(&mut input, &command.stdin).map_err(io)?;
        for stream in &mut streams {
            if stream.fd.as_ref().is_some_and(is_readable) {
                stream.take(on_line).map_err(io)?;
            }
        }
    }
    let [out, err] = streams;
    Ok((out.kept, err.kept))
}

pub(super) fn feed(
    input: &mut Option<(std::process::ChildStdin, usize)>,
    bytes: &[u8],
) -> std::io::Result<()> {
    let Some((pipe, sent)) = input else {
        return Ok(());
    };
    match pipe.write(&bytes[*sent..]) {
        Ok(n) => *sent += n,
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
            ) =>
        {
            return Ok(());
        }
        // The command has closed its stdin.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => *sent = bytes.len(),
        Err(e) => return Err(e),
    }
    if *sent == bytes.len() {
        *input = None;
    }
    Ok(())
}

/// Returns the path of the program that a command of this name would run, or None if there is none.
/// A name without a slash is looked up in [`Command`]'s search path.
pub fn find_program(name: &std::path::Path) -> Option<PathBuf> {
    crate::locks::may_block("file access");
    use std::os::unix::fs::PermissionsExt;
    let runs = |p: &PathBuf| {
        std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if name.as_os_str().as_encoded_bytes().contains(&b'/') {
        return Some(name.to_owned()).filter(runs);
    }
    PATH.split(':')
        .map(|dir| std::path::Path::new(dir).join(name))
        .find(runs)
}

/// Reads up to `max` bytes.
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
    fn command_reads_input_and_returns_output_and_status() {
        let c = Command::new("sh")
            .args(["-c", "cat; echo err >&2; exit 3"])
            .stdin("in\n");
        let mut lines = Vec::new();
        let out = run_any_status(&c, &cancel(), &mut |l| lines.push(l.to_owned())).unwrap();
        assert_eq!(
            (out.status, out.stdout.as_slice(), out.stderr.as_slice()),
            (3, &b"in\n"[..], &b"err\n"[..])
        );
        lines.sort();
        assert_eq!(lines, ["err", "in"]);
    }

    #[test]
    fn cancelled_command_is_killed_with_its_children() {
        let cancel = cancel();
        let c = Command::new("sh").args(["-c", "sleep 1000 & echo $!; wait"]);
        let seen = std::cell::RefCell::new(String::new());
        let e = run_any_status(&c, &cancel, &mut |l| {
            *seen.borrow_mut() = l.to_owned();
            cancel.cancel(crate::locks::CancelCause::Requested);
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled);
        assert_gone(&seen.borrow());
    }

    /// Waits until the process is gone. It is not our child, so it exists until init has reaped it.
    #[track_caller]
    fn assert_gone(pid: &str) {
        let gone = (0..500).any(|_| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return true;
            }
            super::super::wait::sleep(Duration::from_millis(20), &cancel()).unwrap();
            false
        });
        assert!(gone, "{pid} lives");
    }

    #[test]
    fn command_child_left_behind_is_killed_without_delay() {
        let c = Command::new("sh").args(["-c", "sleep 1000 & echo $!"]);
        let began = Instant::now();
        let out = run_any_status(&c, &cancel(), &mut |_| {}).unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
        assert_eq!(out.status, 0);
        assert_gone(String::from_utf8(out.stdout).unwrap().trim());
    }

    #[test]
    fn cancelled_command_with_grace_can_clean_up() {
        let dir = tempfile::tempdir().unwrap();
        let script = "trap 'echo cleaned > done; exit' TERM; echo ready; sleep 1000 & wait";
        let c = Command::new("sh")
            .args(["-c", script])
            .cwd(dir.path())
            .term_grace(Duration::from_secs(20));
        let cancel = cancel();
        let e = run_any_status(&c, &cancel, &mut |_| {
            cancel.cancel(crate::locks::CancelCause::Requested)
        })
        .unwrap_err();
        assert_eq!(e.to_string(), "run sh: cancelled: op cancel was requested");
        assert_eq!(
            std::fs::read_to_string(dir.path().join("done")).unwrap(),
            "cleaned\n"
        );
    }

    #[test]
    fn missing_program_is_command_missing() {
        let e =
            run_any_status(&Command::new("no-such-program"), &cancel(), &mut |_| {}).unwrap_err();
        assert_eq!(e.kind(), Kind::CommandMissing);
    }

    #[test]
    fn command_past_its_deadline_is_ended() {
        let c = Command::new("sleep")
            .arg("1000")
            .deadline(Duration::from_millis(50));
        assert_eq!(
            run_any_status(&c, &cancel(), &mut |_| {})
                .unwrap_err()
                .kind(),
            Kind::Timeout
        );
    }
}
