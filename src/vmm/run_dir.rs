//! The parts of a VM's directory that a VMM uses: `run/`, in which it creates its sockets, and its
//! log.

use super::VmmSpec;
use super::console::VMM_LOG;
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::host::command::read_bounded;
use crate::host::fs::{open_at, open_dir};
use crate::host::process::{Exit, Process};
use crate::host::text::printable;
use crate::sched::Instant;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

pub(super) const RUN_DIR: &str = "run";
/// How long a VMM may take to exit after it has hung up.
const EXIT_GRACE: Duration = Duration::from_secs(1);
/// The length limit of a VMM's output in an error.
const SAID_BYTES_MAX: u64 = 2048;

/// Creates `run/` for the VMM's uid, and removes these files if they are left from an earlier
/// start. Does not follow links, because the VMM's uid may have created them.
pub(super) fn make(
    dir: &OwnedFd,
    files: &[&str],
    credentials: Option<Credentials>,
) -> Result<OwnedFd> {
    crate::locks::may_block("file access");
    let make = || -> rustix::io::Result<OwnedFd> {
        match rustix::fs::mkdirat(dir, RUN_DIR, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let run = rustix::fs::openat(dir, RUN_DIR, flags, Mode::empty())?;
        for name in files {
            match rustix::fs::unlinkat(&run, *name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
        if let Some(Credentials { uid, gid }) = credentials {
            rustix::fs::fchown(&run, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        rustix::fs::fchmod(&run, Mode::RWXU)?;
        Ok(run)
    };
    make().map_err(|e| Error::io("make the VMM's run directory", e))
}

/// Opens the existing `run/`.
pub(super) fn open(dir: &Path, doing: &str) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    Ok(OwnedFd::from(
        open_at(open_dir(dir)?, RUN_DIR, flags, 0).map_err(|e| Error::io(doing, e))?,
    ))
}

/// Opens the log for the VMM's own output, and discards its earlier content.
pub(super) fn open_log(dir: &OwnedFd, spec: &VmmSpec) -> Result<File> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::TRUNC;
    open_at(dir, VMM_LOG, flags, 0o600)
        .map_err(|e| Error::io(format!("open {}", spec.dir.join(VMM_LOG).display()), e))
}

/// Returns true if the VMM exits within [`EXIT_GRACE`]. A VMM that hangs up is usually about to
/// exit, and its output then makes a better error than the hang-up.
pub(super) fn is_exiting(process: &Process) -> bool {
    process
        .wait_uncancelled(Instant::now() + EXIT_GRACE)
        .unwrap_or(false)
}

/// Returns the error for a VMM that exited during its start, with the last lines of its output.
pub(super) fn exited_early(program: &str, spec: &VmmSpec, process: &Process) -> Error {
    let exit = process.exit().unwrap_or(Exit::Unknown);
    let said = last_said(&spec.dir).map_or_else(String::new, |said| format!(": {said}"));
    Error::new(
        Kind::VmmFailed,
        format!("start the VMM: {program} ended with {exit}{said}"),
    )
    .hint(format!(
        "see {}, or run fcctl doctor",
        spec.dir.join(VMM_LOG).display()
    ))
}

fn last_said(dir: &Path) -> Option<String> {
    let mut file = open_at(open_dir(dir).ok()?, VMM_LOG, OFlags::RDONLY, 0).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(SAID_BYTES_MAX)))
        .ok()?;
    let bytes = read_bounded(file, SAID_BYTES_MAX).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    let last = lines[lines.len().saturating_sub(2)..].join("; ");
    (!last.is_empty()).then(|| printable(&last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_directory_is_recreated_without_following_links() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_dir(temp.path()).unwrap();
        make(&dir, &["x.sock"], None).unwrap();
        std::fs::write(temp.path().join("victim"), "x").unwrap();
        std::os::unix::fs::symlink("../victim", temp.path().join("run/x.sock")).unwrap();
        make(&dir, &["x.sock"], None).unwrap();
        assert_eq!(
            std::fs::read_dir(temp.path().join("run")).unwrap().count(),
            0
        );
        assert!(temp.path().join("victim").exists());
        std::fs::remove_dir(temp.path().join("run")).unwrap();
        std::os::unix::fs::symlink("/tmp", temp.path().join("run")).unwrap();
        assert!(make(&dir, &[], None).is_err());
    }

    #[test]
    fn last_lines_of_vmm_log_are_quoted() {
        let temp = tempfile::tempdir().unwrap();
        assert_eq!(last_said(temp.path()), None);
        std::fs::write(temp.path().join(VMM_LOG), "one\n\ntwo\nqemu: \x1b[31mno\n").unwrap();
        assert_eq!(last_said(temp.path()).unwrap(), "two; qemu: \\u{1b}[31mno");
    }
}
