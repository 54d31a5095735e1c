//! Turns a VM's row into the specification for a driver.

use super::core::Core;
use super::network::Networks;
use super::snapshot_registry::Restore;
use super::uses::{UseGuard, Uses};
use super::vm_dir::{CHANGES_FILE, DISK_FILE, INITRD_FILE, KERNEL_FILE};
use super::vm_dir::{SEED_FILE, WORK_DISK_FILE};
use crate::api::vm::Init;
use crate::disk::{Method, Probe};
use crate::error::{Error, Kind, Result};
use crate::host::Credentials;
use crate::ids::{RuntimeId, VmId};
use crate::image::kernels::Kernels;
use crate::image::{Boots, GuestRuntimes, ImageInfo};
use crate::store::VmRow;
use crate::vmm::{DiskFormat, VmmSpec};
use std::path::PathBuf;
use std::sync::Arc;

/// How many times to look for the newest guest runtime. A try fails only if the runtime is deleted
/// meanwhile, because a newer one has been published.
const RUNTIME_TRIES_MAX: usize = 10;

/// Makes the specifications of VMs for the driver.
#[derive(Clone)]
pub(super) struct Specs {
    pub(super) core: Core,
    pub(super) networks: Networks,
    pub(super) kernels: Kernels,
    pub(super) guest_runtimes: GuestRuntimes,
    pub(super) runtime_uses: Uses<RuntimeId>,
    /// How root disks are made on this host, or why none can be made.
    pub(super) disk_probe: Arc<Result<Probe>>,
    /// The uid of the VM in slot 0.
    pub(super) uid_base: u32,
}

impl Specs {
    /// Returns the newest guest runtime. The guard prevents its deletion. A row must name the
    /// runtime before the guard is dropped.
    ///
    /// # Errors
    /// `image_not_found` if there is none, `busy` if each one found is deleted at once.
    pub(super) fn use_newest_runtime(&self) -> Result<(RuntimeId, UseGuard<RuntimeId>)> {
        for _ in 0..RUNTIME_TRIES_MAX {
            let id = self.guest_runtimes.newest()?.id;
            // The runtime may have been deleted since, after a newer one was published.
            if let Some(in_use) = self.runtime_uses.begin_use(&id)
                && self.guest_runtimes.get(&id).is_ok()
            {
                return Ok((id, in_use));
            }
        }
        let text = "the guest runtimes are being deleted";
        Err(Error::new(Kind::Busy, text).hint("try again in a moment"))
    }

    /// Returns the specification for the driver. The disk's format comes from the row, because it
    /// was chosen when the disk was created.
    pub(super) fn spec(&self, row: &VmRow, image: &ImageInfo) -> VmmSpec {
        let dir = self.core.vm_dir(&row.id);
        let chosen = row.shape.kernel.as_ref();
        let runtime = row
            .shape
            .runtime
            .as_ref()
            .map(|id| self.guest_runtimes.files(id));
        let (kernel, initrd) = match (chosen, &image.boots) {
            (Some(name), _) => self.kernels.files(name),
            // The boot links the files; see `resources/directory.rs`.
            (None, Boots::Own { .. }) if image.private_kernel().is_some() => {
                (dir.join(KERNEL_FILE), dir.join(INITRD_FILE))
            }
            (None, Boots::Own { kernel, initrd }) => (kernel.clone(), initrd.clone()),
            // A VM that has never booted has no runtime yet.
            (None, Boots::Runtime) => {
                let files = runtime.clone().unwrap_or_default();
                (files.kernel, files.initrd)
            }
        };
        let mut boot_args = crate::image::BOOT_ARGS.to_vec();
        boot_args.extend(runtime.as_ref().map(|_| crate::image::runtime::BOOT_ARG));
        if chosen.is_none() && image.guest_version >= crate::image::CONSOLE_LEVEL_SINCE {
            boot_args.push(crate::image::QUIET_BOOT_ARG);
        }
        if row.shape.init == Init::Image {
            boot_args.extend(crate::image::runtime::SYSTEMD_ARGS);
        }
        VmmSpec {
            vm: row.id.clone(),
            tag: self.core.tag(row),
            kernel,
            initrd,
            boot_args: boot_args.join(" "),
            disk: dir.join(DISK_FILE),
            disk_format: match self.disk_method(row) {
                Some(Method::Reflink | Method::Copy) => DiskFormat::Raw,
                Some(Method::DmSnapshot) => DiskFormat::Device,
                Some(Method::Qcow2) | None => DiskFormat::Qcow2,
            },
            seed: dir.join(SEED_FILE),
            runtime_disk: runtime.map(|files| files.disk),
            work_disk: row.shape.work_disk_bytes.map(|_| dir.join(WORK_DISK_FILE)),
            vcpus: row.shape.vcpus,
            mem_mib: row.shape.mem_mib,
            credentials: self.credentials(row),
            network: self.networks.guest_network(row),
            rates: row.shape.rates,
            has_balloon: row.shape.kernel.is_some()
                || image.guest_version >= crate::image::BALLOON_SINCE,
            console_bytes_max: self.core.limits.console_bytes_max,
            saved: None,
            dir,
        }
    }

    /// Like [`Self::spec`], but for a boot, which may restore a snapshot.
    pub(super) fn boot_spec(
        &self,
        restore: Option<&Restore>,
        row: &VmRow,
        image: &ImageInfo,
    ) -> VmmSpec {
        let spec = self.spec(row, image);
        match restore {
            None => spec,
            Some(restore) => VmmSpec {
                kernel: restore.files.kernel.clone(),
                initrd: restore.files.initrd.clone(),
                runtime_disk: restore
                    .row
                    .shape
                    .runtime
                    .as_ref()
                    .map(|_| restore.files.runtime.clone()),
                has_balloon: restore.row.has_balloon,
                saved: Some(restore.saved()),
                ..spec
            },
        }
    }

    /// Returns how the VM's root disk was made from the image or, if the disk does not exist yet,
    /// how this host would make it. Returns `None` if this host cannot make root disks, or if the
    /// row names a method that this version does not know.
    pub(super) fn disk_method(&self, row: &VmRow) -> Option<Method> {
        match row.disk_driver.as_deref() {
            Some(name) => Method::from_name(name),
            None => self.disk_probe.as_ref().as_ref().ok().map(|p| p.method),
        }
    }

    /// Returns the file of a root disk that is made by `method`. For a device-mapper snapshot, the
    /// file holds only the changes.
    pub(super) fn disk_path(&self, vm: &VmId, method: Method) -> PathBuf {
        self.core.vm_dir(vm).join(if method == Method::DmSnapshot {
            CHANGES_FILE
        } else {
            DISK_FILE
        })
    }

    /// Returns the VMM's credentials, which are unique to the VM, or `None` if the daemon is not
    /// root.
    pub(super) fn credentials(&self, row: &VmRow) -> Option<Credentials> {
        let own = self.uid_base + row.slot;
        nix::unistd::geteuid()
            .is_root()
            .then_some(Credentials { uid: own, gid: own })
    }
}
