//! Deletes temporary images. `fcctl image commit` makes a temporary image of a VM's disk and boots
//! it in a VM that cleans the copy. Afterwards, fcctl deletes the image. If fcctl was killed, the
//! daemon deletes it.

use super::images::ImageService;
use crate::error::Kind;
use crate::ids::ImageRef;
use std::time::Duration;

/// How long a temporary image is kept for the caller to create a VM from it.
const GRACE: Duration = Duration::from_secs(30);
/// How often to look whether a temporary image is still used.
const PERIOD: Duration = Duration::from_secs(2);

impl ImageService {
    /// Deletes, in the background, the temporary images that an earlier daemon left. They get no
    /// grace period, because their callers are gone.
    pub fn delete_temporary_images(&self) {
        let images = self.images.list().unwrap_or_else(|e| {
            log::warn!("look for temporary images: {e}");
            Vec::new()
        });
        for info in images.into_iter().filter(|info| info.temporary) {
            self.delete_when_unused(info.name, Duration::ZERO);
        }
    }

    /// Gives the caller time to use a new temporary image, and then deletes it as soon as nothing
    /// uses it.
    pub(super) fn delete_after_use(&self, name: ImageRef) {
        self.delete_when_unused(name, GRACE);
    }

    fn delete_when_unused(&self, name: ImageRef, grace: Duration) {
        let service = self.clone();
        let body = move || {
            let mut period = grace;
            while !service.core.sleep(period) {
                if service.is_deleted_if_unused(&name) {
                    return;
                }
                period = PERIOD;
            }
        };
        if let Err(e) = self.core.spawn("temporary", body) {
            log::warn!(
                "start a thread to delete a temporary image: {e}; fcd will retry at its next start"
            );
        }
    }

    /// Deletes a temporary image if nothing uses it. Returns true if there is nothing left to do.
    fn is_deleted_if_unused(&self, name: &ImageRef) -> bool {
        let Some(_guard) = self.uses.begin_delete(name) else {
            return false;
        };
        match self.images.get(name) {
            // Its caller has deleted it, and somebody may have used the name again.
            Err(e) if e.kind() == Kind::ImageNotFound => return true,
            Ok(info) if !info.temporary => return true,
            _ => {}
        }
        if self.check_unused(name, "delete").is_err() {
            return false;
        }
        match self.images.delete(name) {
            Ok(()) => log::info!("deleted the temporary image {name}"),
            Err(e) => log::warn!("{e}; fcd will retry at its next start"),
        }
        true
    }
}
