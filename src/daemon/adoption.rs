//! The crash budget of adoption. A starting daemon talks to every VMM that an earlier daemon left
//! running. If a guest has taken over its VMM, the VMM may send anything. If such a VMM crashes a
//! daemon, later daemons must not crash on it forever. So a VM is no longer adopted once its
//! adoption has crashed [`DEATHS_MAX`] daemons.
//!
//! | what the last daemon did | what this daemon does |
//! |---|---|
//! | survived its first minute | adopts all VMs, and writes one mark before the first |
//! | died in its first minute | records each adoption before it begins |
//! | died while it adopted a VM | records each adoption, and adopts that VM last |
//! | was the second to die while adopting a VM | marks it `unresponsive`; a stop kills its VMM |
//!
//! A recorded adoption lasts until the VMM has first answered the thread that monitors it, because
//! that thread also reads what the VMM sends. If no daemon has died, the records cost one durable
//! change at the start, for any number of VMs. A read-only store does not delay any adoption. The
//! record of a VM is removed at the VM's next start, when the VM is deleted, or when an adoption
//! succeeds.

use super::core::Core;
use super::core::DURABLE_DEADLINE;
use super::records::{self, Attempts, Record};
use crate::api::vm::VmState;
use crate::ids::VmId;
use crate::locks::{Cancel, Condvar, Mutex, Rank};
use crate::sched::{HashMap, HashSet, Instant};
use crate::store::{State, Store, Tx, VmRow};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const PREFIX: &str = "adoption/";
/// The meta key that exists while a daemon may be adopting VMs.
const MARK: &str = "adopting";
/// How many daemons may die while adopting a VM before the VM is no longer adopted. A death that
/// cannot be attributed to a VM is not counted.
const DEATHS_MAX: u32 = 2;

/// How long a recorded adoption waits for the VMM's first answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);

/// The state of the adoptions of this daemon.
pub(super) struct Adoptions {
    /// True if the previous daemon may have died in an adoption. Each adoption is then recorded.
    is_careful: bool,
    is_marked: AtomicBool,
    /// VMs whose adoption is recorded and whose VMM has not answered yet.
    silent: Mutex<HashSet<VmId>>,
    /// VMs that this daemon could not adopt, each with its generation. Their adoption is retried.
    failed: Mutex<HashMap<VmId, u64>>,
    answered: Condvar,
}

impl Adoptions {
    /// Notes that the VMM has answered the thread that monitors it.
    pub(super) fn note_answer(&self, vm: &VmId) {
        if self.silent.lock().remove(vm) {
            self.answered.notify_all();
        }
    }

    pub(super) fn note_failure(&self, row: &VmRow) {
        self.failed.lock().insert(row.id.clone(), row.generation);
    }

    pub(super) fn forget_failure(&self, vm: &VmId) {
        self.failed.lock().remove(vm);
    }

    /// True if adopting the VM failed and the VM is still in the same boot.
    pub(super) fn has_failed(&self, row: &VmRow) -> bool {
        row.state == VmState::Running && self.failed.lock().get(&row.id) == Some(&row.generation)
    }

    /// Returns the VMs whose adoption has failed, even if they were adopted or ended since.
    pub(super) fn failures(&self) -> Vec<VmId> {
        self.failed.lock().keys().cloned().collect()
    }

    fn await_answer(&self, vm: &VmId, closing: &Cancel) {
        let mut silent = self.silent.lock();
        let is_silent = |silent: &mut HashSet<VmId>| silent.contains(vm);
        self.answered.wait_while_cancellable(
            &mut silent,
            Instant::now() + ANSWER_DEADLINE,
            closing,
            is_silent,
        );
        silent.remove(vm);
    }
}

pub(super) fn name(vm: &VmId) -> String {
    format!("{PREFIX}{vm}")
}

/// Returns the VM whose adoption record has this name. Returns None if `name` belongs to another
/// kind of record.
pub(super) fn vm_of(name: &str) -> Option<VmId> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Returns the number of daemons that died while adopting the VM. An adoption in progress does not
/// count.
pub(super) fn deaths(state: &State, vm: &VmId) -> u32 {
    records::read(state, &name(vm)).deaths
}

/// Returns how many daemons died while adopting the VM, or `None` if the VM may still be adopted.
pub(super) fn left_alone(state: &State, vm: &VmId) -> Option<u32> {
    let record = records::read(state, &name(vm));
    record.is_left_alone.then_some(record.deaths)
}

