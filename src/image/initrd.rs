//! Makes the initramfs: a busybox, the modules that a guest needs to reach its root disk, and the
//! script that loads them.

use super::cpio::Cpio;
use super::kernel;
use super::registry::INITRD;
use crate::error::{Error, Result};
use std::fs::File;
use std::path::Path;

/// The size limit of each part of the initramfs.
pub(super) const PART_BYTES_MAX: u64 = 64 << 20;

/// The drivers of the transports and devices. modprobe loads their dependencies.
const INITRD_MODULES: &str = "virtio_pci virtio_mmio virtio_blk virtio_net virtio_balloon";
const BUSYBOX_APPLETS: [&str; 7] = [
    "mkdir",
    "modprobe",
    "mount",
    "sh",
    "sleep",
    "switch_root",
    "usleep",
];
const INITRD_INIT: &str = include_str!("guest/initrd-init");

/// Writes `initrd`, the initramfs, from the files `busybox` and `modules`.
pub(super) fn write_initrd(out: &Path, kernel_version: &str) -> Result<()> {
    crate::locks::may_block("file access");
    let read = |path: &Path| {
        let file =
            File::open(path).and_then(|f| crate::host::command::read_bounded(f, PART_BYTES_MAX));
        file.map_err(|e| Error::io(format!("read {}", path.display()), e))
    };
    let mut modules = Vec::new();
    let mut modules_dep = String::new();
    let io = |e| Error::io("read the modules", e);
    for entry in std::fs::read_dir(out.join("modules")).map_err(io)? {
        let entry = entry.map_err(io)?;
        let bytes = read(&entry.path())?;
        match entry
            .file_name()
            .into_string()
            .ok()
            .filter(|n| n != "modules.dep")
        {
            Some(name) => modules.push((name, bytes)),
            None => modules_dep = String::from_utf8_lossy(&bytes).into_owned(),
        }
    }
    modules.sort();
    let busybox = read(&out.join("busybox"))?;
    let bytes = initrd(
        &busybox,
        &modules,
        &modules_dep,
        kernel_version,
        INITRD_MODULES,
    );
    std::fs::write(out.join(INITRD), bytes).map_err(|e| Error::io("write the initramfs", e))
}

pub(super) fn initrd(
    busybox: &[u8],
    modules: &[(String, Vec<u8>)],
    modules_dep: &str,
    kernel_version: &str,
    wanted: &str,
) -> Vec<u8> {
    let mut cpio = Cpio::new();
    let modules_dir = format!("lib/modules/{kernel_version}");
    for dir in [
        "bin",
        "dev",
        "proc",
        "sys",
        "root",
        "lib",
        "lib/modules",
        &modules_dir,
    ] {
        cpio.dir(dir, 0o755);
    }
    cpio.file(
        "init",
        0o755,
        INITRD_INIT.replace("@MODULES@", wanted).as_bytes(),
    );
    cpio.file("bin/busybox", 0o755, busybox);
    for applet in BUSYBOX_APPLETS {
        cpio.symlink(&format!("bin/{applet}"), "busybox");
    }
    for (name, bytes) in modules {
        cpio.file(
            &format!("{modules_dir}/{name}"),
            0o644,
            kernel::without_signature(bytes),
        );
    }
    let names: Vec<_> = modules.iter().map(|(name, _)| name.clone()).collect();
    cpio.file(
        &format!("{modules_dir}/modules.dep"),
        0o644,
        kernel::flat_modules_dep(modules_dep, &names).as_bytes(),
    );
    cpio.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initramfs_is_complete_and_reproducible() {
        let modules = [("a.ko".to_owned(), b"module".to_vec())];
        let make = || {
            initrd(
                b"busybox",
                &modules,
                "kernel/x/a.ko:\n",
                "6.1",
                INITRD_MODULES,
            )
        };
        let bytes = make();
        assert_eq!(bytes, make());
        let text = String::from_utf8_lossy(&bytes);
        for part in [
            "lib/modules/6.1/a.ko",
            "lib/modules/6.1/modules.dep",
            "bin/modprobe",
            INITRD_MODULES,
            "TRAILER!!!",
        ] {
            assert!(text.contains(part), "{part}");
        }
        assert!(!text.contains("@MODULES@"));
    }
}
