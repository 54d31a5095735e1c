//! The VMs that this daemon has to look at before it changes them, because an earlier daemon left
//! something under way or running, and who is looking. The reconciler goes through them, running
//! VMs first; a call that changes one looks at its VM by itself instead of waiting for its turn.

use super::transitions::Verb;
use crate::api::vm::VmState;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::{Cancel, Condvar, Mutex, Rank, Waited};
use crate::store::VmRow;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// How long a call waits while another thread looks at its VM: as long as a VMM may take to answer,
/// and some.
const LOOK_DEADLINE: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Due,
    UnderWay,
}

/// A VM that is not looked at yet.
struct Due {
    look: Look,
    /// The generation of the boot that was under way when the daemon started.
    generation: u64,
}

/// The VMs that are not looked at yet.
pub(super) struct Looks {
    left: Mutex<HashMap<VmId, Due>>,
    ended: Condvar,
    looker: OnceLock<Weak<dyn Looker>>,
}

/// Looks at VMs for the callers of [`Looks`]: the reconciler, which is built from parts that hold
/// the `Looks`.
pub(super) trait Looker: Send + Sync {
    fn look(&self, vm: &VmId, looking: Looking<'_>);

    /// Adopts the VMM of `row`, which answers again, if it could not be adopted before.
    fn adopt_late(&self, row: &VmRow) -> Result<()>;
}

/// A look under way; the VM counts as looked at when this is dropped, whatever came of it.
pub(super) struct Looking<'a> {
    looks: &'a Looks,
    vm: VmId,
    /// A row with another generation belongs to a boot of this daemon.
    pub generation: u64,
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.looks.left.lock().remove(&self.vm);
        self.looks.ended.notify_all();
    }
}

impl Looks {
    /// Each with the boot that it was in.
    pub fn new(due: impl IntoIterator<Item = (VmId, u64)>) -> Self {
        let due_at = |(vm, generation)| (vm, Due { look: Look::Due, generation });
        let left = due.into_iter().map(due_at).collect();
        Self { left: Mutex::new(Rank::Runtimes, left), ended: Condvar::new(), looker: OnceLock::new() }
    }

    pub fn set_looker(&self, looker: Weak<dyn Looker>) {
        // Called once, by the wiring.
        drop(self.looker.set(looker));
    }

    fn looker(&self) -> Result<Arc<dyn Looker>> {
        let looker = self.looker.get().and_then(Weak::upgrade);
        looker.ok_or_else(|| Error::new(Kind::ShuttingDown, "the daemon is shutting down"))
    }

    /// Call this before anything changes a VM. If the VM is due, the caller's thread looks at it,
    /// or waits while another thread does. Ending a running guest needs no look: its VMM is in the
    /// row, and killing it must not wait for a VMM that hangs and therefore cannot be adopted.
    pub fn ensure_looked_at(&self, row: &VmRow, verb: Verb, closing: &Cancel) -> Result<()> {
        let kills_running = row.state == VmState::Running && verb.ends_guest();
        if !self.is_due(&row.id) || kills_running {
            return Ok(());
        }
        let looked = self.begin_or_wait(&row.id, closing);
        if let Some(looking) = looked.map_err(|e| e.context(format!("{} VM {}", verb.name(), row.name)))? {
            self.looker()?.look(&row.id, looking);
        }
        Ok(())
    }

    /// See [`Looker::adopt_late`].
    pub fn adopt_late(&self, row: &VmRow) -> Result<()> {
        self.looker()?.adopt_late(row)
    }

    pub fn is_due(&self, vm: &VmId) -> bool {
        self.left.lock().contains_key(vm)
    }

    pub fn due(&self) -> Vec<VmId> {
        self.left.lock().keys().cloned().collect()
    }

