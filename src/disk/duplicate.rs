//! Copies disks from a VM into a snapshot, and back into a VM. Nothing may write to a disk while it
//! is copied.

use super::copy::copy_sparse;
use super::root::{link_origin, new_file, rebase_qcow2, with_qemu_img_hint};
use super::{Cloned, Draft, Method, ficlone, origin};
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::host::Credentials;
use crate::host::fs::open_nofollow;
use crate::locks::Cancel;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A disk to copy.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The method with which the disk was created, or None for an independent raw file.
    pub method: Option<Method>,
    /// The disk's file, or for a device-mapper snapshot the file with its changes.
    pub path: &'a Path,
    /// The image's file system, which is used if the disk's directory has no hard link to it.
    pub base: &'a Path,
}

/// A complete copy that has not been moved to its place yet.
pub struct Copied {
    draft: Draft,
    owner: Option<Credentials>,
}

impl Copied {
    /// Moves the copy to its place, replacing an existing file. The `owner` that was passed to
    /// [`copy`] can then open it, unless it is the store of a device-mapper snapshot.
    pub fn publish(self) -> Result<()> {
        self.draft.publish(self.owner)
    }
}

/// Copies a disk. The copy shares blocks if the file system can do that. If the disk has a base, a
/// hard link to the base is created next to the copy immediately. `progress` receives the bytes
/// copied and their total.
pub fn copy(
    commands: &dyn Commands,
    source: &Source<'_>,
    to: &Path,
    owner: Option<Credentials>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Copied> {
    let doing = |e: Error| {
        e.context(format!(
            "copy disk {} to {}",
            source.path.display(),
            to.display()
        ))
    };
    let from = open_nofollow(source.path).map_err(doing)?;
    let draft = Draft::new(to)?;
    let file = new_file(&draft.path).map_err(doing)?;
    match ficlone(&file, &from).map_err(|e| doing(Error::io("share its blocks", e)))? {
        Cloned::Yes => {}
        Cloned::No(_) => copy_sparse(&from, &file, cancel, progress).map_err(doing)?,
    }
    if let Some(method) = source.method.filter(|m| m.needs_image()) {
        let (base, there) = (origin(source.path, source.base), origin(to, to));
        // The existing disk may have the same base. Keep its link, so that it never lacks its base.
        let origin = if is_same_file(&base, &there) {
            there
        } else {
            link_origin(&base, to).map_err(doing)?
        };
        if method == Method::Qcow2 {
            let rebased = commands.run(&rebase_qcow2(&origin, &draft.path), cancel, &mut |_| {});
            rebased.map_err(|e| doing(with_qemu_img_hint(e)))?;
        }
    }
    // The kernel writes a snapshot's store; the VMM must not have access to it.
    let owner = owner.filter(|_| source.method != Some(Method::DmSnapshot));
    Ok(Copied { draft, owner })
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    crate::locks::may_block("file access");
    let known = |path: &Path| {
        std::fs::symlink_metadata(path)
            .ok()
            .map(|m| (m.dev(), m.ino()))
    };
    known(a).is_some_and(|a| known(b) == Some(a))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{RootSpec, make_root};
    use crate::host::{Command, HostCommands};
    use std::os::unix::fs::FileExt;

    fn cancel() -> Cancel {
        Cancel::try_new().unwrap()
    }

    #[test]
    fn qcow2_copy_does_not_depend_on_its_source() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("a")).unwrap();
        std::fs::create_dir(at("b")).unwrap();
        std::fs::write(at("base"), vec![7u8; 8192]).unwrap();
        let (method, base, from, to) = (Method::Qcow2, at("base"), at("a/disk"), at("b/disk"));
        let spec = RootSpec {
            method,
            base: &base,
            path: &from,
            size_bytes: 16384,
            owner: None,
        };
        make_root(&HostCommands, &spec, &cancel(), &mut |_, _| {}).unwrap();
        let source = Source {
            method: Some(method),
            path: &from,
            base: &base,
        };
        // The second copy replaces the first. The file never lacks its base.
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {})
            .unwrap()
            .publish()
            .unwrap();
        let linked = std::fs::metadata(at("b/origin")).unwrap().ctime_nsec();
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {})
            .unwrap()
            .publish()
            .unwrap();
        assert_eq!(
            std::fs::metadata(at("b/origin")).unwrap().ctime_nsec(),
            linked
        );
        std::fs::remove_dir_all(at("a")).unwrap();
        std::fs::remove_file(&base).unwrap();
        let convert = Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .arg(&to)
            .arg(at("raw"));
        crate::host::Commands::run(&HostCommands, &convert, &cancel(), &mut |_| {}).unwrap();
        let raw = std::fs::read(at("raw")).unwrap();
        assert_eq!((raw.len(), raw[8191], raw[8192]), (16384, 7, 0));
        assert_eq!(std::fs::read_dir(at("b")).unwrap().count(), 2);
    }

    #[test]
    fn unpublished_copy_does_not_replace_the_target() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = std::fs::File::create(&from).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"new", 4096).unwrap();
        std::fs::write(&to, "old").unwrap();
        let source = Source {
            method: None,
            path: &from,
            base: &from,
        };
        let copied = copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"old");
        drop(copied);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {})
            .unwrap()
            .publish()
            .unwrap();
        let bytes = std::fs::read(&to).unwrap();
        assert_eq!((bytes.len(), &bytes[4096..4099]), (1 << 20, &b"new"[..]));
        std::os::unix::fs::symlink("from", dir.path().join("link")).unwrap();
        let source = Source {
            path: &dir.path().join("link"),
            ..source
        };
        assert!(copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).is_err());
    }
}
