//! Shares an image that exists.

use super::registry::{ImageInfo, Images, METADATA};
use crate::error::{Error, Result};
use crate::ids::ImageRef;

impl Images {
    /// Lets all users use an image.
    pub fn share(&self, name: &ImageRef) -> Result<ImageInfo> {
        let mut metadata = self.metadata(name)?;
        metadata.private = false;
        let io = |e: serde_json::Error| Error::io(format!("share image {name}"), e);
        let text = serde_json::to_vec_pretty(&metadata).map_err(io)?;
        crate::host::fs::write_durable(&self.path(name).join(METADATA), &text, 0o444)?;
        self.get(name)
    }
}
