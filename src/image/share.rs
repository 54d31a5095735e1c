//! Shares an existing image with all users.

use super::directory::{Readers, set_readers};
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
        // VMMs open the kernel of a shared image by its path.
        let dir = self.path(name);
        set_readers(&dir, Readers::Everybody)
            .map_err(|e| Error::io(format!("open {} to all users", dir.display()), e))?;
        crate::host::fs::write_durable(&dir.join(METADATA), &text, 0o444)?;
        self.get(name)
    }
}
