//! The pipes in a VMM's working directory.

use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::fs::open_at;
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// The name of the pipe that receives the output of the guest's serial console.
pub(super) const CONSOLE_PIPE: &str = "console";
pub(super) const METRICS_PIPE: &str = "metrics";

pub(super) fn make_pipe(run: &OwnedFd, name: &str, credentials: Option<Credentials>) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e: rustix::io::Errno| {
        Error::io(
            format!("create a pipe for the {name}"),
            std::io::Error::from(e),
        )
    };
    rustix::fs::mknodat(run, name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).map_err(io)?;
    if let Some(Credentials { uid, gid }) = credentials {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(
            run,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            flags,
        )
        .map_err(io)?;
    }
    Ok(())
}

/// Opens a pipe for reading. The VMM's uid owns the directory, so anything other than a pipe is
/// rejected.
pub(super) fn open_pipe(run: &OwnedFd, name: &str) -> Result<File> {
    let doing = format!("open the pipe for the {name}");
    let file = open_at(run, name, OFlags::RDONLY | OFlags::NONBLOCK, 0)
        .map_err(|e| Error::io(doing.clone(), e))?;
    let stat = rustix::fs::fstat(file.as_fd())
        .map_err(|e| Error::io(doing.clone(), std::io::Error::from(e)))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
        return Ok(file);
    }
    Err(Error::new(
        Kind::Denied,
        format!("{doing}: it is not a pipe"),
    ))
}
