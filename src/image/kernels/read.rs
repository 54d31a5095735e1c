//! Reads files that an untrusted user may have named or created.

use crate::error::{Error, Kind, Result};
use crate::host::command::read_bounded;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reads a regular file of at most `bytes_max` bytes.
pub(super) fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    crate::locks::may_block("file access");
    // Use O_NONBLOCK, because opening a FIFO would otherwise wait for a writer.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    read_opened(opened, path, bytes_max)
}

/// Reads a file below a directory that an untrusted user may control. Nothing outside of it is
/// read, because every guest may see the content.
pub(super) fn read_below(
    dir: &OwnedFd,
    shown_dir: &Path,
    path: &Path,
    bytes_max: u64,
) -> Result<Vec<u8>> {
    crate::locks::may_block("file access");
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let shown = shown_dir.join(path);
    match rustix::fs::openat2(dir, path, flags, Mode::empty(), within) {
        Err(Errno::XDEV | Errno::LOOP) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} points outside of {}",
                shown.display(),
                shown_dir.display()
            ),
        )
        .hint("name a directory that contains the modules themselves: --modules DIR")),
        opened => read_opened(
            opened.map(File::from).map_err(std::io::Error::from),
            &shown,
            bytes_max,
        ),
    }
}

fn read_opened(opened: std::io::Result<File>, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    crate::locks::may_block("file access");
    let shown = path.display();
    let io = |e| Error::io(format!("read {shown}"), e);
    let file = opened.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(Kind::PathNotFound, format!("{shown} does not exist"))
                .hint(format!("ls -l {shown}"))
        }
        _ => io(e),
    })?;
    let stat = file.metadata().map_err(io)?;
    if !stat.is_file() || stat.len() > bytes_max {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{shown} is not a file of at most {} MiB", bytes_max >> 20),
        )
        .hint(format!("ls -lL {shown}")));
    }
    read_bounded(file, bytes_max).map_err(io)
}
