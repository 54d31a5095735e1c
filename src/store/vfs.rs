//! Combines SQLite's writes to the write-ahead log.
//!
//! SQLite writes the header and the page of every frame of its log separately. A commit of four
//! pages takes eight system calls, which together take a tenth as long as the fdatasync(2) after
//! them. [`register`] adds a VFS (sqlite.org/vfs.html) that collects writes to a log as long as
//! each begins where the previous one ended. The VFS writes the collected bytes as one piece before
//! the log is synced, read, truncated or closed. It leaves all other calls and all other files to
//! SQLite's own VFS.
//!
//! This loses nothing, because what SQLite has not synced may be lost in a crash anyway. If writing
//! a piece fails, the call that needed the write, usually the sync, returns the error to SQLite.

#![allow(unsafe_code)] // SQLite is a C library; its files are tables of functions.

use rusqlite::ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// The name of the VFS, for [`rusqlite::Connection::open_with_flags_and_vfs`].
pub(super) const NAME: &CStr = c"fcd";
/// Maximum number of bytes that are collected before they are written. A longer transaction is
/// written in several pieces. SQLite's own VFS writes at most 2^17 - 1 bytes at once and reports a
/// longer write as a full disk (`seekAndWriteFd` in `os_unix.c`).
pub(super) const PIECE_BYTES_MAX: usize = 64 * 1024;

/// SQLite's view of an open log. The file of SQLite's own VFS follows this struct in memory.
#[repr(C)]
struct Log {
    base: sqlite3_file,
    /// The collected bytes. They belong to this log: they are allocated when the log is opened and
    /// freed when it is closed.
    piece: *mut Piece,
}

/// Bytes that are collected for one write, and their offset in the log.
struct Piece {
    offset: sqlite3_int64,
    bytes: Vec<u8>,
}

/// SQLite's default VFS, which opens all files. SQLite keeps it in static memory, so its address
/// stays valid.
struct Default(*mut sqlite3_vfs);
// SAFETY: SQLite never changes a registered VFS of its own, and its functions may be called by any
// thread.
unsafe impl Send for Default {}
// SAFETY: as above.
unsafe impl Sync for Default {}

static DEFAULT: OnceLock<Default> = OnceLock::new();

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    // These methods belong to later versions of the interface. SQLite calls them only for a
    // database file.
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

/// Adds the VFS [`NAME`], once per process.
pub(super) fn register() {
    DEFAULT.get_or_init(|| {
        // SAFETY: the default VFS exists after this call, which initialises SQLite. The copy lives
        // forever, as a registered VFS must.
        unsafe {
            let default = ffi::sqlite3_vfs_find(std::ptr::null());
            assert!(!default.is_null(), "SQLite has no default VFS");
            let mut vfs = *default;
            vfs.zName = NAME.as_ptr();
            vfs.szOsFile += size_of::<Log>() as c_int;
            vfs.xOpen = Some(open);
            let status = ffi::sqlite3_vfs_register(Box::leak(Box::new(vfs)), 0);
            assert_eq!(status, ffi::SQLITE_OK, "SQLite refuses a VFS");
            Default(default)
        }
    });
}

/// Opens a log as a [`Log`], and every other file with SQLite's own VFS.
unsafe extern "C" fn open(
    _: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    let Some(default) = DEFAULT.get() else {
        return ffi::SQLITE_CANTOPEN;
    };
    // SAFETY: SQLite gives `szOsFile` bytes at `file`, enough for the file of the default VFS and a
    // `Log`.
    unsafe {
        let Some(open) = (*default.0).xOpen else {
            return ffi::SQLITE_CANTOPEN;
        };
        if flags & ffi::SQLITE_OPEN_WAL == 0 {
            return open(default.0, name, file, flags, out);
        }
        // A null pointer means that nothing is open, so SQLite does not close the file if opening
        // fails.
        (*file).pMethods = std::ptr::null();
        let status = open(default.0, name, beneath(file), flags, out);
        if status == ffi::SQLITE_OK {
            let piece = Piece {
                offset: 0,
                bytes: Vec::new(),
            };
            file.cast::<Log>().write(Log {
                base: sqlite3_file {
                    pMethods: &raw const METHODS,
                },
                piece: Box::into_raw(Box::new(piece)),
            });
        }
        status
    }
}

/// Returns the file of SQLite's own VFS, which is stored right after our [`Log`].
///
/// # Safety
/// `file` points to a [`Log`] of SQLite.
unsafe fn beneath(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: see `open`.
    unsafe { file.cast::<Log>().add(1).cast() }
}

