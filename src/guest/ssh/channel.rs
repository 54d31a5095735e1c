//! Implements an SSH channel directly on libssh2. The channel of the ssh2 crate is freed without
//! the session's lock, cannot send signals, and cannot distinguish exit status 0 from no exit
//! status.

use super::wire::Shared;
use crate::api::exec::{Exit, Pty, PtySize};
use libssh2_sys as raw;
use std::os::raw::{c_char, c_int, c_uint};
use std::ptr::null;
use std::rc::Rc;

/// The result of a libssh2 call. `Ok(None)` means that more bytes must arrive before the call can
/// finish.
pub(super) type Step<T> = Result<Option<T>, ssh2::Error>;

/// How much the guest may send before we read it, for both streams together (RFC 4254, 5.2).
/// libssh2 enforces this limit, which therefore bounds a session's memory. If nobody reads one
/// sink, the other stream stalls after this many bytes.
pub(super) const WINDOW_BYTES: c_uint = 2 * 1024 * 1024;
const PACKET_BYTES: c_uint = 32 * 1024;
/// Maximum number of bytes that one write accepts (`ssh2_channel_write`).
pub(super) const WRITE_BYTES_MAX: usize = 32_700;

/// Buffer size of every read. A read first enlarges the window by an amount that depends on this
/// size. If the adjustment cannot be sent at once because keys are being exchanged, the next read
/// sends the earlier amount but accounts for its own (`ssh2_channel_receive_window_adjust`). If the
/// two differed, libssh2 would drop data that the server sends in between.
pub(super) const READ_BYTES: usize = 64 * 1024;

pub(super) const STDOUT: c_int = 0;
pub(super) const STDERR: c_int = 1;
/// A stream that no server uses. Reading it only processes incoming packets.
const NO_STREAM: c_int = 7;

/// The encoded terminal modes of a pty. They turn IUTF8 on (RFC 4254, 8 and RFC 8160), and
/// TTY_OP_END ends the list. All other modes keep the guest kernel's default.
const PTY_MODES: [u8; 6] = [42, 0, 0, 0, 1, 0];

#[allow(unsafe_code)]
unsafe extern "C" {
    // Declared in libssh2.h of the vendored libssh2; libssh2-sys 0.3.4 has no binding.
    fn libssh2_channel_has_exit_status(channel: *mut raw::LIBSSH2_CHANNEL) -> c_int;
}

pub(in crate::guest) struct Channel {
    raw: *mut raw::LIBSSH2_CHANNEL,
    shared: Rc<Shared>,
    /// Size of the last write if it must be repeated. libssh2 requires the same size again
    /// (`write_bufwrite`).
    offered: Option<usize>,
}

// SAFETY of every call below: `raw` came from libssh2 for the session in `shared`, which lives as
// long as `self`. Both stay on one thread (`Rc`). libssh2 keeps no pointer that it gets beyond the
// call, except for a write, which is repeated with the same number of bytes.
#[allow(unsafe_code)]
impl Channel {
    /// Opens a channel. After `None`, the caller must repeat the call until it succeeds or fails,
    /// and open nothing else before that.
    pub(crate) fn open(shared: &Rc<Shared>) -> Step<Self> {
        const KIND: &str = "session";
        let raw = unsafe {
            raw::libssh2_channel_open_ex(
                shared.raw(),
                KIND.as_ptr().cast::<c_char>(),
                KIND.len() as c_uint,
                WINDOW_BYTES,
                PACKET_BYTES,
                null(),
                0,
            )
        };
        if !raw.is_null() {
            return Ok(Some(Self {
                raw,
                shared: shared.clone(),
                offered: None,
            }));
        }
        match unsafe { raw::libssh2_session_last_errno(shared.raw()) } {
            raw::LIBSSH2_ERROR_EAGAIN => Ok(None),
            rc => Err(ssh2::Error::from_session_error(
                &shared.session.borrow(),
                rc,
            )),
        }
    }

    fn step(&self, rc: isize) -> Step<usize> {
        match rc {
            n if n >= 0 => Ok(Some(n as usize)),
            n if n == raw::LIBSSH2_ERROR_EAGAIN as isize => Ok(None),
            n => Err(ssh2::Error::from_session_error(
                &self.shared.session.borrow(),
                n as c_int,
            )),
        }
    }

    pub(crate) fn request_pty(&mut self, pty: &Pty) -> Step<usize> {
        let rc = unsafe {
            raw::libssh2_channel_request_pty_ex(
                self.raw,
                pty.term.as_ptr().cast::<c_char>(),
                pty.term.len() as c_uint,
                PTY_MODES.as_ptr().cast::<c_char>(),
                PTY_MODES.len() as c_uint,
                c_int::from(pty.size.cols),
                c_int::from(pty.size.rows),
                0,
                0,
            )
        };
        self.step(rc as isize)
    }

