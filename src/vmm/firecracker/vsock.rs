//! Connects to ports of a guest's vsock (docs/vsock.md, v1.16). The VMM listens on a Unix socket,
//! and a line on it selects the port. Guests cannot connect to the host: that would need a socket
//! `vsock_PORT` next to this one, and fcd creates none.

use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::vmm::dial::Deadline;
use nix::poll::PollFlags;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The socket's name in the VMM's working directory.
pub const SOCKET: &str = "vsock";
/// The CID of every guest. Sockets are distinguished by their paths. This is the first number
/// without a special meaning (vsock(7)).
pub const GUEST_CID: u32 = 3;
/// Room for an answer such as `OK 1073741824`.
const ANSWER_BYTES_MAX: usize = 32;

/// Checks that the VMM has a vsock. One that was started without it has no such socket.
pub fn require(place: &OwnedFd) -> Result<()> {
    match rustix::fs::statat(place, SOCKET, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NOENT) => Err(Error::new(
            Kind::Unsupported,
            "the VMM was started without a vsock",
        )
        .hint("fcctl vm restart")),
        Err(e) => Err(Error::io("look for the VMM's vsock", io::Error::from(e))),
    }
}

/// Connects a non-blocking stream to the guest's `port`, and makes it blocking.
pub fn open(mut stream: UnixStream, port: u32, deadline: Deadline<'_>) -> Result<UnixStream> {
    let doing = "connect to the guest's port";
    let io = |e| Error::io(doing, e);
    let mut line = [0; ANSWER_BYTES_MAX];
    let mut len = 0;
    // This always fits into a socket's buffer.
    let asked = stream.write_all(format!("CONNECT {port}\n").as_bytes());
    match asked {
        Err(e) if is_hang_up(&e) => return Err(refused(port)),
        other => other.map_err(io)?,
    }
    while !line[..len].ends_with(b"\n") {
        // Read one byte at a time, because what follows the line comes from the guest.
        match line.get_mut(len..=len).map(|byte| stream.read(byte)) {
            Some(Ok(0)) => return Err(refused(port)),
            Some(Ok(n)) => len += n,
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                wait(&stream, doing, deadline)?
            }
            Some(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Some(Err(e)) if is_hang_up(&e) => return Err(refused(port)),
            Some(Err(e)) => return Err(io(e)),
            None => break,
        }
    }
    if !line[..len].starts_with(b"OK ") {
        return Err(Error::new(
            Kind::VmmFailed,
            format!("{doing}: the VMM's answer is not as documented"),
        ));
    }
    stream.set_nonblocking(false).map_err(io)?;
    Ok(stream)
}

fn is_hang_up(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// The error after the VMM has hung up, which is its only way to refuse a port.
fn refused(port: u32) -> Error {
    Error::new(
        Kind::GuestUnavailable,
        format!("nothing in the guest listens on vsock port {port}"),
    )
    .hint(format!(
        "start a server in the guest: socat VSOCK-LISTEN:{port},fork -"
    ))
}

fn wait(stream: &UnixStream, doing: &str, Deadline { at, cancel }: Deadline<'_>) -> Result<()> {
    match wait_any(&[(stream.as_fd(), PollFlags::POLLIN)], at, cancel)
        .map_err(|e| Error::io(doing, e))?
    {
        WaitResult::Ready => Ok(()),
        WaitResult::Cancelled => Err(cancelled(doing, cancel)),
        WaitResult::Deadline => Err(Error::new(
            Kind::Timeout,
            format!("{doing}: the guest does not respond"),
        )
        .hint("load the driver in the guest: modprobe vmw_vsock_virtio_transport")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::Cancel;
    use std::time::{Duration, Instant};

    /// Connects to a VMM that answers this and then hangs up.
    fn answered(says: &[u8]) -> Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(says).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let opened = open(
            ours,
            5000,
            Deadline {
                at: Instant::now() + Duration::from_secs(60),
                cancel: &cancel,
            },
        );
        let mut asked = [0; 13];
        theirs.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"CONNECT 5000\n");
        opened
    }

    #[test]
    fn bytes_after_answer_come_from_guest() {
        let mut rest = String::new();
        answered(b"OK 1073741824\nhello\n")
            .unwrap()
            .read_to_string(&mut rest)
            .unwrap();
        assert_eq!(rest, "hello\n");
    }

    #[test]
    fn unexpected_answers_are_errors() {
        let kind = |says: &[u8]| answered(says).unwrap_err().kind();
        assert_eq!(kind(b""), Kind::GuestUnavailable);
        assert_eq!(kind(b"OK 10737"), Kind::GuestUnavailable);
        assert_eq!(kind(b"KO 1073741824\n"), Kind::VmmFailed);
        assert_eq!(kind(&[b'1'; 100]), Kind::VmmFailed);
    }

    #[test]
    fn silent_vmm_times_out_and_can_be_cancelled() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cancel = Cancel::try_new().unwrap();
        let ask = |deadline| {
            let ours = ours.try_clone().unwrap();
            ours.set_nonblocking(true).unwrap();
            open(
                ours,
                1,
                Deadline {
                    at: deadline,
                    cancel: &cancel,
                },
            )
            .unwrap_err()
            .kind()
        };
        assert_eq!(ask(Instant::now()), Kind::Timeout);
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(
            ask(Instant::now() + Duration::from_secs(60)),
            Kind::Cancelled
        );
        drop(theirs);
    }
}
