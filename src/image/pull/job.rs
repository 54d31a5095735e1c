//! The job that the daemon gives the helper, and its outcome.

use crate::api::image::{ArchiveFormat, ImageConfig, ImageHistory};
use crate::host::text;
use crate::image::fetch::{Selector, Settings};
use crate::image::oci::limits::{HISTORY_MAX, LAYERS_MAX};
use crate::image::oci::{Digest, check_config};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub source: JobSource,
    /// The platform to choose from an index.
    pub platform: String,
    /// The limit of the space that the image may take.
    pub bytes_max: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum JobSource {
    Registry {
        settings: Box<Settings>,
        selector: Selector,
        /// The name that the image gets unless the caller chose another.
        name: String,
    },
    Archive {
        format: Option<ArchiveFormat>,
        /// Chooses one of several images.
        reference: Option<String>,
    },
}

/// The image that the helper has written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub config: ImageConfig,
    pub history: Vec<ImageHistory>,
    /// The digests of the unpacked layers, lowest first.
    pub layers: Vec<String>,
    /// `PRETTY_NAME` of the image's os-release(5), if it has that file.
    pub os: Option<String>,
}

impl Outcome {
    /// Returns the outcome if an honest helper could have sent it. The daemon keeps these texts and
    /// shows them to users.
    pub(super) fn checked(mut self) -> Option<Self> {
        let are_digests = self.layers.iter().all(|l| l.parse::<Digest>().is_ok());
        let is_bounded = self.layers.len() <= LAYERS_MAX && self.history.len() <= HISTORY_MAX;
        self.os = self.os.map(|os| text::printable(&os));
        (are_digests && is_bounded && check_config(&self.config).is_ok()).then_some(self)
    }
}
