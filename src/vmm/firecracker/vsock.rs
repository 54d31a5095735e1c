//! Connects to ports of a guest's vsock (docs/vsock.md, v1.16). The VMM listens on a Unix socket,
//! and the first line of a connection selects the port. Guests cannot connect to the host, because
//! fcd does not create the socket `vsock_PORT` that this requires.

use crate::error::{Error, Kind, Result};
use crate::vmm::conversation::Conversation;
use crate::vmm::dial::Deadline;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The socket's name in the VMM's working directory.
pub(super) const SOCKET: &str = "vsock";
/// The CID of every guest. VMs can share it because their sockets have different paths. It is the
/// first CID without a special meaning (vsock(7)).
pub(super) const GUEST_CID: u32 = 3;
/// The length limit of an answer such as `OK 1073741824`.
const ANSWER_BYTES_MAX: usize = 32;

/// Checks that the VMM has a vsock. A VMM that was started without a vsock has no such socket.
pub(super) fn require(place: &OwnedFd) -> Result<()> {
    crate::locks::may_block("file access");
    match rustix::fs::statat(place, SOCKET, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(()),
        Err(rustix::io::Errno::NOENT) => Err(Error::new(
            Kind::Unsupported,
            "the VMM was started without a vsock",
        )
        .hint("fcctl vm restart")),
        Err(e) => Err(Error::io(
            "look for the VMM's vsock",
            std::io::Error::from(e),
        )),
    }
}

/// Connects a non-blocking stream to the guest's `port`, and then makes the stream blocking.
pub(super) fn open(stream: UnixStream, port: u32, deadline: Deadline<'_>) -> Result<UnixStream> {
    let doing = "connect to the guest's port";
    let mut conversation = Conversation::new(stream, deadline);
    let line = read_answer(&mut conversation, port, doing).map_err(|e| match e.kind() {
        Kind::VmmFailed => refused(port),
        Kind::Timeout => silent(doing),
        _ => e,
    })?;
    if !line.starts_with(b"OK ") {
        return Err(Error::new(
            Kind::VmmFailed,
            format!("{doing}: the VMM's answer is not as documented"),
        ));
    }
    let stream = conversation.into_stream();
    stream
        .set_nonblocking(false)
        .map_err(|e| Error::io(doing, e))?;
    Ok(stream)
}

/// Requests a connection to the port, and returns the first line of the VMM's answer.
fn read_answer(conversation: &mut Conversation<'_>, port: u32, doing: &str) -> Result<Vec<u8>> {
    conversation.send(format!("CONNECT {port}\n").as_bytes(), doing)?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < ANSWER_BYTES_MAX {
        // Read one byte at a time, because the bytes after the line belong to the guest's stream.
        let mut byte = [0];
        conversation.read(&mut byte, doing)?;
        line.extend(byte);
    }
    Ok(line)
}

/// Returns the error for a hang-up, which is the VMM's only way to refuse a port.
fn refused(port: u32) -> Error {
    Error::new(
        Kind::GuestUnavailable,
        format!("nothing in the guest listens on vsock port {port}"),
    )
    .hint(format!(
        "start a server in the guest: socat VSOCK-LISTEN:{port},fork -"
    ))
}

fn silent(doing: &str) -> Error {
    Error::new(
        Kind::Timeout,
        format!("{doing}: the guest does not respond"),
    )
    .hint("load the driver in the guest: modprobe vmw_vsock_virtio_transport")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locks::Cancel;
    use crate::sched::Instant;
    use std::io::{Read, Write};
    use std::time::Duration;

    /// Connects to a VMM that sends `says` and then hangs up.
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
