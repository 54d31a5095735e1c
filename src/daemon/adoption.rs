//! The crash budget of adoption. A daemon that starts talks to every VMM that an earlier one left
//! running, and a VMM that its guest has taken over says what it likes. If that ends the daemon,
//! the next one must not die of the same VMM, nor the one after that: so no VMM is adopted again by
//! whom it has cost [`DEATHS_MAX`] daemons.
//!
//! | what the last daemon did | what this one does |
//! |---|---|
//! | survived its first minute | adopts all, and writes one mark before the first |
//! | died in its first minute | writes down before each adoption which VM it is |
//! | died in the adoption of a VM | the same, that VM last |
//! | that, for the second time | leaves the VM: `unresponsive`, so a stop or a delete ends its VMM without asking |
//!
//! An adoption that is written down lasts until the thread that listens to the VMM has had its
//! first answer, for that thread reads what the VMM says by itself. Without a death all of this
//! costs one durable change at the start, however many VMs run. A store that takes no change holds
//! up no adoption. The record goes with the VM's next start, with the VM, or with an adoption that
//! ends well.

use super::core::Core;
use super::core::DURABLE_DEADLINE;
use super::records::{self, Attempts, Record};
use crate::api::vm::VmState;
use crate::ids::VmId;
use crate::locks::{Cancel, Condvar, Mutex, Rank};
use crate::store::{State, Store, Tx, VmRow};
use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PREFIX: &str = "adoption/";
/// In the store while a daemon may be adopting.
const MARK: &str = "adopting";
/// Daemons that a VM may cost before it is left alone, beside one whose death nobody can lay to a
/// VM.
const DEATHS_MAX: u32 = 2;

/// How long an adoption that is written down waits for the VMM's first answer to who listens to it.
const ANSWER_DEADLINE: Duration = Duration::from_secs(4);

/// What the daemon before did, and what this one is at.
pub(super) struct Adoptions {
    /// It died while it may have adopted, so each attempt is written down.
    is_careful: bool,
    is_marked: AtomicBool,
    /// VMs whose adoption is written down, and whose VMM has not answered yet.
    silent: Mutex<HashSet<VmId>>,
    /// VMs that this daemon could not adopt, with the boot that each was in. Adopting them is
    /// retried.
    failed: Mutex<HashMap<VmId, u64>>,
    told: Condvar,
}

impl Adoptions {
    /// The VMM has answered who listens to it.
    pub fn note_answer(&self, vm: &VmId) {
        if self.silent.lock().remove(vm) {
            self.told.notify_all();
        }
    }

    pub fn note_failure(&self, row: &VmRow) {
        self.failed.lock().insert(row.id.clone(), row.generation);
    }

    pub fn forget_failure(&self, vm: &VmId) {
        self.failed.lock().remove(vm);
    }

    /// True if the VM still runs unadopted.
    pub fn has_failed(&self, row: &VmRow) -> bool {
        row.state == VmState::Running && self.failed.lock().get(&row.id) == Some(&row.generation)
    }

    /// The VMs whose adoption has failed, adopted or ended since or not.
    pub fn failures(&self) -> Vec<VmId> {
        self.failed.lock().keys().cloned().collect()
    }

    fn await_answer(&self, vm: &VmId, closing: &Cancel) {
        let mut silent = self.silent.lock();
        let is_silent = |silent: &mut HashSet<VmId>| silent.contains(vm);
        self.told.wait_while_cancellable(&mut silent, Instant::now() + ANSWER_DEADLINE, closing, is_silent);
        silent.remove(vm);
    }
}

pub(super) fn name(vm: &VmId) -> String {
    format!("{PREFIX}{vm}")
}

/// The VM with this record.
pub(super) fn vm_of(name: &str) -> Option<VmId> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Daemons that died while they adopted the VM, not counting one that adopts it now.
pub(super) fn deaths(state: &State, vm: &VmId) -> u32 {
    records::read(state, &name(vm)).deaths
}

/// The same where nothing is asked of the VM's VMM any more.
pub(super) fn left_alone(state: &State, vm: &VmId) -> Option<u32> {
    let record = records::read(state, &name(vm));
    record.is_left_alone.then_some(record.deaths)
}

pub(super) fn forget(tx: &mut Tx, vm: &VmId) {
    tx.remove_meta(&name(vm));
}

/// Before anything is adopted.
pub(super) fn open(store: &Store) -> Adoptions {
    let (is_careful, has_running) =
        store.read(|s| (s.meta(MARK).is_some(), s.vms().any(|row| row.state == VmState::Running && row.identity.is_some())));
    if has_running && !is_careful {
        let marked = store.change_essential(|tx| {
            tx.put_meta(MARK, "1");
            Ok(())
        });
        if let Err(e) = marked.and_then(|((), ticket)| ticket.wait(Instant::now() + DURABLE_DEADLINE).map(drop)) {
            log::warn!("write down that VMs are adopted: {e}");
        }
    }
    Adoptions {
        is_careful,
        is_marked: AtomicBool::new(is_careful || has_running),
        silent: Mutex::new(Rank::Runtimes, HashSet::new()),
        failed: Mutex::new(Rank::Runtimes, HashMap::new()),
        told: Condvar::new(),
    }
}

/// Adopts VMs within the crash budget.
#[derive(Clone)]
pub struct Adopter {
    pub(super) core: Core,
    pub(super) adoptions: Arc<Adoptions>,
    pub(super) attempts: Attempts,
}

impl Adopter {
    /// All that ran were adopted some time ago, or the daemon ends in good order.
    pub(super) fn end_all(&self) {
        if !self.adoptions.is_marked.swap(false, Ordering::SeqCst) {
            return;
        }
        let ended = self.core.change(true, |tx| {
            tx.remove_meta(MARK);
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("write down that all VMs are adopted: {e}");
        }
    }

    /// How many daemons have died in the adoption of this VM, the one before included.
    pub(super) fn deaths(&self, vm: &VmId) -> u32 {
        self.core.store.read(|s| records::read(s, &name(vm)).deaths_at_start())
    }

    /// Called before every word with a VMM that an earlier daemon started. False: it is to be left
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
            records::write(tx, &name(&row.id), Record { deaths, is_under_way: true, is_left_alone: false });
            Ok(())
        });
        if let Err(e) = begun.and_then(|((), ticket)| self.core.wait_durable(ticket)) {
            log::warn!("write down that VM {} is adopted: {e}", row.name);
        }
        true
    }

    /// The daemon survived it. An adoption that failed may be the one that kills the daemon when it
    /// is tried again.
    pub(super) fn survive(&self, row: &VmRow, is_adopted: bool) {
        let record = self.core.store.read(|s| records::read(s, &name(&row.id)));
        if record == Record::default() {
            return;
        }
        let record = if is_adopted { Record::default() } else { Record { is_under_way: false, ..record } };
        let ended = self.core.change(true, |tx| {
            records::write(tx, &name(&row.id), record);
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("write down that VM {} was adopted: {e}", row.name);
        }
    }

    /// The same once the VMM has answered who listens to it, where the adoption is written down.
    pub(super) fn end(&self, row: &VmRow, is_adopted: bool) {
        self.adoptions.await_answer(&row.id, &self.core.closing);
        self.survive(row, is_adopted);
    }
}

pub(super) fn times(deaths: u32) -> String {
    format!("the daemon died {deaths} times while it adopted this VM")
}
