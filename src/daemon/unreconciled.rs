//! The VMs that must be reconciled before anything changes them, because an earlier daemon left
//! them running or in the middle of an operation. The reconciler handles them one after the other,
//! running VMs first. A call that changes such a VM does not wait for the VM's turn, but reconciles
//! it on its own thread.

use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::error::{Error, Kind, Result};
use crate::ids::{Tag, VmId};
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use crate::sched::{HashMap, Instant, OnceLock};
use crate::store::VmRow;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long a call waits while another thread reconciles its VM. This is longer than a VMM may take
/// to answer.
const RECONCILE_DEADLINE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Due,
    InProgress,
}

/// A VM that is not reconciled yet.
struct Due {
    progress: Progress,
    /// The generation of the VM when the daemon started.
    generation: u64,
}

/// The VMs that are not reconciled yet.
pub(super) struct Unreconciled {
    left: Mutex<HashMap<VmId, Due>>,
    ended: Condvar,
    reconciler: OnceLock<Weak<dyn VmReconciler>>,
}

/// Reconciles VMs for the callers of [`Unreconciled`]. The reconciler implements this trait. A
/// trait is needed because the reconciler is built from parts that hold the `Unreconciled`.
pub(super) trait VmReconciler: Send + Sync {
    fn reconcile_one(&self, vm: &VmId, guard: ReconcileGuard<'_>);

    /// Adopts the VMM of `row` if an earlier adoption failed. Called when the VMM responds again.
    fn adopt_late(&self, row: &VmRow) -> Result<()>;
}

/// Marks a VM as being reconciled. When this is dropped, the VM counts as reconciled, even after an
/// error.
pub(super) struct ReconcileGuard<'a> {
    unreconciled: &'a Unreconciled,
    vm: VmId,
    /// The generation that the earlier daemon left. A row with a different generation belongs to a
    /// boot of this daemon.
    pub generation: u64,
}

impl Drop for ReconcileGuard<'_> {
    fn drop(&mut self) {
        self.unreconciled.left.lock().remove(&self.vm);
        self.unreconciled.ended.notify_all();
    }
}

impl Unreconciled {
    /// Takes the VMs that must be reconciled, each with its generation.
    pub(super) fn new(due: impl IntoIterator<Item = (VmId, u64)>) -> Self {
        let due_at = |(vm, generation)| {
            (
                vm,
                Due {
                    progress: Progress::Due,
                    generation,
                },
            )
        };
        let left = due.into_iter().map(due_at).collect();
        Self {
            left: Mutex::new(Rank::Runtimes, left),
            ended: Condvar::new(),
            reconciler: OnceLock::new(),
        }
    }

    pub(super) fn set_reconciler(&self, reconciler: Weak<dyn VmReconciler>) {
        // The wiring calls this once.
        drop(self.reconciler.set(reconciler));
    }

    fn reconciler(&self) -> Result<Arc<dyn VmReconciler>> {
        let reconciler = self.reconciler.get().and_then(Weak::upgrade);
        reconciler.ok_or_else(|| Error::new(Kind::ShuttingDown, "the daemon is shutting down"))
    }

    /// Makes sure that a VM is reconciled. Call this before anything changes a VM. If the VM is not
    /// reconciled, the caller's thread reconciles it, or waits for a thread that is reconciling it.
    /// A call that ends a running guest does not need this: the VMM is in the row, and the kill
    /// must not wait for a VMM that hangs and cannot be adopted.
    pub(super) fn ensure_reconciled(
        &self,
        row: &VmRow,
        verb: Verb,
        closing: &Cancel,
    ) -> Result<()> {
        let kills_running = row.state == VmState::Running && verb.ends_guest();
        if !self.is_due(&row.id) || kills_running {
            return Ok(());
        }
        let guard = self.begin_or_wait(&row.id, closing);
        if let Some(guard) =
            guard.map_err(|e| e.context(format!("{} VM {}", verb.name(), row.name)))?
        {
            self.reconciler()?.reconcile_one(&row.id, guard);
        }
        Ok(())
    }

    /// Calls [`VmReconciler::adopt_late`].
    pub(super) fn adopt_late(&self, row: &VmRow) -> Result<()> {
        self.reconciler()?.adopt_late(row)
    }

    pub(super) fn is_due(&self, vm: &VmId) -> bool {
        self.left.lock().contains_key(vm)
    }

    pub(super) fn due(&self) -> Vec<VmId> {
        self.left.lock().keys().cloned().collect()
    }

    /// Begins to reconcile a VM. Returns `None` if the VM is reconciled or another thread is
    /// reconciling it.
    pub(super) fn begin(&self, vm: &VmId) -> Option<ReconcileGuard<'_>> {
        let mut left = self.left.lock();
        let due = left
            .get_mut(vm)
            .filter(|due| due.progress == Progress::Due)?;
        due.progress = Progress::InProgress;
        Some(ReconcileGuard {
            unreconciled: self,
            vm: vm.clone(),
            generation: due.generation,
        })
    }

    /// Begins to reconcile a VM, or waits while another thread reconciles it. Returns `None` if the
    /// VM is reconciled, and a guard if the caller must reconcile it.
    pub(super) fn begin_or_wait(
        &self,
        vm: &VmId,
        closing: &Cancel,
    ) -> Result<Option<ReconcileGuard<'_>>> {
        if let Some(guard) = self.begin(vm) {
            return Ok(Some(guard));
        }
        let mut left = self.left.lock();
        let is_left = |left: &mut HashMap<VmId, Due>| left.contains_key(vm);
        match self.ended.wait_while_cancellable(
            &mut left,
            Instant::now() + RECONCILE_DEADLINE,
            closing,
            is_left,
        ) {
            Waited::Done => Ok(None),
            Waited::Cancelled => Err(Error::new(
                Kind::ShuttingDown,
                "the daemon is shutting down",
            )),
            Waited::TimedOut => Err(Error::new(
                Kind::Busy,
                "fcd was restarted and is still reconciling the VM",
            )
            .hint("try again in a moment; stop --force and rm -f do not wait for this")),
        }
    }

    /// Removes the VM from the list, because an operation of this daemon owns it. A thread that is
    /// already reconciling the VM continues and notices the operation.
    pub(super) fn skip(&self, vm: &VmId) {
        let mut left = self.left.lock();
        if left
            .get(vm)
            .is_some_and(|due| due.progress == Progress::Due)
        {
            left.remove(vm);
        }
    }
}

