//! The registry of images. It has one directory per image and keeps nothing in memory.

use super::directory::{self, Readers, Staging, open_registry};
use super::in_place::InPlace;
use super::stamps;
use crate::api::image::{ImageConfig, ImageFile, ImageHistory};
use crate::error::{Error, Kind, Result};
use crate::host::hex;
use crate::host::time::now_s;
use crate::ids::{ImageRef, KernelName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

pub(super) const KERNEL: &str = "vmlinux";
const IMAGES_DIR: &str = "images";
pub(super) const INITRD: &str = "initrd";
pub(super) const ROOTFS: &str = "rootfs.ext4";
pub(super) const METADATA: &str = "image.json";
const METADATA_BYTES_MAX: u64 = 4 << 20;
/// The file with the details that are only shown on demand.
const DETAILS: &str = "details.json";
const DETAILS_BYTES_MAX: u64 = 8 << 20;
/// The size of a disk is a multiple of this.
const BLOCK_BYTES: u64 = 4096;
/// The format of `image.json` for an image that has its own kernel and init.
const FORMAT_OWN: u32 = 1;
/// The format of `image.json` for an image that boots with a guest runtime. Images with another
/// format are refused.
pub(super) const FORMAT_RUNTIME: u32 = 2;
/// The version of the init in new images. Version 1 supports `work_disk` and `files.tar` in the
/// seed. In version 2 the initramfs loads the balloon driver. Version 3 shuts down on Ctrl-Alt-Del
/// and loads the vsock driver on demand. In version 4, users other than root can log in. In version
/// 5 the initramfs sets the level of the console. Version 6 sets up IPv6 if the seed has an IPv6
/// address.
const GUEST_VERSION: u32 = 6;
/// The first version of the init whose guests can return memory to the host.
pub const BALLOON_SINCE: u32 = 2;
/// The first version of the init whose guests shut down on Ctrl-Alt-Del. Earlier guests would be
/// reset.
pub const CTRL_ALT_DEL_SINCE: u32 = 3;
/// The first version of the init whose guests let fcd's key log in as any user of the guest.
pub const USER_LOGIN_SINCE: u32 = 4;
/// The first version of the init that lets the kernel write its errors to the console. Earlier ones
/// keep the level of the boot.
pub const CONSOLE_LEVEL_SINCE: u32 = 5;
/// The prefix of a build's directory. No image name begins with a dot.
const STAGING_PREFIX: &str = ".building-";

/// A complete image. The paths are absolute if the registry's path is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    pub name: ImageRef,
    pub dir: PathBuf,
    pub boots: Boots,
    /// The raw ext4 file system, which is read-only. It does not exist if the image is in place.
    pub rootfs: PathBuf,
    /// The user's file that holds the root file system of an image that was registered.
    pub in_place: Option<InPlace>,
    /// True if the image is deleted once nothing uses it.
    pub temporary: bool,
    /// The kernel that a VM of this image boots unless its creator chooses another.
    pub kernel: Option<KernelName>,
    /// The virtual size of the root file system.
    pub disk_bytes: u64,
    /// The space that the image uses on the host.
    pub allocated_bytes: u64,
    /// The distribution's name, for example `Debian GNU/Linux 12 (bookworm)`.
    pub os: String,
    /// The kernel's version, for example `6.1.0-56-cloud-amd64`.
    pub kernel_version: String,
    /// When the image was built, in seconds since the epoch.
    pub built_at: u64,
    /// The version of the image's init; see [`GUEST_VERSION`].
    pub guest_version: u32,
    /// The user who built the image, or None if the image belongs to the host.
    pub owner_uid: Option<u32>,
    /// The digest of the manifest from which the image was made, such as `sha256:...`.
    pub digest: Option<String>,
    /// The source of the image, as it was given to the command that made it.
    pub source: Option<String>,
    /// True if only the owner may use the image.
    pub private: bool,
    /// The settings of commands in the image.
    pub config: ImageConfig,
    /// The digest of the image's own files.
    pub content: String,
    /// The caller's name for the origin of the image; see [`crate::api::image::Image`].
    pub recipe: Option<String>,
}

/// The source of the kernel and the init that a VM boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boots {
    /// The image has a kernel, an ELF file that boots through PVH, and an init of fcd.
    Own { kernel: PathBuf, initrd: PathBuf },
    /// The image holds only its own files, and boots with the newest guest runtime.
    Runtime,
}

