//! After a start of the daemon, what an earlier one left is adopted, finished or undone. Running it
//! twice changes nothing. A live healthy VMM is never killed, and what is not ours is never
//! touched.
//!
//! The reconciler's thread looks at VMs one after the other, running VMs first; `looks.rs` knows
//! which are left. VMs at rest with nothing of a boot in the ledger need no look and are usable at
//! once. A call that changes a VM which is still due looks at it by itself
//! ([`Looks::ensure_looked_at`]).

use super::adoption::Adopter;
use super::controls::Controls;
use super::core::Core;
use super::lifecycle::{Claim, Lifecycle};
use super::looks::Looker;
use super::looks::{Looking, Looks};
use super::network::Networks;
use super::recovery;
use super::recovery::Recovery;
use super::resources;
use super::resources::Resources;
use super::rules::is_at_rest;
use super::spec::Specs;
use super::transitions::Verb;
use super::vmms::Vmms;
use crate::api::vm::VmState;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::image::Images;
use crate::locks::{Condvar, Mutex, Rank, Waited};
use crate::store::{State, Ticket, VmRow};
use crate::vmm::Driver;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two comparisons of the ledger, the rows and the host.
const SWEEP_PERIOD: Duration = Duration::from_secs(60);

/// The reason of a VM whose VMM was gone when the daemon started, where nothing says more.
const UNSEEN_END: &str = "the VMM ended while the daemon did not run, and nothing says why";

/// How long one who asks for leaks waits for the first look at what an earlier daemon left.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);

/// Whether the first look has ended.
pub(super) struct Settled {
    is_settled: Mutex<bool>,
    told: Condvar,
}

/// Work that remains after a look.
enum Left {
    AsItIs,
    /// An `rm` VM without a holder.
    ToDelete,
}

/// The VMs in which an earlier daemon left something under way or running, with the boot that each
/// was in.
pub(super) fn to_look_at(state: &State) -> HashMap<VmId, u64> {
    let of_boots = state.ledger().filter(|l| resources::ends_with_its_boot(&l.kind));
    let with_leftovers: HashSet<&VmId> = of_boots.filter_map(|l| l.vm.as_ref()).collect();
    let needs_look = |row: &VmRow| {
        row.rm
            || recovery::deaths_at_start(state, &row.id) > 0
            || row.identity.is_some()
            || !is_at_rest(row.state)
            || with_leftovers.contains(&row.id)
    };
    state.vms().filter(|row| needs_look(row)).map(|row| (row.id.clone(), row.generation)).collect()
}

/// What a VM is looked at for, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Adopt,
    /// Daemons have died of it.
    AdoptLast,
    Finish,
    Clean,
}

impl Settled {
    pub fn new() -> Self {
        Self { is_settled: Mutex::new(Rank::Runtimes, false), told: Condvar::new() }
    }
}

/// Cleans up after an earlier daemon, and then every minute.
pub struct Reconciler {
    pub(super) core: Core,
    pub(super) recovery: Recovery,
    pub(super) adopter: Adopter,
    pub(super) looks: Arc<Looks>,
    pub(super) networks: Networks,
    pub(super) specs: Specs,
    pub(super) vmms: Vmms,
    pub(super) controls: Controls,
    pub(super) resources: Resources,
    pub(super) lifecycle: Lifecycle,
    pub(super) images: Images,
    pub(super) vmm: Arc<dyn Driver>,
    pub(super) settled: Settled,
}

impl Reconciler {
    /// Looks at every VM that an earlier daemon left in the middle of something.
    pub fn reconcile(&self) {
        for id in self.in_order_of_need() {
            // Somebody else looks at it, or has.
            let Some(looking) = self.looks.begin(&id) else { continue };
            self.look(&id, looking);
        }
        drop(self.vmms.earlier_vmms.lock().take());
        self.resources.sweep(true);
        *self.settled.is_settled.lock() = true;
        self.settled.told.notify_all();
        self.networks.mend_network();
    }

