//! Second copies of disks that nobody writes meanwhile: of a VM's into a snapshot, and back into a VM.

use super::copy::copy_sparse;
use super::root::{link_origin, mend_qemu_img, new_file, rebase_qcow2};
use super::{Cloned, Draft, Method, ficlone, origin};
use crate::error::{Error, Result};
use crate::host::Commands;
use crate::host::fs::open_nofollow;
use crate::locks::Cancel;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A disk to copy.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// How it was made; none: a raw file of its own.
    pub method: Option<Method>,
    /// Its file; of a device-mapper snapshot, its changes.
    pub path: &'a Path,
    /// The image's file system, where what it stands on has no name beside it.
    pub base: &'a Path,
}

/// A copy that is whole, and not in its place yet.
pub struct Copied {
    draft: Draft,
    owner: Option<(u32, u32)>,
}

impl Copied {
    /// Replaces what is there. `owner`, of [`copy`], may open it from then on.
    pub fn publish(self) -> Result<()> {
        self.draft.publish(self.owner)
    }
}

/// Shares blocks where the file system can, else copies what is no hole. What the disk stands on gets a second name beside the copy, now.
/// `progress` is told the bytes of a copy.
pub fn copy(
    commands: &dyn Commands,
    source: &Source<'_>,
    to: &Path,
    owner: Option<(u32, u32)>,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Copied> {
    let doing = |e: Error| e.context(format!("copy disk {} to {}", source.path.display(), to.display()));
    let from = open_nofollow(source.path).map_err(doing)?;
    let draft = Draft::new(to)?;
    let file = new_file(&draft.path).map_err(doing)?;
    match ficlone(&file, &from).map_err(|e| doing(Error::io("share its blocks", e)))? {
        Cloned::Yes => {}
        Cloned::No(_) => copy_sparse(&from, &file, cancel, progress).map_err(doing)?,
    }
    if let Some(method) = source.method.filter(|m| m.needs_image()) {
        let (base, there) = (origin(source.path, source.base), origin(to, to));
        // The disk that is there stands on the same file: there must be no instant in which it has none.
        let origin = if is_same_file(&base, &there) { there } else { link_origin(&base, to).map_err(doing)? };
        if method == Method::Qcow2 {
            let rebased = commands.run(&rebase_qcow2(&origin, &draft.path), cancel, &mut |_| {});
            rebased.map_err(|e| doing(mend_qemu_img(e)))?;
        }
    }
    // The store of a device-mapper snapshot is the kernel's to write, not the VMM's.
    let owner = owner.filter(|_| source.method != Some(Method::DmSnapshot));
    Ok(Copied { draft, owner })
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    let known = |path: &Path| std::fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()));
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

    /// The copy stands by itself: what it came from may change and go.
    #[test]
    fn a_qcow2_copy_stands_on_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("a")).unwrap();
        std::fs::create_dir(at("b")).unwrap();
        std::fs::write(at("base"), vec![7u8; 8192]).unwrap();
        let (method, base, from, to) = (Method::Qcow2, at("base"), at("a/disk"), at("b/disk"));
        let spec = RootSpec { method, base: &base, path: &from, size_bytes: 16384, owner: None };
        make_root(&HostCommands, &spec, &cancel(), &mut |_, _| {}).unwrap();
        let source = Source { method: Some(method), path: &from, base: &base };
        // The second time over what is there, which never stands on nothing.
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).unwrap().publish().unwrap();
        let linked = std::fs::metadata(at("b/origin")).unwrap().ctime_nsec();
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).unwrap().publish().unwrap();
        assert_eq!(std::fs::metadata(at("b/origin")).unwrap().ctime_nsec(), linked);
        std::fs::remove_dir_all(at("a")).unwrap();
        std::fs::remove_file(&base).unwrap();
        let convert = Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&to).arg(at("raw"));
        crate::host::Commands::run(&HostCommands, &convert, &cancel(), &mut |_| {}).unwrap();
        let raw = std::fs::read(at("raw")).unwrap();
        assert_eq!((raw.len(), raw[8191], raw[8192]), (16384, 7, 0));
        assert_eq!(std::fs::read_dir(at("b")).unwrap().count(), 2);
    }

    #[test]
    fn a_copy_that_is_not_published_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = std::fs::File::create(&from).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"new", 4096).unwrap();
        std::fs::write(&to, "old").unwrap();
        let source = Source { method: None, path: &from, base: &from };
        let copied = copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"old");
        drop(copied);
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
        copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).unwrap().publish().unwrap();
        let bytes = std::fs::read(&to).unwrap();
        assert_eq!((bytes.len(), &bytes[4096..4099]), (1 << 20, &b"new"[..]));
        std::os::unix::fs::symlink("from", dir.path().join("link")).unwrap();
        let source = Source { path: &dir.path().join("link"), ..source };
        assert!(copy(&HostCommands, &source, &to, None, &cancel(), &mut |_, _| {}).is_err());
    }
}
