//! libssh2 without sockets: it reads from and writes to memory, and [`Shared`] moves the bytes.
//!
//! Why: a libssh2 call that could send only part of a packet must be repeated before any other call that sends
//! (`transport_send_existing`), and its reads go on for as long as the peer sends. With buffers between, a send
//! never stops half-way, and a round of reading is bounded, whatever the peer does.

use crate::error::{Error, Result};
use libssh2_sys as raw;
use nix::poll::{PollFd, PollFlags};
use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::raw::{c_int, c_void};
use std::rc::Rc;

/// Most bytes taken from the socket before everything else is looked at again.
const ROUND_BYTES: usize = 256 * 1024;
/// With so much unsent, no more of the command's input is encrypted.
const OUTBOX_BYTES_HIGH: usize = 256 * 1024;

/// Bytes on their way. Behind a `RefCell`, since libssh2 calls back into it.
#[derive(Default)]
struct Wire {
    inbox: Vec<u8>,
    inbox_at: usize,
    outbox: Vec<u8>,
    outbox_at: usize,
    /// The peer will send no more. libssh2 is not told: it would give nothing of what it has taken in.
    ended: bool,
    /// Sending failed: what is to be sent goes nowhere.
    unsendable: bool,
    /// The session goes.
    shut: bool,
}

/// One session, its buffers and its socket. `Rc` and the raw pointers keep it on one thread.
pub(in crate::guest) struct Shared {
    // Fields drop in this order: the session needs the wire while it goes.
    pub session: RefCell<ssh2::Session>,
    raw: *mut raw::LIBSSH2_SESSION,
    wire: Box<RefCell<Wire>>,
    socket: Rc<TcpStream>,
    scratch: RefCell<Vec<u8>>,
    /// Bytes that ever came.
    received: Cell<u64>,
    /// Of these, what libssh2 had taken when [`Shared::has_more`] was asked last.
    taken: Cell<u64>,
}

type Callback = unsafe extern "C" fn();

#[allow(unsafe_code)]
unsafe extern "C" {
    // libssh2.h of the vendored libssh2; not bound by libssh2-sys 0.3.4.
    fn libssh2_session_callback_set2(session: *mut raw::LIBSSH2_SESSION, kind: c_int, callback: Callback) -> Callback;
}
/// libssh2.h.
const LIBSSH2_CALLBACK_SEND: c_int = 5;
const LIBSSH2_CALLBACK_RECV: c_int = 6;

/// `LIBSSH2_RECV_FUNC`: minus errno on failure, 0 at the end.
#[allow(unsafe_code)]
unsafe extern "C" fn receive(_fd: c_int, buffer: *mut c_void, len: usize, _flags: c_int, place: *mut *mut c_void) -> isize {
    // SAFETY: `place` is the session's abstract pointer, set in `Shared::new` to the wire, which outlives the
    // session; the RefCell is not borrowed while libssh2 runs.
    let mut wire = unsafe { &*(*place).cast::<RefCell<Wire>>() }.borrow_mut();
    let n = len.min(wire.inbox.len() - wire.inbox_at);
    if n == 0 {
        return if wire.shut { 0 } else { -(libc::EAGAIN as isize) };
    }
    // SAFETY: libssh2 gives room for `len` bytes, and `n` is at most that.
    unsafe { std::ptr::copy_nonoverlapping(wire.inbox[wire.inbox_at..].as_ptr(), buffer.cast::<u8>(), n) };
    wire.inbox_at += n;
    n as isize
}

/// `LIBSSH2_SEND_FUNC`: takes everything, always.
#[allow(unsafe_code)]
unsafe extern "C" fn send(_fd: c_int, bytes: *const c_void, len: usize, _flags: c_int, place: *mut *mut c_void) -> isize {
    // SAFETY: as in `receive`.
    let mut wire = unsafe { &*(*place).cast::<RefCell<Wire>>() }.borrow_mut();
    // SAFETY: libssh2 gives `len` bytes.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) };
    wire.outbox.extend_from_slice(bytes);
    len as isize
}

