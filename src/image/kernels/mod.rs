//! Kernels that VMs can boot instead of the kernel of their image.
//!
//! Each is a directory `<state>/kernels/<name>` with `vmlinux`, `initrd` and `kernel.json`. It is
//! published with one rename and never changes.
//!
//! An import takes an ELF file as it is and unpacks a bzImage. The initramfs gets the modules that
//! a guest needs to reach its root disk and network, unless they are built in (`modules.builtin`),
//! and their dependencies (`modules.dep`). These lists and the modules are read only from below the
//! modules' directory, because every guest can read an initramfs. The initramfs takes its busybox
//! from an image. The guest loads later modules from its own root file system, which has only the
//! modules of the image's kernel.
//!
//! The daemon reads the files, so only root and the daemon's own user may import.

mod elf;
mod modules;
mod read;
mod vmlinux;

use super::initrd::{PART_BYTES_MAX, initrd};
use super::registry::{INITRD, KERNEL, Staging};
use super::{Images, cpio};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::command::read_bounded;
use crate::host::time::now_s;
use crate::ids::{KernelName, NAME_LEN_MAX};
use crate::locks::Cancel;
use modules::{WANTED, find_modules};
use read::read_file;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use vmlinux::take_kernel;

const KERNELS_DIR: &str = "kernels";
/// The prefix of directories that are being created or removed.
const IMPORTING: &str = ".importing-";
const DELETING: &str = ".deleting-";
const METADATA: &str = "kernel.json";
const METADATA_BYTES_MAX: u64 = 64 << 10;

/// The content of `kernel.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    pub name: KernelName,
    /// The kernel's version, for example `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// The modules in the initramfs. All others that a guest needs are built in.
    pub modules: Vec<String>,
    /// When the kernel was imported, in seconds since the epoch.
    pub imported_at: u64,
    /// The space that the kernel uses on the host.
    #[serde(skip)]
    pub bytes: u64,
}

/// The kernel to import.
#[derive(Clone, Debug)]
pub struct ImportSpec {
    /// The absolute path of an ELF file or a bzImage.
    pub path: PathBuf,
    pub name: Option<KernelName>,
    /// The directory of the kernel's modules; `/lib/modules/VERSION` if None.
    pub modules: Option<PathBuf>,
}

/// The registry of kernels.
#[derive(Clone, Debug)]
pub struct Kernels {
    dir: PathBuf,
}