pub(super) fn forget(tx: &mut Tx, vm: &VmId) {
    tx.remove_meta(&name(vm));
}

/// Reads the state that the previous daemon left, and sets the mark if there are VMs to adopt. Call
/// this before any adoption.
pub(super) fn open(store: &Store) -> Adoptions {
    let (is_careful, has_running) = store.read(|s| {
        (
            s.meta(MARK).is_some(),
            s.vms()
                .any(|row| row.state == VmState::Running && row.identity.is_some()),
        )
    });
    if has_running && !is_careful {
        let marked = store.change_essential(|tx| {
            tx.put_meta(MARK, "1");
            Ok(())
        });
        if let Err(e) =
            marked.and_then(|((), ticket)| ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop))
        {
            log::warn!("record that VMs are being adopted: {e}");
        }
    }
    Adoptions {
        is_careful,
        is_marked: AtomicBool::new(is_careful || has_running),
        silent: Mutex::new(Rank::Runtimes, HashSet::default()),
        failed: Mutex::new(Rank::Runtimes, HashMap::default()),
        answered: Condvar::new(),
    }
}

/// Adopts VMs within the crash budget.
#[derive(Clone)]
pub(super) struct Adopter {
    pub(super) core: Core,
    pub(super) adoptions: Arc<Adoptions>,
    pub(super) attempts: Attempts,
}

impl Adopter {
    /// Removes the mark. Call this some time after all VMs were adopted, or when the daemon exits
    /// normally.
    pub(super) fn end_all(&self) {
        if !self.adoptions.is_marked.swap(false, Ordering::SeqCst) {
            return;
        }
        let ended = self.core.change(true, |tx| {
            tx.remove_meta(MARK);
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("record that all VMs are adopted: {e}");
        }
    }

    /// Returns how many daemons have died while adopting this VM, including the previous one.
    pub(super) fn deaths(&self, vm: &VmId) -> u32 {
        self.core
            .store
            .read(|s| records::read(s, &name(vm)).deaths_at_start())
    }

    /// Begins the adoption of a VM, and records it if the crash budget requires a record. Call this
    /// before talking to a VMM that an earlier daemon started. Returns false if the VM must be left
    /// alone.
    pub(super) fn begin(&self, row: &VmRow, is_late: bool) -> bool {
        let record = self.core.store.read(|s| records::read(s, &name(&row.id)));
        let deaths = record.deaths_at_start();
        if record.is_left_alone || deaths >= DEATHS_MAX {
            return false;
        }
        if !(self.adoptions.is_careful || is_late || record != Record::default()) {
            return true;
        }
        self.attempts.note(&row.id);
        if !is_late {
            self.adoptions.silent.lock().insert(row.id.clone());
        }
        let begun = self.core.change(true, |tx| {
            records::write(
                tx,
                &name(&row.id),
                Record {
                    deaths,
                    is_under_way: true,
                    is_left_alone: false,
                },
            );
            Ok(())
        });
        if let Err(e) = begun.and_then(|((), ticket)| self.core.wait_durable_in_time(&ticket)) {
            log::warn!("record that VM {} is being adopted: {e}", row.name);
        }
        true
    }

    /// Records that the daemon survived an adoption, if the adoption is recorded. After a failed
    /// adoption, the record stays, because a retry may kill the daemon.
    pub(super) fn survive(&self, row: &VmRow, is_adopted: bool) {
        let record = self.core.store.read(|s| records::read(s, &name(&row.id)));
        if record == Record::default() {
            return;
        }
        let record = if is_adopted {
            Record::default()
        } else {
            Record {
                is_under_way: false,
                ..record
            }
        };
        let ended = self.core.change(true, |tx| {
            records::write(tx, &name(&row.id), record);
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("record that VM {} was adopted: {e}", row.name);
        }
    }

    /// Calls [`Self::survive`]. If the adoption is recorded, first waits until the VMM has answered
    /// its monitor, for at most [`ANSWER_DEADLINE`].
    pub(super) fn end(&self, row: &VmRow, is_adopted: bool) {
        self.adoptions.await_answer(&row.id, &self.core.closing);
        self.survive(row, is_adopted);
    }
}

pub(super) fn times(deaths: u32) -> String {
    format!("the daemon died {deaths} times while it adopted this VM")
}
