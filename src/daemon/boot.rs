//! Boots a VM. A boot runs its steps (`resources`) in order, and then waits for the guest. A boot
//! that fails releases the resources that its steps acquired, in reverse order.

use super::guest_scripts::Layout;
use super::lifecycle::{Claim, Lifecycle};
use super::resources::Boot;
use crate::api::exec::Exit;
use crate::disk::RestoreSeed;
use crate::error::{Error, Kind, Result};
use crate::guest::{Script, Target, run_script};
use crate::image::{Boots, ImageInfo};
use crate::sched::Instant;
use crate::store::VmRow;
use crate::vmm::Running;
use crate::workspace::remote;
use std::time::Duration;

const WORKSPACE_DEADLINE: Duration = Duration::from_secs(60);
/// How long a guest that was restored from a snapshot may take to apply its new seed.
const REJOIN_DEADLINE: Duration = Duration::from_secs(60);
/// How long to wait before another attempt while the guest still has its old keys.
const REJOIN_PERIOD: Duration = Duration::from_millis(100);
const OUTPUT_BYTES_MAX: usize = 4096;

impl Lifecycle {
    /// Boots the VM and waits until its guest responds. After an error, everything that the boot
    /// acquired is released or in the ledger.
    pub(super) fn boot(&self, claim: &Claim) -> Result<Running> {
        let row = self.core.row(&claim.vm)?;
        let generation = row.generation;
        self.try_boot(claim, row).map_err(|e| {
            self.runtimes.give_up_boot(&claim.vm);
            // This also releases ledger entries of steps that the boot did not reach.
            match self.resources.release_boot(&claim.vm, generation) {
                Ok(()) => e,
                Err(k) => k.context(format!("after {e}: clean up")),
            }
        })
    }

    fn try_boot(&self, claim: &Claim, row: VmRow) -> Result<Running> {
        let (op, cancel, restore) = (claim.op(), &claim.cancel, claim.restore.as_ref());
        let _admitted = self.boots.enter(cancel, &mut |ahead| {
            op.progress(&format!("wait for other boots ({ahead} ahead)"));
        })?;
        if row.identity.is_some() {
            op.progress("end the VMM of an earlier start");
            self.vmms.kill_earlier(&row)?;
        }
        self.resources
            .release_boot(&row.id, row.generation.saturating_sub(1))?;
        let image = self.images.get(&row.shape.image)?;
        // Refuse to start the VM if the file of a registered image has changed, even though the
        // VM's disk is a copy.
        drop(image.open_in_place()?);
        let row = if restore.is_none() {
            self.kernel_service
                .check_kernel(row.shape.kernel.as_ref(), &image)?;
            self.choose_runtime(row, &image)?
        } else {
            row
        };
        let spec = self.specs.boot_spec(restore, &row, &image);
        let (files, restore_seed, former_disks, running) = (Vec::new(), None, None, None);
        let mut boot = Boot {
            op,
            cancel,
            restore,
            row,
            image: &image,
            spec,
            files,
            restore_seed,
            former_disks,
            running,
        };
        self.resources.run_boot_steps(&mut boot)?;
        self.finish_boot(&mut boot)
    }

    /// Records the newest guest runtime in the VM's row if the image needs one.
    fn choose_runtime(&self, row: VmRow, image: &ImageInfo) -> Result<VmRow> {
        let (wanted, _in_use) = match image.boots {
            Boots::Own { .. } => (None, None),
            Boots::Runtime => {
                let (id, in_use) = self.specs.use_newest_runtime()?;
                (Some(id), Some(in_use))
            }
        };
        if row.shape.runtime == wanted {
            return Ok(row);
        }
        let ticket = self
            .core
            .change_row(&row.id, false, |row| row.shape.runtime = wanted)?;
        self.core.wait_durable(ticket)?;
        self.core.row(&row.id)
    }

    fn finish_boot(&self, boot: &mut Boot<'_>) -> Result<Running> {
        let running = boot
            .running
            .take()
            .ok_or_else(|| Error::internal("a boot acquired everything but a VMM"))?;
        self.watch(&self.core.row(&boot.row.id)?, &running.identity)?;
        boot.op.progress("wait for the guest");
        self.wait_guest(boot, &running)?;
        if let Some(seed) = &boot.restore_seed {
            self.wait_rejoined(boot, &running, seed)?;
        }
        self.resources.keep_disks(boot)?;
        self.restore_workspace(boot, &running)?;
        Ok(running)
    }

