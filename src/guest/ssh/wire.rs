//! Runs libssh2 without sockets: it reads from and writes to memory, and [`Shared`] moves the
//! bytes.
//!
//! A libssh2 call that sent only a part of a packet must be repeated before any other call that
//! sends (`transport_send_existing`), and its reads continue for as long as the peer sends. With
//! buffers in between, a send never stops half-way, and each round of reading is bounded.

use crate::error::{Error, Result};
use libssh2_sys as raw;
use nix::poll::{PollFd, PollFlags};
use std::cell::{Cell, RefCell};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::raw::{c_int, c_void};
use std::rc::Rc;

/// Maximum number of bytes to take from the socket before the session turns to something else.
const ROUND_BYTES: usize = 256 * 1024;
/// While at least this many bytes are unsent, no more of the command's input is encrypted.
const OUTBOX_BYTES_HIGH: usize = 256 * 1024;

/// Bytes in transit. libssh2's callbacks reach them through a `RefCell`.
#[derive(Default)]
struct Wire {
    inbox: Vec<u8>,
    inbox_at: usize,
    outbox: Vec<u8>,
    outbox_at: usize,
    /// True if the peer will send no more. libssh2 is not informed, because it would then discard
    /// what it has buffered.
    ended: bool,
    /// True if sending has failed. Further output is discarded.
    unsendable: bool,
    /// True while the session is being freed. libssh2 then reads the end of the stream.
    shut: bool,
}

/// One session, its buffers and its socket. `Rc` and the raw pointers keep it on one thread.
pub(in crate::guest) struct Shared {
    // Fields drop in this order: the session uses the wire while it is freed.
    pub session: RefCell<ssh2::Session>,
    raw: *mut raw::LIBSSH2_SESSION,
    wire: Box<RefCell<Wire>>,
    socket: Rc<TcpStream>,
    scratch: RefCell<Vec<u8>>,
    /// Total number of bytes received.
    received: Cell<u64>,
    /// How many received bytes libssh2 had consumed at the last call of [`Shared::has_more`].
    taken: Cell<u64>,
}

type Callback = unsafe extern "C" fn();

#[allow(unsafe_code)]
unsafe extern "C" {
    // Declared in libssh2.h of the vendored libssh2; libssh2-sys 0.3.4 has no binding.
    fn libssh2_session_callback_set2(
        session: *mut raw::LIBSSH2_SESSION,
        kind: c_int,
        callback: Callback,
    ) -> Callback;
}
/// Values from libssh2.h.
const LIBSSH2_CALLBACK_SEND: c_int = 5;
const LIBSSH2_CALLBACK_RECV: c_int = 6;

/// Implements `LIBSSH2_RECV_FUNC`. Returns a negative errno if there is nothing to read, or 0 once
/// the session is being freed.
#[allow(unsafe_code)]
unsafe extern "C" fn receive(
    _fd: c_int,
    buffer: *mut c_void,
    len: usize,
    _flags: c_int,
    place: *mut *mut c_void,
) -> isize {
    // SAFETY: `place` is the session's abstract pointer, which `Shared::new` set to the wire. The
    // wire outlives the session, and the RefCell is not borrowed while libssh2 runs.
    let mut wire = unsafe { &*(*place).cast::<RefCell<Wire>>() }.borrow_mut();
    let n = len.min(wire.inbox.len() - wire.inbox_at);
    if n == 0 {
        return if wire.shut {
            0
        } else {
            -(libc::EAGAIN as isize)
        };
    }
    // SAFETY: libssh2 provides space for `len` bytes, and `n` is at most that.
    unsafe {
        std::ptr::copy_nonoverlapping(wire.inbox[wire.inbox_at..].as_ptr(), buffer.cast::<u8>(), n)
    };
    wire.inbox_at += n;
    n as isize
}

/// Implements `LIBSSH2_SEND_FUNC`. Always accepts all bytes.
#[allow(unsafe_code)]
unsafe extern "C" fn send(
    _fd: c_int,
    bytes: *const c_void,
    len: usize,
    _flags: c_int,
    place: *mut *mut c_void,
) -> isize {
    // SAFETY: as in `receive`.
    let mut wire = unsafe { &*(*place).cast::<RefCell<Wire>>() }.borrow_mut();
    // SAFETY: libssh2 provides `len` bytes.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), len) };
    wire.outbox.extend_from_slice(bytes);
    len as isize
}