    pub(crate) fn resize(&mut self, size: PtySize) -> Step<usize> {
        let (cols, rows) = (c_int::from(size.cols), c_int::from(size.rows));
        let rc = unsafe { raw::libssh2_channel_request_pty_size_ex(self.raw, cols, rows, 0, 0) };
        self.step(rc as isize)
    }

    /// Starts a command of at most `COMMAND_BYTES_MAX` bytes, which fits into a packet of libssh2.
    pub(crate) fn exec(&mut self, command: &[u8]) -> Step<usize> {
        const REQUEST: &str = "exec";
        let rc = unsafe {
            raw::libssh2_channel_process_startup(
                self.raw,
                REQUEST.as_ptr().cast::<c_char>(),
                REQUEST.len() as c_uint,
                command.as_ptr().cast::<c_char>(),
                command.len() as c_uint,
            )
        };
        self.step(rc as isize)
    }

    /// Reads a stream. 0 means that no more output will arrive for this stream.
    pub(crate) fn read(&mut self, stream: c_int, buffer: &mut [u8; READ_BYTES]) -> Step<usize> {
        let rc = unsafe {
            raw::libssh2_channel_read_ex(self.raw, stream, buffer.as_mut_ptr().cast(), buffer.len())
        };
        self.step(rc)
    }

    /// Processes everything that has arrived, without reading a stream.
    pub(crate) fn take_in(&mut self) -> Step<usize> {
        let nothing = &mut [0; READ_BYTES];
        loop {
            let step = self.read(NO_STREAM, nothing);
            if step.is_err() || !self.shared.has_more() {
                return step;
            }
        }
    }

    /// Writes a part of `bytes`. After `None`, the caller must repeat the call with the same bytes,
    /// and may append more to them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Step<usize> {
        let n = self.offered.unwrap_or(bytes.len().min(WRITE_BYTES_MAX));
        let bytes = &bytes[..n];
        let rc =
            unsafe { raw::libssh2_channel_write_ex(self.raw, STDOUT, bytes.as_ptr().cast(), n) };
        let step = self.step(rc);
        self.offered = if matches!(step, Ok(None)) {
            Some(n)
        } else {
            None
        };
        step
    }

    pub(crate) fn send_eof(&mut self) -> Step<usize> {
        let rc = unsafe { raw::libssh2_channel_send_eof(self.raw) };
        self.step(rc as isize)
    }

    /// True if the server has closed the channel. Some of its output may still be unread.
    pub(crate) fn remote_closed(&mut self) -> Result<bool, ssh2::Error> {
        match unsafe { raw::libssh2_channel_wait_closed(self.raw) } {
            // libssh2 refuses this call until the server has announced the end of the output.
            raw::LIBSSH2_ERROR_INVAL => Ok(false),
            rc => self.step(rc as isize).map(|done| done.is_some()),
        }
    }

    /// True if the server has announced the end of the output and all output has been read.
    pub(crate) fn is_drained(&self) -> bool {
        unsafe { raw::libssh2_channel_eof(self.raw) == 1 }
    }

    /// Returns how the command ended, if the server has reported it with `exit-signal` or
    /// `exit-status` (RFC 4254, 6.10).
    pub(crate) fn exit(&self) -> Option<Exit> {
        if let Some(name) = self.exit_signal() {
            return Some(Exit::Signal(name));
        }
        if unsafe { libssh2_channel_has_exit_status(self.raw) } != 1 {
            return None;
        }
        let status = unsafe { raw::libssh2_channel_get_exit_status(self.raw) };
        // The status is a uint32 on the wire; exit(3) keeps 8 bits of it.
        Some(Exit::Status((status & 0xff) as u8))
    }

    fn exit_signal(&self) -> Option<String> {
        let (mut name, mut len) = (std::ptr::null_mut::<c_char>(), 0);
        let unset = std::ptr::null_mut();
        let rc = unsafe {
            raw::libssh2_channel_get_exit_signal(
                self.raw,
                &mut name,
                &mut len,
                unset,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        if rc != 0 || name.is_null() {
            return None;
        }
        let bytes = unsafe { std::slice::from_raw_parts(name.cast::<u8>(), len) }.to_vec();
        unsafe { raw::libssh2_free(self.shared.raw(), name.cast()) };
        // The name comes from the guest, so accept only a short name with characters that signal
        // names have.
        let good = |b: &u8| b.is_ascii_alphanumeric();
        Some(
            String::from_utf8(bytes)
                .ok()
                .filter(|s| s.len() <= 16 && s.bytes().all(|b| good(&b)))
                .unwrap_or_else(|| "unknown".into()),
        )
    }
}

impl Drop for Channel {
    /// Frees the channel. If the server has not closed it, libssh2 keeps the channel until the
    /// session is freed.
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: as above; `raw` is not used after this.
        unsafe { raw::libssh2_channel_free(self.raw) };
    }
}
