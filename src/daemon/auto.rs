//! Chooses the driver for `driver = "auto"` under `[vmm]`: Firecracker if everything that it needs
//! is available, and QEMU otherwise.
//!
//! The choice is made once, when the daemon starts. It does not change while the daemon runs,
//! because disks, snapshots and the ledger depend on it. Doctor names the first thing that
//! Firecracker lacks.

use super::core::VMS_DIR;
use super::disk_probe::probe;
use super::resources::existing;
use super::vm_dir::DISK_FILE;
use crate::api::daemon::{Check, Severity};
use crate::config::{Disk, Network, Qemu};
use crate::ids::ImageRef;
use crate::locks::Cancel;
use crate::vmm::Driver;
use crate::vmm::firecracker::require_mount;
use crate::vmm::qemu::try_kvm;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const ID: &str = "vmm-driver";
/// The first bytes of a qcow2 file (docs/interop/qcow2.txt).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The first thing that Firecracker lacks here, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Missing {
    what: String,
    fix: String,
}

impl Missing {
    fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            fix: fix.into(),
        }
    }
}

/// Returns the check of `doctor` that explains the choice.
pub(super) fn check(missing: Option<&Missing>) -> Check {
    match missing {
        None => Check::ok(
            ID,
            "auto: VMs are started by Firecracker, which has everything it needs here",
        ),
        Some(Missing { what, fix }) => {
            let mut check = Check::ok(
                ID,
                format!(
                    "auto: VMs are started by QEMU, because Firecracker cannot be used: {what}"
                ),
            );
            check.fix = Some(fix.clone());
            check
        }
    }
}

/// The settings that decide whether Firecracker can be used.
pub(super) struct Settings<'a> {
    pub state_dir: &'a Path,
    pub network: &'a Network,
    pub disk: &'a Disk,
    pub qemu: &'a Qemu,
    /// The image whose kernel is booted to test KVM.
    pub image: &'a ImageRef,
}

/// Returns the first thing that Firecracker lacks, or None if it can be used. Cheap conditions come
/// first. The last one boots a kernel, which takes a second or two if KVM works, and ten seconds if
/// it does not.
pub(super) fn missing(
    settings: &Settings<'_>,
    firecracker: &dyn Driver,
    is_root: bool,
) -> Option<Missing> {
    if !is_root {
        return Some(Missing::new("fcd must run as root", "run fcd as root"));
    }
    if !settings.network.is_bridge() {
        return Some(Missing::new(
            "guests need a bridge",
            "driver = \"bridge\" under [network]",
        ));
    }
    if let Some(check) = firecracker
        .checks()
        .into_iter()
        .find(|check| check.severity == Severity::Fail)
    {
        return Some(Missing::new(
            format!("this is missing: {}", check.found),
            check.fix.unwrap_or_default(),
        ));
    }
    let state_dir = existing(settings.state_dir);
    let on_disk = require_mount(state_dir)
        .and_then(|()| probe(settings.disk, firecracker, state_dir).map(drop));
    if let Err(e) = on_disk {
        return Some(Missing::new(
            format!("the state directory is not suitable: {e}"),
            e.hint_text().unwrap_or("use another state_dir"),
        ));
    }
    if let Some(disk) = qcow2_disk(settings.state_dir) {
        let fix = "delete that VM, or keep QEMU with driver = \"qemu\" under [vmm]";
        return Some(Missing::new(
            format!("disks must be raw, and {} is a qcow2 file", disk.display()),
            fix,
        ));
    }
    kvm(settings.state_dir, settings.image, settings.qemu)
}

