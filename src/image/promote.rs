//! Copies the file of an image that is in place into the store.

use super::ImageInfo;
use super::digest::record_file;
use super::register::Copy;
use super::registry::{Images, ROOTFS};
use crate::error::{Error, Kind, Result};
use crate::ids::ImageRef;
use crate::locks::Cancel;
use std::fs::File;

/// Copies the file and publishes the image again, under its name. The image then no longer depends
/// on the user's file. An image that is already in the store is not changed.
///
/// # Errors
/// `conflict` if the file is not what was registered, before the copy or after it,
/// `image_not_found`, `disk_full`, `cancelled`, and those of `copy`.
pub fn promote(
    images: &Images,
    name: &ImageRef,
    copy: &mut Copy<'_>,
    cancel: &Cancel,
) -> Result<ImageInfo> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("promote image {name}"), e);
    let info = images.get(name)?;
    let Some(file) = info.open_in_place()? else {
        return Ok(info);
    };
    let mut metadata = images.metadata(name)?;
    let staging = images.stage_pull()?;
    let out = staging.path().join("out");
    std::fs::create_dir(&out).map_err(io)?;
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let rootfs = options.open(out.join(ROOTFS)).map_err(io)?;
    copy(&file, &rootfs)?;
    // Readers of an image's file expect whole blocks. The added zeroes do not change the digest.
    rootfs.set_len(info.disk_bytes).map_err(io)?;
    let record = record_file(&rootfs, ROOTFS, cancel)?;
    info.require_same(&file)?;
    // A file that is mapped into memory can change without a trace in its times.
    if !metadata.files.iter().any(|of| of.sha256 == record.sha256) {
        let text = format!("the content of image {name} is not what was registered");
        let hint = format!("run fcctl image rm {name} and register the file again");
        return Err(Error::new(Kind::Conflict, text).hint(hint));
    }
    (metadata.in_place, metadata.files) = (None, vec![record]);
    images.replace(&out, &metadata)
}

#[cfg(test)]
mod tests {
    use super::super::in_place::InPlace;
    use super::super::register::{RegisterSpec, Steps, register};
    use super::*;
    use crate::host::{Command, Commands, Output};
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};

    struct CleanCheck;
    impl Commands for CleanCheck {
        fn run(&self, command: &Command, _: &Cancel, _: &mut dyn FnMut(&str)) -> Result<Output> {
            assert_eq!(command.program, "e2fsck");
            Ok(Output::default())
        }
    }

    /// A registry with the image `mine` in place, and its file.
    struct Bench {
        _dir: tempfile::TempDir,
        images: Images,
        file: PathBuf,
        cancel: Cancel,
    }

    fn name() -> ImageRef {
        "mine".parse().unwrap()
    }

    fn copy(from: &File, to: &File) -> Result<()> {
        let bytes = from.metadata().unwrap().len();
        let mut content = vec![0; usize::try_from(bytes).unwrap()];
        from.read_exact_at(&mut content, 0).unwrap();
        to.write_all_at(&content, 0).unwrap();
        Ok(())
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("root.ext4");
            let mut content = vec![7; 64 * 1024 + 7];
            content[1024..2048].fill(0);
            content[1024 + 0x18] = 2;
            content[1024 + 0x38..1024 + 0x3b].copy_from_slice(&[0x53, 0xef, 1]);
            std::fs::write(&file, content).unwrap();
            let images = Images::open(dir.path()).unwrap();
            let cancel = Cancel::try_new().unwrap();
            let uid = nix::unistd::geteuid().as_raw();
            let fd = File::open(&file).unwrap().into();
            let spec = RegisterSpec {
                name: name(),
                file: &InPlace::accept(&fd, uid).unwrap(),
                kernel: Some("linux".parse().unwrap()),
                owner_uid: uid,
                helper: None,
            };
            let mut steps = Steps {
                copy: &mut |_, _| panic!("the file is checked in its place"),
                publish: &mut || Ok(()),
            };
            register(&images, &CleanCheck, &spec, &mut steps, &cancel).unwrap();
            Self {
                _dir: dir,
                images,
                file,
                cancel,
            }
        }

        fn promote(&self, copy: &mut Copy<'_>) -> Result<ImageInfo> {
            promote(&self.images, &name(), copy, &self.cancel)
        }

        /// Returns the number of entries in the registry, including those of work in progress.
        fn entries(&self) -> usize {
            let dir = self.images.get(&name()).unwrap().dir;
            std::fs::read_dir(dir.parent().unwrap()).unwrap().count()
        }
    }

    fn write(path: &Path) {
        let file = File::options().write(true).open(path).unwrap();
        file.write_at(b"x", 50_000).unwrap();
    }

    #[test]
    fn promoted_image_does_not_need_the_file() {
        let bench = Bench::new();
        let before = bench.images.get(&name()).unwrap();
        let content = std::fs::read(&bench.file).unwrap();
        let after = bench.promote(&mut copy).unwrap();
        std::fs::remove_file(&bench.file).unwrap();
        assert!(after.in_place.is_none() && after.open_in_place().unwrap().is_none());
        let stored = std::fs::read(&after.rootfs).unwrap();
        assert_eq!(stored.len() as u64, after.disk_bytes);
        assert!(stored.starts_with(&content));
        assert_eq!(
            (&after.content, &after.kernel, after.disk_bytes),
            (&before.content, &before.kernel, before.disk_bytes)
        );
        // There is nothing left to do.
        let never = &mut |_: &File, _: &File| panic!("it is in the store");
        assert_eq!(bench.promote(never).unwrap(), after);
        assert_eq!(bench.entries(), 1);
    }

    #[test]
    fn file_that_changes_during_copy_is_not_promoted() {
        let bench = Bench::new();
        let path = bench.file.clone();
        let mut changing = |from: &File, to: &File| {
            copy(from, to)?;
            write(&path);
            Ok(())
        };
        let e = bench.promote(&mut changing).unwrap_err();
        assert_eq!(e.kind(), Kind::Conflict);
        assert!(bench.images.get(&name()).unwrap().in_place.is_some());
        // Now it differs before the copy begins.
        let never = &mut |_: &File, _: &File| panic!("it has changed");
        assert_eq!(bench.promote(never).unwrap_err().kind(), Kind::Conflict);
        assert_eq!(bench.entries(), 1);
    }

    #[test]
    fn copy_with_other_content_is_not_promoted() {
        let bench = Bench::new();
        let mut wrong = |from: &File, to: &File| {
            copy(from, to)?;
            to.write_all_at(b"y", 9).unwrap();
            Ok(())
        };
        assert_eq!(
            bench.promote(&mut wrong).unwrap_err().kind(),
            Kind::Conflict
        );
        assert_eq!(bench.entries(), 1);
    }

    #[test]
    fn image_that_is_deleted_during_copy_stays_deleted() {
        let bench = Bench::new();
        let mut deleting = |from: &File, to: &File| {
            bench.images.delete(&name()).unwrap();
            copy(from, to)
        };
        let e = bench.promote(&mut deleting).unwrap_err();
        assert_eq!(e.kind(), Kind::ImageNotFound, "{e}");
        assert!(bench.images.list().unwrap().is_empty());
    }
}
