//! Finds the modules that a guest needs to reach its root disk and network.

use super::elf::is_elf;
use super::read::{read_below, read_file};
use crate::error::{Error, Kind, Result};
use crate::host::Commands;
use crate::image::initrd::PART_BYTES_MAX;
use crate::image::kernel::{Compression, VMLINUX_BYTES_MAX};
use crate::image::registry::KERNEL;
use crate::image::unpack::unpack_file;
use crate::locks::Cancel;
use object::elf::ET_REL;
use rustix::fs::{Mode, OFlags};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The directory in which distributions keep modules, by kernel version.
const MODULES_DIR: &str = "/lib/modules";
/// The size limit of `modules.dep` and `modules.builtin`.
const LIST_BYTES_MAX: u64 = 16 << 20;
/// The modules that a guest needs to boot, in loading order, and whether each is optional. At least
/// one of the two transports is needed. ext4 also needs a checksum module, which it declares only
/// as a soft dependency.
pub(super) const WANTED: [(&str, bool); 7] = [
    ("virtio_pci", true),
    ("virtio_mmio", true),
    ("virtio_blk", false),
    ("virtio_net", false),
    ("virtio_balloon", true),
    ("crc32c_generic", true),
    ("ext4", false),
];

#[derive(Debug, Default, PartialEq)]
pub(super) struct Modules {
    /// The file names and the unpacked contents.
    pub files: Vec<(String, Vec<u8>)>,
    /// The content of `modules.dep`, with the names of unpacked files.
    pub dependencies: String,
}

pub(super) fn find_modules(
    commands: &dyn Commands,
    given: Option<&Path>,
    version: &str,
    out: &Path,
    cancel: &Cancel,
) -> Result<Modules> {
    crate::locks::may_block("file access");
    let dir = given.map_or_else(|| Path::new(MODULES_DIR).join(version), Path::to_owned);
    if !dir.is_dir() {
        if let Some(given) = given {
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
    // Remove the suffixes of the compression from the names.
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

/// Checks that the drivers are built in, for a kernel without a `modules.builtin`, by searching for
/// their names in the kernel.
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

/// Returns the module's name: `virtio_blk` for `kernel/drivers/x/virtio-blk.ko.xz`.
fn module_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Returns the path without the suffix of its compression. Keeps a colon at the end.
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

/// Returns the paths of the modules that a guest needs and of their dependencies. Fails if a module
/// that is not optional is neither listed nor built in.
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
    crate::locks::may_block("file access");
    let bytes = read_below(below, dir, Path::new(path), PART_BYTES_MAX)?;
    let checked = |name: String, bytes: Vec<u8>| {
        if is_elf(&bytes, &[ET_REL]) {
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
    unpack_file(
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

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
    fn names_are_parsed() {
        assert_eq!(
            module_of("kernel/drivers/virtio/virtio-mmio.ko.zst"),
            "virtio_mmio"
        );
        assert_eq!(unpacked_name("a/b.ko.zst:"), "a/b.ko:");
        assert!(
            has_word(b"xvirtio_blk\0", b"virtio_blk")
                && !has_word(b"virtio_blk_x\0", b"virtio_blk")
        );
    }

    #[test]
    fn module_outside_of_its_directory_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let never = Cancel::try_new().unwrap();
        let at = |name: &str| temp.path().join(name);
        let mut module = vec![0; 65];
        module[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
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
        // This small file would fill the disk when unpacked.
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
}
