//! Files of the host that the configuration gives to every guest, and the variables of the VM's
//! commands for shells. They are read at each start, except a restore, and put on the guest's seed
//! drive.

use super::super::{Boot, BootStep, HostView, Resources};
use crate::api::daemon::Check;
use crate::config::SyncedFile;
use crate::daemon::command_defaults;
use crate::disk::SeedFile;
use crate::error::{Error, Kind, Result};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

/// The limits for one file and for all files together. A guest holds all of the files in memory for
/// a moment.
const FILE_BYTES_MAX: u64 = 1 << 20;
const ALL_BYTES_MAX: u64 = 8 << 20;

pub(in super::super) struct SyncedFiles;

impl BootStep for SyncedFiles {
    fn stage(&self) -> &'static str {
        "read the configured files"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        // A restored guest has the files already.
        if boot.restore.is_some() {
            return Ok(());
        }
        if !resources.synced.is_empty() {
            boot.needs_guest("the files listed under [[sync]]")?;
            boot.files = read_all(&resources.synced)?;
        }
        if let Some(profile) = command_defaults::profile(&resources.core, &boot.row)? {
            boot.needs_guest("variables (--env)")?;
            boot.files.push(profile);
        }
        Ok(())
    }
}

pub(in super::super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    const ID: &str = "sync";
    match read_all(&host.config.sync) {
        Ok(files) if files.is_empty() => Vec::new(),
        Ok(files) => vec![Check::ok(
            ID,
            format!("{} files for every guest ([[sync]])", files.len()),
        )],
        Err(e) => vec![Check::fail(
            ID,
            e.to_string(),
            e.hint_text().unwrap_or("correct it under [[sync]]"),
        )],
    }
}

fn read_all(all: &[SyncedFile]) -> Result<Vec<SeedFile>> {
    let files: Vec<SeedFile> = all.iter().map(read).collect::<Result<_>>()?;
    let bytes: u64 = files.iter().map(|f| f.bytes.len() as u64).sum();
    if bytes > ALL_BYTES_MAX {
        let message =
            format!("the files of [[sync]] have {bytes} bytes, but the limit is {ALL_BYTES_MAX}");
        return Err(Error::new(Kind::InvalidConfig, message)
            .hint("put large files into an image, or copy them with fcctl workspace"));
    }
    Ok(files)
}

fn read(file: &SyncedFile) -> Result<SeedFile> {
    crate::locks::may_block("file access");
    let from = file.from.display();
    let hint = format!(
        "create the file, or remove it from [[sync]]: from = {from:?}",
        from = file.from
    );
    let io = |e| {
        Error::io(
            format!("read {from} for {} in the guest", file.to.display()),
            e,
        )
        .hint(hint.clone())
    };
    let bad = |what: String| {
        Err(Error::new(Kind::InvalidConfig, format!("sync {from}: {what}")).hint(hint.clone()))
    };
    // With `O_NONBLOCK`, opening a FIFO does not block.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&file.from)
        .map_err(io)?;
    let stat = opened.metadata().map_err(io)?;
    if !stat.is_file() {
        return bad("it is not a regular file".to_owned());
    }
    let bytes = crate::host::command::read_bounded(opened, FILE_BYTES_MAX + 1).map_err(io)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return bad(format!("it has more than {FILE_BYTES_MAX} bytes"));
    }
    Ok(SeedFile {
        path: file.to.clone(),
        mode: file.mode(),
        mtime_s: u64::try_from(stat.mtime()).unwrap_or(0),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(from: &std::path::Path) -> SyncedFile {
        toml::from_str(&format!("from = {from:?}\nto = '/etc/x'\nmode = '0600'")).unwrap()
    }

    #[test]
    fn file_is_read_with_configured_mode() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("link"));
        std::fs::write(&path, "hello").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        // The administrator controls the configuration, so a symbolic link is followed.
        let read = read_all(&[entry(&link)]).unwrap();
        assert_eq!(
            (read[0].bytes.as_slice(), read[0].mode),
            (b"hello".as_slice(), 0o600)
        );
    }

    #[test]
    fn large_or_irregular_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("large"), vec![0; FILE_BYTES_MAX as usize + 1]).unwrap();
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["missing", "large", "fifo", "."] {
            let e = read_all(&[entry(&path(name))]).unwrap_err();
            assert!(e.to_string().contains(dir.path().to_str().unwrap()), "{e}");
        }
        std::fs::write(path("most"), vec![0; FILE_BYTES_MAX as usize]).unwrap();
        read_all(&vec![entry(&path("most")); 8]).unwrap();
        assert!(read_all(&vec![entry(&path("most")); 9]).is_err());
    }
}