impl ImageInfo {
    /// Returns the image's own kernel and initrd if only the daemon can read them. A VMM with a uid
    /// of its own then needs links in its VM's directory.
    pub fn private_kernel(&self) -> Option<(&Path, &Path)> {
        match &self.boots {
            Boots::Own { kernel, initrd } if self.private => Some((kernel, initrd)),
            _ => None,
        }
    }

    /// Returns the size of a VM's root disk if its creator does not choose one. The file system of
    /// an image that boots with a runtime is only as large as its files.
    pub fn default_disk_bytes(&self) -> u64 {
        match self.boots {
            Boots::Own { .. } => self.disk_bytes,
            Boots::Runtime => self.disk_bytes.max(super::DISK_BYTES_DEFAULT),
        }
    }

    /// Returns the digest by which users know the image: that of its manifest or, if it was not
    /// pulled, that of its files.
    pub fn shown_digest(&self) -> &str {
        self.digest.as_deref().unwrap_or(&self.content)
    }

    /// Returns the image as the user `uid` sees it.
    pub fn to_api(&self, uid: u32, vms: u64) -> crate::api::image::Image {
        crate::api::image::Image {
            name: self.name.said_by(uid),
            disk_bytes: self.disk_bytes,
            allocated_bytes: self.allocated_bytes,
            kernel: match (&self.kernel, &self.boots) {
                (Some(name), _) => format!("kernel {name}"),
                (None, Boots::Own { .. }) => format!("Linux {}", self.kernel_version),
                (None, Boots::Runtime) => "guest runtime".to_owned(),
            },
            os: self.os.clone(),
            built_at: self.built_at,
            vms,
            owner_uid: self.owner_uid,
            digest: Some(self.shown_digest().to_owned()),
            source: self.source.clone(),
            recipe: self.recipe.clone(),
            file: self.in_place.as_ref().map(|file| ImageFile {
                path: file.path.display().to_string(),
                changed: file.difference(),
            }),
        }
    }

    /// Opens the file of an image that is in place. Returns None for other images.
    ///
    /// # Errors
    /// `conflict` if the file is no longer what was registered.
    pub fn open_in_place(&self) -> Result<Option<File>> {
        let opened = self.in_place.as_ref().map(InPlace::open).transpose();
        opened.map_err(|e| self.about_file(e))
    }

    /// Checks that the file of an image that is in place has not changed since it was opened.
    pub fn require_same(&self, file: &File) -> Result<()> {
        let same = self.in_place.as_ref().map(|of| of.require_same(file));
        same.unwrap_or(Ok(())).map_err(|e| self.about_file(e))
    }

    fn about_file(&self, e: Error) -> Error {
        let name = &self.name;
        e.context(format!("image {name}")).hint(format!(
            "put the file back as it was, or run fcctl image rm {name} and register it again"
        ))
    }
}

/// The content of `image.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Metadata {
    pub format: u32,
    pub name: ImageRef,
    pub os: String,
    pub kernel_version: String,
    /// The packages in addition to the essential ones.
    pub packages: Vec<String>,
    pub built_at: u64,
    /// The version of the image's init. Images of earlier versions lack this field.
    #[serde(default)]
    pub guest_version: u32,
    /// The user who built the image. Images of earlier versions lack this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub private: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ImageConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<String>,
    /// The location of the root file system, if it is not among the image's own files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<InPlace>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub temporary: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelName>,
    pub files: Vec<FileRecord>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FileRecord {
    pub name: String,
    pub bytes: u64,
    /// The digest of the content. For the root file system, it covers the non-zero blocks.
    pub sha256: String,
}

impl Metadata {
    fn readers(&self) -> Readers {
        if self.private {
            Readers::Daemon
        } else {
            Readers::Everybody
        }
    }

    pub(super) fn new(name: &ImageRef, packages: &[String], built_at: u64) -> Self {
        Self {
            format: FORMAT_OWN,
            name: name.clone(),
            os: String::new(),
            kernel_version: String::new(),
            packages: packages.to_vec(),
            built_at,
            guest_version: GUEST_VERSION,
            owner_uid: None,
            digest: None,
            source: None,
            private: false,
            config: None,
            recipe: None,
            in_place: None,
            temporary: false,
            kernel: None,
            files: Vec::new(),
        }
    }

    /// Returns the digest of the image's content, which is computed from the digests of its files.
    fn content(&self) -> String {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(format!("{} {}\n", file.sha256, file.name));
        }
        format!("sha256:{}", hex::encode(&hash.finalize()))
    }
}

