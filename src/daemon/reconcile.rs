//! Adopts, finishes or undoes what an earlier daemon left, once this daemon has started.
//! Reconciliation is idempotent. It does not kill a VMM that cannot be adopted, and never touches
//! what does not belong to fcd.
//!
//! The reconciler's thread handles VMs one after the other, running VMs first; `unreconciled.rs`
//! tracks which VMs are left. VMs at rest without ledger rows of a boot are usable at once. A call
//! that changes an unreconciled VM first reconciles it ([`Unreconciled::ensure_reconciled`]).

use super::adoption::Adopter;
use super::controls::Controls;
use super::core::Core;
use super::lifecycle::{Claim, Lifecycle};
use super::network::Networks;
use super::recovery;
use super::recovery::Recovery;
use super::resources;
use super::resources::Resources;
use super::rules::is_at_rest;
use super::spec::Specs;
use super::transitions::Verb;
use super::unreconciled::VmReconciler;
use super::unreconciled::{ReconcileGuard, Unreconciled};
use super::vmms::Vmms;
use crate::api::vm::{Restart, VmState};
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::image::Images;
use crate::locks::{Condvar, Mutex, Rank, Waited};
use crate::sched::{HashMap, HashSet, Instant};
use crate::store::{State, Ticket, VmRow};
use crate::vmm::Driver;
use std::sync::Arc;
use std::time::Duration;

/// How long to pause between two sweeps.
const SWEEP_PERIOD: Duration = Duration::from_secs(60);

/// The reason of a VM whose VMM had exited when the daemon started, if nothing shows the cause.
const UNSEEN_END: &str = "the VMM ended while fcd was not running, for an unknown reason";

/// How long a call that lists leaks waits for the first pass.
const FIRST_PASS_DEADLINE: Duration = Duration::from_secs(60);

/// Tells when the first pass over all VMs has ended.
pub(super) struct FirstPass {
    is_done: Mutex<bool>,
    done: Condvar,
}

/// The next step for a VM that was reconciled.
enum Next {
    Nothing,
    /// Delete the VM, because it is an `rm` VM without a holder.
    Delete,
    /// Start the VM, because its owner wants that after a reboot of the host.
    Start,
}

/// Returns the VMs that this daemon must reconcile, because an earlier daemon left a VMM, an
/// operation or other work, each with its generation.
pub(super) fn unreconciled_vms(state: &State) -> HashMap<VmId, u64> {
    let boot_rows = state
        .ledger()
        .filter(|l| resources::ends_with_its_boot(&l.kind));
    let with_leftovers: HashSet<&VmId> = boot_rows.filter_map(|l| l.vm.as_ref()).collect();
    let is_unreconciled = |row: &VmRow| {
        row.rm
            || recovery::deaths_at_start(state, &row.id) > 0
            || row.identity.is_some()
            || !is_at_rest(row.state)
            || with_leftovers.contains(&row.id)
    };
    state
        .vms()
        .filter(|row| is_unreconciled(row))
        .map(|row| (row.id.clone(), row.generation))
        .collect()
}

/// True if the VMM was started before the host's last reboot.
fn has_rebooted(row: &VmRow) -> Result<bool> {
    let now = crate::host::process::boot_id()?;
    let before = row.identity.as_ref().map(|identity| &identity.boot_id);
    Ok(before.is_some_and(|before| before != now))
}

/// The work that a VM needs, from the most to the least urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Adopt,
    /// Adopt the VM after all others, because daemons have died while adopting it.
    AdoptLast,
    Finish,
    Clean,
}

impl FirstPass {
    pub(super) fn new() -> Self {
        Self {
            is_done: Mutex::new(Rank::Runtimes, false),
            done: Condvar::new(),
        }
    }
}

