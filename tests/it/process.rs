//! Tests of the daemon as a separate process: its signals and the descriptors that it inherits.

use crate::world::{SOON, await_that};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

/// A daemon process without VMs in its own directory. Dropping it kills the process.
pub struct Process {
    dir: tempfile::TempDir,
    pub child: Child,
}

/// Makes a directory that every user may enter, as VMMs must. `TMPDIR` may be closed.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

impl Process {
    /// Starts the daemon. `before` changes the command and what the process inherits.
    pub fn start(before: impl FnOnce(&mut Command)) -> Self {
        let dir = open_dir();
        let log = File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_fcd"));
        let config = dir.path().join("config.toml");
        fs::write(&config, "").unwrap();
        command.args(["--config".as_ref(), config.as_os_str()]);
        command.args(["--state-dir".as_ref(), dir.path().join("state").as_os_str()]);
        command.args(["--socket".as_ref(), dir.path().join("fcd.sock").as_os_str()]);
        command.env("FCD_TEST_CLAIMS", dir.path().join("claims"));
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        before(&mut command);
        let mut process = Self {
            child: command.spawn().unwrap(),
            dir,
        };
        await_that("the daemon serves", || {
            let ended = process.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", process.log());
            UnixStream::connect(process.socket()).is_ok()
        });
        process
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("fcd.sock")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(
                    Instant::now() < deadline,
                    "the daemon has not ended: {}",
                    self.log()
                ),
            }
            std::thread::yield_now();
        }
    }

    /// Returns the file behind the daemon's descriptor `fd`, or `None` if the descriptor is closed.
    fn descriptor(&self, fd: i32) -> Option<PathBuf> {
        fs::read_link(
            Path::new("/proc")
                .join(self.child.id().to_string())
                .join("fd")
                .join(fd.to_string()),
        )
        .ok()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn daemon_notifies_systemd_when_it_serves_and_when_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let systemd = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    systemd.set_read_timeout(Some(SOON)).unwrap();
    let next = || {
        let mut text = [0; 64];
        let len = systemd.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..len]).trim().to_owned()
    };
    let mut process = Process::start(|command| {
        command.env("NOTIFY_SOCKET", dir.path().join("notify"));
    });
    assert_eq!(next(), "READY=1");
    process.signal(nix::sys::signal::SIGTERM);
    assert_eq!(next(), "STOPPING=1");
    assert!(process.end().success(), "{}", process.log());
}

#[test]
fn sighup_drains_daemon_as_sigterm_does() {
    for signal in [
        nix::sys::signal::SIGHUP,
        nix::sys::signal::SIGTERM,
        nix::sys::signal::SIGINT,
    ] {
        let mut process = Process::start(|_| {});
        process.signal(signal);
        let status = process.end();
        assert_eq!(
            (status.code(), status.signal()),
            (Some(0), None),
            "{signal}: {}",
            process.log()
        );
        assert!(
            !process.socket().exists(),
            "{signal}: the socket is removed"
        );
        assert!(
            process.log().contains("done; VMs keep running"),
            "{signal}: {}",
            process.log()
        );
    }
}

/// A closing terminal sends SIGHUP, and its shell sends another.
#[test]
fn repeated_sighup_does_not_cut_drain_short() {
    let mut process = Process::start(|_| {});
    (0..20).for_each(|_| process.signal(nix::sys::signal::SIGHUP));
    assert_eq!(process.end().code(), Some(0), "{}", process.log());
}

/// A daemon started with `nohup fcd &` must outlive its terminal.
#[test]
fn sighup_ignored_at_start_stays_ignored() {
    let mut process = Process::start(|command| {
        through_shell(command, "trap '' HUP; exec \"$@\"");
    });
    process.signal(nix::sys::signal::SIGHUP);
    UnixStream::connect(process.socket()).unwrap();
    process.signal(nix::sys::signal::SIGTERM);
    assert_eq!(process.end().code(), Some(0));
    assert!(process.log().contains("SIGTERM"), "{}", process.log());
}

/// Makes the command start the daemon from a shell script.
fn through_shell(command: &mut Command, script: &str) {
    let args: Vec<_> = command
        .get_args()
        .map(|a| a.to_str().unwrap().to_owned())
        .collect();
    let dir = Path::new(&args[1]).parent().unwrap();
    let log = File::options().append(true).open(dir.join("log")).unwrap();
    *command = Command::new("sh");
    command
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_fcd")])
        .args(&args)
        .env("FCD_TEST_CLAIMS", dir.join("claims"));
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
}

