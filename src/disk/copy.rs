//! Copies sparse files without filling their holes.

use super::{Cloned, Method, ficlone};
use crate::error::{Error, Result};
use crate::locks::Cancel;
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, seek};
use rustix::io::Errno;
use std::fs::File;

/// The number of bytes to copy between two checks of the cancel token.
const STEP_BYTES: u64 = 16 << 20;
/// The smallest run of zeroes that is turned into a hole. The extents of smaller holes would cost
/// more space than they free.
const PUNCH_BYTES: usize = 64 << 10;

/// Makes the empty file `to` share the blocks of `from`, or copies them if the file system cannot
/// share them. Returns the method that was used. `progress` receives the position and the file's
/// length.
pub fn share_or_copy(
    from: &File,
    to: &File,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Method> {
    match ficlone(to, from).map_err(|e| Error::io("share its blocks", e))? {
        Cloned::Yes => Ok(Method::Reflink),
        Cloned::No(_) => copy_sparse(from, to, cancel, progress).map(|()| Method::Copy),
    }
}

/// Copies the data of `from` to `to`, which must be empty. `progress` receives the position and the
/// file's length.
pub(super) fn copy_sparse(
    from: &File,
    to: &File,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io("copy a disk", e);
    let len = from.metadata().map_err(io)?.len();
    to.set_len(len).map_err(io)?;
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, len).map_err(|e| io(e.into()))? {
        at = start;
        while at < end {
            if cancel.is_cancelled() {
                return Err(crate::host::wait::cancelled("copy a disk", cancel));
            }
            at += copy_step(from, to, at, (end - at).min(STEP_BYTES)).map_err(io)?;
            progress(at, len);
        }
    }
    progress(len, len);
    Ok(())
}

/// Returns the next range of data at or after `at` (SEEK_DATA, lseek(2)), or None if only a hole
/// follows.
fn next_data(file: &File, at: u64, len: u64) -> rustix::io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e),
    };
    Ok(Some((start, seek(file, SeekFrom::Hole(start))?.min(len))))
}

fn copy_step(from: &File, to: &File, at: u64, bytes: u64) -> std::io::Result<u64> {
    match copy_some(from, at, to, at, bytes)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        copied => Ok(copied),
    }
}

/// Copies bytes to another offset. Bytes beyond the end of `from` are zero.
pub(super) fn copy_range(
    from: &File,
    mut from_at: u64,
    to: &File,
    mut to_at: u64,
    mut bytes: u64,
) -> std::io::Result<()> {
    let len = from.metadata()?.len();
    while bytes > 0 {
        let rest = len.saturating_sub(from_at).min(bytes);
        let copied = if rest == 0 {
            0
        } else {
            copy_some(from, from_at, to, to_at, rest)?
        };
        if copied == 0 {
            return punch_range(to, to_at, bytes);
        }
        (from_at, to_at, bytes) = (from_at + copied, to_at + copied, bytes - copied);
    }
    Ok(())
}

/// Copies at most this many bytes. Returns 0 at the end of `from`.
fn copy_some(from: &File, from_at: u64, to: &File, to_at: u64, bytes: u64) -> std::io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let (mut offset_in, mut offset_out) = (from_at, to_at);
    let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
    match copy_file_range(
        from,
        Some(&mut offset_in),
        to,
        Some(&mut offset_out),
        wanted,
    ) {
        Ok(copied) => Ok(copied as u64),
        // copy_file_range(2) does not work between these file systems.
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
            let mut buffer = vec![0; wanted.min(1 << 20)];
            let read = from.read_at(&mut buffer, from_at)?;
            to.write_all_at(&buffer[..read], to_at)?;
            Ok(read as u64)
        }
        Err(e) => Err(e.into()),
    }
}

/// Makes a range zero.
pub(super) fn punch_range(file: &File, mut at: u64, mut bytes: u64) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, at, bytes) {
        Ok(()) => return Ok(()),
        // The file system does not support holes.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    let zeroes = vec![0; PUNCH_BYTES];
    while bytes > 0 {
        let step = bytes.min(PUNCH_BYTES as u64);
        file.write_all_at(&zeroes[..step as usize], at)?;
        (at, bytes) = (at + step, bytes - step);
    }
    Ok(())
}

