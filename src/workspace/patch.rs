//! Writes a patch from a guest, completely or not at all, and counts the files that it changes.

mod count;

use super::room::Room;
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use count::Counter;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// The size of a received patch, and the number of files that it changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    pub bytes: u64,
    /// The number of files that the patch creates, deletes or changes. The host counts them,
    /// because the guest's own number cannot be trusted.
    pub files: u64,
}

/// Checks that a patch may be written to `path`. Errors: `target_exists`, `path_not_found` (the
/// directory of `path` does not exist).
pub fn check_target(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    let dir = dir_of(path);
    if !dir.is_dir() {
        return Err(Error::new(
            Kind::PathNotFound,
            format!("{} is not a directory", dir.display()),
        ));
    }
    Ok(())
}

fn exists(path: &Path) -> Error {
    Error::new(
        Kind::TargetExists,
        format!("{} already exists", path.display()),
    )
    .hint("choose another name or move the existing one away: nothing is overwritten")
}

fn dir_of(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Copies all of `from` to a new file at `path`. `from` must return an error if the stream lacks a
/// matching trailer (`api::stream` does), so that the file appears only when it is complete.
pub fn receive(from: &mut dyn Read, path: &Path, bytes_max: u64, cancel: &Cancel) -> Result<Patch> {
    check_target(path)?;
    let doing = || format!("write {}", path.display());
    let mut file = tempfile::Builder::new()
        .prefix(".fcctl-patch-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .tempfile_in(dir_of(path))
        .map_err(|e| Error::io(doing(), e))?;
    let patch = copy(
        from,
        file.as_file_mut(),
        Room::new(dir_of(path), bytes_max),
        cancel,
    )?;
    file.as_file()
        .sync_all()
        .map_err(|e| Error::io(doing(), e))?;
    file.persist_noclobber(path)
        .map_err(|e| match e.error.kind() {
            std::io::ErrorKind::AlreadyExists => exists(path),
            _ => Error::io(doing(), e.error),
        })?;
    Ok(patch)
}

/// Copies all of `from` to an unnamed temporary file, for a patch that is then printed to stdout.
/// stdout must not get half a patch.
pub fn spool(from: &mut dyn Read, bytes_max: u64, cancel: &Cancel) -> Result<(File, Patch)> {
    let dir = std::env::temp_dir();
    let mut file = tempfile::tempfile_in(&dir)
        .map_err(|e| Error::io(format!("make a file in {}", dir.display()), e))?;
    let patch = copy(from, &mut file, Room::new(&dir, bytes_max), cancel)?;
    Ok((file, patch))
}

fn copy(from: &mut dyn Read, to: &mut File, mut room: Room, cancel: &Cancel) -> Result<Patch> {
    let mut buffer = vec![0; 256 * 1024];
    let (mut bytes, mut counter) = (0, Counter::default());
    loop {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(
                Kind::Cancelled,
                format!("receive the patch: cancelled: {cause}"),
            ));
        }
        let n = match from.read(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other.map_err(|e| super::unpack::stream_error("receive the patch", e))?,
        };
        if n == 0 {
            return Ok(Patch {
                bytes,
                files: counter.finish(),
            });
        }
        room.take(n as u64)
            .map_err(|e| e.context("receive the patch"))?;
        counter.push(&buffer[..n]);
        to.write_all(&buffer[..n])
            .map_err(|e| Error::io("write the patch", e))?;
        bytes += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("no trailer"))
        }
    }

    #[test]
    fn patch_file_is_complete_or_absent_and_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::try_new().unwrap();
        let target = dir.path().join("p");
        let mut broken = b"half".chain(Broken);
        assert!(receive(&mut broken, &target, 100, &cancel).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(
            receive(&mut &b"whole"[..], &target, 100, &cancel).unwrap(),
            Patch { bytes: 5, files: 0 }
        );
        assert_eq!(std::fs::read(&target).unwrap(), b"whole");
        let e = receive(&mut &b"other"[..], &target, 100, &cancel).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetExists);
        assert_eq!(std::fs::read(&target).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    /// Another program creates the file while the patch is received.
    #[test]
    fn patch_does_not_overwrite_file_that_appears_meanwhile() {
        struct Meanwhile<'a>(&'a Path);
        impl Read for Meanwhile<'_> {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                std::fs::write(self.0, "theirs").map(|()| 0)
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("p");
        let mut patch = b"ours".chain(Meanwhile(&target));
        let e = receive(&mut patch, &target, 100, &Cancel::try_new().unwrap()).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetExists);
        assert_eq!(std::fs::read(&target).unwrap(), b"theirs");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn patch_without_end_stops_at_the_limit_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::try_new().unwrap();
        let target = dir.path().join("p");
        let e = receive(&mut std::io::repeat(b'x'), &target, 5 << 20, &cancel).unwrap_err();
        assert_eq!(
            (e.kind(), e.to_string().as_str()),
            (
                Kind::Exhausted,
                "receive the patch: the guest sends more than 5242880 bytes"
            )
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(
            spool(&mut std::io::repeat(b'x'), 5 << 20, &cancel)
                .unwrap_err()
                .kind(),
            Kind::Exhausted
        );
    }
}