    fn wait_guest(&self, boot: &Boot<'_>, running: &Running) -> Result<()> {
        let row = self.core.row(&boot.row.id)?;
        let target = self.guests.target_at(&row, running.ssh_addr)?;
        let timeout = Duration::from_secs(self.core.limits.boot_timeout_s);
        let deadline = Instant::now() + timeout;
        let ready = match boot.restore {
            None => self.transport.wait_ready(&target, deadline, boot.cancel),
            Some(_) => self.wait_with_new_keys(boot, &target, deadline),
        };
        ready.map_err(|e| match e.kind() {
            Kind::Timeout | Kind::BootTimeout => Error::new(
                Kind::BootTimeout,
                format!(
                    "the guest did not respond within {} s: {e}",
                    self.core.limits.boot_timeout_s
                ),
            )
            .hint(format!(
                "see its console: fcctl logs {}; limits.boot_timeout_s sets the timeout",
                row.name
            )),
            _ => e,
        })
    }

    /// Mounts a read-only workspace again, because the mount ended with the last boot.
    fn restore_workspace(&self, boot: &Boot<'_>, running: &Running) -> Result<()> {
        let Some(workspace) = self.core.store.read(|s| {
            s.workspace(&boot.row.id)
                .filter(|w| w.info.readonly)
                .cloned()
        }) else {
            return Ok(());
        };
        let target = self
            .guests
            .script_target_at(&self.core.row(&boot.row.id)?, running.ssh_addr)?;
        let command =
            remote::status_command(&remote::GuestWorkspace::new(&workspace.info.guest_path));
        let deadline = Instant::now() + WORKSPACE_DEADLINE;
        let script = Script {
            command: &command,
            stdin: &[],
            deadline,
            output_bytes_max: remote::ANSWER_BYTES_MAX,
        };
        let output = run_script(self.transport.as_ref(), &target, &script, boot.cancel)?;
        match output.exit {
            Exit::Status(0) => Ok(()),
            exit => Err(remote::failure(
                "mount the read-only workspace again",
                &exit,
                &output.stderr,
            )),
        }
    }

    /// Waits until the restored guest has applied its new seed, and then sets its clock.
    fn wait_rejoined(&self, boot: &Boot<'_>, running: &Running, seed: &RestoreSeed) -> Result<()> {
        boot.op
            .progress("wait for the guest to apply its new identity");
        let row = self.core.row(&boot.row.id)?;
        let (target, layout) = (
            self.guests.script_target_at(&row, running.ssh_addr)?,
            Layout::of(&row),
        );
        let deadline = Instant::now() + REJOIN_DEADLINE;
        let command = layout.wait_rejoined_command(&seed.token);
        let script = Script {
            command: &command,
            stdin: &[],
            deadline,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        let output = run_script(self.transport.as_ref(), &target, &script, boot.cancel)
            .map_err(|e| e.context("wait for the guest to apply its new identity"))?;
        match output.exit {
            Exit::Status(0) => {
                // The clock in the seed is out of date, because loading the memory took time.
                let command = layout.set_clock_command();
                let script = Script {
                    command: &command,
                    ..script
                };
                run_script(self.transport.as_ref(), &target, &script, boot.cancel).map(drop)
            }
            exit => Err(remote::failure(
                "wait for the guest to apply its new identity",
                &exit,
                &output.stderr,
            )),
        }
    }

    /// Waits for a restored guest. If it was restored into another VM, it still has the keys of the
    /// original VM at first.
    fn wait_with_new_keys(
        &self,
        boot: &Boot<'_>,
        target: &Target,
        deadline: Instant,
    ) -> Result<()> {
        loop {
            match self.transport.wait_ready(target, deadline, boot.cancel) {
                Err(e) if e.kind() == Kind::HostKeyMismatch && Instant::now() < deadline => {
                    crate::host::wait::sleep(REJOIN_PERIOD, boot.cancel)
                        .map_err(|e| Error::io("wait for the guest", e))?;
                }
                other => return other,
            }
        }
    }
}
