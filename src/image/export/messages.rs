//! The messages between the daemon and the helper that makes a layer: JSON, one message per packet.

use crate::image::pull::Failure;
use serde::{Deserialize, Serialize};

/// The size limit of a message in either direction.
pub(super) const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The first message to the helper. Its descriptors are the file system and an empty file.
#[derive(Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) bytes_max: u64,
}

/// A message from the helper.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// The bytes of all files that were written so far.
    Progress(u64),
    Done,
    Failed(Failure),
}
