//! Follows paths in a tree that may be hostile, and reads small files that name a path.

use crate::error::{Error, Kind};
use crate::host::shell::quote;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Maximum size of a file that names a path. git does not read a longer `.git` file either.
const POINTER_BYTES_MAX: u64 = 1024 * 1024;
/// Maximum number of links to follow in one path, as in the kernel.
const LINKS_MAX: usize = 40;

/// Resolves all links in a path, as realpath(3) does. Also resolves a path that does not exist,
/// because a dangling link may have a target later.
pub(super) fn real(path: &Path) -> std::io::Result<PathBuf> {
    let mut links = 0;
    let mut done = PathBuf::from("/");
    let mut todo: Vec<PathBuf> = path
        .components()
        .rev()
        .map(|c| PathBuf::from(c.as_os_str()))
        .collect();
    while let Some(part) = todo.pop() {
        match part.components().next() {
            None | Some(Component::CurDir) => continue,
            Some(Component::ParentDir) => {
                done.pop();
                continue;
            }
            Some(Component::RootDir | Component::Prefix(_)) => {
                done = PathBuf::from("/");
                continue;
            }
            Some(Component::Normal(_)) => done.push(&part),
        }
        match std::fs::read_link(&done) {
            Ok(target) => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(std::io::Error::from_raw_os_error(libc::ELOOP));
                }
                done.pop();
                todo.extend(
                    target
                        .components()
                        .rev()
                        .map(|c| PathBuf::from(c.as_os_str())),
                );
            }
            // The component is not a link, or does not exist.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::ENOENT | libc::ENOTDIR)
                ) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Opens a small file that names a path. Returns `None` if it does not exist, and `EINVAL` if it is
/// not a regular file.
pub(super) fn open_pointer(path: &Path) -> std::io::Result<Option<std::fs::File>> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    // Without O_NONBLOCK, opening a FIFO would wait for its writer.
    match options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
    {
        Ok(file) if file.metadata()?.is_file() => Ok(Some(file)),
        Ok(_) => Err(std::io::Error::from_raw_os_error(libc::EINVAL)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn read_open_pointer(file: std::fs::File) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file.take(POINTER_BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}

pub(super) fn read_pointer(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    open_pointer(path)?.map(read_open_pointer).transpose()
}

pub(super) fn trim(text: &[u8]) -> &[u8] {
    let end = text
        .iter()
        .rposition(|b| !matches!(b, b'\n' | b'\r'))
        .map_or(0, |at| at + 1);
    &text[..end]
}

pub(super) fn quoted(path: &Path) -> String {
    quote(&path.to_string_lossy())
}

pub(super) fn look(top: &Path) -> String {
    format!("look with: git -C {} status", quoted(top))
}

pub(super) fn refusal(doing: String, e: std::io::Error) -> Error {
    Error::io(doing, e).with_kind(Kind::InvalidTree)
}

pub(super) fn unreadable(path: &Path, e: std::io::Error) -> Error {
    refusal(format!("read {}", path.display()), e)
        .hint(format!("inspect it with: ls -ld {}", quoted(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_path_resolves_missing_components() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        std::fs::create_dir(dir.join("d")).unwrap();
        std::os::unix::fs::symlink("d/../gone/x", dir.join("l")).unwrap();
        std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
        assert_eq!(real(&dir.join("l/y")).unwrap(), dir.join("gone/x/y"));
        assert_eq!(real(&dir.join("d/.././d")).unwrap(), dir.join("d"));
        assert!(real(&dir.join("loop")).is_err());
    }
}