/// Writes the collected bytes, then calls a method of the file beneath.
///
/// # Safety
/// `file` is an open [`Log`].
unsafe fn after_flush(
    file: *mut sqlite3_file,
    call: impl FnOnce(&sqlite3_io_methods, *mut sqlite3_file) -> Option<c_int>,
) -> c_int {
    // SAFETY: SQLite never calls two methods of one file at the same time, so nothing else uses its
    // piece.
    unsafe {
        let piece = &mut *(*file.cast::<Log>()).piece;
        let status = flush(file, piece);
        if status != ffi::SQLITE_OK {
            status
        } else {
            directly(file, call)
        }
    }
}

/// Calls a method of the file beneath.
///
/// # Safety
/// `file` is an open [`Log`].
unsafe fn directly(
    file: *mut sqlite3_file,
    call: impl FnOnce(&sqlite3_io_methods, *mut sqlite3_file) -> Option<c_int>,
) -> c_int {
    // SAFETY: an open log has an open file beneath, and an open file has methods.
    unsafe {
        let file = beneath(file);
        call(&*(*file).pMethods, file).unwrap_or(ffi::SQLITE_IOERR)
    }
}

/// Writes the collected bytes. They are dropped even after an error, because SQLite then writes
/// them again or gives up.
///
/// # Safety
/// `file` is an open [`Log`], and `piece` is its own.
unsafe fn flush(file: *mut sqlite3_file, piece: &mut Piece) -> c_int {
    if piece.bytes.is_empty() {
        return ffi::SQLITE_OK;
    }
    // SAFETY: the bytes live until the call returns.
    let status = unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xWrite?)(
                beneath,
                piece.bytes.as_ptr().cast(),
                piece.bytes.len() as c_int,
                piece.offset,
            ))
        })
    };
    piece.bytes.clear();
    status
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    bytes: *const c_void,
    len: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives `len` bytes, and calls the methods of one file one after the other.
    unsafe {
        let piece = &mut *(*file.cast::<Log>()).piece;
        let bytes = std::slice::from_raw_parts(bytes.cast::<u8>(), len as usize);
        let follows = piece.offset + piece.bytes.len() as sqlite3_int64 == offset;
        if !follows || piece.bytes.len() + bytes.len() > PIECE_BYTES_MAX {
            let status = flush(file, piece);
            if status != ffi::SQLITE_OK {
                return status;
            }
        }
        if piece.bytes.is_empty() {
            piece.offset = offset;
        }
        piece.bytes.extend_from_slice(bytes);
        ffi::SQLITE_OK
    }
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: SQLite calls no method of a closed file, so the piece is freed once.
    unsafe {
        let mut piece = Box::from_raw((*file.cast::<Log>()).piece);
        let flushed = flush(file, &mut piece);
        let closed = directly(file, |methods, beneath| Some((methods.xClose?)(beneath)));
        (*file).pMethods = std::ptr::null();
        if flushed != ffi::SQLITE_OK {
            flushed
        } else {
            closed
        }
    }
}

unsafe extern "C" fn read(
    file: *mut sqlite3_file,
    into: *mut c_void,
    len: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: the arguments come from SQLite.
    unsafe {
        after_flush(file, |methods, beneath| {
            Some((methods.xRead?)(beneath, into, len, offset))
        })
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        after_flush(file, |methods, beneath| {
            Some((methods.xTruncate?)(beneath, size))
        })
    }
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, flags: c_int) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        after_flush(file, |methods, beneath| {
            Some((methods.xSync?)(beneath, flags))
        })
    }
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        after_flush(file, |methods, beneath| {
            Some((methods.xFileSize?)(beneath, size))
        })
    }
}

unsafe extern "C" fn lock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xLock?)(beneath, level))
        })
    }
}

unsafe extern "C" fn unlock(file: *mut sqlite3_file, level: c_int) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xUnlock?)(beneath, level))
        })
    }
}

unsafe extern "C" fn check_reserved_lock(file: *mut sqlite3_file, is_locked: *mut c_int) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xCheckReservedLock?)(beneath, is_locked))
        })
    }
}

unsafe extern "C" fn file_control(
    file: *mut sqlite3_file,
    operation: c_int,
    argument: *mut c_void,
) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        after_flush(file, |methods, beneath| {
            Some((methods.xFileControl?)(beneath, operation, argument))
        })
    }
}

unsafe extern "C" fn sector_size(file: *mut sqlite3_file) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xSectorSize?)(beneath))
        })
    }
}

unsafe extern "C" fn device_characteristics(file: *mut sqlite3_file) -> c_int {
    // SAFETY: as in `read`.
    unsafe {
        directly(file, |methods, beneath| {
            Some((methods.xDeviceCharacteristics?)(beneath))
        })
    }
}