impl Shared {
    /// Creates a session on a connected, non-blocking socket.
    #[allow(unsafe_code)]
    pub(crate) fn new(socket: TcpStream) -> Result<Rc<Self>> {
        let session = ssh2::Session::new()
            .map_err(|e| Error::internal("make an ssh session").with_source(e))?;
        session.set_blocking(false);
        let raw: *mut raw::LIBSSH2_SESSION = {
            let mut locked = session.raw();
            &mut *locked
        };
        let wire = Box::new(RefCell::new(Wire::default()));
        let socket = Rc::new(socket);
        // SAFETY: `raw` is this live session. The box has a fixed address and outlives it (field
        // order). libssh2 casts the two callbacks back to these types (LIBSSH2_RECV_FUNC,
        // _SEND_FUNC).
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
        Ok(Rc::new(Self {
            session,
            raw,
            wire,
            socket,
            scratch,
            received: Cell::new(0),
            taken: Cell::new(0),
        }))
    }

    /// Returns the raw session, which is valid as long as `self`.
    pub(super) fn raw(&self) -> *mut raw::LIBSSH2_SESSION {
        self.raw
    }

    /// Takes up to one round of bytes from the socket. Returns true if anything arrived. A broken
    /// connection counts as ended.
    pub(crate) fn fill(&self) -> bool {
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
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => wire.ended = true,
        }
        false
    }

    /// Sends as much as the socket accepts. After a failure, the outbox is discarded; the next read
    /// of the socket shows that the connection is lost.
    pub(crate) fn flush(&self) {
        let mut wire = self.wire.borrow_mut();
        let Wire {
            outbox,
            outbox_at,
            unsendable,
            ..
        } = &mut *wire;
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

    /// Returns the events to poll the socket for, or `None` after the peer has ended the stream,
    /// because the socket would then always be ready.
    pub(crate) fn poll_fd(&self) -> Option<PollFd<'_>> {
        let wire = self.wire.borrow();
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, wire.outbox_at < wire.outbox.len());
        (!wire.ended).then(|| PollFd::new(self.socket.as_fd(), events))
    }

    pub(crate) fn outbox_is_high(&self) -> bool {
        let wire = self.wire.borrow();
        wire.outbox.len() - wire.outbox_at >= OUTBOX_BYTES_HIGH
    }
    /// Returns the size of the outbox, including bytes that a partial flush has already sent. It
    /// grows when a libssh2 call sends.
    pub(crate) fn outbox_len(&self) -> usize {
        self.wire.borrow().outbox.len()
    }
    /// True if the peer will send no more and everything that it sent has been consumed.
    pub(crate) fn ended(&self) -> bool {
        let wire = self.wire.borrow();
        wire.ended && wire.inbox_at == wire.inbox.len()
    }
    /// True if libssh2 left some bytes unread and consumed others since the last call of this
    /// function. libssh2 must then be called again before waiting for more: with a cipher that
    /// needs whole packets, it stops at a packet that exceeds its buffer (`ssh2_transport_read`),
    /// and assumes that the socket is still readable.
    pub(crate) fn has_more(&self) -> bool {
        let wire = self.wire.borrow();
        let left = wire.inbox.len() - wire.inbox_at;
        let taken = self.received.get() - left as u64;
        left > 0 && self.taken.replace(taken) != taken
    }
    pub(crate) fn received(&self) -> u64 {
        self.received.get()
    }
}

impl Drop for Shared {
    /// Makes every later wait inside libssh2 fail at once, so that freeing the session also frees
    /// its channels and waits for nobody.
    fn drop(&mut self) {
        let mut wire = self.wire.borrow_mut();
        wire.inbox.clear();
        wire.inbox_at = 0;
        wire.shut = true;
        drop(wire);
        let _ = self.socket.shutdown(Shutdown::Both); // It may be disconnected already.
    }
}
