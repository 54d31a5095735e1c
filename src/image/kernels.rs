//! Kernels that VMs can boot instead of their image's.
//!
//! Each is a directory `<state>/kernels/<name>` with `vmlinux`, `initrd` and `kernel.json`. It
//! appears complete, by one rename, and never changes.
//!
//! An import takes an ELF file as it is and unpacks a bzImage. Modules that a guest needs to reach
//! its root disk and network, and that are not built in (`modules.builtin`), go into the initramfs
//! together with what `modules.dep` says they need. They are read from below their directory only,
//! because every guest can see what is in an initramfs. The initramfs takes its busybox from an
//! image. Later modules come from the guest's own root file system, which has those of its image's
//! kernel.
//!
//! The daemon reads the files, so only root and the daemon's own user may import.

use super::build::{PART_BYTES_MAX, initrd, unpack};
use super::kernel::{self, Compression, VMLINUX_BYTES_MAX};
use super::registry::{INITRD, KERNEL, Staging};
use super::{Images, cpio};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::host::command::read_bounded;
use crate::host::time::now_s;
use crate::ids::{KernelName, NAME_LEN_MAX};
use crate::locks::Cancel;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const KERNELS_DIR: &str = "kernels";
/// The prefix of directories that are being created or removed.
const IMPORTING: &str = ".importing-";
const DELETING: &str = ".deleting-";
const METADATA: &str = "kernel.json";
const METADATA_BYTES_MAX: u64 = 64 << 10;
/// The directory in which distributions keep modules, by kernel version.
const MODULES_DIR: &str = "/lib/modules";
/// The largest list of modules.
const LIST_BYTES_MAX: u64 = 16 << 20;
/// The modules that a guest needs to boot, in loading order, and whether each is optional. Of the
/// two transports one is needed. ext4 needs a checksum module that it declares as a soft dependency
/// only.
const WANTED: [(&str, bool); 7] = [
    ("virtio_pci", true),
    ("virtio_mmio", true),
    ("virtio_blk", false),
    ("virtio_net", false),
    ("virtio_balloon", true),
    ("crc32c_generic", true),
    ("ext4", false),
];
/// The text before the version in a kernel (init/version.c).
const BANNER: &[u8] = b"Linux version ";
/// `e_machine` of x86-64, and the types of an executable and a position-independent file (elf(5)).
const EM_X86_64: u16 = 62;
const ET: [u16; 2] = [2, 3];
/// The type of a module: a relocatable file.
const ET_MODULE: [u16; 1] = [1];
/// The sizes of `Elf64_Ehdr` and `Elf64_Phdr`.
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;

/// The content of `kernel.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelInfo {
    pub name: KernelName,
    /// For example `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// The modules in the initramfs. All others that a guest needs are built in.
    pub modules: Vec<String>,
    /// Seconds since the epoch.
    pub imported_at: u64,
    /// The space that it uses on the host.
    #[serde(skip)]
    pub bytes: u64,
}

/// What to import.
#[derive(Clone, Debug)]
pub struct ImportSpec {
    /// The absolute path of an ELF file or a bzImage.
    pub path: PathBuf,
    pub name: Option<KernelName>,
    /// The directory of its modules; `/lib/modules/VERSION` if not given.
    pub modules: Option<PathBuf>,
}

/// The registry of kernels.
#[derive(Clone, Debug)]
pub struct Kernels {
    dir: PathBuf,
}

impl Kernels {
    /// Opens the registry like [`Images::open`].
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

    /// The paths of a kernel and its initramfs, which may not exist.
    pub fn files(&self, name: &KernelName) -> (PathBuf, PathBuf) {
        let dir = self.dir.join(name.as_str());
        (dir.join(KERNEL), dir.join(INITRD))
    }

    /// Reads the information about a kernel.
    ///
    /// # Errors
    /// `kernel_not_found`, or `host` if a file is missing.
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

    /// All kernels, sorted by name. Damaged ones are logged and omitted.
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
        // Move it away first, so that no VM can boot a kernel that is partly deleted.
        let gone = tempfile::Builder::new()
            .prefix(DELETING)
            .tempdir_in(&self.dir)
            .map_err(|e| Error::io(format!("delete kernel {name}"), e))?;
        std::fs::rename(&dir, gone.path().join("gone"))
            .map_err(|e| Error::io(format!("delete kernel {name}"), e))
    }

    /// Imports a kernel. The busybox of its initramfs comes from an image, so there must be one. An
    /// import that fails leaves nothing behind.
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
        let modules = find_modules(commands, spec, &version, out, cancel).map_err(doing)?;
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