fn kvm(state_dir: &Path, image: &ImageRef, qemu: &Qemu) -> Option<Missing> {
    crate::locks::may_block("file access");
    let kernel = crate::image::kernel_path(state_dir, image);
    if !kernel.exists() {
        let what = format!(
            "KVM must run a stock kernel, and there is no image {image} yet to try it with"
        );
        return Some(Missing::new(what, "fcctl image build, then restart fcd"));
    }
    let why = match Cancel::try_new().map_err(|e| e.to_string()) {
        Ok(cancel) => try_kvm(qemu, &kernel, &cancel).unwrap_or_else(|e| Some(e.to_string())),
        Err(e) => Some(e),
    };
    why.map(|why| {
        Missing::new(
            format!("KVM cannot run a stock kernel: {why}"),
            "use a host with working KVM",
        )
    })
}

/// Finds a root disk that is a qcow2 file, which only QEMU can read.
fn qcow2_disk(state_dir: &Path) -> Option<PathBuf> {
    crate::locks::may_block("file access");
    let vms = std::fs::read_dir(state_dir.join(VMS_DIR))
        .into_iter()
        .flatten()
        .flatten();
    let mut disks = vms.map(|vm| vm.path().join(DISK_FILE));
    disks.find(|disk| {
        let mut magic = [0; QCOW2_MAGIC.len()];
        // A directory entry that is not a plain file, such as a device node, must not be opened.
        let is_file = disk.symlink_metadata().is_ok_and(|meta| meta.is_file());
        is_file
            && File::open(disk)
                .and_then(|mut file| file.read_exact(&mut magic))
                .is_ok()
            && magic == QCOW2_MAGIC
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Flags};
    use crate::vmm::console::Consoles;
    use crate::vmm::firecracker::Firecracker;
    use std::sync::Arc;

    fn config(dir: &Path, text: &str) -> Config {
        let path = dir.join("config.toml");
        std::fs::write(
            &path,
            format!(
                "state_dir = \"{}/state\"\n[vmm]\ndriver = \"auto\"\n{text}",
                dir.display()
            ),
        )
        .unwrap();
        Config::load(
            &Flags {
                config: Some(path),
                ..Flags::default()
            },
            0,
            &|_| None,
        )
        .unwrap()
    }

    fn missing_with(config: &Config, is_root: bool) -> Missing {
        let consoles = Arc::new(Consoles::try_new().unwrap());
        let firecracker =
            Firecracker::new(config.firecracker.clone(), config.qemu.uids(), consoles).unwrap();
        let settings = Settings {
            state_dir: &config.state_dir,
            network: &config.network,
            disk: &config.disk,
            qemu: &config.qemu,
            image: &config.vm.image,
        };
        missing(&settings, &firecracker, is_root).expect("something is missing")
    }

    #[test]
    fn first_missing_requirement_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let user_mode = config(dir.path(), "");
        assert_eq!(missing_with(&user_mode, false).what, "fcd must run as root");
        assert_eq!(missing_with(&user_mode, true).what, "guests need a bridge");
        let bridge =
            "[network]\ndriver = \"bridge\"\n[firecracker]\nbinary = \"no-such-firecracker\"\n";
        let found = missing_with(&config(dir.path(), bridge), true);
        assert!(
            found.what.contains("no-such-firecracker is not installed"),
            "{found:?}"
        );
        let check = check(Some(&found));
        assert_eq!(check.severity, Severity::Ok);
        assert!(
            check
                .found
                .starts_with("auto: VMs are started by QEMU, because")
                && check.fix.is_some(),
            "{check:?}"
        );
    }

    #[test]
    fn vm_with_qcow2_disk_keeps_qemu() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(qcow2_disk(dir.path()), None);
        for (vm, bytes) in [("a", &b"raw disk"[..]), ("b", b"Q")] {
            let vm = dir.path().join(VMS_DIR).join(vm);
            std::fs::create_dir_all(&vm).unwrap();
            std::fs::write(vm.join(DISK_FILE), bytes).unwrap();
        }
        assert_eq!(qcow2_disk(dir.path()), None);
        let disk = dir.path().join(VMS_DIR).join("a").join(DISK_FILE);
        std::fs::write(&disk, b"QFI\xfb and more").unwrap();
        assert_eq!(qcow2_disk(dir.path()), Some(disk));
    }
}