/// An additional name of an image.
pub struct Tag<'a> {
    pub new_name: &'a ImageRef,
    pub owner_uid: u32,
    /// True if all users may use the image under this name.
    pub is_shared: bool,
}

/// The registry of images.
#[derive(Clone, Debug)]
pub struct Images {
    dir: PathBuf,
}

/// Returns the path of an image's kernel, which may not exist.
pub fn kernel_path(state_dir: &Path, name: &ImageRef) -> PathBuf {
    state_dir
        .join(IMAGES_DIR)
        .join(name.dir_name())
        .join(KERNEL)
}

impl Images {
    /// Opens `<state_dir>/images`, which is created if it does not exist, and removes the leftovers
    /// of unfinished builds and deletions. The caller holds the state directory's lock, so no build
    /// is running.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let dir = open_registry(state_dir, IMAGES_DIR, STAGING_PREFIX)?;
        let images = Self { dir };
        // Earlier versions let every user of the host read private images.
        for image in images.list()?.iter().filter(|image| image.private) {
            directory::set_readers(&image.dir, Readers::Daemon)
                .map_err(|e| Error::io(format!("protect {}", image.dir.display()), e))?;
        }
        Ok(images)
    }

    /// Returns all complete images, sorted by name. Damaged ones are logged and omitted.
    pub fn list(&self) -> Result<Vec<ImageInfo>> {
        crate::locks::may_block("file access");
        let io = |e| Error::io(format!("read image registry {}", self.dir.display()), e);
        let mut images = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            let Some(name) = name.to_str().and_then(ImageRef::of_dir_name) else {
                continue;
            };
            match self.get(&name) {
                Ok(info) => images.push(info),
                Err(e) => log::warn!("{e}"),
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Reads the information about an image.
    ///
    /// # Errors
    /// `image_not_found`, or `host` if the image is damaged, for example because a file is missing
    /// or was written to after the image was published.
    pub fn get(&self, name: &ImageRef) -> Result<ImageInfo> {
        crate::locks::may_block("file access");
        let metadata = self.metadata(name)?;
        let dir = self.path(name);
        let damaged = |what: String| damaged(name, &what);
        stamps::require_unchanged(&dir).map_err(damaged)?;
        let mut allocated_bytes = 0;
        let mut size = |wanted: &str| {
            let record = metadata.files.iter().find(|f| f.name == wanted);
            let record =
                record.ok_or_else(|| damaged(format!("{METADATA} does not name {wanted}")))?;
            if wanted == ROOTFS && metadata.in_place.is_some() {
                return Ok(record.bytes);
            }
            let found = std::fs::metadata(dir.join(wanted))
                .map_err(|e| damaged(format!("{wanted}: {e}")))?;
            allocated_bytes += found.blocks() * 512;
            if found.len() != record.bytes {
                return Err(damaged(format!(
                    "{wanted} has {} bytes instead of {}",
                    found.len(),
                    record.bytes
                )));
            }
            Ok(record.bytes)
        };
        let boots = if metadata.format == FORMAT_RUNTIME {
            Boots::Runtime
        } else {
            size(KERNEL)?;
            size(INITRD)?;
            Boots::Own {
                kernel: dir.join(KERNEL),
                initrd: dir.join(INITRD),
            }
        };
        // A user's file may have any size, but a disk consists of whole blocks.
        let disk_bytes = size(ROOTFS)?.next_multiple_of(BLOCK_BYTES);
        Ok(ImageInfo {
            name: name.clone(),
            rootfs: dir.join(ROOTFS),
            disk_bytes,
            allocated_bytes,
            content: metadata.content(),
            os: metadata.os,
            kernel_version: metadata.kernel_version,
            built_at: metadata.built_at,
            guest_version: match boots {
                Boots::Own { .. } => metadata.guest_version,
                // Such an image uses the init of the runtime.
                Boots::Runtime => GUEST_VERSION,
            },
            owner_uid: metadata.owner_uid,
            digest: metadata.digest,
            source: metadata.source,
            private: metadata.private,
            config: metadata.config.unwrap_or_default(),
            boots,
            recipe: metadata.recipe,
            in_place: metadata.in_place,
            temporary: metadata.temporary,
            kernel: metadata.kernel,
            dir,
        })
    }

    /// Reads an image's `image.json`.
    pub(super) fn metadata(&self, name: &ImageRef) -> Result<Metadata> {
        crate::locks::may_block("file access");
        let dir = self.path(name);
        let damaged = |what: String| damaged(name, &what);
        let file = match File::open(dir.join(METADATA)) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !dir.exists() => {
                return Err(not_found(name));
            }
            Err(e) => return Err(damaged(format!("{METADATA}: {e}"))),
        };
        let bytes = crate::host::command::read_bounded(file, METADATA_BYTES_MAX)
            .map_err(|e| damaged(e.to_string()))?;
        let metadata: Metadata =
            serde_json::from_slice(&bytes).map_err(|e| damaged(format!("{METADATA}: {e}")))?;
        if ![FORMAT_OWN, FORMAT_RUNTIME].contains(&metadata.format) || metadata.name != *name {
            return Err(damaged(format!(
                "{METADATA} belongs to another image or another version of fcd"
            )));
        }
        Ok(metadata)
    }

    pub(super) fn path(&self, name: &ImageRef) -> PathBuf {
        self.dir.join(name.dir_name())
    }

    /// Deletes an image, even a damaged one. It is renamed first, so it disappears at once. The
    /// blocks of the root file system are freed when the last hard link to it, from a VM's disk, is
    /// removed.
    ///
    /// # Errors
    /// `image_not_found`, `host`.
    pub fn delete(&self, name: &ImageRef) -> Result<()> {
        if directory::delete(&self.dir, &name.dir_name())? {
            return Ok(());
        }
        Err(not_found(name))
    }

    /// Creates an empty directory for a build. The directory is removed when the result is dropped.
    pub(super) fn stage(&self, name: &ImageRef) -> Result<Staging> {
        crate::locks::may_block("file access");
        if self.path(name).exists() {
            return Err(name_taken(name));
        }
        Staging::new(&self.dir, &format!("{STAGING_PREFIX}{}-", name.dir_name()))
    }

    /// Publishes `files`, a directory below the staging directory, as an image: writes
    /// `image.json`, makes the files read-only, syncs everything, and renames the directory.
    pub(super) fn publish(&self, files: &Path, metadata: &Metadata) -> Result<ImageInfo> {
        let name = &metadata.name;
        let io = |e: std::io::Error| Error::io(format!("publish image {name}"), e);
        self.write_metadata(files, metadata)?;
        // If two builds use the same name, the first one wins.
        let (names, readers) = (self.files_of(files), metadata.readers());
        if !directory::publish(files, &names, readers, &self.path(name)).map_err(io)? {
            return Err(name_taken(name));
        }
        self.get(name)
    }

    fn write_metadata(&self, files: &Path, metadata: &Metadata) -> Result<()> {
        crate::locks::may_block("file access");
        let io = |e| Error::io(format!("publish image {}", metadata.name), e);
        let text = serde_json::to_vec_pretty(metadata).map_err(|e| io(e.into()))?;
        // A longer text could not be read back.
        if text.len() as u64 > METADATA_BYTES_MAX {
            return Err(too_long());
        }
        std::fs::write(files.join(METADATA), text).map_err(io)
    }

    /// Returns the files of an image that exist in a directory.
    fn files_of(&self, dir: &Path) -> Vec<&'static str> {
        crate::locks::may_block("file access");
        [KERNEL, INITRD, ROOTFS, DETAILS, METADATA]
            .into_iter()
            .filter(|file| dir.join(file).exists())
            .collect()
    }
}