/// Reconciles the VMs of an earlier daemon, and sweeps every minute.
pub struct Reconciler {
    pub(super) core: Core,
    pub(super) recovery: Recovery,
    pub(super) adopter: Adopter,
    pub(super) unreconciled: Arc<Unreconciled>,
    pub(super) networks: Networks,
    pub(super) specs: Specs,
    pub(super) vmms: Vmms,
    pub(super) controls: Controls,
    pub(super) resources: Resources,
    pub(super) lifecycle: Lifecycle,
    pub(super) images: Images,
    pub(super) vmm: Arc<dyn Driver>,
    pub(super) first_pass: FirstPass,
}

impl Reconciler {
    /// Reconciles all VMs that are still unreconciled. Then sweeps once and restores the network.
    pub fn reconcile(&self) {
        for id in self.in_order_of_need() {
            // No guard means that a call is reconciling the VM or has done so.
            let Some(guard) = self.unreconciled.begin(&id) else {
                continue;
            };
            self.reconcile_one(&id, guard);
        }
        drop(self.vmms.earlier_vmms.lock().take());
        self.resources.sweep(true);
        *self.first_pass.is_done.lock() = true;
        self.first_pass.done.notify_all();
        self.networks.mend_network();
    }

    /// Returns the unreconciled VMs in the order in which they must be reconciled. Running VMs come
    /// first, because their end is not noticed before they are adopted.
    fn in_order_of_need(&self) -> Vec<VmId> {
        let needs = |id: &VmId| match self.core.store.read(|s| s.vm(id).map(|row| row.state)) {
            Some(VmState::Running) if self.adopter.deaths(id) == 0 => Need::Adopt,
            Some(VmState::Running) => Need::AdoptLast,
            Some(VmState::Starting | VmState::Stopping | VmState::Deleting) => Need::Finish,
            _ => Need::Clean,
        };
        let mut due: Vec<_> = self
            .unreconciled
            .due()
            .into_iter()
            .map(|id| (needs(&id), id))
            .collect();
        due.sort();
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// Waits until the first pass has ended. Until then, leftovers of an earlier daemon are not
    /// leaks.
    pub(super) fn wait_first_pass(&self) -> Result<()> {
        let mut is_done = self.first_pass.is_done.lock();
        let deadline = Instant::now() + FIRST_PASS_DEADLINE;
        match self.first_pass.done.wait_while_cancellable(
            &mut is_done,
            deadline,
            &self.core.closing,
            |is_done| !*is_done,
        ) {
            Waited::Done => Ok(()),
            Waited::TimedOut => Err(Error::new(
                Kind::Busy,
                "fcd is still cleaning up after an earlier run",
            )
            .hint("try again in a moment; see the daemon's log for what takes so long")),
            Waited::Cancelled => Err(Error::new(
                Kind::ShuttingDown,
                "the daemon is shutting down",
            )),
        }
    }

    /// Sweeps every [`SWEEP_PERIOD`] until the daemon closes, so that failed clean-ups are retried.
    pub fn run_sweeper(&self) {
        while !self.core.sleep(SWEEP_PERIOD) {
            self.sweep_once();
        }
    }

    /// Removes leftovers, restores the network, and retries adoptions that have failed.
    pub fn sweep_once(&self) {
        self.adopter.end_all();
        self.resources.sweep(true);
        self.networks.mend_network();
        let adoptions = &self.adopter.adoptions;
        for vm in adoptions.failures() {
            let Some(row) = self
                .core
                .row(&vm)
                .ok()
                .filter(|row| adoptions.has_failed(row))
            else {
                adoptions.forget_failure(&vm);
                continue;
            };
            match self.adopt_late(&row) {
                Ok(()) => log::info!("VM {} has been adopted", row.name),
                Err(e) => log::warn!(
                    "adopt the VMM of VM {}: {e}; retrying every minute",
                    row.name
                ),
            }
        }
    }

    /// Reconciles one VM. `generation` is the generation of the boot that an earlier daemon left.
    fn reconcile_vm(&self, id: &VmId, generation: u64) -> Result<Next> {
        let _label = crate::locks::operation_scope(format!("reconcile {id}"));
        let row = self.core.row(id)?;
        // All operations of earlier daemons have ended, so an operation in progress is this
        // daemon's.
        let is_owned = row
            .op
            .as_ref()
            .is_some_and(|op| self.core.ops.get(op).is_ok_and(|op| !op.state.has_ended()));
        if is_owned || row.generation != generation {
            return Ok(Next::Nothing);
        }
        if self.gave_up(&row)? {
            return Ok(Next::Nothing);
        }
        match row.state {
            VmState::Running if has_rebooted(&row)? => {
                self.put_at_rest(&row, VmState::Stopped, "the host was rebooted")?;
                self.resources.release_boot(&row.id, row.generation)?;
                if row.restart == Restart::Always && !row.rm {
                    return Ok(Next::Start);
                }
            }
            VmState::Running => self.adopt_or_fail(&row)?,
            VmState::Starting => {
                self.end_leftover(&row)?;
                let before = if row.started_at.is_none() {
                    VmState::Created
                } else {
                    VmState::Stopped
                };
                self.put_at_rest(&row, before, "fcd was restarted while the VM booted")?;
            }
            VmState::Stopping => return self.resume(&row, Verb::Stop).map(|()| Next::Nothing),
            VmState::Deleting => {
                return self.resume(&row, Verb::DeleteForce).map(|()| Next::Nothing);
            }
            VmState::Created | VmState::Stopped | VmState::Failed => self.end_leftover(&row)?,
        }
        // The earlier daemon's end has closed the connection of the VM's holder.
        Ok(if row.rm { Next::Delete } else { Next::Nothing })
    }

    fn adopt_or_fail(&self, row: &VmRow) -> Result<()> {
        let Some(identity) = self.vmms.identity(row) else {
            let (state, reason) = match self.vmms.unseen_end(row) {
                Some(end) if end.is_orderly() => (VmState::Stopped, end.to_string()),
                Some(end) => (VmState::Failed, format!("while fcd was not running: {end}")),
                None => (VmState::Failed, UNSEEN_END.to_owned()),
            };
            self.put_at_rest(row, state, &reason)?;
            return self.resources.release_boot(&row.id, row.generation);
        };
        if !self.adopter.begin(row, false) {
            return self.leave_unadopted(row, &identity);
        }
        let adopted = self
            .images
            .get(&row.shape.image)
            .and_then(|image| self.vmm.adopt(&self.specs.spec(row, &image), &identity));
        match adopted {
            Ok(running) => {
                self.networks.adopt_guest(row);
                self.lifecycle.watch(row, &running.identity)?;
                self.adopter.end(row, true);
                self.controls.adopt_adjusted(row);
                self.controls.adopt_ports(row);
                self.controls.adopt_pause(row);
                self.lifecycle.auto_forwarder.follow(&row.id);
                // An earlier daemon that could not adopt the VM may have set a reason.
                let adopted = (Some(running.identity), Some(running.ssh_addr), None);
                if adopted == (row.identity.clone(), row.ssh_addr, row.reason.clone()) {
                    // In the usual case nothing has to be written, so adoption works even if the
                    // disk is full.
                    return Ok(());
                }
                let ticket = self.change_as_found(row, false, |r| {
                    (r.identity, r.ssh_addr, r.reason) = adopted
                })?;
                self.core.wait_durable_in_time(&ticket)
            }
            // The VMM is alive, so it is not killed. The VM's reason shows that the VMM cannot be
            // reached.
            Err(e) => {
                log::warn!("adopt the VMM of VM {}: {e}", row.name);
                self.adopter.adoptions.note_failure(row);
                let reason = format!("its VMM is running but could not be adopted: {e}");
                let ticket = self.change_as_found(row, false, |r| r.reason = Some(reason))?;
                self.core.wait_durable_in_time(&ticket)?;
                self.lifecycle.watch(row, &identity)?;
                self.adopter.end(row, false);
                Ok(())
            }
        }
    }

    /// Kills the VMM of a VM that should not have one, and releases the VMM's resources.
    pub(super) fn end_leftover(&self, row: &VmRow) -> Result<()> {
        if let Some(identity) = self.vmms.identity(row) {
            self.vmms.kill_vmm(&identity)?;
        }
        self.resources.release_boot(&row.id, row.generation)
    }

    fn put_at_rest(&self, row: &VmRow, state: VmState, reason: &str) -> Result<()> {
        let ticket = self.change_as_found(row, true, |r| {
            r.state = state;
            r.reason = Some(reason.to_owned());
            (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
            r.forget_listeners();
        })?;
        self.core.wait_durable_in_time(&ticket)
    }

    /// Changes the row, unless an operation has claimed the VM since `found` was read.
    fn change_as_found(
        &self,
        found: &VmRow,
        essential: bool,
        change: impl FnOnce(&mut VmRow),
    ) -> Result<Ticket> {
        self.core.change_row(&found.id, essential, |row| {
            if (row.generation, row.state, &row.op) == (found.generation, found.state, &found.op) {
                change(row);
            }
        })
    }

    /// Finishes a stop or delete that was in progress, as an operation of the daemon itself.
    fn resume(&self, row: &VmRow, verb: Verb) -> Result<()> {
        let deaths = self
            .core
            .store
            .read(|s| recovery::deaths_at_start(s, &row.id));
        self.recovery.attempts.note(&row.id);
        let op = self
            .core
            .begin_own_op("reconcile", Some(row.id.clone()), row.owner_uid)?;
        let guard = self.core.locks.vm.lock(&row.id);
        let (id, op_row) = (op.id().clone(), op.op());
        let ((), ticket) = self.core.change(true, |tx| {
            tx.put_op(op_row);
            recovery::begin(tx, guard.key());
            tx.update_vm(&guard, |r| {
                r.op = Some(id);
                if deaths > 0 {
                    // Resume only the stop, not the start after it.
                    r.intent = None;
                }
            })
        })?;
        self.lifecycle.arm_locked(&guard, &op, row.state, verb);
        drop(guard);
        let (vm, cancel) = (row.id.clone(), op.cancel().clone());
        let (lifecycle, state, ticket) = (self.lifecycle.clone(), row.state, Some(ticket));
        let claim = Claim {
            lifecycle,
            vm,
            op: Some(op),
            state,
            verb,
            timeout: None,
            restore: None,
            cancel,
            ticket,
        };
        self.lifecycle.begin(claim).map(drop)
    }
}

impl VmReconciler for Reconciler {
    fn reconcile_one(&self, id: &VmId, guard: ReconcileGuard<'_>) {
        let result = self.reconcile_vm(id, guard.generation);
        // Release the guard now, because calls wait for it, including the deletion below.
        drop(guard);
        match result {
            Ok(Next::Delete) => self.lifecycle.delete_unasked(id),
            Ok(Next::Start) => self.lifecycle.start_unasked(id),
            Ok(Next::Nothing) => {}
            Err(e) => log::error!("reconcile VM {id}: {e}"),
        }
    }

    /// Adopts a VM that did not respond when the daemon started but responds now.
    fn adopt_late(&self, row: &VmRow) -> Result<()> {
        let adoptions = &self.adopter.adoptions;
        let (Some(identity), true) = (&row.identity, adoptions.has_failed(row)) else {
            return Ok(());
        };
        let image = self.images.get(&row.shape.image)?;
        if !self.adopter.begin(row, true) {
            adoptions.forget_failure(&row.id);
            return self.leave_unadopted(row, identity);
        }
        let adopted = self.vmm.adopt(&self.specs.spec(row, &image), identity);
        self.adopter.survive(row, adopted.is_ok());
        let running = adopted?;
        adoptions.forget_failure(&row.id);
        self.networks.adopt_guest(row);
        self.controls.adopt_adjusted(row);
        self.controls.adopt_ports(row);
        self.controls.adopt_pause(row);
        self.lifecycle.auto_forwarder.follow(&row.id);
        let adopted = (None, Some(running.ssh_addr));
        let ticket = self.change_as_found(row, false, |r| (r.reason, r.ssh_addr) = adopted)?;
        self.core.wait_durable_in_time(&ticket)
    }
}
