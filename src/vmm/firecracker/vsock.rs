//! Streams to a guest's vsock (docs/vsock.md, v1.16): a Unix socket of the VMM's, on which a line names the guest's port. Guests that connect
//! to the host find nobody: what they reach would be a socket beside this one, `vsock_PORT`, and none is made.

use crate::error::{Error, Kind, Result};
use crate::host::wait::{WaitResult, cancelled, wait_any};
use crate::vmm::dial::Patience;
use nix::poll::PollFlags;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// In the VMM's working directory.
pub const SOCKET: &str = "vsock";
/// Every guest's: sockets are told apart by their files. The first number that is no well-known one (vsock(7)).
pub const GUEST_CID: u32 = 3;
/// `OK 1073741824`, with room.
const ANSWER_BYTES_MAX: usize = 32;

/// A VMM that was started without one has no such socket, and never will.
pub fn require(place: &OwnedFd) -> Result<()> {
    match rustix::fs::statat(place, SOCKET, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NOENT) => {
            Err(Error::new(Kind::Unsupported, "its VMM was started without a vsock").hint("start it anew: fcctl vm restart"))
        }
        Err(e) => Err(Error::io("look for the VMM's vsock", io::Error::from(e))),
    }
}

/// Turns a connection that does not block into one to the guest's `port` that does.
pub fn open(mut stream: UnixStream, port: u32, patience: Patience<'_>) -> Result<UnixStream> {
    let doing = "ask for the guest's port";
    let io = |e| Error::io(doing, e);
    let mut line = [0; ANSWER_BYTES_MAX];
    let mut len = 0;
    // So few bytes always fit into a socket's buffer.
    let asked = stream.write_all(format!("CONNECT {port}\n").as_bytes());
    match asked {
        Err(e) if is_hang_up(&e) => return Err(refused(port)),
        other => other.map_err(io)?,
    }
    while !line[..len].ends_with(b"\n") {
        // One by one: what follows is the guest's.
        match line.get_mut(len..=len).map(|byte| stream.read(byte)) {
            Some(Ok(0)) => return Err(refused(port)),
            Some(Ok(n)) => len += n,
            Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => wait(&stream, doing, patience)?,
            Some(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
            Some(Err(e)) if is_hang_up(&e) => return Err(refused(port)),
            Some(Err(e)) => return Err(io(e)),
            None => break,
        }
    }
    if !line[..len].starts_with(b"OK ") {
        return Err(Error::new(Kind::VmmFailed, format!("{doing}: the VMM's answer is not as documented")));
    }
    stream.set_nonblocking(false).map_err(io)?;
    Ok(stream)
}

fn is_hang_up(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// The VMM has no other word for it.
fn refused(port: u32) -> Error {
    Error::new(Kind::GuestUnavailable, format!("nothing in the guest listens on vsock port {port}"))
        .hint(format!("start it there, as in: socat VSOCK-LISTEN:{port},fork -"))
}

fn wait(stream: &UnixStream, doing: &str, Patience { deadline, cancel }: Patience<'_>) -> Result<()> {
    match wait_any(&[(stream.as_fd(), PollFlags::POLLIN)], deadline, cancel).map_err(|e| Error::io(doing, e))? {
        WaitResult::Ready => Ok(()),
        WaitResult::Cancelled => Err(cancelled(doing, cancel)),
        WaitResult::Deadline => Err(Error::new(Kind::Timeout, format!("{doing}: the guest does not answer"))
            .hint("its kernel may have no driver yet; in the guest: modprobe vmw_vsock_virtio_transport")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::Cancel;
    use std::time::{Duration, Instant};

    /// What a VMM that says this is taken for; it hangs up at the end.
    fn answered(says: &[u8]) -> Result<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(says).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let cancel = Cancel::try_new().unwrap();
        let opened = open(ours, 5000, Patience { deadline: Instant::now() + Duration::from_secs(60), cancel: &cancel });
        let mut asked = [0; 13];
        theirs.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"CONNECT 5000\n");
        opened
    }

    #[test]
    fn what_follows_the_answer_is_the_guests() {
        let mut rest = String::new();
        answered(b"OK 1073741824\nhello\n").unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello\n");
    }

    #[test]
    fn other_answers_are_errors() {
        let kind = |says: &[u8]| answered(says).unwrap_err().kind();
        assert_eq!(kind(b""), Kind::GuestUnavailable);
        assert_eq!(kind(b"OK 10737"), Kind::GuestUnavailable);
        assert_eq!(kind(b"KO 1073741824\n"), Kind::VmmFailed);
        assert_eq!(kind(&[b'1'; 100]), Kind::VmmFailed);
    }

    #[test]
    fn one_that_does_not_answer_is_waited_for_until_the_deadline_or_the_cancel() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let cancel = Cancel::try_new().unwrap();
        let ask = |deadline| {
            let ours = ours.try_clone().unwrap();
            ours.set_nonblocking(true).unwrap();
            open(ours, 1, Patience { deadline, cancel: &cancel }).unwrap_err().kind()
        };
        assert_eq!(ask(Instant::now()), Kind::Timeout);
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert_eq!(ask(Instant::now() + Duration::from_secs(60)), Kind::Cancelled);
        drop(theirs);
    }
}
