//! The locks of operations. Nothing outside `src/daemon` names them.

use crate::ids::VmId;
use crate::locks::{KeyRecord, LockKey, LockSet, Rank};
use crate::store::WorkspaceOf;

/// The only key of `create_vm`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VmNames;

impl LockKey for VmNames {
    const RANK: Rank = Rank::CreateVm;
}

/// The only key of `image_ops`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ImageNames;

impl LockKey for ImageNames {
    const RANK: Rank = Rank::ImageOps;
}

pub struct OpLocks {
    /// Protects state checks and state changes of one VM. It is held only briefly.
    pub vm: LockSet<VmId>,
    /// Allows one import or export at a time per VM. It is held during guest I/O.
    pub workspace: LockSet<WorkspaceOf>,
    /// Protects the reservation of VM names, ports and addresses in memory. It is a set with one
    /// key, so that its holder is shown in `debug locks`.
    pub create_vm: LockSet<VmNames>,
    /// Protects the reservation of image names in memory.
    pub image_ops: LockSet<ImageNames>,
}

impl OpLocks {
    pub fn new() -> Self {
        Self {
            vm: LockSet::default(),
            workspace: LockSet::default(),
            create_vm: LockSet::default(),
            image_ops: LockSet::default(),
        }
    }

    /// Returns every key that is held, with the name of its set.
    pub fn records(&self) -> Vec<(&'static str, KeyRecord)> {
        let named = |name, records: Vec<KeyRecord>| records.into_iter().map(move |r| (name, r));
        // Each of these sets has a single key, which is not worth showing.
        let unkeyed = |record| KeyRecord {
            key: String::new(),
            ..record
        };
        let keyed = named("vm_locks", self.vm.records())
            .chain(named("workspace_locks", self.workspace.records()));
        let single = named("create_vm", self.create_vm.records())
            .chain(named("image_ops", self.image_ops.records()));
        keyed
            .chain(single.map(|(name, record)| (name, unkeyed(record))))
            .collect()
    }

    /// Returns the number of keys that are held or waited for, which is 0 if nothing is in
    /// progress.
    #[cfg(any(test, feature = "fakes"))]
    pub fn entries(&self) -> usize {
        self.vm.len() + self.workspace.len() + self.create_vm.len() + self.image_ops.len()
    }
}

#[cfg(all(
    test,
    not(any(feature = "shuttle", feature = "one-lock")),
    any(debug_assertions, feature = "lock-check")
))]
mod tests {
    use super::*;
    use crate::host::wait::poll_until;
    use crate::image::Images;
    use crate::image::kernels::Kernels;
    use crate::locks::check;
    use crate::sched::Instant;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// Returns the checker's report of what happens under a lock.
    fn report(act: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(act)).expect_err("a breach panics");
        *panic.downcast::<String>().expect("a report is a String")
    }

    /// `kernel_delete` and `check_kernel` used to read files under `create_vm`, and `settle_ports`
    /// bound sockets.
    #[test]
    fn only_memory_is_touched_under_the_locks_of_vms_and_names() {
        check::stop_recording();
        let dir = tempfile::tempdir().unwrap();
        let images = Images::open(dir.path()).unwrap();
        let kernels = Kernels::open(dir.path()).unwrap();
        let (image, kernel) = ("tool".parse().unwrap(), "linux".parse().unwrap());
        let port = serde_json::from_str(r#"{"guest_port": 80}"#).unwrap();
        let locks = OpLocks::new();
        let acts: [(&str, &dyn Fn()); 8] = [
            ("file access", &|| drop(images.list())),
            ("file access", &|| drop(images.get(&image))),
            ("file access", &|| drop(kernels.get(&kernel))),
            ("file access", &|| drop(kernels.delete(&kernel))),
            ("file access", &|| {
                drop(crate::host::fs::open_nofollow(dir.path()))
            }),
            ("socket", &|| drop(crate::net::free_port(&port))),
            ("poll", &|| drop(poll_until(&mut [], Some(Instant::now())))),
            ("log call", &|| {
                log::debug!("nobody may wait for the reader of this")
            }),
        ];
        for (what, act) in acts {
            let reports = [
                report(|| {
                    let _vm = locks.vm.lock(&VmId::random());
                    act();
                }),
                report(|| {
                    let _names = locks.create_vm.lock(&VmNames);
                    act();
                }),
                report(|| {
                    let _images = locks.image_ops.lock(&ImageNames);
                    act();
                }),
            ];
            for report in reports {
                assert!(
                    report.starts_with(&format!("{what} with locks held")),
                    "{report}"
                );
            }
            let _workspace = locks.workspace.lock(&WorkspaceOf(VmId::random()));
            act();
        }
    }
}