/// Makes the new process inherit `file` as its descriptor `to`.
fn inherit(command: &mut Command, file: &File, to: i32) {
    let from = file.as_raw_fd();
    // SAFETY: dup2(2) may be called between fork and exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(from, to) < 0 {
                Err(std::io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
}

#[test]
fn inherited_descriptors_are_closed_at_start() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // Neither this process nor the daemon uses these numbers otherwise.
    let numbers = [857, 863, 1000];
    let process = Process::start(|command| {
        numbers
            .iter()
            .for_each(|n| inherit(command, file.as_file(), *n))
    });
    for fd in numbers {
        assert_eq!(
            process.descriptor(fd),
            None,
            "descriptor {fd} is still open"
        );
    }
    assert!(process.descriptor(1).is_some() && process.descriptor(2).is_some());
}

/// systemd passes `LISTEN_FDS` descriptors starting at 3 if `LISTEN_PID` is the ID of the process.
#[test]
fn descriptors_of_socket_activation_are_kept() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // Neither this process nor the daemon uses numbers this high.
    let last = 904;
    let with = |pid: &str| {
        let pid = pid.to_owned();
        Process::start(|command| {
            through_shell(
                command,
                &format!(
                    "export LISTEN_PID={pid} LISTEN_FDS={}; exec \"$@\"",
                    last - 2
                ),
            );
            (last - 4..last + 5).for_each(|n| inherit(command, file.as_file(), n));
        })
    };
    let process = with("$$");
    assert_eq!(process.descriptor(last), Some(file.path().to_owned()));
    assert_eq!(
        process.descriptor(last + 1),
        None,
        "the descriptor after the last one of LISTEN_FDS stays closed"
    );
    assert_eq!(
        with("1").descriptor(last),
        None,
        "descriptors for another process are closed"
    );
}

/// systemd keeps its socket, so callers wait for the next daemon instead of failing.
#[test]
fn socket_of_systemd_is_used_and_kept() {
    let mut listener = None;
    let mut process = Process::start(|command| {
        let path = PathBuf::from(command.get_args().nth(5).unwrap());
        let bound = UnixListener::bind(path).unwrap();
        through_shell(command, "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\"");
        let file = File::from(bound.as_fd().try_clone_to_owned().unwrap());
        inherit(command, &file, 3);
        listener = Some((bound, file));
    });
    let socket = process.socket();
    let ask = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let line = "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"fcd.info\",\"params\":{}}\n";
        stream.write_all(line.as_bytes()).unwrap();
        stream
    };
    let mut answer = String::new();
    BufReader::new(ask()).read_line(&mut answer).unwrap();
    assert!(answer.contains("\"version\""), "{answer}");
    process.signal(nix::sys::signal::SIGTERM);
    assert_eq!(process.end().code(), Some(0), "{}", process.log());
    // The connection waits in the socket that systemd still has open.
    let _waiting = ask();
    let (listener, _) = listener.unwrap();
    listener.accept().unwrap();
}

/// Otherwise the first start of a VM would fail.
#[test]
fn state_directory_that_vmms_cannot_reach_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED, because VMMs have their own uids only if root runs this test");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let state = dir.path().join("state");
    let mut command = Command::new("timeout");
    command.args(["30", env!("CARGO_BIN_EXE_fcd"), "--state-dir"]);
    command.arg(&state).env("FCD_CONFIG", "/dev/null");
    command.env("FCD_SOCKET", dir.path().join("fcd.sock"));
    let refused = command.output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    let closed = dir.path().display();
    assert!(
        said.contains(&format!(
            "may not enter {closed}, where the state directory"
        )) && said.contains(&format!("chmod o+x {closed}")),
        "{said}"
    );
    assert!(!state.exists(), "nothing was made");
}

/// Two daemons running as root with two state directories would give their VMs the same uids.
#[test]
fn second_root_daemon_is_refused_before_it_makes_anything() {
    let first = Process::start(|_| {});
    let dir = open_dir();
    let config = dir.path().join("config.toml");
    let second = |text: &str| {
        fs::write(&config, text).unwrap();
        let mut command = Command::new("timeout");
        command
            .args(["30", env!("CARGO_BIN_EXE_fcd"), "--config"])
            .arg(&config);
        command
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--socket")
            .arg(dir.path().join("fcd.sock"));
        command
            .env("FCD_TEST_CLAIMS", first.dir.path().join("claims"))
            .output()
            .unwrap()
    };
    let refused = second("");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{said}");
    let state = first.dir.path().join("state");
    assert!(
        said.contains(state.to_str().unwrap())
            && said.contains("uid_base = ... and uid_count = ..."),
        "{said}"
    );
    assert!(!dir.path().join("state/fcd.db").exists() && !dir.path().join("fcd.sock").exists());
    // The daemon starts if it has its own range of uids.
    let mut other = Process::start(|command| {
        let config = PathBuf::from(command.get_args().nth(1).unwrap());
        fs::write(config, "[qemu]\nuid_base = 1900065536\n").unwrap();
        command.env("FCD_TEST_CLAIMS", first.dir.path().join("claims"));
    });
    other.signal(nix::sys::signal::SIGTERM);
    assert_eq!(other.end().code(), Some(0), "{}", other.log());
}