impl Shared {
    /// Around a socket that is connected and non-blocking.
    #[allow(unsafe_code)]
    pub fn new(socket: TcpStream) -> Result<Rc<Self>> {
        let session = ssh2::Session::new().map_err(|e| Error::internal("make an ssh session").with_source(e))?;
        session.set_blocking(false);
        let raw: *mut raw::LIBSSH2_SESSION = {
            let mut locked = session.raw();
            &mut *locked
        };
        let wire = Box::new(RefCell::new(Wire::default()));
        let socket = Rc::new(socket);
        // SAFETY: `raw` is this live session. The box is at a fixed address and outlives it (field order). The
        // types of the two callbacks are those that libssh2 casts them back to (LIBSSH2_RECV_FUNC, _SEND_FUNC).
        unsafe {
            *raw::libssh2_session_abstract(raw) = (&raw const *wire).cast_mut().cast();
            let receive: Callback = std::mem::transmute(receive as *const ());
            let send: Callback = std::mem::transmute(send as *const ());
            libssh2_session_callback_set2(raw, LIBSSH2_CALLBACK_RECV, receive);
            libssh2_session_callback_set2(raw, LIBSSH2_CALLBACK_SEND, send);
        }
        let session = RefCell::new(session);
        session.borrow_mut().set_tcp_stream(socket.clone());
        let scratch = RefCell::new(vec![0; ROUND_BYTES]);
        Ok(Rc::new(Self { session, raw, wire, socket, scratch, received: Cell::new(0), taken: Cell::new(0) }))
    }

    /// Valid as long as `self`.
    pub(super) fn raw(&self) -> *mut raw::LIBSSH2_SESSION {
        self.raw
    }

    /// Takes what the socket has, up to a round's worth. Whether anything came. A broken connection is as ended.
    pub fn fill(&self) -> bool {
        let mut wire = self.wire.borrow_mut();
        if wire.inbox_at == wire.inbox.len() {
            wire.inbox.clear();
            wire.inbox_at = 0;
        }
        if wire.ended || wire.inbox.len() >= ROUND_BYTES {
            return false;
        }
        let mut scratch = self.scratch.borrow_mut();
        match (&*self.socket).read(&mut scratch) {
            Ok(0) => wire.ended = true,
            Ok(n) => {
                wire.inbox.extend_from_slice(&scratch[..n]);
                self.received.set(self.received.get() + n as u64);
                return true;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => wire.ended = true,
        }
        false
    }

    /// Sends what is to be sent, as far as the socket takes it. A failure shows when the peer's end is read.
    pub fn flush(&self) {
        let mut wire = self.wire.borrow_mut();
        let Wire { outbox, outbox_at, unsendable, .. } = &mut *wire;
        while *outbox_at < outbox.len() && !*unsendable {
            match (&*self.socket).write(&outbox[*outbox_at..]) {
                Ok(n) => *outbox_at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => *unsendable = true,
            }
        }
        outbox.clear();
        *outbox_at = 0;
    }

    /// What the socket is to be polled for. Nothing once the peer has ended it: it would always be ready.
    pub fn poll_fd(&self) -> Option<PollFd<'_>> {
        let wire = self.wire.borrow();
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, wire.outbox_at < wire.outbox.len());
        (!wire.ended).then(|| PollFd::new(self.socket.as_fd(), events))
    }

    pub fn outbox_is_high(&self) -> bool {
        let wire = self.wire.borrow();
        wire.outbox.len() - wire.outbox_at >= OUTBOX_BYTES_HIGH
    }
    /// Grows when a call sends.
    pub fn outbox_len(&self) -> usize {
        self.wire.borrow().outbox.len()
    }
    /// The peer will send no more, and everything that it sent has been taken in.
    pub fn ended(&self) -> bool {
        let wire = self.wire.borrow();
        wire.ended && wire.inbox_at == wire.inbox.len()
    }
    /// libssh2 left some of what has come, and took some since this was asked last: it is to be called again before anybody
    /// waits for more. With a cipher that needs whole packets it stops where a packet goes beyond its buffer
    /// (`ssh2_transport_read`), and trusts that the socket is still readable.
    pub fn has_more(&self) -> bool {
        let wire = self.wire.borrow();
        let left = wire.inbox.len() - wire.inbox_at;
        let taken = self.received.get() - left as u64;
        left > 0 && self.taken.replace(taken) != taken
    }
    pub fn received(&self) -> u64 {
        self.received.get()
    }
}

impl Drop for Shared {
    /// From now on every wait inside libssh2 fails at once, so that freeing the session frees its channels too
    /// and waits for nobody.
    fn drop(&mut self) {
        let mut wire = self.wire.borrow_mut();
        wire.inbox.clear();
        wire.inbox_at = 0;
        wire.shut = true;
        drop(wire);
        let _ = self.socket.shutdown(Shutdown::Both); // Not connected any more: as good.
    }
}
