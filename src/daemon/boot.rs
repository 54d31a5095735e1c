//! The work of a start: the resources are taken one after the other (`resources`), then the guest has to answer. A failure
//! gives back what the boot took, the last first.

use super::Daemon;
use super::lifecycle::Claim;
use crate::api::exec::Exit;
use crate::disk::{self, KeyPair, Method, RestoreSeed, RootSpec, SeedFile};
use crate::error::{Error, Kind, Result};
use crate::guest::{Script, Target, run_script};
use crate::host::confine::Owner;
use crate::ids::VmId;
use crate::image::ImageInfo;
use crate::store::{Ticket, VmRow};
use crate::vmm::{DiskFormat, Running, VmmSpec};
use crate::workspace::remote;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const GUEST_USER: &str = "root";
const WORKSPACE_DEADLINE: Duration = Duration::from_secs(60);
const KEY_FILE: &str = "key";
const HOST_KEY_FILE: &str = "host_key";
const USER_KEY_COMMENT: &str = "fcd";
const SEED_FILE: &str = "seed";
pub(super) const DISK_FILE: &str = "disk";
pub(super) const WORK_DISK_FILE: &str = "work";
/// What a snapshot's guest has changed.
pub(super) const CHANGES_FILE: &str = "changes";

/// A boot under way: what its steps need and what they made.
pub(super) struct Boot<'a> {
    pub claim: &'a Claim,
    pub row: VmRow,
    pub image: &'a ImageInfo,
    pub spec: VmmSpec,
    /// What is copied into the guest.
    pub files: Vec<SeedFile>,
    /// What a guest is told that goes on from a snapshot.
    pub wake: Option<RestoreSeed>,
    /// In the ledger: the disks that the VM had until it took those of a snapshot.
    pub former_disks: Option<u64>,
    pub running: Option<Running>,
}

impl Boot<'_> {
    /// An init that does not know of it would leave it out in silence.
    pub(super) fn needs_guest(&self, what: &str) -> Result<()> {
        if self.row.guest_version >= 1 {
            return Ok(());
        }
        let message = format!("give vm {} {what}: its disk was made from an image that an earlier fcd built", self.row.name);
        Err(Error::new(Kind::Unsupported, message).hint("build the image again (fcctl image build), and make a new VM from it"))
    }
}

impl Daemon {
    /// From nothing to a guest that answers. On an error nothing of the boot is left, or the ledger says what is.
    pub(super) fn boot(&self, claim: &Claim) -> Result<Running> {
        let row = self.row(&claim.vm)?;
        let generation = row.generation;
        self.try_boot(claim, row).map_err(|e| {
            self.runtimes.give_up_boot(&claim.vm);
            // What the claim intended goes, however far the boot got.
            match self.release_boot(&claim.vm, generation) {
                Ok(()) => e,
                Err(k) => k.context(format!("after {e}: clean up")),
            }
        })
    }

    fn try_boot(&self, claim: &Claim, row: VmRow) -> Result<Running> {
        let op = claim.op();
        let _place = self.admission.enter(&claim.cancel, &mut |ahead| {
            op.progress(&format!("waits for a boot to end ({ahead} ahead)"));
        })?;
        if row.identity.is_some() {
            op.progress("end the vmm of an earlier start");
            self.kill_earlier(&row)?;
        }
        self.release_boot(&row.id, row.generation.saturating_sub(1))?;
        let image = self.images.get(&row.image)?;
        if claim.restore.is_none() {
            self.check_kernel(row.kernel.as_ref())?;
        }
        let spec = self.boot_spec(claim, &row, &image);
        let mut boot = Boot { claim, row, image: &image, spec, files: Vec::new(), wake: None, former_disks: None, running: None };
        self.acquire_all(&mut boot)?;
        self.await_guest(&mut boot)
    }

    /// Every VMM of this VM's, whichever start it is of.
    fn kill_earlier(&self, row: &VmRow) -> Result<()> {
        let all = self.vmm.list(&format!("{}{}-", self.tag_prefix(), row.id))?;
        all.iter().try_for_each(|vmm| self.kill_vmm(&vmm.identity))
    }

    fn await_guest(&self, boot: &mut Boot<'_>) -> Result<Running> {
        let running = boot.running.take().ok_or_else(|| Error::internal("a boot took everything but a vmm"))?;
        boot.claim.op().progress("wait for the guest");
        self.wait_guest(boot.claim, &running)?;
        if let Some(wake) = &boot.wake {
            self.wait_rejoined(boot.claim, &running, wake)?;
        }
        self.keep_disks(boot)?;
        self.restore_workspace(boot.claim, &running)?;
        Ok(running)
    }

