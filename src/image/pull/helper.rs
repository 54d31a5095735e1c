//! The helper's side of a pull: drops its privileges, fetches the image and writes its file system.
//!
//! The first thread owns the channel. Other threads send it their requests and wait for the answer.

use super::job::{Job, Outcome};
use super::link::{Answer, Asking, Link};
use super::protocol::{Failure, JOB_BYTES_MAX, MESSAGE_BYTES_MAX, Order, Request};
use super::work;
use crate::error::{Error, Result};
use crate::host::command::read_bounded;
use crate::host::confine::{Allowed, Asked, Call, Profile};
use crate::host::thread;
use crate::image::helper_side::{self, Daemon};
use crossbeam_channel::{Receiver, bounded};
use std::fs::File;
use std::io::{self, Write};
use std::process::ExitCode;

/// This helper's name for [`crate::host::confine::spawn`].
pub(crate) const NAME: &str = "image";

/// The memory limit of the helper. The indexes of 10 million entries would not fit, so the number
/// of an image's entries has a lower limit.
const MEMORY_BYTES_MAX: u64 = 2 << 30;
/// The size limit of a file that the helper writes: a layer or a file system.
pub(super) const FILE_BYTES_MAX: u64 = 1 << 40;
/// The limit of open files: a file per layer, connections, and what name resolution opens.
const OPEN_FILES_MAX: u64 = 1024;

/// Files for resolving host names, and certificates.
const READABLE: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/services",
    "/run/systemd/resolve",
    "/run/nscd",
    "/proc/self",
    "/sys/devices/system/cpu",
];

/// The flags that open a file for writing, create it or truncate it.
const WRITES: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64;
const INTERNET: Allowed = Allowed::ArgumentIn(
    0,
    &[
        libc::AF_INET as u64,
        libc::AF_INET6 as u64,
        // getaddrinfo(3) uses it to get the host's addresses.
        libc::AF_NETLINK as u64,
    ],
);

const PROFILE: Profile = Profile {
    memory_bytes_max: MEMORY_BYTES_MAX,
    open_files_max: OPEN_FILES_MAX,
    has_threads: true,
    has_network: true,
    readable: READABLE,
    file_bytes_max: FILE_BYTES_MAX,
    calls: &[
        Call(libc::SYS_eventfd2, Allowed::Always),
        Call(libc::SYS_pipe2, Allowed::Always),
        // Files that the daemon passed.
        Call(libc::SYS_lseek, Allowed::Always),
        Call(libc::SYS_pread64, Allowed::Always),
        Call(libc::SYS_pwrite64, Allowed::Always),
        Call(libc::SYS_ftruncate, Allowed::Always),
        Call(libc::SYS_fallocate, Allowed::Always),
        Call(libc::SYS_fsync, Allowed::Always),
        Call(libc::SYS_fdatasync, Allowed::Always),
        Call(libc::SYS_fstat, Allowed::Always),
        Call(libc::SYS_newfstatat, Allowed::Always),
        Call(libc::SYS_statx, Allowed::Always),
        // Files for resolving names.
        Call(libc::SYS_openat, Allowed::ArgumentLacks(2, WRITES)),
        // Connections to registries and name servers.
        Call(libc::SYS_socket, INTERNET),
        Call(libc::SYS_connect, Allowed::Always),
        Call(libc::SYS_bind, Allowed::Always),
        Call(libc::SYS_getsockopt, Allowed::Always),
        Call(libc::SYS_setsockopt, Allowed::Always),
        Call(libc::SYS_getsockname, Allowed::Always),
        Call(libc::SYS_getpeername, Allowed::Always),
        Call(libc::SYS_sendmmsg, Allowed::Always),
        Call(libc::SYS_sendto, Allowed::Always),
        Call(libc::SYS_uname, Allowed::Always),
    ],
};

/// Runs this process as the helper of one pull.
pub(crate) fn run(asked: &Asked) -> ExitCode {
    helper_side::run(asked, &PROFILE, serve, |ended| match ended {
        Ok(()) => Request::Done,
        Err(e) => Request::Failed(Failure::from(e)),
    })
}

/// Sends a request and, if the daemon answers it, returns the answer.
fn ask(daemon: &Daemon, request: &Request) -> Result<Answer> {
    let io = |e| Error::io("talk to the daemon", e);
    daemon.send(request).map_err(io)?;
    if !request.has_answer() {
        return Ok(Answer::None);
    }
    let (order, fds) = daemon.receive(MESSAGE_BYTES_MAX).map_err(io)?;
    let file = || {
        let mut fds = fds.into_iter().map(File::from);
        fds.next()
            .ok_or_else(|| Error::internal("the daemon passed no file"))
    };
    match order {
        Order::Continue => Ok(Answer::None),
        Order::Cached => Ok(Answer::Cached(file()?)),
        Order::Empty => Ok(Answer::Empty(file()?)),
        Order::Partial => Ok(Answer::Partial(file()?)),
        Order::Pull => Err(Error::internal("a second job")),
    }
}

fn serve(daemon: &Daemon) -> Result<()> {
    let io = |e| Error::io("receive the job", e);
    let (order, fds) = daemon.receive(MESSAGE_BYTES_MAX).map_err(io)?;
    let mut fds = fds.into_iter();
    let (Order::Pull, Some(job), Some(image), Some(result)) =
        (order, fds.next(), fds.next(), fds.next())
    else {
        return Err(Error::internal("the first message is not a job"));
    };
    let bytes = read_bounded(File::from(job), JOB_BYTES_MAX).map_err(io)?;
    let job: Job = serde_json::from_slice(&bytes).map_err(|e| io(e.into()))?;
    let stream = fds.next();
    let (asking, asked) = bounded(0);
    let link = Link::new(asking);
    let worker = thread::spawn("pull", move || {
        let outcome = work::pull(job, stream, &File::from(image), &link)?;
        write_outcome(File::from(result), &outcome)
    })?;
    answer(daemon, &asked);
    worker
        .join()
        .unwrap_or_else(|_| Err(Error::internal("the thread of the pull panicked")))
}

/// Answers the threads' requests until all threads have ended.
fn answer(daemon: &Daemon, asked: &Receiver<Asking>) {
    for (request, to) in asked {
        // A thread that has ended needs no answer.
        let _ = to.send(ask(daemon, &request));
    }
}

fn write_outcome(mut file: File, outcome: &Outcome) -> Result<()> {
    let io = |e: io::Error| Error::io("write the result", e);
    let bytes = serde_json::to_vec(outcome).map_err(|e| io(e.into()))?;
    file.write_all(&bytes).map_err(io)
}
