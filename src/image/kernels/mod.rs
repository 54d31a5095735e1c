//! Kernels that VMs can boot instead of the kernel of their image.
//!
//! Each is a directory `<state>/kernels/<name>` with `vmlinux`, `initrd` and `kernel.json`. It is
//! published with one rename and never changes.
//!
//! An import takes an ELF file as it is and unpacks a bzImage. The initramfs gets the modules that
//! a guest needs to reach its root disk and network, unless they are built in (`modules.builtin`),
//! and their dependencies (`modules.dep`). These lists and the modules are read only from below the
//! modules' directory, because every guest can read an initramfs. The initramfs takes its busybox
//! from an image or a guest runtime. The guest loads later modules from its own root file system,
//! which has only the modules of the image's kernel.
//!
//! The daemon reads the files, so only root and the daemon's own user may import.

mod elf;
mod modules;
mod read;
mod vmlinux;

use super::directory::{self, Readers, Staging, open_registry};
use super::initrd::{PART_BYTES_MAX, initrd};
use super::registry::{INITRD, KERNEL};
use super::{Boots, GuestRuntimes, Images, cpio, stamps};
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
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vmlinux::take_kernel;

const KERNELS_DIR: &str = "kernels";
/// The prefix of directories that are being created.
const IMPORTING: &str = ".importing-";
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
    /// True if the initramfs can start the init of a guest runtime. Kernels that were imported by
    /// earlier versions lack this field.
    #[serde(default)]
    pub boots_runtime: bool,
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
        let dir = open_registry(state_dir, KERNELS_DIR, IMPORTING)?;
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
    /// missing or was written to.
    pub fn get(&self, name: &KernelName) -> Result<KernelInfo> {
        crate::locks::may_block("file access");
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
        stamps::require_unchanged(&dir).map_err(damaged)?;
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
        crate::locks::may_block("file access");
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
        crate::locks::may_block("file access");
        let dir = self.dir.join(name.as_str());
        if !dir.is_dir() {
            return self.get(name).map(drop);
        }
        directory::delete(&self.dir, name.as_str()).map(drop)
    }

    /// Imports a kernel. The busybox of the initramfs comes from an image or a guest runtime, so
    /// one of them must exist. An import that fails leaves nothing behind.
    ///
    /// # Errors
    /// `name_taken`, `unsupported` (not a kernel for a guest), `path_not_found`, `image_not_found`,
    /// `command_missing`, `cancelled`.
    pub fn import(
        &self,
        (images, runtimes): (&Images, &GuestRuntimes),
        commands: &dyn Commands,
        spec: &ImportSpec,
        cancel: &Cancel,
    ) -> Result<KernelInfo> {
        crate::locks::may_block("file access");
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
        let busybox = busybox(images, runtimes).map_err(doing)?;
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
                boots_runtime: true,
                imported_at: now_s(),
                bytes: 0,
            },
        )
    }

    fn publish(&self, staging: &Staging, info: &KernelInfo) -> Result<KernelInfo> {
        crate::locks::may_block("file access");
        let (name, files) = (&info.name, staging.path());
        let io = |e: std::io::Error| Error::io(format!("publish kernel {name}"), e);
        std::fs::write(
            files.join(METADATA),
            serde_json::to_vec_pretty(info).map_err(|e| io(e.into()))?,
        )
        .map_err(io)?;
        let to = self.dir.join(name.as_str());
        if !directory::publish(files, &[KERNEL, INITRD, METADATA], Readers::Everybody, &to)
            .map_err(io)?
        {
            return Err(taken(name));
        }
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

/// Returns the static busybox from the initramfs of the first image that has an initramfs, or else
/// of the newest guest runtime. Fails if there is neither.
fn busybox(images: &Images, runtimes: &GuestRuntimes) -> Result<Vec<u8>> {
    let none = || {
        Error::new(
            Kind::ImageNotFound,
            "there is neither an image nor a guest runtime with a busybox for the initramfs",
        )
        .hint("run fcctl image build")
    };
    let mut initrds = images.list()?.into_iter().filter_map(|i| match i.boots {
        Boots::Own { initrd, .. } => Some(initrd),
        Boots::Runtime => None,
    });
    let initrd = match initrds.next() {
        Some(initrd) => initrd,
        None => {
            runtimes
                .files(&runtimes.newest().map_err(|_| none())?.id)
                .initrd
        }
    };
    let initrd = read_file(&initrd, PART_BYTES_MAX)?;
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
            boots_runtime: true,
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