/// The default name for a version, such as `linux-6-1-0-56-cloud-amd64`.
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

/// Writes `out/vmlinux` and returns the kernel's version.
fn take_kernel(
    commands: &dyn Commands,
    path: &Path,
    out: &Path,
    cancel: &Cancel,
) -> Result<String> {
    let bytes = read_file(path, u64::from(VMLINUX_BYTES_MAX))?;
    if bytes.starts_with(b"\x7fELF") {
        check_elf(&bytes)?;
        std::fs::write(out.join(KERNEL), &bytes).map_err(|e| Error::io("write the kernel", e))?;
        return version_in(&bytes)
            .ok_or_else(|| Error::new(Kind::Unsupported, "it does not contain a Linux version"));
    }
    let payload = kernel::payload(&bytes)?;
    unpack(commands, &payload, out, cancel)?;
    let unpacked = read_file(&out.join(KERNEL), u64::from(VMLINUX_BYTES_MAX))?;
    check_elf(&unpacked)?;
    kernel::version(&bytes)
        .or_else(|| version_in(&unpacked))
        .ok_or_else(|| Error::new(Kind::Unsupported, "it does not contain a Linux version"))
}

/// Reads a regular file of at most `bytes_max` bytes.
fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    // O_NONBLOCK, because opening a FIFO would otherwise wait for a writer.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    read_opened(opened, path, bytes_max)
}

/// Reads a file below a directory that an untrusted user may control. Nothing outside of it is
/// read, because every guest may see the content.
fn read_below(dir: &OwnedFd, shown_dir: &Path, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let shown = shown_dir.join(path);
    match rustix::fs::openat2(dir, path, flags, Mode::empty(), within) {
        Err(Errno::XDEV | Errno::LOOP) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} points outside of {}",
                shown.display(),
                shown_dir.display()
            ),
        )
        .hint("name a directory that contains the modules themselves: --modules DIR")),
        opened => read_opened(
            opened.map(File::from).map_err(std::io::Error::from),
            &shown,
            bytes_max,
        ),
    }
}

fn read_opened(opened: std::io::Result<File>, path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let shown = path.display();
    let io = |e| Error::io(format!("read {shown}"), e);
    let file = opened.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::new(Kind::PathNotFound, format!("{shown} does not exist"))
                .hint(format!("ls -l {shown}"))
        }
        _ => io(e),
    })?;
    let stat = file.metadata().map_err(io)?;
    if !stat.is_file() || stat.len() > bytes_max {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{shown} is not a file of at most {} MiB", bytes_max >> 20),
        )
        .hint(format!("ls -lL {shown}")));
    }
    read_bounded(file, bytes_max).map_err(io)
}

/// True if it is an ELF file of one of these types for x86-64.
fn is_elf(bytes: &[u8], types: &[u16]) -> bool {
    let u16_at = |at: usize| {
        bytes
            .get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    let is_ours = bytes.starts_with(b"\x7fELF\x02\x01") && u16_at(18) == Some(EM_X86_64);
    is_ours && u16_at(16).is_some_and(|t| types.contains(&t)) && bytes.len() > EHDR_BYTES
}

/// True if the file contains all of its loadable segments (elf(5), `Elf64_Phdr`).
fn is_whole(elf: &[u8]) -> bool {
    let number = |at: usize, len: usize| {
        let bytes = at.checked_add(len).and_then(|end| elf.get(at..end))?;
        usize::try_from(bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))).ok()
    };
    let headers = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (size == PHDR_BYTES && count > 0).then_some(())?;
        (0..count)
            .map(|n| table.checked_add(n * PHDR_BYTES))
            .collect::<Option<Vec<usize>>>()
    };
    let ends = |at: usize| {
        let header = elf.get(at..at.checked_add(PHDR_BYTES)?).map(|_| at)?;
        number(header + 8, 8)?.checked_add(number(header + 32, 8)?)
    };
    headers().is_some_and(|all| {
        all.into_iter()
            .all(|at| ends(at).is_some_and(|end| end <= elf.len()))
    })
}