/// Turns blocks of zeroes into holes, which use no space. Returns an upper bound for the number of
/// bytes freed.
pub fn punch_zeroes(file: &File, cancel: &Cancel) -> Result<u64> {
    use std::os::unix::fs::FileExt;
    let io = |e: std::io::Error| Error::io("free the blocks of zeroes in a file", e);
    let len = file.metadata().map_err(io)?.len();
    let mut block = vec![0; PUNCH_BYTES];
    let (mut at, mut freed) = (0, 0);
    while let Some((start, end)) = next_data(file, at, len).map_err(|e| io(e.into()))? {
        at = start;
        while at < end {
            if cancel.is_cancelled() {
                return Err(crate::host::wait::cancelled(
                    "free the blocks of zeroes in a file",
                    cancel,
                ));
            }
            let wanted = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(PUNCH_BYTES);
            let read = file.read_at(&mut block[..wanted], at).map_err(io)?;
            if read == 0 {
                return Ok(freed);
            }
            if block[..read].iter().all(|byte| *byte == 0) {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match fallocate(file, flags, at, read as u64) {
                    Ok(()) => freed += read as u64,
                    // The file system does not support holes, so leave the file as it is.
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(freed),
                    Err(e) => return Err(io(e.into())),
                }
            }
            at += read as u64;
        }
    }
    Ok(freed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn files() -> (tempfile::TempDir, File, File) {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(dir.path().join(name))
                .unwrap()
        };
        let (from, to) = (open("from"), open("to"));
        (dir, from, to)
    }

    #[test]
    fn copy_keeps_holes_and_data() {
        let (_dir, from, to) = files();
        from.set_len(256 << 20).unwrap();
        for (at, byte) in [(0, 1), (64 << 20, 2), ((256 << 20) - 4096, 3)] {
            from.write_all_at(&[byte; 4096], at).unwrap();
        }
        let mut reported = Vec::new();
        copy_sparse(&from, &to, &Cancel::try_new().unwrap(), &mut |done, of| {
            reported.push((done, of))
        })
        .unwrap();
        assert_eq!(to.metadata().unwrap().len(), 256 << 20);
        assert!(
            to.metadata().unwrap().blocks() * 512 < 4 << 20,
            "{}",
            to.metadata().unwrap().blocks()
        );
        let mut byte = [0];
        for (at, expected) in [
            (0, 1),
            (4095, 1),
            (4096, 0),
            (64 << 20, 2),
            ((256 << 20) - 1, 3),
        ] {
            to.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte, [expected], "{at}");
        }
        assert_eq!(*reported.last().unwrap(), (256 << 20, 256 << 20));
        assert!(reported.is_sorted());
    }

    #[test]
    fn zeroes_become_holes_and_data_is_kept() {
        let (_dir, file, _) = files();
        let block = vec![0; 1 << 20];
        for at in 0..8 {
            file.write_all_at(&block, at << 20).unwrap();
        }
        for (at, byte) in [(0, 1), ((3 << 20) + 5, 2), ((8 << 20) - 1, 3)] {
            file.write_all_at(&[byte], at).unwrap();
        }
        file.sync_all().unwrap();
        let never = Cancel::try_new().unwrap();
        assert_eq!(
            punch_zeroes(&file, &never).unwrap(),
            (8 << 20) - 3 * (64 << 10)
        );
        assert!(
            file.metadata().unwrap().blocks() * 512 < 1 << 20,
            "{}",
            file.metadata().unwrap().blocks()
        );
        assert_eq!(file.metadata().unwrap().len(), 8 << 20);
        let mut byte = [0];
        for (at, expected) in [
            (0, 1),
            (1, 0),
            ((3 << 20) + 5, 2),
            (5 << 20, 0),
            ((8 << 20) - 1, 3),
        ] {
            file.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte, [expected], "{at}");
        }
        assert_eq!(
            punch_zeroes(&file, &never).unwrap(),
            0,
            "a second time there is nothing to free"
        );
        never.cancel(crate::locks::CancelCause::VmDeleted);
        assert_eq!(
            punch_zeroes(&file, &never).unwrap_err().kind(),
            Kind::Cancelled
        );
    }

    #[test]
    fn copy_of_trailing_hole_and_empty_file() {
        let (_dir, from, to) = files();
        copy_sparse(&from, &to, &Cancel::try_new().unwrap(), &mut |_, _| {}).unwrap();
        assert_eq!(to.metadata().unwrap().len(), 0);
        from.set_len(1 << 20).unwrap();
        copy_sparse(&from, &to, &Cancel::try_new().unwrap(), &mut |_, _| {}).unwrap();
        assert_eq!(
            (
                to.metadata().unwrap().len(),
                to.metadata().unwrap().blocks()
            ),
            (1 << 20, 0)
        );
    }

    #[test]
    fn cancelled_copy_ends_immediately() {
        let (_dir, from, to) = files();
        from.write_all_at(&vec![1; 1 << 20], 0).unwrap();
        let cancel = Cancel::try_new().unwrap();
        cancel.cancel(crate::locks::CancelCause::VmDeleted);
        let e =
            copy_sparse(&from, &to, &cancel, &mut |_, _| panic!("nothing is copied")).unwrap_err();
        assert_eq!(e.kind(), Kind::Cancelled);
    }
}
