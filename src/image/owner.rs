//! Finds the owner of an image.

use super::registry::Images;
use crate::error::Result;
use crate::ids::ImageRef;

/// Returns the user to whom an image belongs, even if its files are damaged, or None if it belongs
/// to the host.
///
/// # Errors
/// `image_not_found`, or `host` if the owner cannot be read.
pub fn owner_of(images: &Images, name: &ImageRef) -> Result<Option<u32>> {
    Ok(images.metadata(name)?.owner_uid)
}
