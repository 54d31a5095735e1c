//! Long-lived processes such as VMMs. They outlive the daemon and are identified by more than their
//! pid ([`Identity`]). They are signalled and awaited through a pidfd only ([`Process`]).

use super::Credentials;
use super::wait::{WaitResult, is_readable, wait_any, wait_uncancelled};
use crate::error::{Error, Kind, Result};
use crate::locks::{Cancel, Mutex, Rank};
use nix::poll::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Instant;

/// Identifies a process even if its pid is reused later or the host reboots.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// The start time in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
    pub start_time: u64,
    /// The content of `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// How to start a process that outlives the daemon. It gets its own session, a cleared environment,
/// no core dumps and none of the daemon's descriptors except `output`.
#[derive(Debug)]
pub struct Spawn {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: PathBuf,
    /// Receives stdout and stderr; `/dev/null` if None.
    pub output: Option<File>,
    /// The daemon's own if None.
    pub credentials: Option<Credentials>,
    /// The supplementary groups that go with `credentials`; all others are dropped.
    pub groups: Vec<u32>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Status(i32),
    Signal(i32),
    /// The process was not a child of this daemon, so its exit status is not available.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "exit status {status}"),
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "signal {signal} ({name})"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Exit::Unknown => f.write_str("unknown exit status (it was started by an earlier fcd)"),
        }
    }
}

/// Our children by start time and pid; `None` until they are reaped. The first thread that sees a
/// child exit reaps it and records its exit here for the others.
static CHILDREN: Mutex<BTreeMap<(u64, u32), Option<Exit>>> =
    Mutex::new(Rank::Consoles, BTreeMap::new());
/// How many exits are remembered. The oldest is dropped first.
const EXITS_MAX: usize = 4096;

/// A process held by its pidfd. It may exit, but the descriptor never refers to another process.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    fd: OwnedFd,
}

impl Process {
    /// Opens a process. None if it has been reaped, its pid belongs to another process, or the host
    /// has rebooted.
    pub fn open(identity: &Identity) -> Result<Option<Self>> {
        let doing = || format!("open process {}", identity.pid);
        if identity.boot_id != boot_id()? {
            return Ok(None);
        }
        let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(Error::io(doing(), e)),
        };
        // Compare the start time after opening the pidfd: if the pid had been reused before, it
        // would differ.
        match read_stat(identity.pid) {
            Some(stat) if stat.start_time == identity.start_time => Ok(Some(Self {
                identity: identity.clone(),
                fd,
            })),
            _ => Ok(None),
        }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The pidfd, which is readable once the process has exited.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// False if the process has exited, even if it is not reaped yet.
    pub fn is_alive(&self) -> bool {
        !is_readable(&self.fd)
    }

    /// Sends a signal. Returns false if the process has already been reaped.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        match rustix::process::pidfd_send_signal(&self.fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(Error::io(
                format!("signal process {}", self.identity.pid),
                e,
            )),
        }
    }

    /// Waits until the process has exited and reaps it if it is our child. Returns false at the
    /// deadline.
    ///
    /// # Errors
    /// `cancelled` if the token fires first.
    pub fn wait(&self, deadline: Instant, cancel: &Cancel) -> Result<bool> {
        let doing = || format!("wait for process {} to exit", self.identity.pid);
        match wait_any(&[(self.fd(), PollFlags::POLLIN)], deadline, cancel)
            .map_err(|e| Error::io(doing(), e))?
        {
            WaitResult::Ready => {
                self.exit();
                Ok(true)
            }
            WaitResult::Deadline => Ok(false),
            WaitResult::Cancelled => Err(super::wait::cancelled(&doing(), cancel)),
        }
    }

    /// Like [`Process::wait`], but ignores cancellation. For cleaning up.
    pub fn wait_uncancelled(&self, deadline: Instant) -> Result<bool> {
        let woken = wait_uncancelled(&[(self.fd(), PollFlags::POLLIN)], deadline)
            .map_err(|e| Error::io(format!("wait for process {} to exit", self.identity.pid), e))?;
        if woken == WaitResult::Ready {
            self.exit();
        }
        Ok(woken == WaitResult::Ready)
    }

    /// How the process ended, or None while it runs. Reaps it if it is our child.
    pub fn exit(&self) -> Option<Exit> {
        let key = (self.identity.start_time, self.identity.pid);
        let mut children = CHILDREN.lock();
        match rustix::process::waitid(
            WaitId::PidFd(self.fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(None) => None,
            Ok(Some(status)) => {
                let exit = match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => Exit::Status(status),
                    (None, Some(signal)) => Exit::Signal(signal),
                    (None, None) => Exit::Unknown,
                };
                children.insert(key, Some(exit));
                if children.len() > EXITS_MAX {
                    let oldest = children
                        .iter()
                        .find(|(_, exit)| exit.is_some())
                        .map(|(key, _)| *key);
                    oldest.and_then(|key| children.remove(&key));
                }
                Some(exit)
            }
            // It is not our child, or it has been reaped already; see `pidfd_info`.
            Err(_) if self.is_alive() => None,
            Err(_) => Some(
                children
                    .get(&key)
                    .copied()
                    .flatten()
                    .unwrap_or(Exit::Unknown),
            ),
        }
    }
}