/// An image that was pulled.
pub(super) struct Pulled {
    pub name: ImageRef,
    /// The digest of its manifest.
    pub digest: String,
    pub source: String,
    pub owner_uid: u32,
    pub private: bool,
    pub config: ImageConfig,
    pub details: ImageDetails,
    pub os: String,
}

/// The details that are only shown on demand, which are the content of `details.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageDetails {
    /// The digests of the unpacked layers, lowest first.
    pub layers: Vec<String>,
    /// The steps that made the image, oldest first.
    pub history: Vec<ImageHistory>,
}

impl Images {
    /// Creates an empty directory for an image whose name is not known yet.
    pub(super) fn stage_pull(&self) -> Result<Staging> {
        Staging::new(&self.dir, &format!("{STAGING_PREFIX}pull-"))
    }

    /// Publishes the directory `files`, which holds the root file system of a pulled image. If
    /// `replaces` is true, an existing image of the same name is moved to `files`.
    pub(super) fn publish_pulled(
        &self,
        files: &Path,
        pulled: Pulled,
        replaces: bool,
    ) -> Result<ImageInfo> {
        crate::locks::may_block("file access");
        let io = |e: std::io::Error| Error::io(format!("publish image {}", pulled.name), e);
        let details = serde_json::to_vec(&pulled.details).map_err(|e| io(e.into()))?;
        if details.len() as u64 > DETAILS_BYTES_MAX {
            return Err(too_long());
        }
        std::fs::write(files.join(DETAILS), details).map_err(io)?;
        let bytes = std::fs::metadata(files.join(ROOTFS)).map_err(io)?.len();
        let metadata = Metadata {
            format: FORMAT_RUNTIME,
            os: pulled.os,
            owner_uid: Some(pulled.owner_uid),
            digest: Some(pulled.digest),
            source: Some(pulled.source),
            private: pulled.private,
            config: Some(pulled.config),
            files: vec![FileRecord {
                name: ROOTFS.to_owned(),
                bytes,
                // The digests of the layers were verified during the pull.
                sha256: String::new(),
            }],
            ..Metadata::new(&pulled.name, &[], now_s())
        };
        // The image to replace may have been deleted during the pull.
        if !replaces || !self.path(&pulled.name).exists() {
            return self.publish(files, &metadata);
        }
        self.replace(files, &metadata)
    }

