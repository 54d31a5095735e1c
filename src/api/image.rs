//! Calls about images. An image is a root file system with its kernel and initramfs.

use super::call::calls;
use crate::ids::{ImageRef, KernelName};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    pub name: ImageRef,
    /// The virtual size of the root file system.
    pub disk_bytes: u64,
    /// The space that the image uses on the host.
    pub allocated_bytes: u64,
    /// The kernel and its version, such as `Linux 6.1.0-56-cloud-amd64`.
    pub kernel: String,
    /// The distribution, such as `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
    /// When the image was built, in seconds since the epoch.
    pub built_at: u64,
    /// The number of existing VMs that were created from the image.
    pub vms: u64,
    /// The user to whom the image belongs; null if all users share it.
    pub owner_uid: Option<u32>,
    /// The digest of the manifest from which the image was made, or else of its files, such as
    /// `sha256:...`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The source from which the image was pulled, such as a reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// A description of what the image was made from, chosen by the caller of `image.commit`. With
    /// it, fcctl recognizes a build that it has already done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// The user's file that an image from `image.register` uses in place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<ImageFile>,
}

/// A file outside of the daemon's state directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageFile {
    pub path: String,
    /// How the file differs from what was registered. Null if it does not differ. VMs of an image
    /// whose file has changed do not start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageBuildRequest {
    /// The name of the new image. Defaults to `image` under `[vm]` in the daemon's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ImageRef>,
    /// Additional packages of the distribution.
    #[serde(default)]
    pub include: Vec<String>,
    /// Omit the compilers, tools and the user `dev` that an image has otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub minimal: bool,
}

/// The format of an archive. A file that `docker save` wrote may have both formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveFormat {
    Oci,
    Docker,
}