impl Kernels {
    /// Opens `<state_dir>/kernels`, which is created if it does not exist, and removes the
    /// leftovers of unfinished imports and deletions.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let dir = state_dir.join(KERNELS_DIR);
        let io = |e| Error::io(format!("open kernel registry {}", dir.display()), e);
        // VMMs run under their own uids and have to read kernels.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&dir)
            .map_err(io)?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).map_err(io)?;
        for entry in std::fs::read_dir(&dir).map_err(io)?.flatten() {
            let (name, path) = (entry.file_name(), entry.path());
            if [IMPORTING, DELETING]
                .iter()
                .any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
            {
                log::info!("removing the unfinished kernel import {}", path.display());
                if let Err(e) = std::fs::remove_dir_all(&path) {
                    log::warn!("remove {}: {e}", path.display());
                }
            }
        }
        Ok(Self { dir })
    }

    /// Returns the paths of a kernel and its initramfs. Does not check that the files exist.
    pub fn files(&self, name: &KernelName) -> (PathBuf, PathBuf) {
        let dir = self.dir.join(name.as_str());
        (dir.join(KERNEL), dir.join(INITRD))
    }

    /// Reads the information about a kernel.
    ///
    /// # Errors
    /// `kernel_not_found`, or `host` if the kernel is damaged, for example because a file is
    /// missing.
    pub fn get(&self, name: &KernelName) -> Result<KernelInfo> {
        crate::locks::require_memory_only("file access");
        let dir = self.dir.join(name.as_str());
        let file = match File::open(dir.join(METADATA)) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    Error::new(Kind::KernelNotFound, format!("there is no kernel {name}"))
                        .hint("run fcctl kernel list"),
                );
            }
            Err(e) => return Err(Error::io(format!("read kernel {name}"), e)),
        };
        let damaged = |what: String| {
            Error::new(Kind::Host, format!("kernel {name} is damaged: {what}")).hint(format!(
                "run fcctl kernel delete {name}, then import it again"
            ))
        };
        let bytes = read_bounded(file, METADATA_BYTES_MAX).map_err(|e| damaged(e.to_string()))?;
        let mut info: KernelInfo =
            serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        for file in [KERNEL, INITRD] {
            info.bytes += std::fs::metadata(dir.join(file))
                .map_err(|e| damaged(format!("{file}: {e}")))?
                .blocks()
                * 512;
        }
        Ok(info)
    }

    /// Returns all kernels, sorted by name. Damaged ones are logged and omitted.
    pub fn list(&self) -> Result<Vec<KernelInfo>> {
        let entries =
            std::fs::read_dir(&self.dir).map_err(|e| Error::io("read the kernel registry", e))?;
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse::<KernelName>().ok());
        let mut all: Vec<KernelInfo> = names
            .filter_map(|name| self.get(&name).inspect_err(|e| log::warn!("{e}")).ok())
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Deletes a kernel. VMs that are running with it are not affected.
    pub fn delete(&self, name: &KernelName) -> Result<()> {
        crate::locks::require_memory_only("file access");
        let dir = self.dir.join(name.as_str());
        if !dir.is_dir() {
            return self.get(name).map(drop);
        }
        // Move the kernel away first, so that no VM can boot a kernel that is partly deleted.
        let gone = tempfile::Builder::new()
            .prefix(DELETING)
            .tempdir_in(&self.dir)
            .map_err(|e| Error::io(format!("delete kernel {name}"), e))?;
        std::fs::rename(&dir, gone.path().join("gone"))
            .map_err(|e| Error::io(format!("delete kernel {name}"), e))
    }

    /// Imports a kernel. The busybox of the initramfs comes from an image, so an image must exist.
    /// An import that fails leaves nothing behind.
    ///
    /// # Errors
    /// `name_taken`, `unsupported` (not a kernel for a guest), `path_not_found`, `image_not_found`,
    /// `command_missing`, `cancelled`.
    pub fn import(
        &self,
        images: &Images,
        commands: &dyn Commands,
        spec: &ImportSpec,
        cancel: &Cancel,
    ) -> Result<KernelInfo> {
        let doing = |e: Error| e.context(format!("import kernel {}", spec.path.display()));
        let staging = Staging::new(&self.dir, IMPORTING)?;
        let out = staging.path();
        let version = take_kernel(commands, &spec.path, out, cancel).map_err(doing)?;
        let name = spec.name.clone().map_or_else(|| name_of(&version), Ok)?;
        if self.dir.join(name.as_str()).exists() {
            return Err(taken(&name));
        }
        let modules = find_modules(commands, spec.modules.as_deref(), &version, out, cancel)
            .map_err(doing)?;
        let busybox = busybox(images).map_err(doing)?;
        let wanted: Vec<&str> = WANTED.iter().map(|(name, _)| *name).collect();
        let bytes = initrd(
            &busybox,
            &modules.files,
            &modules.dependencies,
            &version,
            &wanted.join(" "),
        );
        std::fs::write(out.join(INITRD), bytes)
            .map_err(|e| doing(Error::io("write the initramfs", e)))?;
        let names = modules.files.iter().map(|(name, _)| name.clone()).collect();
        self.publish(
            &staging,
            &KernelInfo {
                name,
                version,
                modules: names,
                imported_at: now_s(),
                bytes: 0,
            },
        )
    }

    fn publish(&self, staging: &Staging, info: &KernelInfo) -> Result<KernelInfo> {
        let (name, files) = (&info.name, staging.path());
        let io = |e: std::io::Error| Error::io(format!("publish kernel {name}"), e);
        std::fs::write(
            files.join(METADATA),
            serde_json::to_vec_pretty(info).map_err(|e| io(e.into()))?,
        )
        .map_err(io)?;
        for file in [KERNEL, INITRD, METADATA] {
            let file = File::open(files.join(file)).map_err(io)?;
            file.set_permissions(std::fs::Permissions::from_mode(0o444))
                .map_err(io)?;
            file.sync_all().map_err(io)?;
        }
        std::fs::set_permissions(files, std::fs::Permissions::from_mode(0o755)).map_err(io)?;
        File::open(files).and_then(|d| d.sync_all()).map_err(io)?;
        let to = self.dir.join(name.as_str());
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            files,
            rustix::fs::CWD,
            &to,
            rustix::fs::RenameFlags::NOREPLACE,
        ) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST | rustix::io::Errno::NOTEMPTY) => return Err(taken(name)),
            Err(e) => return Err(io(e.into())),
        }
        File::open(&self.dir)
            .and_then(|d| d.sync_all())
            .map_err(io)?;
        self.get(name)
    }
}

