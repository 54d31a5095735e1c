//! Images: a root file system with its kernel and initramfs.

use super::calls;
use crate::ids::ImageRef;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    pub name: ImageRef,
    /// Of the root file system's virtual size.
    pub disk_bytes: u64,
    /// What it takes on the host.
    pub allocated_bytes: u64,
    /// `Linux 6.1.0-56-cloud-amd64`.
    pub kernel: String,
    /// `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
    /// Seconds since the epoch.
    pub built_at: u64,
    /// VMs made from it.
    pub vms: u64,
    /// Who built it; null: it belongs to the host.
    pub owner_uid: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageBuildRequest {
    /// `default` when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ImageRef>,
    /// More packages of the distribution.
    #[serde(default)]
    pub include: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageReply {
    pub image: Image,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageListReply<I = Image> {
    /// In the order of their names.
    pub images: Vec<I>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRequest {
    pub image: ImageRef,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageDeleteReply {
    pub deleted: ImageRef,
}

calls! {
    /// An operation; hang-up cancels it. An image of that name must not exist.
    ImageBuild = "image.build" (ImageBuildRequest) -> ImageReply;
    ImageList = "image.list" (super::page::ListRequest) -> ImageListReply;
    /// Allowed for root, the daemon's own user and the user who built the image. `conflict` while a VM or a snapshot needs it.
    ImageDelete = "image.delete" (ImageRequest) -> ImageDeleteReply;
}

super::page::list_calls! { ImageList: images of Image; }