    /// Publishes `files` like [`Self::publish`], but replaces the image of the same name, which is
    /// moved to `files`.
    pub(super) fn replace(&self, files: &Path, metadata: &Metadata) -> Result<ImageInfo> {
        crate::locks::may_block("file access");
        let name = &metadata.name;
        let io = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::NotFound if !self.path(name).exists() => not_found(name),
            _ => Error::io(format!("publish image {name}"), e),
        };
        self.write_metadata(files, metadata)?;
        directory::seal(files, &self.files_of(files), metadata.readers()).map_err(io)?;
        directory::exchange(files, &self.path(name)).map_err(io)?;
        self.get(name)
    }

    /// Reads the details that are only shown on demand. They are empty for images that were built
    /// here.
    pub fn details(&self, name: &ImageRef) -> Result<ImageDetails> {
        crate::locks::may_block("file access");
        let path = self.path(name).join(DETAILS);
        let io = |e| Error::io(format!("read {}", path.display()), e);
        let file = match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(ImageDetails::default());
            }
            opened => opened.map_err(io)?,
        };
        let bytes = crate::host::command::read_bounded(file, DETAILS_BYTES_MAX).map_err(io)?;
        serde_json::from_slice(&bytes).map_err(|e| io(e.into()))
    }

    /// Gives an image an additional name. Both names share their files.
    ///
    /// # Errors
    /// `image_not_found`, `name_taken`, `host`.
    pub fn tag(&self, name: &ImageRef, tag: &Tag<'_>) -> Result<ImageInfo> {
        crate::locks::may_block("file access");
        let Tag {
            new_name,
            owner_uid,
            is_shared,
        } = *tag;
        let from = self.get(name)?.dir;
        let mut metadata = self.metadata(name)?;
        let io = |e: std::io::Error| Error::io(format!("tag image {name} as {new_name}"), e);
        metadata.name = new_name.clone();
        if metadata.owner_uid != Some(owner_uid) {
            // The former owner chose this text, so it proves nothing to the new one.
            metadata.recipe = None;
        }
        metadata.owner_uid = Some(owner_uid);
        metadata.private = !is_shared && (metadata.private || new_name.owner().is_some());
        let staging = self.stage(new_name)?;
        let out = staging.path().join("out");
        std::fs::create_dir(&out).map_err(io)?;
        for file in [KERNEL, INITRD, ROOTFS, DETAILS] {
            match std::fs::hard_link(from.join(file), out.join(file)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                linked => linked.map_err(io)?,
            }
        }
        self.publish(&out, &metadata)
    }
}

fn damaged(name: &ImageRef, what: &str) -> Error {
    let text = format!("image {name} is damaged: {what}");
    Error::new(Kind::Host, text).hint(format!(
        "run fcctl image rm {name}, then build or pull it again"
    ))
}

fn too_long() -> Error {
    let text = "the configuration or the history of the image is too long";
    Error::new(Kind::InvalidImage, text)
}

fn not_found(name: &ImageRef) -> Error {
    let hint = if name.as_str() == "default" {
        "run fcctl image build".to_owned()
    } else {
        format!("list images: fcctl image list, or pull one: fcctl image pull {name}")
    };
    Error::new(Kind::ImageNotFound, format!("there is no image {name}")).hint(hint)
}

fn name_taken(name: &ImageRef) -> Error {
    Error::new(Kind::NameTaken, format!("image {name} already exists"))
        .hint("run fcctl image list, or choose another name")
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
