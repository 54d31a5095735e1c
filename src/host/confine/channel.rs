//! Passes whole messages and file descriptors between a helper and its parent, over a pair of
//! sequential-packet sockets.

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, send, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The maximum number of descriptors in one message.
pub(super) const FDS_MAX: usize = 8;

/// One end of the channel. It is non-blocking: a call that would wait fails with `WouldBlock`.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A received message.
#[derive(Debug)]
pub struct Received {
    /// The length of the message. 0 means that the other end is closed.
    pub len: usize,
    pub fds: Vec<OwnedFd>,
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl Channel {
    /// Creates two connected ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(ours), Self(theirs)))
    }

    /// Returns the helper's end, which the helper inherits as its standard input.
    #[allow(unsafe_code)]
    pub fn inherited() -> Self {
        // SAFETY: a helper uses descriptor 0 for nothing else and calls this function once.
        Self(unsafe { OwnedFd::from_raw_fd(0) })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sends one whole message. Only the parent may send descriptors with it. Fails with
    /// `BrokenPipe` if the other end is closed.
    pub fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        loop {
            // A helper may not use sendmsg(2).
            let sent = if raw.is_empty() {
                send(self.0.as_raw_fd(), message, flags)
            } else {
                sendmsg::<UnixAddr>(
                    self.0.as_raw_fd(),
                    &[IoSlice::new(message)],
                    &rights,
                    flags,
                    None,
                )
            };
            match sent {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Receives one message and drops any descriptors in it, because the parent accepts none from a
    /// helper. Fails with `InvalidData` if the message is longer than `buffer`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // Without room for control data, the kernel closes any descriptors in the message.
        let received = self.receive_message(buffer, &mut [])?;
        Ok(received.len)
    }

    /// Receives one message with its descriptors. Only helpers call this method.
    pub fn receive_with_fds(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
        self.receive_message(buffer, &mut control)
    }

    #[allow(unsafe_code)]
    fn receive_message(&self, buffer: &mut [u8], control: &mut [u8]) -> io::Result<Received> {
        loop {
            let mut parts = [IoSliceMut::new(buffer)];
            let control = (!control.is_empty()).then_some(&mut *control);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = match recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut parts, control, flags)
            {
                Ok(message) => message,
                Err(nix::errno::Errno::EINTR) => continue,
                // The other end was closed before it had read all of our messages. The kernel
                // reports this once (unix(7) does not mention it), before the messages that the
                // other end had sent. So continue, and receive those first.
                Err(nix::errno::Errno::ECONNRESET) => continue,
                Err(e) => return Err(e.into()),
            };
            let mut fds = Vec::new();
            if let Ok(controls) = message.cmsgs() {
                for control in controls {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel has just created these descriptors for this process.
                        fds.extend(
                            raw.into_iter()
                                .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                        );
                    }
                }
            }
            if message.flags.contains(MsgFlags::MSG_TRUNC) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a message on a helper's channel is too long",
                ));
            }
            return Ok(Received {
                len: message.bytes,
                fds,
            });
        }
    }
}