    /// Running VMs first: until they are adopted nobody sees their end.
    fn in_order_of_need(&self) -> Vec<VmId> {
        let needs = |id: &VmId| match self.core.store.read(|s| s.vm(id).map(|row| row.state)) {
            Some(VmState::Running) if self.adopter.deaths(id) == 0 => Need::Adopt,
            Some(VmState::Running) => Need::AdoptLast,
            Some(VmState::Starting | VmState::Stopping | VmState::Deleting) => Need::Finish,
            _ => Need::Clean,
        };
        let mut due: Vec<_> = self.looks.due().into_iter().map(|id| (needs(&id), id)).collect();
        due.sort();
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// What an earlier daemon left is no leak before this one has cleared it away.
    pub(super) fn await_settled(&self) -> Result<()> {
        let mut settled = self.settled.is_settled.lock();
        let deadline = Instant::now() + SETTLE_DEADLINE;
        match self.settled.told.wait_while_cancellable(&mut settled, deadline, &self.core.closing, |settled| !*settled) {
            Waited::Done => Ok(()),
            Waited::TimedOut => Err(Error::new(Kind::Busy, "the daemon still clears away what an earlier one left")
                .hint("try again in a moment; the daemon's log says what takes so long")),
            Waited::Cancelled => Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down")),
        }
    }

    /// Every [`SWEEP_PERIOD`], until the daemon closes: what a clean-up could not remove is tried
    /// again.
    pub fn run_sweeper(&self) {
        while !self.core.sleep(SWEEP_PERIOD) {
            self.sweep_once();
        }
    }

    /// Once.
    pub fn sweep_once(&self) {
        self.adopter.end_all();
        self.resources.sweep(true);
        self.networks.mend_network();
        let adoptions = &self.adopter.adoptions;
        for vm in adoptions.failures() {
            let Some(row) = self.core.row(&vm).ok().filter(|row| adoptions.has_failed(row)) else {
                adoptions.forget_failure(&vm);
                continue;
            };
            match self.adopt_late(&row) {
                Ok(()) => log::info!("VM {} is adopted now", row.name),
                Err(e) => log::warn!("adopt the VMM of {}: {e}; retrying every minute", row.name),
            }
        }
    }

    /// `generation`: of the boot that an earlier daemon left.
    fn reconcile_vm(&self, id: &VmId, generation: u64) -> Result<Left> {
        let _label = crate::locks::operation_scope(format!("reconcile {id}"));
        let row = self.core.row(id)?;
        // Operations of earlier daemons have ended.
        let is_owned = row.op.as_ref().is_some_and(|op| self.core.ops.get(op).is_ok_and(|op| !op.state.has_ended()));
        if is_owned || row.generation != generation {
            return Ok(Left::AsItIs);
        }
        if self.gave_up(&row)? {
            return Ok(Left::AsItIs);
        }
        match row.state {
            VmState::Running => self.adopt_or_fail(&row)?,
            VmState::Starting => {
                self.end_leftover(&row)?;
                let before = if row.started_at.is_none() { VmState::Created } else { VmState::Stopped };
                self.put_at_rest(&row, before, "the daemon was restarted while it booted")?;
            }
            VmState::Stopping => return self.resume(&row, Verb::Stop).map(|()| Left::AsItIs),
            VmState::Deleting => return self.resume(&row, Verb::DeleteForce).map(|()| Left::AsItIs),
            VmState::Created | VmState::Stopped | VmState::Failed => self.end_leftover(&row)?,
        }
        // Its holder's connection died with the earlier this.
        Ok(if row.rm { Left::ToDelete } else { Left::AsItIs })
    }

    fn adopt_or_fail(&self, row: &VmRow) -> Result<()> {
        let known = row.identity.clone();
        if let Some(identity) = &known
            && identity.boot_id != crate::host::process::boot_id()?
        {
            self.put_at_rest(row, VmState::Stopped, "the host was rebooted")?;
            return self.resources.release_boot(&row.id, row.generation);
        }
        let Some(identity) = self.vmms.identity(row) else {
            let (state, reason) = match self.vmms.unseen_end(row) {
                Some(end) if end.is_orderly() => (VmState::Stopped, end.to_string()),
                Some(end) => (VmState::Failed, format!("while the daemon did not run: {end}")),
                None => (VmState::Failed, UNSEEN_END.to_owned()),
            };
            self.put_at_rest(row, state, &reason)?;
            return self.resources.release_boot(&row.id, row.generation);
        };
        if !self.adopter.begin(row, false) {
            return self.leave_unadopted(row, &identity);
        }
        let adopted = self.images.get(&row.image).and_then(|image| self.vmm.adopt(&self.specs.spec(row, &image), &identity));
        match adopted {
            Ok(running) => {
                self.networks.adopt_guest(row);
                self.lifecycle.watch(row, &running.identity)?;
                self.adopter.end(row, true);
                self.controls.adopt_adjusted(row);
                self.controls.adopt_pause(row);
                // An earlier daemon that could not adopt the VM has said so in the reason.
                let adopted = (Some(running.identity), Some(running.ssh_addr), None);
                if adopted == (row.identity.clone(), row.ssh_addr, row.reason.clone()) {
                    // Most often, and then a full disk does not matter.
                    return Ok(());
                }
                let ticket = self.change_as_found(row, false, |r| (r.identity, r.ssh_addr, r.reason) = adopted)?;
                self.core.wait_durable(ticket)
            }
            // It lives, so it is not killed; the user sees that it cannot be reached.
            Err(e) => {
                log::warn!("adopt the vmm of {}: {e}", row.name);
                self.adopter.adoptions.note_failure(row);
                let reason = format!("its VMM runs but could not be adopted: {e}");
                let ticket = self.change_as_found(row, false, |r| r.reason = Some(reason))?;
                self.core.wait_durable(ticket)?;
                self.lifecycle.watch(row, &identity)?;
                self.adopter.end(row, false);
                Ok(())
            }
        }
    }

    /// A VMM that runs for a VM that should have none, and what it had.
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
        })?;
        self.core.wait_durable(ticket)
    }

    /// Changes the row, unless somebody has claimed the VM since the look at it began.
    fn change_as_found(&self, found: &VmRow, essential: bool, change: impl FnOnce(&mut VmRow)) -> Result<Ticket> {
        self.core.change_row(&found.id, essential, |row| {
            if (row.generation, row.state, &row.op) == (found.generation, found.state, &found.op) {
                change(row);
            }
        })
    }

    /// A stop or a delete that was under way is finished by an operation of the daemon's own.
    fn resume(&self, row: &VmRow, verb: Verb) -> Result<()> {
        let deaths = self.core.store.read(|s| recovery::deaths_at_start(s, &row.id));
        self.recovery.attempts.note(&row.id);
        let op = self.core.begin_own_op("reconcile", Some(row.id.clone()), row.owner_uid)?;
        let guard = self.core.locks.vm.lock(&row.id);
        let (id, op_row) = (op.id().clone(), op.op());
        let ((), ticket) = self.core.change(true, |tx| {
            tx.put_op(op_row);
            recovery::begin(tx, guard.key());
            tx.update_vm(&guard, |r| {
                r.op = Some(id);
                if deaths > 0 {
                    // Only the end of the guest is resumed, not its next start.
                    r.intent = None;
                }
            })
        })?;
        self.lifecycle.arm_locked(&guard, &op, row.state, verb);
        drop(guard);
        let (vm, cancel) = (row.id.clone(), op.cancel().clone());
        let (lifecycle, state, ticket) = (self.lifecycle.clone(), row.state, Some(ticket));
        let claim = Claim { lifecycle, vm, op: Some(op), state, verb, timeout: None, restore: None, cancel, ticket };
        self.lifecycle.begin(claim).map(drop)
    }
}

impl Looker for Reconciler {
    fn look(&self, id: &VmId, looking: Looking<'_>) {
        let looked = self.reconcile_vm(id, looking.generation);
        // From here on calls do not wait for this look, which the deletion below is one of.
        drop(looking);
        match looked {
            Ok(Left::ToDelete) => self.lifecycle.delete_unasked(id),
            Ok(Left::AsItIs) => {}
            Err(e) => log::error!("reconcile VM {id}: {e}"),
        }
    }

    /// One that did not answer when the daemon started, and does now.
    fn adopt_late(&self, row: &VmRow) -> Result<()> {
        let adoptions = &self.adopter.adoptions;
        let (Some(identity), true) = (&row.identity, adoptions.has_failed(row)) else { return Ok(()) };
        let image = self.images.get(&row.image)?;
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
        self.controls.adopt_pause(row);
        let adopted = (None, Some(running.ssh_addr));
        let ticket = self.change_as_found(row, false, |r| (r.reason, r.ssh_addr) = adopted)?;
        self.core.wait_durable(ticket)
    }
}