fn taken(name: &KernelName) -> Error {
    Error::new(Kind::NameTaken, format!("kernel {name} already exists"))
        .hint("choose another with --name, or run fcctl kernel list")
}

/// Returns the default name for a version, such as `linux-6-1-0-56-cloud-amd64`.
fn name_of(version: &str) -> Result<KernelName> {
    let plain: String = version
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let mut name = format!("linux-{plain}");
    name.truncate(NAME_LEN_MAX);
    name.trim_end_matches('-')
        .parse::<KernelName>()
        .map_err(|e| e.hint("give it a name: --name"))
}

/// Returns a static busybox from the initramfs of the first image. Fails if there is no image, or
/// if that initramfs has no busybox.
fn busybox(images: &Images) -> Result<Vec<u8>> {
    let none = || {
        Error::new(
            Kind::ImageNotFound,
            "no image exists from which to take the initramfs's busybox",
        )
        .hint("run fcctl image build")
    };
    let image = images.list()?.into_iter().next().ok_or_else(none)?;
    let initrd = read_file(&image.initrd, PART_BYTES_MAX)?;
    cpio::find(&initrd, "bin/busybox")
        .map(<[u8]>::to_vec)
        .ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_follows_from_version() {
        assert_eq!(
            name_of("6.1.0-56-cloud-amd64").unwrap().as_str(),
            "linux-6-1-0-56-cloud-amd64"
        );
        assert_eq!(
            name_of(&"9".repeat(90)).unwrap().as_str().len(),
            NAME_LEN_MAX
        );
    }

    #[test]
    fn kernel_is_published_and_deleted_atomically() {
        let state = tempfile::tempdir().unwrap();
        let kernels = Kernels::open(state.path()).unwrap();
        let name: KernelName = "mine".parse().unwrap();
        let info = KernelInfo {
            name: name.clone(),
            version: "6.1".into(),
            modules: vec![],
            imported_at: 7,
            bytes: 0,
        };
        let publish = || {
            let staging = Staging::new(&kernels.dir, ".importing-").unwrap();
            for file in [KERNEL, INITRD] {
                std::fs::write(staging.path().join(file), "x").unwrap();
            }
            kernels.publish(&staging, &info)
        };
        assert_eq!(publish().unwrap().version, "6.1");
        assert_eq!(publish().unwrap_err().kind(), Kind::NameTaken);
        assert_eq!(kernels.list().unwrap().len(), 1);
        std::fs::create_dir(kernels.dir.join(".importing-left")).unwrap();
        std::fs::write(kernels.dir.join(".nfs0001"), "somebody else's").unwrap();
        let kernels = Kernels::open(state.path()).unwrap();
        kernels.delete(&name).unwrap();
        assert_eq!(
            kernels.delete(&name).unwrap_err().kind(),
            Kind::KernelNotFound
        );
        assert_eq!(
            std::fs::read_dir(&kernels.dir).unwrap().count(),
            1,
            "unrelated files are kept"
        );
    }
}
