//! Whole messages and descriptors between a helper and its parent, over a pair of sequential-packet
//! sockets.

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, send, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Most descriptors in one message.
pub(super) const FDS_MAX: usize = 8;

/// One end. Non-blocking: where a call would wait it fails with `WouldBlock`.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A message that came.
#[derive(Debug)]
pub struct Received {
    /// Its length; 0 is the end of the channel.
    pub len: usize,
    pub fds: Vec<OwnedFd>,
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl Channel {
    /// Two connected ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(ours), Self(theirs)))
    }

    /// The helper's end, which it inherited as its standard input.
    #[allow(unsafe_code)]
    pub fn inherited() -> Self {
        // SAFETY: a helper uses its descriptor 0 for nothing else and makes this once.
        Self(unsafe { OwnedFd::from_raw_fd(0) })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sends one message, whole; only the parent may send descriptors with it. `BrokenPipe` when
    /// the other side is gone.
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

    /// Receives one message. Descriptors in it are dropped: this is for the parent, who wants none
    /// from a helper. `InvalidData`: it is longer than `buffer`.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // Without room for control data the kernel closes what descriptors come.
        let received = self.receive_message(buffer, &mut [])?;
        Ok(received.len)
    }

    /// Receives one message with its descriptors: for the helper.
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
                // The other side is gone and left a message of ours unread (unix(7) does not say
                // so). The kernel reports that once, before what the other side had sent: its last
                // message is still to come, then the end.
                Err(nix::errno::Errno::ECONNRESET) => continue,
                Err(e) => return Err(e.into()),
            };
            let mut fds = Vec::new();
            if let Ok(controls) = message.cmsgs() {
                for control in controls {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        // SAFETY: the kernel has just made these descriptors for us.
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
                    "a message of a helper's channel is too long",
                ));
            }
            return Ok(Received {
                len: message.bytes,
                fds,
            });
        }
    }
}
