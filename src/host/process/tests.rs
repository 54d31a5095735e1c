use super::identity::read_stat;
use super::*;
use crate::error::Kind;
use crate::host::Credentials;
use crate::host::wait::{WaitResult, wait_any};
use crate::locks::Cancel;
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::process::Signal;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
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
    // When the shell prints this, the loader has closed its files.
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
        read_stat(process.identity().pid).map(|s| s.start_time == process.identity().start_time),
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
    // The child's own children end with it, and its exit status is known.
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
    // A process that is started later is in the host's namespace again.
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
        // Without privileges the call must fail instead of running as another user.
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