/// How a process that no longer exists ended, if that is still remembered.
pub fn exit_of_gone(identity: &Identity) -> Exit {
    CHILDREN
        .lock()
        .get(&(identity.start_time, identity.pid))
        .copied()
        .flatten()
        .unwrap_or(Exit::Unknown)
}

/// True if the process is running. A zombie is not, and is reaped if it is our child.
pub fn is_alive(identity: &Identity) -> bool {
    match Process::open(identity) {
        Ok(Some(process)) => process.exit().is_none() && process.is_alive(),
        Ok(None) => false,
        // Fall back to /proc, for example when no descriptor is left.
        Err(_) => read_stat(identity.pid)
            .is_some_and(|s| s.start_time == identity.start_time && !s.is_dead()),
    }
}

/// Starts a process that outlives the daemon.
///
/// # Errors
/// `command_missing` or `host`.
#[allow(clippy::disallowed_methods)] // One of the few places that may start processes.
pub fn spawn(spec: Spawn) -> Result<Process> {
    let shown = spec.program.display().to_string();
    let mut command = std::process::Command::new(&spec.program);
    command
        .args(&spec.args)
        .env_clear()
        .envs(spec.env)
        .current_dir(&spec.cwd)
        .stdin(Stdio::null());
    match spec.output {
        Some(file) => {
            let both = file
                .try_clone()
                .map_err(|e| Error::io(format!("run {shown}"), e))?;
            command.stdout(file).stderr(both);
        }
        None => {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
    }
    detach(&mut command, spec.credentials, spec.groups);
    let child = command
        .spawn()
        .map_err(|e| spawn_error(&shown, &spec.cwd, e))?;
    // The child's pid cannot be reused before we reap it, and nothing does before it is in
    // CHILDREN.
    let open = || -> Result<Process> {
        let stat = read_stat(child.id())
            .ok_or_else(|| Error::new(Kind::Host, format!("run {shown}: no /proc entry")))?;
        let identity = Identity {
            pid: child.id(),
            start_time: stat.start_time,
            boot_id: boot_id()?.to_owned(),
        };
        Process::open(&identity)?
            .ok_or_else(|| Error::new(Kind::Host, format!("run {shown}: the process has vanished")))
    };
    let process = open().inspect_err(|_| {
        // For example, no descriptor is left. The child is unreaped, so the pid still names it.
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    })?;
    CHILDREN
        .lock()
        .insert((process.identity.start_time, process.identity.pid), None);
    Ok(process)
}

/// Like [`spawn`], but makes the process the init of a new PID namespace. It sees no other process,
/// and everything it starts ends with it. It is still our child, so its exit status is known. As
/// pid 1 of its namespace it receives only signals that it handles, and SIGKILL and SIGSTOP. Needs
/// root.
pub fn spawn_in_own_pids(spec: Spawn) -> Result<Process> {
    // unshare(2) affects later children of the calling thread, so use a thread that starts only
    // this one.
    let spawned = super::thread::spawn("own-pids", move || {
        let doing = || format!("create a PID namespace for {}", spec.program.display());
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)
            .map_err(|e| Error::io(doing(), std::io::Error::from(e)))?;
        spawn(spec)
    })?;
    spawned
        .join()
        .unwrap_or_else(|_| Err(Error::internal("start a process: its thread panicked")))
}

fn spawn_error(shown: &str, cwd: &Path, e: std::io::Error) -> Error {
    if e.kind() == std::io::ErrorKind::NotFound && cwd.is_dir() {
        return Error::new(Kind::CommandMissing, format!("{shown} is not installed"))
            .hint("run fcctl doctor");
    }
    Error::io(format!("run {shown}"), e)
}

