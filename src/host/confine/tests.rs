//! Tests of confinement: a confined process tries forbidden calls, and its parent inspects it from
//! outside.

use super::{Allowed, Asked, Call, Channel, Helper, Profile, spawn};
use crate::host::Credentials;
use crate::host::process::Exit;
use crate::host::wait::{WaitResult, wait_uncancelled};
use crate::sched::Instant;
use nix::poll::PollFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::time::Duration;

pub const PROBE: &str = "probe";
pub const PROBE_WITH_THREADS: &str = "probe-with-threads";
const MIB: u64 = 1024 * 1024;
/// A profile that allows a few calls more than [`super::BASE`], so that the other limits can be
/// observed separately.
const PROFILE: Profile = Profile {
    memory_bytes_max: 32 * MIB,
    open_files_max: 8,
    has_threads: false,
    has_network: false,
    readable: &["/etc/hosts", "/proc/sys", "/no/such/path"],
    file_bytes_max: 0,
    calls: &[
        Call(libc::SYS_openat, Allowed::Always),
        Call(libc::SYS_dup, Allowed::Always),
    ],
};

const PROFILE_WITH_THREADS: Profile = Profile {
    has_threads: true,
    ..PROFILE
};

/// Runs the helper. It tries the calls that each message names and replies with the error number,
/// or with 0.
pub fn run_probe(asked: &Asked) -> ExitCode {
    let channel = Channel::inherited();
    let profile = if asked.name == PROBE_WITH_THREADS {
        &PROFILE_WITH_THREADS
    } else {
        &PROFILE
    };
    if let Err(e) = asked.confine(profile) {
        let _ = channel.send(e.to_string().as_bytes(), &[]);
        return ExitCode::FAILURE;
    }
    let mut passed = Vec::new();
    loop {
        let mut buffer = [0; 64];
        wait_readable(&channel);
        let received = match channel.receive_with_fds(&mut buffer) {
            Ok(received) if received.len > 0 => received,
            _ => return ExitCode::SUCCESS,
        };
        passed.extend(received.fds);
        let answer = match &buffer[..received.len] {
            b"write to what was passed" => {
                rustix::io::write(&passed[0], b"hello").map_or_else(|e| e.raw_os_error(), |_| 0)
            }
            b"exit" => return ExitCode::from(7),
            attempt => attempt_by_name(attempt),
        };
        if channel.send(answer.to_string().as_bytes(), &[]).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

#[allow(unsafe_code)]
fn attempt_by_name(attempt: &[u8]) -> i32 {
    let anywhere = std::ptr::null_mut();
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: these are raw system calls on literals. The objects that they create are leaked, but
    // the process ends soon.
    let result = unsafe {
        match attempt {
            b"open a file" => libc::open(c"/etc/passwd".as_ptr(), libc::O_RDONLY).into(),
            b"open a readable file" => libc::open(c"/etc/hosts".as_ptr(), libc::O_RDONLY).into(),
            b"list a readable directory" => libc::open(
                c"/proc/sys/kernel".as_ptr(),
                libc::O_RDONLY | libc::O_DIRECTORY,
            )
            .into(),
            b"write a readable file" => libc::open(c"/etc/hosts".as_ptr(), libc::O_RDWR).into(),
            b"open a directory" => {
                libc::open(c"/".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY).into()
            }
            b"make a file" => libc::open(
                c"/tmp/fcd-probe".as_ptr(),
                libc::O_CREAT | libc::O_WRONLY,
                0o600,
            )
            .into(),
            b"make a socket" => libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into(),
            b"fork" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            b"share memory with a child" => libc::syscall(
                libc::SYS_clone,
                libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
                0,
                0,
                0,
                0,
            ),
            b"make a namespace" => {
                let flags = libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_NEWNET;
                libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0)
            }
            b"start a thread" => {
                let thread = crate::host::thread::spawn("probe", || ());
                i64::from(thread.is_ok_and(|thread| thread.join().is_ok())) - 1
            }
            b"run a program" => {
                libc::execve(c"/bin/true".as_ptr(), std::ptr::null(), std::ptr::null()).into()
            }
            b"signal its parent" => libc::kill(libc::getppid(), 0).into(),
            b"trace its parent" => libc::ptrace(libc::PTRACE_ATTACH, libc::getppid(), 0, 0),
            b"own its descriptor" => libc::fcntl(0, libc::F_SETOWN, 1).into(),
            b"send elsewhere" => {
                let address = libc::sockaddr_un {
                    sun_family: libc::AF_UNIX as u16,
                    sun_path: [0; 108],
                };
                libc::sendto(
                    0,
                    c"x".as_ptr().cast(),
                    1,
                    0,
                    (&raw const address).cast(),
                    2,
                ) as i64
            }
            b"pass a descriptor" => {
                let mut part = libc::iovec {
                    iov_base: c"x".as_ptr().cast_mut().cast(),
                    iov_len: 1,
                };
                let mut message: libc::msghdr = std::mem::zeroed();
                (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
                libc::sendmsg(0, &raw const message, 0) as i64
            }
            b"map code" => libc::mmap(
                anywhere,
                4096,
                libc::PROT_READ | libc::PROT_EXEC,
                private,
                -1,
                0,
            ) as i64,
            b"take much memory" => libc::mmap(
                anywhere,
                40 << 20,
                libc::PROT_READ | libc::PROT_WRITE,
                private,
                -1,
                0,
            ) as i64,
            b"take some memory" => {
                (libc::mmap(anywhere, 1 << 20, libc::PROT_READ, private, -1, 0) as i64).min(0)
            }
            b"take many descriptors" => (0..8).map(|_| i64::from(libc::dup(0))).min().unwrap_or(0),
            b"become root" => libc::setuid(0).into(),
            _ => panic!("unknown attempt"),
        }
    };
    if result < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)
    } else {
        0
    }
}

