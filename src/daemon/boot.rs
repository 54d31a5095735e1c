//! The work of a start: a list of steps, each of which leaves something that a later start or a delete finds.

use super::Daemon;
use super::lifecycle::Claim;
use crate::disk;
use crate::disk::seed::{KeyPair, Network, Seed};
use crate::error::{Error, Kind, Result};
use crate::guest::Target;
use crate::image::ImageInfo;
use crate::locks::Cancel;
use crate::store::VmRow;
use crate::vmm::{DiskFormat, Running, VmmSpec};
use std::path::Path;
use std::time::{Duration, Instant};

/// The guest's side of user-mode networking (QEMU, "-netdev user": 10.0.2.0/24, .2 the host, .3 the DNS server).
const USER_NET: (&str, &str, &str) = ("10.0.2.15/24", "10.0.2.2", "10.0.2.3");
const GUEST_USER: &str = "root";
const KEY_FILE: &str = "key";
const SEED_FILE: &str = "seed";

impl Daemon {
    /// From nothing to a guest that answers. On an error nothing of the VM runs.
    pub(super) fn boot(&self, claim: &Claim) -> Result<Running> {
        let op = claim.op();
        let _place = self.admission.enter(&claim.cancel, &mut |ahead| {
            op.progress(&format!("waits for a boot to end ({ahead} ahead)"));
        })?;
        let row = self.row(&claim.vm)?;
        let image = self.images.get(&row.image)?;
        op.progress("prepare the disk");
        let spec = self.prepare_files(&row, &image, &claim.cancel)?;
        op.progress("start the vmm");
        let running = self.start_vmm(claim, &spec)?;
        op.progress("wait for the guest");
        match self.wait_guest(claim, &running) {
            Ok(()) => Ok(running),
            Err(e) => {
                self.kill_vmm(&running.identity).map_err(|k| k.context(format!("after {e}: end the vmm")))?;
                Err(e)
            }
        }
    }

    /// The VM's directory with its disk, its seed and its keys; what is there already stays.
    fn prepare_files(&self, row: &VmRow, image: &ImageInfo, cancel: &Cancel) -> Result<VmmSpec> {
        let dir = self.vm_dir(&row.id);
        let credentials = self.credentials(row);
        crate::host::fs::create_dir(&dir, 0o711)?;
        let run = dir.join("run");
        crate::host::fs::create_dir(&run, 0o700)?;
        crate::host::fs::own(&run, credentials)?;
        self.write_identity(row, &dir, credentials)?;
        let root = disk::make_root(self.commands.as_ref(), &image.rootfs, &dir, row.disk_bytes, credentials, cancel)?;
        let name = root.driver.name().to_owned();
        if row.disk_driver.as_deref() != Some(name.as_str()) {
            self.store.change(|tx| tx.update_vm(&row.id, |r| r.disk_driver = Some(name)))?;
        }
        Ok(VmmSpec {
            vm: row.id.clone(),
            tag: self.tag(row),
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            disk: root.path,
            disk_format: if root.driver == disk::RootDriver::Qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw },
            seed: dir.join(SEED_FILE),
            vcpus: row.vcpus,
            mem_mib: row.mem_mib,
            credentials,
            console_bytes_max: self.config.limits.console_bytes_max,
            dir,
        })
    }

    /// The VMM's uid and gid, when the daemon may give them.
    pub(super) fn credentials(&self, row: &VmRow) -> Option<(u32, u32)> {
        let qemu = &self.config.qemu;
        nix::unistd::geteuid().is_root().then_some((qemu.uid_base + row.slot, qemu.uid_base))
    }

    /// Host key, user key and seed are made once in a VM's life: its identity outlives its restarts.
    fn write_identity(&self, row: &VmRow, dir: &Path, credentials: Option<(u32, u32)>) -> Result<()> {
        if row.host_key.is_some() && dir.join(KEY_FILE).exists() && dir.join(SEED_FILE).exists() {
            return Ok(());
        }
        let (host, user) = (KeyPair::generate()?, KeyPair::generate()?);
        let (address, gateway, dns) = USER_NET;
        let seed = Seed {
            host_name: row.name.to_string(),
            network: Network { address: address.into(), gateway: gateway.into(), dns: dns.into() },
            authorized_key: user.public_line.clone(),
            host_key: host.private.clone(),
        };
        crate::host::fs::write_durable(&dir.join(KEY_FILE), user.private.as_bytes(), 0o600)?;
        seed.write(&dir.join(SEED_FILE), credentials)?;
        let blob = host.public_blob.clone();
        let ((), ticket) = self.store.change(|tx| tx.update_vm(&row.id, |r| r.host_key = Some(blob)))?;
        self.wait_durable(ticket)
    }

    fn start_vmm(&self, claim: &Claim, spec: &VmmSpec) -> Result<Running> {
        let running = self.vmm.start(spec, &claim.cancel, &mut |identity| {
            // A fact, not an intent: the process is found again by its tag whether or not this reaches the disk.
            let identity = identity.clone();
            let driver = self.vmm.describe();
            let fact = self.store.change(|tx| {
                tx.update_vm(&claim.vm, |r| {
                    r.identity = Some(identity.into());
                    r.driver = Some(driver);
                })
            });
            if let Err(e) = fact {
                log::warn!("record the vmm of {}: {e}", claim.vm);
            }
        })?;
        let row = self.row(&claim.vm)?;
        if let Err(e) = self.watch(&row, &running.identity) {
            self.kill_vmm(&running.identity)?;
            return Err(e);
        }
        Ok(running)
    }

    fn wait_guest(&self, claim: &Claim, running: &Running) -> Result<()> {
        let row = self.row(&claim.vm)?;
        let target = self.target_at(&row, running.ssh_addr)?;
        let timeout = Duration::from_secs(self.config.limits.boot_timeout_s);
        self.transport.wait_ready(&target, Instant::now() + timeout, &claim.cancel).map_err(|e| match e.kind() {
            Kind::Timeout => Error::new(
                Kind::BootTimeout,
                format!("the guest did not answer within {} s of its start", self.config.limits.boot_timeout_s),
            )
            .hint(format!("see what it printed: fcctl logs {}; limits.boot_timeout_s sets the time", row.name)),
            _ => e,
        })
    }

    /// Where a running guest is and how it proves itself.
    pub(super) fn target(&self, row: &VmRow) -> Result<Target> {
        match row.ssh_addr {
            Some(addr) => self.target_at(row, addr),
            None => Err(Error::new(Kind::GuestUnavailable, format!("vm {} has no address", row.name))),
        }
    }

    fn target_at(&self, row: &VmRow, addr: std::net::SocketAddr) -> Result<Target> {
        let Some(host_key) = row.host_key.clone() else {
            return Err(Error::internal(format!("vm {} has no host key", row.name)));
        };
        let private_key = self.private_key(row)?;
        Ok(Target { addr, user: GUEST_USER.to_owned(), private_key, host_key })
    }

    pub(super) fn private_key(&self, row: &VmRow) -> Result<String> {
        let path = self.vm_dir(&row.id).join(KEY_FILE);
        std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read the key of vm {}", row.name), e))
    }
}