#[allow(unsafe_code)]
fn detach(command: &mut std::process::Command, credentials: Option<Credentials>, groups: Vec<u32>) {
    // SAFETY: the closure runs between fork and exec. It makes async-signal-safe system calls only,
    // on memory that was allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            let ok = |result: libc::c_int| {
                if result == 0 {
                    Ok(())
                } else {
                    Err(std::io::Error::last_os_error())
                }
            };
            if libc::setsid() < 0 {
                return Err(std::io::Error::last_os_error());
            }
            let no_core = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            ok(libc::setrlimit(libc::RLIMIT_CORE, &no_core))?;
            // Our own descriptors are close-on-exec; this catches those of a library that forgot
            // it.
            ok(libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            ) as libc::c_int)?;
            if let Some(c) = credentials {
                ok(libc::setgroups(groups.len(), groups.as_ptr()))?;
                ok(libc::setresgid(c.gid, c.gid, c.gid))?;
                ok(libc::setresuid(c.uid, c.uid, c.uid))?;
            }
            Ok(())
        });
    }
}

/// Finds running processes that have exactly `argument` as an argument. Root finds processes of all
/// users; others only their own.
pub fn find_by_argument(argument: &str) -> Result<Vec<Identity>> {
    Ok(scan(|a| a == argument.as_bytes())?
        .into_iter()
        .map(|(_, identity)| identity)
        .collect())
}

/// Finds running processes with an argument that begins with `prefix`, and returns each with that
/// argument. Root finds processes of all users; others only their own.
pub fn find_by_prefix(prefix: &str) -> Result<Vec<(String, Identity)>> {
    scan(|a| a.starts_with(prefix.as_bytes()))
}

/// Scans `/proc` for processes and the first argument of each that `fits`.
fn scan(fits: impl Fn(&[u8]) -> bool) -> Result<Vec<(String, Identity)>> {
    let me = rustix::process::geteuid().as_raw();
    let mut found = Vec::new();
    let entries = std::fs::read_dir("/proc").map_err(|e| Error::io("read /proc", e))?;
    for entry in entries.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Some(argument) = arguments(pid)
            .into_iter()
            .find(|a| fits(a))
            .and_then(|a| String::from_utf8(a).ok())
        else {
            continue;
        };
        if me != 0 && uid(pid) != Some(me) {
            continue;
        }
        let Some(before) = read_stat(pid).filter(|stat| !stat.is_dead()) else {
            continue;
        };
        // Read again after the stat: if the pid was reused in between, the identity is another
        // process's.
        if arguments(pid).iter().any(|a| *a == argument.as_bytes()) {
            found.push((
                argument,
                Identity {
                    pid,
                    start_time: before.start_time,
                    boot_id: boot_id()?.to_owned(),
                },
            ));
        }
    }
    Ok(found)
}

/// The argv of a process, empty if it has exited.
pub fn arguments(pid: u32) -> Vec<Vec<u8>> {
    crate::locks::require_memory_only("look at a process");
    const CMDLINE_BYTES_MAX: u64 = 256 * 1024;
    let Ok(file) = File::open(format!("/proc/{pid}/cmdline")) else {
        return Vec::new();
    };
    let Ok(bytes) = super::command::read_bounded(file, CMDLINE_BYTES_MAX) else {
        return Vec::new();
    };
    bytes.split(|b| *b == 0).map(<[u8]>::to_vec).collect()
}

/// The path of the executable, without the ` (deleted)` that the kernel appends if it was replaced.
pub fn executable(pid: u32) -> Option<PathBuf> {
    let path = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    Some(
        path.to_str()
            .and_then(|p| p.strip_suffix(" (deleted)"))
            .map_or(path.clone(), PathBuf::from),
    )
}

