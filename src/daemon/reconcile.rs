//! After a start of the daemon, what an earlier one left is adopted, finished or undone. Running it twice changes
//! nothing. A live healthy VMM is never killed, and what is not ours is never touched.
//!
//! The reconciler's thread looks at VMs one after the other, running VMs first; `looks.rs` knows which are left. VMs at
//! rest with nothing of a boot in the ledger need no look and are usable at once. A call that changes a VM which is
//! still due looks at it by itself ([`Daemon::ensure_looked_at`]).

use super::lifecycle::Claim;
use super::looks::Looking;
use super::transitions::Verb;
use super::{Daemon, recovery, resources};
use crate::api::vm::VmState;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{Condvar, Mutex, Rank, Waited};
use crate::store::{State, Ticket, VmRow};
use std::collections::{HashMap, HashSet};
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

/// The VMs in which an earlier daemon left something under way or running, with the boot that each was in.
pub(super) fn to_look_at(state: &State) -> HashMap<VmId, u64> {
    let of_boots = state.ledger().filter(|l| resources::ends_with_its_boot(&l.kind));
    let with_leftovers: HashSet<&VmId> = of_boots.filter_map(|l| l.vm.as_ref()).collect();
    let needs_look = |row: &VmRow| {
        row.rm
            || recovery::deaths_at_start(state, &row.id) > 0
            || row.identity.is_some()
            || !super::create::is_at_rest(row.state)
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

impl Daemon {
    /// Looks at every VM that an earlier daemon left in the middle of something.
    pub fn reconcile(&self) {
        for id in self.in_order_of_need() {
            // Somebody else looks at it, or has.
            let Some(looking) = self.looks.begin(&id) else { continue };
            self.look(&id, looking);
        }
        drop(self.earlier_vmms.lock().take());
        self.sweep(true);
        *self.settled.is_settled.lock() = true;
        self.settled.told.notify_all();
        self.mend_network();
    }

    /// Running VMs first: until they are adopted nobody sees their end.
    fn in_order_of_need(&self) -> Vec<VmId> {
        let needs = |id: &VmId| match self.store.read(|s| s.vm(id).map(|row| row.state)) {
            Some(VmState::Running) if self.adoption_deaths(id) == 0 => Need::Adopt,
            Some(VmState::Running) => Need::AdoptLast,
            Some(VmState::Starting | VmState::Stopping | VmState::Deleting) => Need::Finish,
            _ => Need::Clean,
        };
        let mut due: Vec<_> = self.looks.due().into_iter().map(|id| (needs(&id), id)).collect();
        due.sort();
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// Called before anything changes a VM. The caller's thread looks at a VM that is still due, and waits while
    /// another one does. Ending a running guest needs no look: its VMM is in the row, and killing it must not wait for
    /// a VMM that hangs and so cannot be adopted.
    pub(super) fn ensure_looked_at(&self, row: &VmRow, verb: Verb) -> Result<()> {
        if !self.looks.is_due(&row.id) {
            return Ok(());
        }
        if row.state == VmState::Running && verb.ends_guest() {
            return Ok(());
        }
        let looked = self.looks.begin_or_wait(&row.id, &self.closing);
        if let Some(looking) = looked.map_err(|e| e.context(format!("{} VM {}", verb.name(), row.name)))? {
            self.look(&row.id, looking);
        }
        Ok(())
    }

    fn look(&self, id: &VmId, looking: Looking<'_>) {
        let looked = self.reconcile_vm(id, looking.generation);
        // From here on calls do not wait for this look, which the deletion below is one of.
        drop(looking);
        match looked {
            Ok(Left::ToDelete) => self.delete_unasked(id),
            Ok(Left::AsItIs) => {}
            Err(e) => log::error!("reconcile VM {id}: {e}"),
        }
    }

    /// The VMM with this tag, if one is there. While the reconciler is at work this does not look at all processes for each
    /// VMM that an earlier daemon had and that is gone.
    pub(super) fn find_vmm(&self, tag: &str) -> Result<Option<crate::vmm::Identity>> {
        let earlier = self.earlier_vmms.lock().clone();
        if earlier.is_some_and(|earlier| earlier.is_gone(tag, || self.vmm.list(&self.tag_prefix()))) {
            return Ok(None);
        }
        self.vmm.find(tag)
    }

    /// What an earlier daemon left is no leak before this one has cleared it away.
    pub(super) fn await_settled(&self) -> Result<()> {
        let mut settled = self.settled.is_settled.lock();
        let deadline = Instant::now() + SETTLE_DEADLINE;
        match self.settled.told.wait_while_cancellable(&mut settled, deadline, &self.closing, |settled| !*settled) {
            Waited::Done => Ok(()),
            Waited::TimedOut => Err(Error::new(Kind::Busy, "the daemon still clears away what an earlier one left")
                .hint("try again in a moment; the daemon's log says what takes so long")),
            Waited::Cancelled => Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down")),
        }
    }

    /// Every [`SWEEP_PERIOD`], until the daemon closes: what a clean-up could not remove is tried again.
    pub fn keep_house(&self) {
        while !self.pause(SWEEP_PERIOD) {
            self.look_after();
        }
    }

    /// Once.
    pub fn look_after(&self) {
        self.end_adoptions();
        self.sweep(true);
        self.mend_network();
        for vm in self.adoptions.failures() {
            let Some(row) = self.row(&vm).ok().filter(|row| self.adoptions.has_failed(row)) else {
                self.adoptions.forget_failure(&vm);
                continue;
            };
            match self.adopt_late(&row) {
                Ok(()) => log::info!("vm {} is adopted now", row.name),
                Err(e) => log::warn!("adopt the vmm of {}: {e}; it is tried again every minute", row.name),
            }
        }
    }

    /// `generation`: of the boot that an earlier daemon left.
    fn reconcile_vm(&self, id: &VmId, generation: u64) -> Result<Left> {
        let _label = crate::locks::operation_scope(format!("reconcile {id}"));
        let row = self.row(id)?;
        // Operations of earlier daemons have ended.
        let is_owned = row.op.as_ref().is_some_and(|op| self.ops.get(op).is_ok_and(|op| !op.state.has_ended()));
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
        // Its holder's connection died with the earlier daemon.
        Ok(if row.rm { Left::ToDelete } else { Left::AsItIs })
    }

    fn adopt_or_fail(&self, row: &VmRow) -> Result<()> {
        let known = row.identity.clone();
        if let Some(identity) = &known
            && identity.boot_id != crate::host::process::boot_id()?
        {
            self.put_at_rest(row, VmState::Stopped, "the host was rebooted")?;
            return self.release_boot(&row.id, row.generation);
        }
        let Some(identity) = self.identity(row) else {
            let (state, reason) = match self.unseen_end(row) {
                Some(end) if end.is_orderly() => (VmState::Stopped, end.to_string()),
                Some(end) => (VmState::Failed, format!("while the daemon did not run: {end}")),
                None => (VmState::Failed, UNSEEN_END.to_owned()),
            };
            self.put_at_rest(row, state, &reason)?;
            return self.release_boot(&row.id, row.generation);
        };
        if !self.begin_adoption(row, false) {
            return self.leave_unadopted(row, &identity);
        }
        let adopted = self.images.get(&row.image).and_then(|image| self.vmm.adopt(&self.spec(row, &image), &identity));
        match adopted {
            Ok(running) => {
                self.adopt_guest(row);
                self.watch(row, &running.identity)?;
                self.end_adoption(row, true);
                self.adopt_adjusted(row);
                self.adopt_pause(row);
                // An earlier daemon that could not adopt it has said so in the reason.
                let adopted = (Some(running.identity), Some(running.ssh_addr), None);
                if adopted == (row.identity.clone(), row.ssh_addr, row.reason.clone()) {
                    // Most often, and then a full disk does not matter.
                    return Ok(());
                }
                let ticket = self.change_as_found(row, false, |r| (r.identity, r.ssh_addr, r.reason) = adopted)?;
                self.wait_durable(ticket)
            }
            // It lives, so it is not killed; the user sees that it cannot be reached.
            Err(e) => {
                log::warn!("adopt the vmm of {}: {e}", row.name);
                self.adoptions.note_failure(row);
                let reason = format!("its VMM runs but could not be adopted: {e}");
                let ticket = self.change_as_found(row, false, |r| r.reason = Some(reason))?;
                self.wait_durable(ticket)?;
                self.watch(row, &identity)?;
                self.end_adoption(row, false);
                Ok(())
            }
        }
    }

    /// One that did not answer when the daemon started, and does now.
    pub(super) fn adopt_late(&self, row: &VmRow) -> Result<()> {
        let (Some(identity), true) = (&row.identity, self.adoptions.has_failed(row)) else { return Ok(()) };
        let image = self.images.get(&row.image)?;
        if !self.begin_adoption(row, true) {
            self.adoptions.forget_failure(&row.id);
            return self.leave_unadopted(row, identity);
        }
        let adopted = self.vmm.adopt(&self.spec(row, &image), identity);
        self.survive_adoption(row, adopted.is_ok());
        let running = adopted?;
        self.adoptions.forget_failure(&row.id);
        self.adopt_guest(row);
        self.adopt_adjusted(row);
        self.adopt_pause(row);
        let adopted = (None, Some(running.ssh_addr));
        let ticket = self.change_as_found(row, false, |r| (r.reason, r.ssh_addr) = adopted)?;
        self.wait_durable(ticket)
    }

    /// A VMM that runs for a VM that should have none, and what it had.
    pub(super) fn end_leftover(&self, row: &VmRow) -> Result<()> {
        if let Some(identity) = self.identity(row) {
            self.kill_vmm(&identity)?;
        }
        self.release_boot(&row.id, row.generation)
    }

    fn put_at_rest(&self, row: &VmRow, state: VmState, reason: &str) -> Result<()> {
        let ticket = self.change_as_found(row, true, |r| {
            r.state = state;
            r.reason = Some(reason.to_owned());
            (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
        })?;
        self.wait_durable(ticket)
    }

    /// Changes the row, unless somebody has claimed the VM since the look at it began.
    fn change_as_found(&self, found: &VmRow, essential: bool, change: impl FnOnce(&mut VmRow)) -> Result<Ticket> {
        self.change_row(&found.id, essential, |row| {
            if (row.generation, row.state, &row.op) == (found.generation, found.state, &found.op) {
                change(row);
            }
        })
    }

    /// A stop or a delete that was under way is finished by an operation of the daemon's own.
    fn resume(&self, row: &VmRow, verb: Verb) -> Result<()> {
        let deaths = self.store.read(|s| recovery::deaths_at_start(s, &row.id));
        self.note_attempt(&row.id);
        let op = self.begin_own_op("reconcile", Some(row.id.clone()), row.owner_uid)?;
        let guard = self.locks.vm.lock(&row.id);
        let (id, op_row) = (op.id().clone(), op.op());
        let ((), ticket) = self.change(true, |tx| {
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
        self.arm_locked(&guard, &op, row.state, verb);
        drop(guard);
        let (vm, cancel) = (row.id.clone(), op.cancel().clone());
        let (daemon, state, ticket) = (self.clone(), row.state, Some(ticket));
        let claim = Claim { daemon, vm, op: Some(op), state, verb, timeout: None, restore: None, cancel, ticket };
        self.begin(claim).map(drop)
    }
}