/// The VMMs that earlier daemons left, from one scan of the host's processes. No VMM of an earlier
/// boot can appear after the scan, so a VMM that is not in the scan has exited.
pub(super) struct EarlierVmms {
    /// The VMs that were not reconciled when this daemon started, each with its generation.
    generations: HashMap<VmId, u64>,
    /// `None` if the scan failed.
    tags: OnceLock<Option<HashMap<String, u32>>>,
}

impl EarlierVmms {
    pub(super) fn new(generations: HashMap<VmId, u64>) -> Self {
        Self {
            generations,
            tags: OnceLock::new(),
        }
    }

    /// True if the VMM with this tag is known to be gone. `list` is called at most once.
    pub(super) fn is_gone(
        &self,
        tag: &str,
        list: impl FnOnce() -> Result<Vec<crate::vmm::Tagged>>,
    ) -> bool {
        let is_earlier = |tag: Tag| {
            let last = self.generations.get(tag.vm());
            last.is_some_and(|last| tag.generation() <= *last)
        };
        if !tag.parse().is_ok_and(is_earlier) {
            return false;
        }
        let tags = self.tags.get_or_init(|| match list() {
            Ok(all) => Some(
                all.into_iter()
                    .map(|vmm| (vmm.tag, vmm.identity.pid))
                    .collect(),
            ),
            Err(e) => {
                log::warn!("look for the VMMs of an earlier daemon: {e}");
                None
            }
        });
        tags.as_ref().is_some_and(|tags| !tags.contains_key(tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Identity, Tagged};

    #[test]
    fn vm_is_reconciled_by_one_thread_and_others_wait() {
        let (vm, closing) = (VmId::random(), Cancel::try_new().unwrap());
        let unreconciled = Unreconciled::new([(vm.clone(), 1)]);
        let guard = unreconciled.begin(&vm).unwrap();
        assert!(unreconciled.begin(&vm).is_none() && unreconciled.is_due(&vm));
        unreconciled.skip(&vm);
        assert!(unreconciled.is_due(&vm), "it is being reconciled");
        std::thread::scope(|scope| {
            let waits =
                scope.spawn(|| unreconciled.begin_or_wait(&vm, &closing).unwrap().is_none());
            drop(guard);
            assert!(waits.join().unwrap());
        });
        assert!(!unreconciled.is_due(&vm) && unreconciled.begin(&vm).is_none());
    }

    /// The threads wait for as long as they like in some of the rounds only.
    #[test]
    fn end_of_reconciliation_wakes_waiting_threads() {
        const ROUNDS: u32 = 100;
        let closing = Cancel::try_new().unwrap();
        let begun = Instant::now();
        for _ in 0..ROUNDS {
            let vm = VmId::random();
            let unreconciled = Unreconciled::new([(vm.clone(), 1)]);
            let guard = unreconciled.begin(&vm).unwrap();
            std::thread::scope(|scope| {
                let (vm, unreconciled, closing) = (&vm, &unreconciled, &closing);
                let wait = || unreconciled.begin_or_wait(vm, closing).unwrap().is_none();
                let waits: Vec<_> = (0..4).map(|_| scope.spawn(wait)).collect();
                std::thread::yield_now();
                drop(guard);
                assert!(waits.into_iter().all(|waits| waits.join().unwrap()));
            });
            assert!(begun.elapsed() < RECONCILE_DEADLINE);
        }
    }

    #[test]
    fn skipped_vm_is_never_reconciled() {
        let vm = VmId::random();
        let unreconciled = Unreconciled::new([(vm.clone(), 1)]);
        unreconciled.skip(&vm);
        assert!(unreconciled.begin(&vm).is_none() && unreconciled.due().is_empty());
    }

    #[test]
    fn only_vmms_of_earlier_boots_are_known_to_be_gone() {
        let (vm, other) = (VmId::random(), VmId::random());
        let earlier = EarlierVmms::new(HashMap::from_iter([(vm.clone(), 3)]));
        let identity = Identity {
            pid: 7,
            start_time: 1,
            boot_id: "boot".into(),
        };
        let list = || {
            Ok(vec![Tagged {
                tag: format!("fc-x-{vm}-2"),
                identity: identity.clone(),
            }])
        };
        let is_gone = |tag: String| earlier.is_gone(&tag, list);
        assert!(is_gone(format!("fc-x-{vm}-3")));
        assert!(!is_gone(format!("fc-x-{vm}-2")), "it runs");
        assert!(
            !is_gone(format!("fc-x-{vm}-4")),
            "this daemon may have started it"
        );
        assert!(!is_gone(format!("fc-x-{other}-1")) && !is_gone("fc-x".into()));
        let blind = EarlierVmms::new(HashMap::from_iter([(vm.clone(), 3)]));
        assert!(!blind.is_gone(&format!("fc-x-{vm}-3"), || Err(Error::internal("no /proc"))));
    }
}