/// The real uid of a process.
pub fn uid(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status
        .lines()
        .find_map(|l| l.strip_prefix("Uid:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// The kernel's id of the current boot.
pub fn boot_id() -> Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(id);
    }
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let id = std::fs::read_to_string(PATH).map_err(|e| Error::io(format!("read {PATH}"), e))?;
    Ok(BOOT_ID.get_or_init(|| id.trim().to_owned()))
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: u8,
    start_time: u64,
}

impl Stat {
    fn is_dead(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

fn read_stat(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read(format!("/proc/{pid}/stat")).ok()?)
}

/// Parses `/proc/<pid>/stat` (proc(5)). The name is in parentheses and may itself contain `) `, so
/// the last parenthesis ends it.
fn parse_stat(stat: &[u8]) -> Option<Stat> {
    let end = stat.iter().rposition(|b| *b == b')')?;
    let mut fields = stat[end + 1..]
        .split(|b| b.is_ascii_whitespace())
        .filter(|f| !f.is_empty());
    let state = *fields.next()?.first()?;
    // The state is field 3, the start time field 22.
    let start_time = std::str::from_utf8(fields.nth(18)?).ok()?.parse().ok()?;
    Some(Stat { state, start_time })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn stopped(tag: &str) -> Spawn {
        Spawn {
            program: "sh".into(),
            args: ["-c", "kill -STOP $$", tag].map(OsString::from).to_vec(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: "/".into(),
            output: None,
            credentials: None,
            groups: Vec::new(),
        }
    }

    fn sleep(tag: &str) -> Spawn {
        Spawn {
            args: ["-c", "exec sleep 1000", tag].map(OsString::from).to_vec(),
            ..stopped(tag)
        }
    }

    fn in_10_s() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn end(process: &Process) {
        process.signal(Signal::KILL).unwrap();
        assert!(
            process
                .wait(in_10_s(), &Cancel::try_new().unwrap())
                .unwrap()
        );
    }

    #[test]
    fn stat_name_with_parentheses_is_parsed() {
        let line =
            b"42 (a) R 1 (b) ) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 2 0\n";
        assert_eq!(
            parse_stat(line),
            Some(Stat {
                state: b'S',
                start_time: 987_654
            })
        );
        assert_eq!(parse_stat(b"42 (x) S 1 2"), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn spawned_process_is_detached_and_inherits_only_its_output() {
        // A descriptor without close-on-exec must not be inherited either.
        let leak = rustix::io::dup(std::fs::File::open("/proc/self/maps").unwrap()).unwrap();
        let (mut said, output) = std::io::pipe().unwrap();
        let script = "echo ready; kill -STOP $$";
        let args = ["-c", script].map(OsString::from).to_vec();
        let output = Some(File::from(OwnedFd::from(output)));
        let process = spawn(Spawn {
            args,
            output,
            ..sleep("")
        })
        .unwrap();
        // Once the shell prints this, the loader has closed the files that it opened.
        std::io::Read::read_exact(&mut said, &mut [0; 6]).unwrap();
        let pid = process.identity().pid;
        assert_eq!(
            nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid as i32)))
                .unwrap()
                .as_raw() as u32,
            pid
        );
        let target = |fd: &str| std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert_eq!(
            std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count(),
            3
        );
        assert_eq!(target("0"), PathBuf::from("/dev/null"));
        assert!(target("1").to_string_lossy().starts_with("pipe:["));
        assert_eq!(target("1"), target("2"));
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
        assert_eq!(environment, b"PATH=/usr/bin:/bin\0");
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|l| l.starts_with("Max core")).unwrap();
        assert!(
            core.split_whitespace().skip(4).take(2).all(|v| v == "0"),
            "{core}"
        );
        end(&process);
        drop(leak);
    }

    #[test]
    fn exit_of_reaped_child_is_known_to_other_handles() {
        let process = spawn(sleep("x")).unwrap();
        let other = Process::open(process.identity()).unwrap().unwrap();
        assert!(is_alive(process.identity()) && process.is_alive());
        assert_eq!(process.exit(), None);
        end(&process);
        assert_eq!(process.exit(), Some(Exit::Signal(9)));
        assert_eq!(other.exit(), Some(Exit::Signal(9)));
        assert!(!is_alive(process.identity()) && !other.is_alive());
        assert!(!other.signal(Signal::TERM).unwrap());
        assert_eq!(
            read_stat(process.identity().pid)
                .map(|s| s.start_time == process.identity().start_time),
            None
        );
    }

    #[test]
    fn zombie_is_not_alive() {
        let process = spawn(Spawn {
            program: "true".into(),
            args: vec![],
            ..sleep("")
        })
        .unwrap();
        assert_eq!(
            wait_any(
                &[(process.fd(), PollFlags::POLLIN)],
                in_10_s(),
                &Cancel::try_new().unwrap()
            )
            .unwrap(),
            WaitResult::Ready
        );
        assert!(read_stat(process.identity().pid).unwrap().is_dead());
        assert!(!process.is_alive() && !is_alive(process.identity()));
        assert_eq!(process.exit(), Some(Exit::Status(0)));
    }

    #[test]
    fn reused_pid_is_not_opened() {
        let process = spawn(sleep("x")).unwrap();
        let mut wrong = process.identity().clone();
        wrong.start_time += 1;
        assert!(Process::open(&wrong).unwrap().is_none());
        assert!(!is_alive(&wrong));
        let mut wrong = process.identity().clone();
        wrong.boot_id = "of another boot".into();
        assert!(Process::open(&wrong).unwrap().is_none());
        assert!(is_alive(process.identity()));
        end(&process);
    }

    #[test]
    fn process_is_found_by_its_whole_argument() {
        let tag = format!("fc-test-{}-1", std::process::id());
        let process = spawn(stopped(&tag)).unwrap();
        assert_eq!(
            find_by_argument(&tag).unwrap(),
            std::slice::from_ref(process.identity())
        );
        assert_eq!(find_by_argument(&tag[..tag.len() - 1]).unwrap(), []);
        end(&process);
        assert_eq!(find_by_argument(&tag).unwrap(), []);
    }

    #[test]
    fn wait_ends_at_deadline_and_on_cancel() {
        let process = spawn(sleep("x")).unwrap();
        let cancel = Cancel::try_new().unwrap();
        assert!(
            !process
                .wait(Instant::now() + Duration::from_millis(5), &cancel)
                .unwrap()
        );
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(
            process.wait(in_10_s(), &cancel).unwrap_err().kind(),
            Kind::Cancelled
        );
        end(&process);
    }

    #[test]
    fn spawn_failure_has_its_kind() {
        let e = spawn(Spawn {
            program: "no-such-program".into(),
            ..sleep("")
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::CommandMissing);
        let e = spawn(Spawn {
            cwd: "/nonexistent".into(),
            ..sleep("")
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::Host);
    }

    #[test]
    fn process_in_own_pid_namespace_is_our_child() {
        let sleeper = spawn_in_own_pids(sleep("x"));
        if !rustix::process::geteuid().is_root() {
            assert!(sleeper.is_err());
            return;
        }
        let sleeper = sleeper.unwrap();
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
        let pid = sleeper.identity().pid;
        assert_ne!(namespace(&pid.to_string()), namespace("self"));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let numbers = status
            .lines()
            .find_map(|l| l.strip_prefix("NSpid:"))
            .unwrap();
        assert_eq!(
            numbers.split_whitespace().collect::<Vec<_>>(),
            [pid.to_string().as_str(), "1"]
        );
        end(&sleeper);
        assert_eq!(sleeper.exit(), Some(Exit::Signal(9)));
        // Its children end with it, and its exit status is known.
        let args = ["-c", "sleep 1000 & exit 7"].map(OsString::from).to_vec();
        let parent = spawn_in_own_pids(Spawn { args, ..sleep("") }).unwrap();
        assert!(parent.wait(in_10_s(), &Cancel::try_new().unwrap()).unwrap());
        assert_eq!(parent.exit(), Some(Exit::Status(7)));
        let e = spawn_in_own_pids(Spawn {
            program: "no-such-program".into(),
            ..sleep("")
        })
        .unwrap_err();
        assert_eq!(e.kind(), Kind::CommandMissing);
        // A process started later is in the host's namespace again.
        let other = spawn(sleep("x")).unwrap();
        assert_eq!(
            namespace(&other.identity().pid.to_string()),
            namespace("self")
        );
        end(&other);
    }

    #[test]
    fn spawn_as_root_drops_to_the_given_credentials() {
        if !rustix::process::geteuid().is_root() {
            // Without privilege the call must fail instead of running as another user.
            let credentials = Some(Credentials {
                uid: 1_900_000_001,
                gid: 1_900_000_001,
            });
            assert!(
                spawn(Spawn {
                    credentials,
                    ..sleep("")
                })
                .is_err()
            );
            return;
        }
        let credentials = Some(Credentials {
            uid: 1_900_000_001,
            gid: 1_900_000_002,
        });
        let process = spawn(Spawn {
            credentials,
            groups: vec![1_900_000_003],
            ..sleep("")
        })
        .unwrap();
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", process.identity().pid)).unwrap();
        let field = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .unwrap()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(field("Uid:"), ["1900000001"; 4].join(" "));
        assert_eq!(field("Gid:"), ["1900000002"; 4].join(" "));
        assert_eq!(field("Groups:"), "1900000003");
        assert_eq!(uid(process.identity().pid), Some(1_900_000_001));
        end(&process);
    }
}