fn check_elf(bytes: &[u8]) -> Result<()> {
    if is_elf(bytes, &ET) {
        return if is_whole(bytes) {
            Ok(())
        } else {
            Err(Error::new(
                Kind::Unsupported,
                "the kernel is truncated: a loadable segment is not in the file",
            )
            .hint("copy or download the file again"))
        };
    }
    Err(Error::new(
        Kind::Unsupported,
        "it is not a kernel for x86-64 (vmlinux or bzImage)",
    )
    .hint("use a distribution's /boot/vmlinuz-VERSION"))
}

/// The version, which follows the banner.
fn version_in(bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    loop {
        let at = rest.iter().position(|b| *b == BANNER[0])?;
        rest = &rest[at..];
        if let Some(text) = rest.strip_prefix(BANNER) {
            let version = kernel::word(text);
            if version
                .as_ref()
                .is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
            {
                return version;
            }
        }
        rest = &rest[1..];
    }
}

#[derive(Debug, Default, PartialEq)]
struct Modules {
    /// The file names and the unpacked contents.
    files: Vec<(String, Vec<u8>)>,
    /// The lines of `modules.dep` about these modules.
    dependencies: String,
}

fn find_modules(
    commands: &dyn Commands,
    spec: &ImportSpec,
    version: &str,
    out: &Path,
    cancel: &Cancel,
) -> Result<Modules> {
    let dir = spec
        .modules
        .clone()
        .unwrap_or_else(|| Path::new(MODULES_DIR).join(version));
    if !dir.is_dir() {
        if let Some(given) = &spec.modules {
            return Err(Error::new(
                Kind::PathNotFound,
                format!("there is no directory {}", given.display()),
            )
            .hint("name the directory that contains the kernel's modules.dep"));
        }
        return built_in(&out.join(KERNEL), &dir);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let below = rustix::fs::open(&dir, flags, Mode::empty())
        .map_err(|e| Error::io(format!("open {}", dir.display()), e))?;
    let list = |name: &str| {
        read_below(&below, &dir, Path::new(name), LIST_BYTES_MAX)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let (dep, builtin) = (list("modules.dep")?, list("modules.builtin")?);
    let paths = needed(&dep, &builtin)?;
    let mut modules = Modules::default();
    for path in &paths {
        let (name, bytes) = read_module(commands, (&below, &dir), path, out, cancel)?;
        modules.files.push((name, bytes));
    }
    modules.files.sort();
    // The names without the suffixes of their compression.
    modules.dependencies = dep
        .lines()
        .map(|line| {
            line.split_whitespace()
                .map(unpacked_name)
                .collect::<Vec<_>>()
                .join(" ")
                + "\n"
        })
        .collect();
    Ok(modules)
}

/// Checks without a `modules.builtin` that the drivers are built in, by searching for their names
/// in the kernel.
fn built_in(vmlinux: &Path, modules: &Path) -> Result<Modules> {
    let bytes = read_file(vmlinux, u64::from(VMLINUX_BYTES_MAX))?;
    let has = |name: &str| has_word(&bytes, name.as_bytes());
    if has("virtio_blk")
        && has("virtio_net")
        && has("ext4")
        && (has("virtio-mmio") || has("virtio-pci"))
    {
        return Ok(Modules::default());
    }
    let text = format!(
        "it has no built-in virtio drivers, and {} does not exist",
        modules.display()
    );
    Err(Error::new(Kind::Unsupported, text)
        .hint("name the directory of its modules: --modules DIR"))
}

/// True if `bytes` contain `word` as a complete C string.
fn has_word(bytes: &[u8], word: &[u8]) -> bool {
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|b| *b == word[0]) {
        rest = &rest[at..];
        if rest.starts_with(word) && rest.get(word.len()) == Some(&0) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// The module's name: `virtio_blk` for `kernel/drivers/x/virtio-blk.ko.xz`.
fn module_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The path without the suffix of its compression.
fn unpacked_name(path: &str) -> String {
    let (path, colon) = path
        .strip_suffix(':')
        .map_or((path, ""), |path| (path, ":"));
    let plain = [".xz", ".zst", ".gz"]
        .iter()
        .find_map(|suffix| path.strip_suffix(suffix))
        .unwrap_or(path);
    format!("{plain}{colon}")
}

/// The paths of the modules that a guest needs and of their dependencies.
fn needed(dep: &str, builtin: &str) -> Result<BTreeSet<String>> {
    let built_in: BTreeSet<String> = builtin.lines().map(module_of).collect();
    let mut paths = BTreeSet::new();
    let mut missing = BTreeSet::new();
    for (name, is_optional) in WANTED {
        let line = dep
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| module_of(path) == name);
        match line {
            Some((path, needs)) => paths.extend(
                std::iter::once(path)
                    .chain(needs.split_whitespace())
                    .map(str::to_owned),
            ),
            None if built_in.contains(name) => {}
            None => drop(missing.insert(name).then_some(is_optional)),
        }
    }
    let needs: Vec<&str> = WANTED
        .iter()
        .filter(|(name, is_optional)| !is_optional && missing.contains(name))
        .map(|(name, _)| *name)
        .collect();
    if !needs.is_empty() || (missing.contains("virtio_pci") && missing.contains("virtio_mmio")) {
        let what = if needs.is_empty() {
            "virtio_pci or virtio_mmio".to_owned()
        } else {
            needs.join(", ")
        };
        return Err(Error::new(
            Kind::Unsupported,
            format!("the kernel has no {what}, either built in or as a module"),
        )
        .hint("use another kernel; a distribution's cloud kernel has them"));
    }
    Ok(paths)
}

/// Reads and unpacks a module. `path` is relative to `dir` and comes from the distribution's list.
fn read_module(
    commands: &dyn Commands,
    (below, dir): (&OwnedFd, &Path),
    path: &str,
    out: &Path,
    cancel: &Cancel,
) -> Result<(String, Vec<u8>)> {
    let bytes = read_below(below, dir, Path::new(path), PART_BYTES_MAX)?;
    let checked = |name: String, bytes: Vec<u8>| {
        if is_elf(&bytes, &ET_MODULE) {
            return Ok((name, bytes));
        }
        let text = format!(
            "{} is not a kernel module for x86-64",
            dir.join(path).display()
        );
        Err(Error::new(Kind::Unsupported, text)
            .hint("name the directory of this kernel's modules: --modules DIR"))
    };
    let name = unpacked_name(path.rsplit('/').next().unwrap_or(path));
    let Some(compression) = Compression::of(&bytes)
        .filter(|_| name.len() < path.rsplit('/').next().unwrap_or(path).len())
    else {
        return checked(name, bytes);
    };
    let packed = out.join(format!("module.{}", compression.program().1));
    let unpacked = out.join("module");
    std::fs::write(&packed, &bytes).map_err(|e| Error::io("write a module", e))?;
    super::build::unpack_file(
        commands,
        compression,
        (&packed, &unpacked),
        PART_BYTES_MAX,
        cancel,
    )?;
    let bytes = read_file(&unpacked, PART_BYTES_MAX)?;
    std::fs::remove_file(&unpacked).map_err(|e| Error::io("remove a module", e))?;
    checked(name, bytes)
}

/// A static busybox, taken from any image's initramfs.
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

    const DEP: &str = "kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
                       kernel/drivers/net/virtio_net.ko.xz: kernel/net/core/failover.ko.xz kernel/drivers/virtio/virtio.ko.xz\n\
                       kernel/drivers/virtio/virtio-pci.ko.xz: kernel/drivers/virtio/virtio.ko.xz\nkernel/x/other.ko.xz:\n";

    #[test]
    fn modules_not_built_in_are_taken_with_dependencies() {
        let paths = needed(DEP, "kernel/fs/ext4/ext4.ko\n").unwrap();
        let names: Vec<String> = paths.iter().map(|p| module_of(p)).collect();
        assert_eq!(
            names,
            [
                "virtio_blk",
                "virtio_net",
                "virtio_pci",
                "virtio",
                "virtio_ring",
                "failover"
            ]
        );
        let all = "kernel/a/virtio_mmio.ko\nkernel/a/virtio_blk.ko\nkernel/a/virtio_net.ko\nkernel/a/ext4.ko\n";
        assert_eq!(needed("", all).unwrap().len(), 0);
        for (builtin, what) in [
            (all.replace("ext4", "xfs"), "ext4"),
            (all.replace("virtio_mmio", "x"), "virtio_pci or virtio_mmio"),
        ] {
            let e = needed("", &builtin).unwrap_err();
            assert!(
                e.kind() == Kind::Unsupported && e.to_string().contains(what),
                "{e}"
            );
        }
    }

    #[test]
    fn names_and_versions_are_parsed() {
        assert_eq!(
            name_of("6.1.0-56-cloud-amd64").unwrap().as_str(),
            "linux-6-1-0-56-cloud-amd64"
        );
        assert_eq!(
            name_of(&"9".repeat(90)).unwrap().as_str().len(),
            NAME_LEN_MAX
        );
        assert_eq!(
            module_of("kernel/drivers/virtio/virtio-mmio.ko.zst"),
            "virtio_mmio"
        );
        assert_eq!(unpacked_name("a/b.ko.zst:"), "a/b.ko:");
        let text = b"\0Linux version %s\0LLinux version 6.1.9-x (gcc)\0";
        assert_eq!(version_in(text).as_deref(), Some("6.1.9-x"));
        assert_eq!(version_in(b"Linux version "), None);
        assert!(
            has_word(b"xvirtio_blk\0", b"virtio_blk")
                && !has_word(b"virtio_blk_x\0", b"virtio_blk")
        );
    }

    #[test]
    fn file_that_is_not_a_kernel_is_refused() {
        let mut elf = vec![0; 128];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16] = 2;
        elf[18] = 62;
        // One loadable segment of 8 bytes at the end.
        (elf[32], elf[54], elf[56]) = (64, 56, 1);
        (elf[64 + 8], elf[64 + 32]) = (120, 8);
        check_elf(&elf).unwrap();
        assert!(
            check_elf(&elf[..127])
                .unwrap_err()
                .to_string()
                .contains("truncated")
        );
        for (at, byte) in [
            (32, 73),
            (54, 55),
            (56, 0),
            (56, 2),
            (64 + 8, 121),
            (64 + 15, 0xff),
        ] {
            let mut bad = elf.clone();
            bad[at] = byte;
            assert_eq!(
                check_elf(&bad).unwrap_err().kind(),
                Kind::Unsupported,
                "{at}"
            );
        }
        for (at, byte) in [(4, 1), (5, 2), (16, 1), (18, 183)] {
            let mut bad = elf.clone();
            bad[at] = byte;
            assert_eq!(
                check_elf(&bad).unwrap_err().kind(),
                Kind::Unsupported,
                "{at}"
            );
        }
        assert!(check_elf(&elf[..20]).is_err() && check_elf(b"\x7fELF").is_err());
    }

    #[test]
    fn module_outside_of_its_directory_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let never = Cancel::try_new().unwrap();
        let at = |name: &str| temp.path().join(name);
        let mut module = vec![0; 65];
        module[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (module[16], module[18]) = (1, 62);
        std::fs::create_dir(at("m")).unwrap();
        for name in ["x.ko", "m/good.ko"] {
            std::fs::write(at(name), &module).unwrap();
        }
        std::fs::write(at("m/none.ko"), "root:*:").unwrap();
        for (to, name) in [
            ("/etc/passwd", "m/abs.ko"),
            ("../x.ko", "m/up.ko"),
            ("..", "m/dir"),
            ("good.ko", "m/beside.ko"),
        ] {
            std::os::unix::fs::symlink(to, at(name)).unwrap();
        }
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("m/pipe.ko"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        let dir = at("m");
        let below = OwnedFd::from(File::open(&dir).unwrap());
        let read = |path: &str| {
            read_module(
                &crate::host::HostCommands,
                (&below, &dir),
                path,
                temp.path(),
                &never,
            )
        };
        for path in ["good.ko", "beside.ko"] {
            assert_eq!(read(path).unwrap(), (path.to_owned(), module.clone()));
        }
        // A small file that would unpack to more than the disk.
        let bomb = File::create(at("m/bomb.ko")).unwrap();
        bomb.set_len(PART_BYTES_MAX + 1).unwrap();
        let packed = crate::host::Command::new("gzip")
            .arg("-1")
            .arg(at("m/bomb.ko"));
        crate::host::HostCommands
            .run(&packed, &never, &mut |_| {})
            .unwrap();
        let e = read("bomb.ko.gz").unwrap_err();
        assert!(
            e.kind() == Kind::CommandFailed && e.hint_text().is_some(),
            "{e}"
        );
        assert!(!at("module").exists());
        for path in [
            "../x.ko",
            "/etc/passwd",
            "a/../../x.ko",
            "abs.ko",
            "up.ko",
            "dir/x.ko",
            "pipe.ko",
            "none.ko",
        ] {
            let e = read(path).unwrap_err();
            assert!(
                matches!(e.kind(), Kind::Unsupported | Kind::PathNotFound)
                    && e.hint_text().is_some(),
                "{path}: {e}"
            );
        }
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
            "files of others are kept"
        );
    }
}