    /// What a driver is told. The disk's kind is the row's: it was decided when the disk was made.
    pub(super) fn spec(&self, row: &VmRow, image: &ImageInfo) -> VmmSpec {
        let dir = self.vm_dir(&row.id);
        let own = row.kernel.as_ref().map(|name| self.kernels.files(name));
        let (kernel, initrd) = own.unwrap_or_else(|| (image.kernel.clone(), image.initrd.clone()));
        VmmSpec {
            vm: row.id.clone(),
            tag: self.tag(row),
            kernel,
            initrd,
            boot_args: crate::image::BOOT_ARGS.join(" "),
            disk: dir.join(DISK_FILE),
            disk_format: match self.disk_method(row) {
                Some(Method::Reflink | Method::Copy) => DiskFormat::Raw,
                Some(Method::DmSnapshot) => DiskFormat::Device,
                Some(Method::Qcow2) | None => DiskFormat::Qcow2,
            },
            seed: dir.join(SEED_FILE),
            work_disk: row.work_disk_bytes.map(|_| dir.join(WORK_DISK_FILE)),
            vcpus: row.vcpus,
            mem_mib: row.mem_mib,
            credentials: self.credentials(row),
            network: self.guest_network(row),
            rates: row.rates,
            has_balloon: row.kernel.is_some() || image.guest_version >= crate::image::BALLOON_SINCE,
            console_bytes_max: self.config.limits.console_bytes_max,
            saved: None,
            dir,
        }
    }

    /// The same for a start, which may go on from a snapshot.
    pub(super) fn boot_spec(&self, claim: &Claim, row: &VmRow, image: &ImageInfo) -> VmmSpec {
        let spec = self.spec(row, image);
        match &claim.restore {
            None => spec,
            Some(restore) => VmmSpec {
                kernel: restore.files.kernel.clone(),
                initrd: restore.files.initrd.clone(),
                has_balloon: restore.row.has_balloon,
                saved: Some(restore.saved()),
                ..spec
            },
        }
    }

    /// How this VM's root disk comes from the image: as it was made, else as this host can; none: it cannot.
    pub(super) fn disk_method(&self, row: &VmRow) -> Option<Method> {
        match row.disk_driver.as_deref() {
            Some(name) => Method::from_name(name),
            None => self.disk_probe.as_ref().ok().map(|p| p.method),
        }
    }

    /// What the host could not do when the daemon started (its disk was full) it may do now. But the device of a snapshot would be
    /// in no ledger: the claim did not know of it.
    fn probe_again(&self) -> Result<Method> {
        let now = super::room::probe(&self.config, self.vmm.as_ref(), &self.config.state_dir)?.method;
        match &self.disk_probe {
            Err(e) if now == Method::DmSnapshot => Err(e.clone().hint("start fcd again: the host can make root disks now")),
            _ => Ok(now),
        }
    }

    /// Where a disk made so is, or its changes are.
    pub(super) fn disk_path(&self, vm: &VmId, method: Method) -> PathBuf {
        self.vm_dir(vm).join(if method == Method::DmSnapshot { CHANGES_FILE } else { DISK_FILE })
    }

    pub(super) fn prepare_disk(&self, row: &VmRow, image: &ImageInfo, spec: &VmmSpec, claim: &Claim) -> Result<()> {
        let commands = self.commands.as_ref();
        let method = self.disk_method(row).map_or_else(|| self.probe_again(), Ok)?;
        let path = self.disk_path(&row.id, method);
        if row.disk_driver.is_some() && path.exists() {
            return disk::grow(commands, &path, method, row.disk_bytes, &claim.cancel);
        }
        let wanted = RootSpec { method, base: &image.rootfs, path: &path, size_bytes: row.disk_bytes, owner: spec.credentials };
        let reporter = claim.op().reporter();
        let told = &mut |done, total| reporter.progress_units(done, Some(total), "bytes");
        disk::make_root(commands, &wanted, &claim.cancel, told)?;
        let ticket = self.change_row(&row.id, false, |r| {
            r.disk_driver = Some(method.name().to_owned());
            r.guest_version = image.guest_version;
        })?;
        self.wait_durable(ticket)
    }

    /// The VMM's uid and gid, which no other VM has, when the daemon may give them.
    pub(super) fn credentials(&self, row: &VmRow) -> Option<(u32, u32)> {
        let own = self.config.qemu.uid_base + row.slot;
        nix::unistd::geteuid().is_root().then_some((own, own))
    }

    /// Host key and user key are made once in a VM's life: its identity outlives its restarts.
    pub(super) fn keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<(KeyPair, KeyPair)> {
        self.read_keys(row, spec)?.map_or_else(|| self.make_keys(row, spec), Ok)
    }

