//! After a start of the daemon: what an earlier one left is adopted, finished or taken back. Run twice it
//! changes nothing. A live healthy VMM is never killed; what is not ours is never touched.

use super::Daemon;
use super::lifecycle::Claim;
use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{Condvar, Mutex, Rank, Waited};
use crate::store::VmRow;
use std::time::{Duration, Instant};

/// Between two comparisons of the ledger, the rows and the host.
const SWEEP_PERIOD: Duration = Duration::from_secs(60);

/// Begins the reason of a VM whose VMM did not answer the daemon that started.
const UNADOPTED: &str = "its vmm runs but could not be adopted";

/// How long one who asks for leaks waits for the first look at what an earlier daemon left.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);

/// Whether the first look has ended.
pub(super) struct Settled {
    is_settled: Mutex<bool>,
    told: Condvar,
}

impl Settled {
    pub fn new() -> Self {
        Self { is_settled: Mutex::new(Rank::Runtimes, false), told: Condvar::new() }
    }
}

impl Daemon {
    /// Looks at every VM; each may be changed again as soon as it was looked at.
    pub fn reconcile(&self) {
        // Not those made since the daemon opened: they are this daemon's.
        let ids: Vec<VmId> = self.unlooked.lock().iter().cloned().collect();
        for id in ids {
            if let Err(e) = self.reconcile_vm(&id) {
                log::error!("reconcile vm {id}: {e}");
            }
            self.unlooked.lock().remove(&id);
        }
        self.sweep(true);
        *self.settled.is_settled.lock() = true;
        self.settled.told.notify_all();
        self.mend_network();
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
        self.sweep(true);
        self.mend_network();
        let unadopted =
            |row: &VmRow| row.state == VmState::Running && row.reason.as_ref().is_some_and(|r| r.starts_with(UNADOPTED));
        let rows: Vec<VmRow> = self.store.read(|s| s.vms().filter(|row| unadopted(row)).map(|row| (**row).clone()).collect());
        for row in rows {
            match self.adopt_late(&row) {
                Ok(()) => log::info!("vm {} is adopted now", row.name),
                Err(e) => log::warn!("adopt the vmm of {}: {e}; it is tried again every minute", row.name),
            }
        }
    }

    fn reconcile_vm(&self, id: &VmId) -> Result<()> {
        let _label = crate::locks::operation_scope(format!("reconcile {id}"));
        let row = self.row(id)?;
        match row.state {
            VmState::Running => self.adopt_or_fail(&row)?,
            VmState::Starting => {
                self.end_leftover(&row)?;
                let before = if row.started_at.is_none() { VmState::Created } else { VmState::Stopped };
                self.put_at_rest(&row, before, "the daemon was restarted while it booted")?;
            }
            VmState::Stopping => return self.resume(&row, Verb::Stop),
            VmState::Deleting => return self.resume(&row, Verb::DeleteForce),
            VmState::Created | VmState::Stopped | VmState::Failed => self.end_leftover(&row)?,
        }
        if row.rm {
            // Its holder's connection died with the earlier daemon.
            self.unlooked.lock().remove(id);
            self.delete_unasked(id);
        }
        Ok(())
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
            self.put_at_rest(row, VmState::Failed, "the vmm died while the daemon did not run")?;
            return self.release_boot(&row.id, row.generation);
        };
        let adopted = self.images.get(&row.image).and_then(|image| self.vmm.adopt(&self.spec(row, &image), &identity));
        match adopted {
            Ok(running) => {
                self.adopt_guest(row);
                self.watch(row, &running.identity)?;
                self.adopt_adjusted(row);
                self.adopt_pause(row);
                let adopted = (Some(running.identity), Some(running.ssh_addr));
                if adopted == (row.identity.clone(), row.ssh_addr) {
                    // Most often, and then a full disk does not matter.
                    return Ok(());
                }
                let ticket = self.change_row(&row.id, false, |r| (r.identity, r.ssh_addr) = adopted)?;
                self.wait_durable(ticket)
            }
            // It lives, so it is not killed; the user sees that it cannot be reached.
            Err(e) => {
                log::warn!("adopt the vmm of {}: {e}", row.name);
                let reason = format!("{UNADOPTED}: {e}");
                let ticket = self.change_row(&row.id, false, |r| r.reason = Some(reason))?;
                self.wait_durable(ticket)?;
                self.watch(row, &identity)
            }
        }
    }

    /// One that did not answer when the daemon started, and does now.
    pub(super) fn adopt_late(&self, row: &VmRow) -> Result<()> {
        let (Some(identity), true) = (&row.identity, row.reason.as_ref().is_some_and(|r| r.starts_with(UNADOPTED))) else {
            return Ok(());
        };
        let image = self.images.get(&row.image)?;
        let running = self.vmm.adopt(&self.spec(row, &image), identity)?;
        self.adopt_guest(row);
        self.adopt_adjusted(row);
        self.adopt_pause(row);
        let adopted = (None, Some(running.ssh_addr));
        let ticket = self.change_row(&row.id, false, |r| {
            if r.generation == row.generation && r.state == VmState::Running {
                (r.reason, r.ssh_addr) = adopted;
            }
        })?;
        self.wait_durable(ticket)
    }

    /// A VMM that runs for a VM that should have none, and what it had.
    fn end_leftover(&self, row: &VmRow) -> Result<()> {
        if let Some(identity) = self.identity(row) {
            self.kill_vmm(&identity)?;
        }
        self.release_boot(&row.id, row.generation)
    }

    fn put_at_rest(&self, row: &VmRow, state: VmState, reason: &str) -> Result<()> {
        let guard = self.locks.vm.lock(&row.id);
        let ((), ticket) = self.change(true, |tx| {
            tx.update_vm(&guard, |r| {
                r.state = state;
                r.reason = Some(reason.to_owned());
                (r.op, r.intent, r.identity, r.ssh_addr) = (None, None, None, None);
            })
        })?;
        drop(guard);
        self.wait_durable(ticket)
    }

    /// A stop or a delete that was under way is finished by an operation of the daemon's own.
    fn resume(&self, row: &VmRow, verb: Verb) -> Result<()> {
        let op = self.begin_own_op("reconcile", Some(row.id.clone()), row.owner_uid)?;
        let guard = self.locks.vm.lock(&row.id);
        let (id, op_row) = (op.id().clone(), op.op());
        let ((), ticket) = self.change(true, |tx| {
            tx.put_op(op_row);
            tx.update_vm(&guard, |r| r.op = Some(id))
        })?;
        self.arm_locked(&guard, &op, row.state, verb);
        drop(guard);
        let (vm, cancel) = (row.id.clone(), op.cancel().clone());
        let (daemon, state, ticket) = (self.clone(), row.state, Some(ticket));
        let claim = Claim { daemon, vm, op: Some(op), state, verb, timeout: None, restore: None, cancel, ticket };
        self.begin(claim).map(drop)
    }
}
