//! Reports each lock that is held too long, and each wait for the disk that lasts too long, once.
//! The daemon promises that no lifecycle operation waits for a slow one, so a report means that fcd
//! has a defect or that the disk hangs. Only a workspace's lock is often held that long, by an
//! import or an export.

use super::core::Core;
use crate::host::process::thread_activity;
use crate::locks::{KeyRecord, Party, durable_waits};
use crate::ops::Filter;
use crate::sched::{HashSet, Instant};
use std::time::Duration;

/// How long a lock may be held, and a wait for the disk may last, before it is reported.
const SLOW: Duration = Duration::from_secs(5);
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// Watches the locks of the operations and the waits for the disk.
pub struct Watchdog {
    core: Core,
}

/// A lock that is held, or a wait for the disk.
#[derive(Debug)]
struct Slow {
    /// The class and the key of the lock that is held. None if the thread waits for the disk.
    lock: Option<(&'static str, String)>,
    thread: Party,
    waiters: Vec<Party>,
}

/// The locks and waits that have been reported and have not ended, by thread and start.
type Reported = HashSet<(i32, Instant)>;

impl Watchdog {
    pub fn new(core: &Core) -> Self {
        Self { core: core.clone() }
    }

    /// Runs until the daemon closes.
    pub fn run(&self) {
        let mut reported = Reported::default();
        loop {
            let all = everything(self.core.locks.records(), durable_waits());
            for slow in unreported(all, SLOW, &mut reported) {
                self.report(&slow);
            }
            if self.core.sleep(CHECK_PERIOD) {
                return;
            }
        }
    }

    fn report(&self, slow: &Slow) {
        let stages = self.stages(slow);
        let text = describe(slow, &stages, thread_activity(slow.thread.tid));
        if slow.is_expected() {
            log::info!("{text}");
        } else {
            log::warn!("{text}");
        }
    }

    /// Returns the method and the current stage of each operation on the VM.
    fn stages(&self, slow: &Slow) -> Vec<String> {
        let Some(vm) = slow.lock.as_ref().and_then(|(_, key)| key.parse().ok()) else {
            return Vec::new();
        };
        let filter = Filter {
            vm: Some(vm),
            ..Filter::default()
        };
        let ops = self.core.ops.list(&filter).into_iter();
        ops.map(|(_, op)| format!("{}: {}", op.method, op.progress.stage))
            .collect()
    }
}

impl Slow {
    /// True for a lock that is held while an import or an export runs.
    fn is_expected(&self) -> bool {
        self.lock
            .as_ref()
            .is_some_and(|(set, _)| *set == "workspace_locks")
    }
}

fn everything(locks: Vec<(&'static str, KeyRecord)>, waits: Vec<Party>) -> Vec<Slow> {
    let held = locks.into_iter().filter_map(|(set, record)| {
        Some(Slow {
            lock: Some((set, record.key)),
            thread: record.holder?,
            waiters: record.waiters,
        })
    });
    let waiting = waits.into_iter().map(|thread| Slow {
        lock: None,
        thread,
        waiters: Vec::new(),
    });
    held.chain(waiting).collect()
}

/// Returns the locks and waits that have lasted for `least` and have not been returned before.
fn unreported(all: Vec<Slow>, least: Duration, reported: &mut Reported) -> Vec<Slow> {
    let id = |slow: &Slow| (slow.thread.tid, slow.thread.since);
    let present: Reported = all.iter().map(id).collect();
    reported.retain(|seen| present.contains(seen));
    all.into_iter()
        .filter(|slow| slow.thread.since.elapsed() >= least && reported.insert(id(slow)))
        .collect()
}

fn describe(slow: &Slow, stages: &[String], activity: Option<String>) -> String {
    let operation = |party: &Party| match party.operation.as_deref() {
        None | Some("") => "no operation".to_owned(),
        Some(operation) => operation.to_owned(),
    };
    let thread = &slow.thread;
    let what = match &slow.lock {
        None => "waited for the disk".to_owned(),
        Some((set, key)) if key.is_empty() => format!("held {set}"),
        Some((set, key)) => format!("held {set} of {key}"),
    };
    let mut text = format!(
        "thread {} has {what} for {} s ({})",
        thread.thread,
        thread.since.elapsed().as_secs(),
        operation(thread)
    );
    if let Some(activity) = activity {
        text += &format!("; it {activity}");
    }
    if !slow.waiters.is_empty() {
        let waiters: Vec<_> = slow.waiters.iter().map(operation).collect();
        text += &format!("; these wait: {}", waiters.join(", "));
    }
    if !stages.is_empty() {
        text += &format!("; in progress: {}", stages.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VmId;
    use crate::locks::{LockSet, durable_wait, operation_scope};

    fn held(set: &LockSet<VmId>) -> Vec<(&'static str, KeyRecord)> {
        set.records()
            .into_iter()
            .map(|record| ("vm_locks", record))
            .collect()
    }

    #[test]
    fn lock_is_reported_once_while_it_is_held() {
        let (set, id) = (LockSet::<VmId>::default(), VmId::random());
        let _label = operation_scope("vm.stop");
        let mut reported = Reported::default();
        for _ in 0..2 {
            let guard = set.lock(&id);
            let mut look = |least| unreported(everything(held(&set), vec![]), least, &mut reported);
            assert!(look(Duration::from_secs(3600)).is_empty());
            let slow = look(Duration::ZERO);
            assert_eq!(slow.len(), 1);
            let text = describe(&slow[0], &["vm.start: boot".into()], Some("sleeps".into()));
            assert!(
                text.contains(&format!(
                    "has held vm_locks of {id} for 0 s (vm.stop); it sleeps"
                )),
                "{text}"
            );
            assert!(text.ends_with("; in progress: vm.start: boot"), "{text}");
            assert!(look(Duration::ZERO).is_empty(), "reported already");
            drop(guard);
        }
    }

    #[test]
    fn wait_for_disk_is_reported_with_its_operation() {
        let _label = operation_scope("vm.create of a test");
        let waiting = durable_wait();
        let own = |party: &Party| party.operation.as_deref() == Some("vm.create of a test");
        let waits: Vec<_> = durable_waits().into_iter().filter(own).collect();
        let slow = unreported(
            everything(vec![], waits),
            Duration::ZERO,
            &mut Reported::default(),
        );
        assert_eq!(slow.len(), 1);
        let text = describe(&slow[0], &[], None);
        assert!(
            text.contains("has waited for the disk for 0 s (vm.create"),
            "{text}"
        );
        drop(waiting);
        assert!(!durable_waits().iter().any(own));
    }
}