fn wait_readable(channel: &Channel) {
    let until = Instant::now() + Duration::from_secs(20);
    assert_eq!(
        wait_uncancelled(&[(channel.fd(), PollFlags::POLLIN)], until).unwrap(),
        WaitResult::Ready,
        "no message came"
    );
}

fn ask(helper: &Helper, attempt: &str) -> String {
    helper.channel.send(attempt.as_bytes(), &[]).unwrap();
    answer(helper)
}

fn answer(helper: &Helper) -> String {
    let mut buffer = [0; 256];
    wait_readable(&helper.channel);
    let len = helper.channel.receive(&mut buffer).unwrap();
    String::from_utf8(buffer[..len].to_vec()).unwrap()
}

fn pid(helper: &Helper) -> String {
    let info =
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", helper.exited().as_raw_fd()))
            .unwrap();
    info.lines()
        .find_map(|l| l.strip_prefix("Pid:"))
        .unwrap()
        .trim()
        .to_owned()
}

fn status(pid: &str) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let fields = text.lines().filter_map(|l| l.split_once(':'));
    fields
        .map(|(key, value)| {
            (
                key.to_owned(),
                value.split_whitespace().collect::<Vec<_>>().join(" "),
            )
        })
        .collect()
}

#[test]
fn confined_process_may_only_do_its_work() {
    let helper = spawn(PROBE, None).unwrap();
    let got = [
        "open a file",
        "open a directory",
        "open a readable file",
        "list a readable directory",
        "write a readable file",
        "make a file",
        "make a socket",
        "fork",
        "run a program",
        "signal its parent",
        "trace its parent",
        "own its descriptor",
        "send elsewhere",
        "pass a descriptor",
        "map code",
        "take much memory",
        "take some memory",
        "take many descriptors",
    ]
    .map(|attempt| format!("{attempt}: {}", errno_name(&ask(&helper, attempt))));
    expect_test::expect![[r#"
        open a file: EACCES
        open a directory: EACCES
        open a readable file: none
        list a readable directory: none
        write a readable file: EACCES
        make a file: EACCES
        make a socket: EPERM
        fork: EPERM
        run a program: EPERM
        signal its parent: EPERM
        trace its parent: EPERM
        own its descriptor: EPERM
        send elsewhere: EPERM
        pass a descriptor: EPERM
        map code: EPERM
        take much memory: ENOMEM
        take some memory: none
        take many descriptors: EMFILE"#]]
    .assert_eq(&got.join("\n"));
}

#[test]
fn confined_process_with_threads_cannot_start_a_process() {
    let helper = spawn(PROBE_WITH_THREADS, None).unwrap();
    let results = [
        "start a thread",
        "fork",
        "share memory with a child",
        "make a namespace",
        "run a program",
    ]
    .map(|attempt| format!("{attempt}: {}", errno_name(&ask(&helper, attempt))));
    expect_test::expect![[r#"
        start a thread: none
        fork: EPERM
        share memory with a child: EPERM
        make a namespace: EPERM
        run a program: EPERM"#]]
    .assert_eq(&results.join("\n"));
}

fn errno_name(answer: &str) -> String {
    match answer {
        "0" => "none".to_owned(),
        number => format!("{:?}", nix::errno::Errno::from_raw(number.parse().unwrap())),
    }
}

#[test]
fn confined_process_has_only_passed_descriptors() {
    let leak = rustix::io::dup(std::fs::File::open("/proc/self/maps").unwrap()).unwrap();
    let helper = spawn(PROBE, None).unwrap();
    assert_eq!(ask(&helper, "take some memory"), "0");
    let (pid, status) = (pid(&helper), status(&pid(&helper)));
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"));
    // The process is not dumpable, so only root can list its descriptors.
    if rustix::process::geteuid().is_root() {
        assert_eq!(open.unwrap().count(), 3);
    } else {
        assert!(open.is_err());
    }
    assert_eq!(
        (status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()),
        ("1", "2")
    );
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    for limit in [
        "Max core file size 0 0",
        "Max file size 0 0",
        "Max processes 0 0",
        "Max open files 8 8",
    ] {
        let is_set = |l: &str| {
            l.split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .starts_with(limit)
        };
        assert!(limits.lines().any(is_set), "{limit}: {limits}");
    }
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    helper
        .channel
        .send(b"write to what was passed", &[w.as_fd()])
        .unwrap();
    drop(w);
    assert_eq!(answer(&helper), "0");
    let mut buffer = [0; 8];
    assert_eq!(rustix::io::read(&r, &mut buffer), Ok(5));
    drop(helper);
    assert_eq!(
        rustix::io::read(&r, &mut buffer),
        Ok(0),
        "the helper's end of the pipe is closed"
    );
    drop(leak);
}

#[test]
fn root_helper_runs_as_its_owner_for_good() {
    if !rustix::process::geteuid().is_root() {
        // Without privileges the spawn must fail instead of running the helper as another user.
        let mut helper = spawn(
            PROBE,
            Some(Credentials {
                uid: 1_900_000_001,
                gid: 1_900_000_002,
            }),
        )
        .unwrap();
        assert!(answer(&helper).starts_with("change to the VM's user"));
        assert_eq!(
            helper.wait(Instant::now() + Duration::from_secs(20)),
            Some(Exit::Status(1))
        );
        return;
    }
    let helper = spawn(
        PROBE,
        Some(Credentials {
            uid: 1_900_000_001,
            gid: 1_900_000_002,
        }),
    )
    .unwrap();
    assert_eq!(ask(&helper, "become root"), libc::EPERM.to_string());
    let status = status(&pid(&helper));
    assert_eq!(status["Uid"], ["1900000001"; 4].join(" "));
    assert_eq!(status["Gid"], ["1900000002"; 4].join(" "));
    assert_eq!(
        (status["Groups"].as_str(), status["CapEff"].as_str()),
        ("", "0000000000000000")
    );
}

#[test]
fn helper_exit_is_reported_and_drop_kills_helper() {
    let mut helper = spawn(PROBE, None).unwrap();
    helper.channel.send(b"exit", &[]).unwrap();
    assert_eq!(
        helper.wait(Instant::now() + Duration::from_secs(20)),
        Some(Exit::Status(1))
    );
    assert_eq!(helper.channel.receive(&mut [0; 8]).unwrap(), 0);
    let helper = spawn(PROBE, None).unwrap();
    assert_eq!(ask(&helper, "take some memory"), "0");
    let process = format!("/proc/{}", pid(&helper));
    drop(helper);
    assert!(!std::path::Path::new(&process).exists());
}

#[test]
fn helper_dies_with_the_thread_that_spawned_it() {
    let mut helper = crate::host::thread::spawn("parent", || {
        let helper = spawn(PROBE, None).unwrap();
        assert_eq!(ask(&helper, "take some memory"), "0");
        helper
    })
    .unwrap()
    .join()
    .unwrap();
    assert_eq!(
        helper.wait(Instant::now() + Duration::from_secs(20)),
        Some(Exit::Signal(libc::SIGKILL))
    );
}

#[test]
fn messages_are_whole_and_bounded() {
    let (ours, theirs) = Channel::pair().unwrap();
    theirs.send(b"one", &[]).unwrap();
    theirs.send(&[7; 65], &[]).unwrap();
    theirs.send(b"with a descriptor", &[theirs.fd()]).unwrap();
    let mut buffer = [0; 64];
    assert_eq!(ours.receive(&mut buffer).unwrap(), 3);
    assert_eq!(
        ours.receive(&mut buffer).unwrap_err().kind(),
        std::io::ErrorKind::InvalidData
    );
    assert_eq!(ours.receive(&mut buffer).unwrap(), 17);
    assert_eq!(
        ours.receive(&mut buffer).unwrap_err().kind(),
        std::io::ErrorKind::WouldBlock
    );
    let mut sent = 0;
    while theirs.send(&[0; 64], &[]).is_ok() {
        sent += 1;
    }
    assert!(
        sent < 10_000,
        "an unread channel accepts only a bounded number of messages"
    );
    drop(theirs);
}

#[test]
fn last_message_of_closed_side_is_received() {
    let (ours, theirs) = Channel::pair().unwrap();
    theirs.send(b"the last word", &[]).unwrap();
    ours.send(b"never read", &[]).unwrap();
    drop(theirs);
    let mut buffer = [0; 64];
    assert_eq!(ours.receive(&mut buffer).unwrap(), 13);
    assert_eq!(&buffer[..13], b"the last word");
    assert_eq!(ours.receive(&mut buffer).unwrap(), 0);
    assert_eq!(
        ours.send(b"to nobody", &[]).unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}