    /// None when the VM was looked at, or somebody is looking.
    pub fn begin(&self, vm: &VmId) -> Option<Looking<'_>> {
        let mut left = self.left.lock();
        let due = left.get_mut(vm).filter(|due| due.look == Look::Due)?;
        due.look = Look::UnderWay;
        Some(Looking { looks: self, vm: vm.clone(), generation: due.generation })
    }

    /// Waits until nobody looks at the VM any more; then None, or the look that is the caller's to
    /// do.
    pub fn begin_or_wait(&self, vm: &VmId, closing: &Cancel) -> Result<Option<Looking<'_>>> {
        if let Some(looking) = self.begin(vm) {
            return Ok(Some(looking));
        }
        let mut left = self.left.lock();
        let is_looked_at = |left: &mut HashMap<VmId, Due>| left.contains_key(vm);
        match self.ended.wait_while_cancellable(&mut left, Instant::now() + LOOK_DEADLINE, closing, is_looked_at) {
            Waited::Done => Ok(None),
            Waited::Cancelled => Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down")),
            Waited::TimedOut => Err(Error::new(Kind::Busy, "the daemon was restarted and is still looking at the VM")
                .hint("try again in a moment; stop --force and rm -f do not wait for this")),
        }
    }

    /// The VM needs no look any more, because an operation of this daemon owns it. A look that is
    /// under way continues, and sees that.
    pub fn skip(&self, vm: &VmId) {
        let mut left = self.left.lock();
        if left.get(vm).is_some_and(|due| due.look == Look::Due) {
            left.remove(vm);
        }
    }
}

/// The VMMs that ran when this daemon began, from one look at the host's processes. It knows all
/// VMMs of boots that an earlier daemon began: from then on none of those can appear, so what it
/// does not list is gone for good.
pub(super) struct EarlierVmms {
    /// The VMs that are still to be looked at, each with the boot that it was in.
    generations: HashMap<VmId, u64>,
    /// None: the host could not be looked at.
    tags: OnceLock<Option<HashMap<String, u32>>>,
}

impl EarlierVmms {
    pub fn new(generations: HashMap<VmId, u64>) -> Self {
        Self { generations, tags: OnceLock::new() }
    }

    /// Whether the VMM with this tag is known to be gone. `list` is called once.
    pub fn is_gone(&self, tag: &str, list: impl FnOnce() -> Result<Vec<crate::vmm::Tagged>>) -> bool {
        let mut parts = tag.rsplit('-');
        let boot = parts.next().and_then(|generation| generation.parse::<u64>().ok());
        let vm = parts.next().and_then(|id| id.parse::<VmId>().ok());
        let is_earlier = |boot, vm: &VmId| self.generations.get(vm).is_some_and(|last| boot <= *last);
        if !boot.zip(vm).is_some_and(|(boot, vm)| is_earlier(boot, &vm)) {
            return false;
        }
        let tags = self.tags.get_or_init(|| match list() {
            Ok(all) => Some(all.into_iter().map(|vmm| (vmm.tag, vmm.identity.pid)).collect()),
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
    fn look_is_one_threads_and_others_wait_for_it() {
        let (vm, closing) = (VmId::random(), Cancel::try_new().unwrap());
        let looks = Looks::new([(vm.clone(), 1)]);
        let looking = looks.begin(&vm).unwrap();
        assert!(looks.begin(&vm).is_none() && looks.is_due(&vm));
        looks.skip(&vm);
        assert!(looks.is_due(&vm), "a look under way continues");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| looks.begin_or_wait(&vm, &closing).unwrap().is_none());
            drop(looking);
            assert!(waits.join().unwrap());
        });
        assert!(!looks.is_due(&vm) && looks.begin(&vm).is_none());
    }

    #[test]
    fn skipped_look_is_never_begun() {
        let vm = VmId::random();
        let looks = Looks::new([(vm.clone(), 1)]);
        looks.skip(&vm);
        assert!(looks.begin(&vm).is_none() && looks.due().is_empty());
    }

    #[test]
    fn only_vmms_of_earlier_boots_are_known_to_be_gone() {
        let (vm, other) = (VmId::random(), VmId::random());
        let earlier = EarlierVmms::new(HashMap::from([(vm.clone(), 3)]));
        let identity = Identity { pid: 7, start_time: 1, boot_id: "boot".into() };
        let list = || Ok(vec![Tagged { tag: format!("fc-x-{vm}-2"), identity: identity.clone() }]);
        let is_gone = |tag: String| earlier.is_gone(&tag, list);
        assert!(is_gone(format!("fc-x-{vm}-3")));
        assert!(!is_gone(format!("fc-x-{vm}-2")), "it runs");
        assert!(!is_gone(format!("fc-x-{vm}-4")), "this daemon may have started it");
        assert!(!is_gone(format!("fc-x-{other}-1")) && !is_gone("fc-x".into()));
        let blind = EarlierVmms::new(HashMap::from([(vm.clone(), 3)]));
        assert!(!blind.is_gone(&format!("fc-x-{vm}-3"), || Err(Error::internal("no /proc"))));
    }
}
