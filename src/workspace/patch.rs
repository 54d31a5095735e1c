//! Writes a patch that comes back: whole or not at all.

use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Where a patch goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file that is not there yet.
    File(PathBuf),
    /// `-`.
    Stdout,
}

impl Target {
    pub fn from_arg(arg: &Path) -> Self {
        if arg == Path::new("-") { Target::Stdout } else { Target::File(arg.to_owned()) }
    }

    /// Before anything is asked of the daemon: `target_exists`, `path_not_found` (its directory).
    pub fn check(&self) -> Result<()> {
        let Target::File(path) = self else { return Ok(()) };
        if path.symlink_metadata().is_ok() {
            return Err(exists(path));
        }
        let dir = dir_of(path);
        if !dir.is_dir() {
            return Err(Error::new(Kind::PathNotFound, format!("{} is no directory", dir.display())));
        }
        Ok(())
    }
}

fn exists(path: &Path) -> Error {
    Error::new(Kind::TargetExists, format!("{} exists already", path.display()))
        .hint("give another name, or move it away: nothing is ever overwritten")
}

fn dir_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Copies all of `from` to the target and gives the number of bytes. `from` must answer an error where the stream
/// has no trailer that fits (`api::stream` does), so that a file appears only when it is whole; stdout gets the
/// bytes as they come.
pub fn receive(from: &mut dyn Read, target: &Target, cancel: &Cancel) -> Result<u64> {
    target.check()?;
    match target {
        Target::Stdout => {
            let mut out = std::io::stdout().lock();
            let bytes = copy(from, &mut out, cancel)?;
            out.flush().map_err(|e| Error::io("write the patch", e))?;
            Ok(bytes)
        }
        Target::File(path) => {
            let doing = || format!("write {}", path.display());
            let mut file = tempfile::Builder::new()
                .prefix(".fcctl-patch-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
                .tempfile_in(dir_of(path))
                .map_err(|e| Error::io(doing(), e))?;
            let bytes = copy(from, file.as_file_mut(), cancel)?;
            file.as_file().sync_all().map_err(|e| Error::io(doing(), e))?;
            file.persist_noclobber(path).map_err(|e| match e.error.kind() {
                std::io::ErrorKind::AlreadyExists => exists(path),
                _ => Error::io(doing(), e.error),
            })?;
            Ok(bytes)
        }
    }
}

fn copy(from: &mut dyn Read, to: &mut dyn Write, cancel: &Cancel) -> Result<u64> {
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        if let Some(cause) = cancel.cause() {
            return Err(Error::new(Kind::Cancelled, format!("receive the patch: cancelled: {cause}")));
        }
        let n = match from.read(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other.map_err(|e| super::unpack::stream_error("receive the patch", e))?,
        };
        if n == 0 {
            return Ok(total);
        }
        to.write_all(&buffer[..n]).map_err(|e| Error::io("write the patch", e))?;
        total += n as u64;
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
    fn a_patch_appears_whole_or_not_at_all_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = Cancel::try_new().unwrap();
        let target = Target::File(dir.path().join("p"));
        let mut broken = b"half".chain(Broken);
        assert!(receive(&mut broken, &target, &cancel).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(receive(&mut &b"whole"[..], &target, &cancel).unwrap(), 5);
        assert_eq!(std::fs::read(dir.path().join("p")).unwrap(), b"whole");
        let e = receive(&mut &b"other"[..], &target, &cancel).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetExists);
        assert_eq!(std::fs::read(dir.path().join("p")).unwrap(), b"whole");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