/// The source of a pull.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PullSource {
    /// A registry. If the call passes a descriptor, the daemon reads the credential from it.
    Registry {
        /// A reference as docker writes it, such as `gcc:13` or `ghcr.io/owner/app@sha256:...`.
        reference: String,
    },
    /// An archive that the daemon reads from the passed descriptor, as `docker save` or `skopeo
    /// copy ... oci-archive:` write it.
    Archive {
        /// Null to detect the format from the files in the archive.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<ArchiveFormat>,
        /// Chooses one of several images in the archive.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reference: Option<String>,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagePullRequest {
    pub source: PullSource,
    /// The name of the image on this host. Defaults to the reference, or to the name in the
    /// archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ImageRef>,
    /// The platform to choose from an index, such as `linux/amd64`. Defaults to that of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Share the image with all users, even if it is already present. Only root and the user who
    /// runs the daemon may do this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageShowReply {
    pub image: Image,
    /// How commands run in the image.
    pub config: ImageConfig,
    /// The digests of the unpacked layers, lowest first.
    pub layers: Vec<String>,
    /// The steps that made the image, oldest first. Long texts of a step are shortened.
    pub history: Vec<ImageHistory>,
    /// The number of older steps, which do not fit into the reply.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub history_omitted: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageTagRequest {
    pub image: ImageRef,
    /// The additional name.
    pub name: ImageRef,
    /// Share the image with all users under the additional name. Only root and the user who runs
    /// the daemon may do this.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImagePruneRequest {
    /// Also delete the caller's images that no VM and no snapshot uses.
    #[serde(default)]
    pub all: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImagePruneReply {
    /// The images that were deleted.
    pub images: Vec<ImageRef>,
    /// The number of cached layers that were removed.
    pub layers: u64,
    /// The guest runtimes that were removed.
    pub runtimes: Vec<String>,
    /// The space that was freed. Images that share files with VMs count only once these are
    /// deleted.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageCommitRequest {
    /// A VM that is stopped.
    pub vm: String,
    /// The name of the new image.
    pub image: ImageRef,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// Delete the image once no VM uses it, at the earliest after half a minute.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temporary: bool,
}

/// The call passes a descriptor of a regular file that is open for reading and belongs to the
/// caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRegisterRequest {
    /// The name of the new image.
    pub image: ImageRef,
    /// The kernel that VMs of the image boot unless `vm.create` names another. Null for that of the
    /// guest runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportFormat {
    /// A tar archive in the OCI image layout, which also has the `manifest.json` of `docker save`.
    #[default]
    Oci,
    /// The ext4 file system.
    Raw,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageExportRequest {
    pub image: ImageRef,
    #[serde(default)]
    pub format: ExportFormat,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageExportReply {
    /// The number of bytes that were written.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageReply {
    pub image: Image,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageListReply<I = Image> {
    /// The images, sorted by name.
    pub images: Vec<I>,
    /// The cursor of the next page, or None if there are no more items.
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

/// The configuration of the process to start, from an OCI image. All of it is untrusted data:
/// nothing here ever becomes part of a command line on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `USER[:GROUP]`, each a name or a number. Empty for root.
    #[serde(default)]
    pub user: String,
    /// Entries of the form `NAME=VALUE`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Empty for the root directory.
    #[serde(default)]
    pub working_dir: String,
    #[serde(default)]
    pub entrypoint: Vec<String>,
    #[serde(default)]
    pub cmd: Vec<String>,
    /// The signal that stops the process, such as `SIGTERM` or `15`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
}

/// One step of an image's build.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageHistory {
    /// When the step ran, in RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// True if the step added no layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

calls! {
    /// Fails if an image of that name exists.
    ImageBuild = "image.build" (ImageBuildRequest) -> ImageReply
        [Anybody, Keyed, CancelOperation, NoFds, feature "image_build"];
    /// Pulls an image. If an image of that name has the same digest, nothing changes. If it has
    /// another digest and no VM and no snapshot uses it, it is replaced.
    ImagePull = "image.pull" (ImagePullRequest) -> ImageReply
        [Anybody, Keyed, CancelOperation, TakesFds, feature "image_pull"];
    ImageShow = "image.show" (ImageRequest) -> ImageShowReply [Anybody, Unkeyed, Nothing, NoFds];
    /// Gives an image an additional name. Both share their files.
    ImageTag = "image.tag" (ImageTagRequest) -> ImageReply [Anybody, Keyed, Nothing, NoFds];
    /// Removes cached layers and guest runtimes that no VM and no image needs.
    ImagePrune = "image.prune" (ImagePruneRequest) -> ImagePruneReply [Anybody, Keyed, Nothing, NoFds];
    /// Makes an image of the root disk of a stopped VM, as it is. Keys and logs of the guest are
    /// part of the image unless the guest removed them. Fails if an image of that name exists.
    ImageCommit = "image.commit" (ImageCommitRequest) -> ImageReply
        [Owner, Keyed, CancelOperation, NoFds, feature "image_commit"];
    /// Makes an image of a file with an ext4 file system. The file stays where it is. Fails if an
    /// image of that name exists.
    ImageRegister = "image.register" (ImageRegisterRequest) -> ImageReply
        [Anybody, Keyed, CancelOperation, TakesFds, feature "image_register"];
    /// Copies the file of an image from `image.register` into the store. The image then no longer
    /// depends on the file. Does nothing if the image is already in the store.
    ImagePromote = "image.promote" (ImageRequest) -> ImageReply
        [Owner, Keyed, CancelOperation, NoFds, feature "image_register"];
    /// Writes an image into the passed write end of a pipe. The image is complete only if the call
    /// succeeds.
    ImageExport = "image.export" (ImageExportRequest) -> ImageExportReply
        [Anybody, Keyed, CancelOperation, TakesFds, feature "image_export"];
    ImageList = "image.list" (super::page::ListRequest) -> ImageListReply [Anybody, Unkeyed, Nothing, NoFds];
    /// The owner is the user who built the image. The user who runs the daemon may delete the
    /// image, too. Fails with `conflict` while a VM or a snapshot needs the image.
    ImageDelete = "image.delete" (ImageRequest) -> ImageDeleteReply [Owner, Keyed, Nothing, NoFds];
}

super::page::list_calls! { ImageList: images of Image; }

/// The media types of manifests and indexes that a pull understands: the OCI image
/// specification, and the image manifest version 2 of Docker.
pub const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Shortens `sha256:...` to the twelve digits that docker shows.
pub fn short_digest(digest: &str) -> &str {
    let hex = digest.split_once(':').map_or(digest, |(_, hex)| hex);
    hex.get(..12).unwrap_or(hex)
}
