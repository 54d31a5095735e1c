//! Publishes an image whose root file system comes from a VM's disk. Everything else comes from the
//! image from which the VM was created.

use super::digest::record;
use super::disk_use::DiskUse;
use super::registry::{Images, ROOTFS};
use super::{Admit, ImageInfo};
use crate::error::{Error, Result};
use crate::host::time::now_s;
use crate::ids::ImageRef;
use crate::locks::Cancel;
use std::fs::File;

/// The image to publish.
pub struct CommitSpec<'a> {
    pub name: ImageRef,
    /// The image of the VM.
    pub base: &'a ImageInfo,
    /// The version of the init on the disk.
    pub guest_version: u32,
    pub owner_uid: u32,
    /// The caller's name for the origin of the image; see [`crate::api::image::Image`].
    pub recipe: Option<String>,
    /// True if the image is deleted once nothing uses it.
    pub temporary: bool,
}

/// Publishes an image. `fill` writes the root file system to the file that it receives. If `fill`
/// or `admit` fails, nothing is published.
///
/// # Errors
/// `name_taken`, `cancelled`, and those of `fill` and `admit`.
pub fn commit(
    images: &Images,
    spec: &CommitSpec<'_>,
    fill: &mut dyn FnMut(&File) -> Result<()>,
    admit: &mut Admit<'_>,
    cancel: &Cancel,
) -> Result<ImageInfo> {
    crate::locks::may_block("file access");
    let io = |e: std::io::Error| Error::io(format!("make image {}", spec.name), e);
    let mut metadata = images.metadata(&spec.base.name)?;
    let staging = images.stage(&spec.name)?;
    let out = staging.path().join("out");
    std::fs::create_dir(&out).map_err(io)?;
    for file in metadata.files.iter().filter(|file| file.name != ROOTFS) {
        std::fs::hard_link(spec.base.dir.join(&file.name), out.join(&file.name)).map_err(io)?;
    }
    let rootfs = File::create_new(out.join(ROOTFS)).map_err(io)?;
    fill(&rootfs)?;
    metadata.files.retain(|file| file.name != ROOTFS);
    metadata.files.push(record(&out, ROOTFS, cancel)?);
    metadata.name = spec.name.clone();
    metadata.built_at = now_s();
    metadata.guest_version = spec.guest_version;
    metadata.owner_uid = Some(spec.owner_uid);
    metadata.recipe.clone_from(&spec.recipe);
    // The content differs from what the base was made from, and may be confidential.
    (metadata.digest, metadata.source, metadata.private) = (None, None, true);
    metadata.in_place = None;
    metadata.temporary = spec.temporary;
    admit(DiskUse::of_directory(&out)?)?;
    images.publish(&out, &metadata)
}
