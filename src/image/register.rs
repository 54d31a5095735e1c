//! Registers a user's file as an image, without copying it into the store.

use super::ImageInfo;
use super::digest::record_file;
use super::fsck;
use super::in_place::InPlace;
use super::registry::{FORMAT_RUNTIME, Images, Metadata, ROOTFS};
use super::superblock;
use crate::error::{Error, Result};
use crate::host::time::now_s;
use crate::host::wait;
use crate::host::{Commands, Credentials};
use crate::ids::{ImageRef, KernelName};
use crate::locks::Cancel;
use std::fs::File;
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;

/// The copy that is checked, in the staging directory.
const CHECKED: &str = "checked.ext4";

/// Copies the content of a file to another, which is empty.
pub(super) type Copy<'a> = dyn FnMut(&File, &File) -> Result<()> + 'a;

/// The steps of a registration that the caller provides.
pub struct Steps<'a> {
    pub copy: &'a mut Copy<'a>,
    /// Called before the image is published.
    pub publish: &'a mut dyn FnMut() -> Result<()>,
}

/// The image to register.
pub struct RegisterSpec<'a> {
    pub name: ImageRef,
    /// The file with the root file system.
    pub file: &'a InPlace,
    pub kernel: Option<KernelName>,
    pub owner_uid: u32,
    /// The uid and gid with which the file system is checked, if the daemon is root.
    pub helper: Option<Credentials>,
}

/// Checks the file system and publishes an image that refers to the file.
///
/// If the daemon is root, a copy is checked and then removed: an unprivileged uid must be able to
/// open the file that it checks, but the modes of the user's file must not change.
///
/// # Errors
/// `invalid_image` and `unsupported` for a file system that cannot be used, `conflict` if the file
/// changes meanwhile, `name_taken`, `disk_full`, `cancelled`.
pub fn register(
    images: &Images,
    commands: &dyn Commands,
    spec: &RegisterSpec<'_>,
    steps: &mut Steps<'_>,
    cancel: &Cancel,
) -> Result<ImageInfo> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("register image {}", spec.name), e);
    if !wait::sleep(spec.file.settles_in(), cancel).map_err(io)? {
        return Err(wait::cancelled_by(cancel));
    }
    let file = spec.file.open().map_err(|e| {
        e.hint("the file must not change, and the user who runs fcd must be able to read it")
    })?;
    superblock::check(&file, spec.file.bytes)?;
    let staging = images.stage(&spec.name)?;
    let record = if let Some(helper) = spec.helper {
        let checked = create_for(helper, &staging.path().join(CHECKED)).map_err(io)?;
        (steps.copy)(&file, &checked)?;
        fsck::check(commands, &staging.path().join(CHECKED), spec.helper, cancel)?;
        record_file(&checked, ROOTFS, cancel)?
    } else {
        fsck::check(commands, &spec.file.path, None, cancel)?;
        record_file(&file, ROOTFS, cancel)?
    };
    spec.file.require_same(&file)?;
    let out = staging.path().join("out");
    std::fs::create_dir(&out).map_err(io)?;
    let metadata = Metadata {
        format: FORMAT_RUNTIME,
        os: "unknown".to_owned(),
        owner_uid: Some(spec.owner_uid),
        source: Some(format!("file {}", spec.file.path.display())),
        // The owner of the file can change it, so no other user should depend on it.
        private: true,
        in_place: Some(spec.file.clone()),
        kernel: spec.kernel.clone(),
        files: vec![record],
        ..Metadata::new(&spec.name, &[], now_s())
    };
    (steps.publish)()?;
    images.publish(&out, &metadata)
}

/// Creates a file that only the helper's uid can read.
fn create_for(helper: Credentials, path: &Path) -> std::io::Result<File> {
    crate::locks::may_block("file access");
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o400);
    let file = options.open(path)?;
    fchown(&file, Some(helper.uid), Some(helper.gid))?;
    Ok(file)
}