    /// None where they are not all there, or not what the row has: the VM has not been started, or an earlier version did it,
    /// which kept the host's key in the seed alone.
    fn read_keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<Option<(KeyPair, KeyPair)>> {
        let read = |name: &str| match std::fs::read_to_string(spec.dir.join(name)) {
            Ok(text) => KeyPair::from_private_openssh(&text).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("read the keys of vm {}", row.name), e)),
        };
        let keys = read(HOST_KEY_FILE)?.zip(read(KEY_FILE)?);
        Ok(keys.filter(|(host, _)| row.host_key.as_deref() == Some(host.public_blob())))
    }

    fn make_keys(&self, row: &VmRow, spec: &VmmSpec) -> Result<(KeyPair, KeyPair)> {
        let (host, user) = (KeyPair::generate(row.name.as_str())?, KeyPair::generate(USER_KEY_COMMENT)?);
        self.effects.before("write the keys")?;
        for (name, key) in [(KEY_FILE, &user), (HOST_KEY_FILE, &host)] {
            crate::host::fs::write_durable(&spec.dir.join(name), key.private_openssh().as_bytes(), 0o600)?;
        }
        let blob = host.public_blob().to_vec();
        let ticket = self.change_row(&row.id, false, |r| r.host_key = Some(blob))?;
        self.wait_durable(ticket)?;
        Ok((host, user))
    }

    pub(super) fn start_vmm(&self, claim: &Claim, spec: &VmmSpec) -> Result<Running> {
        let running = self.vmm.start(spec, &claim.cancel, &mut |identity| {
            // A fact, not an intent: the process is found again by its tag whether or not this reaches the disk.
            let identity = identity.clone();
            let driver = self.vmm.describe();
            let has_balloon = spec.has_balloon;
            let fact = self.change_row(&claim.vm, false, |r| {
                r.has_balloon = has_balloon;
                r.identity = Some(identity);
                r.driver = Some(driver);
            });
            if let Err(e) = fact.map(Ticket::detach) {
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
        let deadline = Instant::now() + timeout;
        let ready = match &claim.restore {
            None => self.transport.wait_ready(&target, deadline, &claim.cancel),
            Some(_) => self.wait_with_new_keys(claim, &target, deadline),
        };
        ready.map_err(|e| match e.kind() {
            Kind::Timeout | Kind::BootTimeout => Error::new(
                Kind::BootTimeout,
                format!("the guest did not answer within {} s of its start: {e}", self.config.limits.boot_timeout_s),
            )
            .hint(format!("see what it printed: fcctl logs {}; limits.boot_timeout_s sets the time", row.name)),
            _ => e,
        })
    }

    /// A read-only workspace is a mount, which the guest lost with its last boot.
    fn restore_workspace(&self, claim: &Claim, running: &Running) -> Result<()> {
        let Some(workspace) = self.store.read(|s| s.workspace(&claim.vm).filter(|w| w.readonly).cloned()) else { return Ok(()) };
        let target = self.target_at(&self.row(&claim.vm)?, running.ssh_addr)?;
        let command = remote::status_command(&remote::GuestWorkspace::new(&workspace.guest_path));
        let deadline = Instant::now() + WORKSPACE_DEADLINE;
        let script = Script { command: &command, stdin: &[], deadline, output_bytes_max: remote::ANSWER_BYTES_MAX };
        let (exit, _, stderr) = run_script(self.transport.as_ref(), &target, &script, &claim.cancel)?;
        match exit {
            Exit::Status(0) => Ok(()),
            exit => Err(remote::failure("mount the read-only workspace again", &exit, &stderr)),
        }
    }

    /// Where a running guest is and how it proves itself.
    pub(super) fn target(&self, row: &VmRow) -> Result<Target> {
        match row.ssh_addr {
            Some(addr) => self.target_at(row, addr),
            None => Err(Error::new(Kind::GuestUnavailable, format!("vm {} has no address", row.name))),
        }
    }

    pub(super) fn target_at(&self, row: &VmRow, addr: std::net::SocketAddr) -> Result<Target> {
        let Some(host_key) = row.host_key.clone() else {
            return Err(Error::internal(format!("vm {} has no host key", row.name)));
        };
        let private_key = self.private_key(row)?;
        let owner = self.credentials(row).map(|(uid, gid)| Owner { uid, gid });
        Ok(Target { addr, user: GUEST_USER.to_owned(), private_key, host_key, owner })
    }

    pub(super) fn private_key(&self, row: &VmRow) -> Result<String> {
        let path = self.vm_dir(&row.id).join(KEY_FILE);
        std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read the key of vm {}", row.name), e))
    }
}
