//! Starts processes that outlive the daemon.

use super::handle::{Process, remember_child};
use super::identity::{Identity, boot_id, read_stat};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// The parameters of a process that outlives the daemon. The process gets its own session, a
/// cleared environment, no core dumps and none of the daemon's descriptors except `output`.
#[derive(Debug)]
pub struct Spawn {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    pub cwd: PathBuf,
    /// The file that receives stdout and stderr. None means `/dev/null`.
    pub output: Option<File>,
    /// The user and the group to run as. None means the daemon's own.
    pub credentials: Option<Credentials>,
    /// The supplementary groups that go with `credentials`; all others are dropped.
    pub groups: Vec<u32>,
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
    // The child's pid cannot be reused before the child is reaped, and nothing reaps it before
    // `remember_child`.
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
        // The open can fail, for example because no descriptor is left. The child is unreaped, so
        // the pid still names it.
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    })?;
    remember_child(process.identity());
    Ok(process)
}

/// Starts a process like [`spawn`], but as the init of a new PID namespace. The process sees no
/// other process, and everything it starts ends with it. The process is still our child, so its
/// exit status is known. As pid 1 of its namespace it receives only signals that it handles, and
/// SIGKILL and SIGSTOP. The caller needs root.
pub fn spawn_in_own_pids(spec: Spawn) -> Result<Process> {
    // unshare(2) affects later children of the calling thread, so use a thread that starts only
    // this one.
    let spawned = crate::host::thread::spawn("own-pids", move || {
        let doing = || format!("create a PID namespace for {}", spec.program.display());
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)
            .map_err(|e| Error::io(doing(), std::io::Error::from(e)))?;
        spawn(spec)
    })?;
    crate::locks::may_block("join");
    spawned
        .join()
        .unwrap_or_else(|_| Err(Error::internal("start a process: its thread panicked")))
}

fn spawn_error(shown: &str, cwd: &Path, e: std::io::Error) -> Error {
    crate::locks::may_block("file access");
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
            // Our own descriptors are close-on-exec; this call covers those of a library that
            // forgot the flag.
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
