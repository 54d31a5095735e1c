//! Waits for states, and lists everything that a daemon keeps.

use super::{SOON, World, soon};
use fcd::testing::api::op::{OpRequest, OpShow};
use fcd::testing::api::vm::*;
use fcd::testing::daemon::Leftovers;
use fcd::testing::error::Kind;
use fcd::testing::ids::OpId;
use fcd::testing::ops::Filter;
use fcd::testing::store::State;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

impl World {
    /// Waits until the VM has this state. Returns the VM.
    #[track_caller]
    pub fn await_state(&self, name: &str, state: VmState) -> Vm {
        let timeout_ms = Some(SOON.as_millis() as u64);
        let waited = self.run::<VmWait>(VmWaitRequest {
            vm: name.into(),
            state: Some(state),
            timeout_ms,
        });
        let vm = waited
            .unwrap_or_else(|e| panic!("wait for {name} to be {state:?}: {e}"))
            .vm;
        assert_eq!(vm.state, state);
        vm
    }

    /// Waits until the VM is deleted.
    #[track_caller]
    pub fn await_gone(&self, name: &str) {
        let request = VmWaitRequest {
            vm: name.into(),
            state: Some(VmState::Deleting),
            timeout_ms: Some(SOON.as_millis() as u64),
        };
        loop {
            match self.run::<VmWait>(request.clone()) {
                Err(e) if e.is(Kind::VmNotFound) => return,
                // The delete is still in progress, so this waits for the next change.
                Ok(_) => self.await_change(|s| !s.vms().any(|r| r.name.as_str() == name)),
                Err(e) => panic!("wait for {name} to be gone: {e}"),
            }
        }
    }

    /// Waits until `is_so` accepts the store's state.
    #[track_caller]
    pub fn await_change(&self, is_so: impl Fn(&State) -> bool) {
        let (watch, deadline) = (self.daemon().core.store.watch(None).unwrap(), soon());
        loop {
            watch.clear();
            if self.daemon().core.store.read(&is_so) {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "timed out waiting for the state: {:#?}",
                self.daemon().core.store.read(State::clone)
            );
            poll(&watch, left);
        }
    }

    /// Waits until no operation is in progress.
    #[track_caller]
    pub fn await_rest(&self) {
        await_that("no operation is in progress", || {
            self.daemon().leftovers() == Leftovers::default()
        });
    }

    /// Waits until `n` threads wait for the lock of one VM.
    #[track_caller]
    pub fn await_waiters(&self, n: usize) {
        await_that("threads wait for a VM", || {
            let records = self.daemon().core.locks.vm.records();
            records.iter().any(|record| record.waiters.len() == n)
        });
    }

    /// Returns the methods of all operations that the daemon keeps, the oldest first.
    pub fn ops(&self) -> Vec<String> {
        let all = Filter {
            all: true,
            ..Filter::default()
        };
        let ops = self.daemon().core.ops.list(&all).into_iter();
        ops.map(|(_, op)| op.method).collect()
    }

    /// Returns the generations of a VM's VMMs that the ledger lists.
    pub fn vmms_in_ledger(&self, vm: &Vm) -> Vec<u64> {
        self.daemon().core.store.read(|s| {
            let rows = s.ledger_of(&vm.id).filter(|row| row.kind == "process");
            rows.map(|row| row.generation).collect()
        })
    }

    pub fn op(&self, id: &OpId) -> fcd::testing::api::op::Op {
        self.call::<OpShow>(&OpRequest { op: id.to_string() })
            .unwrap()
            .op
    }

    /// Returns the VMMs, files, kernel devices and rows, which a failed call must not change.
    pub fn census(&self) -> BTreeSet<String> {
        let mut all: BTreeSet<String> = self
            .vmm
            .live()
            .into_iter()
            .map(|tag| format!("VMM {tag}"))
            .collect();
        files(&self.config.state_dir, &mut all);
        all.extend(
            self.devices()
                .into_iter()
                .map(|device| format!("device {device}")),
        );
        self.daemon().core.store.read(|s| {
            all.extend(s.vms().map(|r| format!("VM {r:?}")));
            all.extend(s.workspaces().map(|r| format!("workspace {r:?}")));
            all.extend(s.ledger().map(|r| format!("ledger {r:?}")));
            all.extend(s.snapshots().map(|r| format!("snapshot {r:?}")));
        });
        all
    }

    /// Returns the kernel devices of this world: device-mapper devices by name, loop devices by
    /// file.
    pub fn devices(&self) -> BTreeSet<String> {
        let install = self.daemon().core.store.install_id().to_owned();
        let state = self.config.state_dir.display().to_string();
        let blocks = std::fs::read_dir("/sys/block")
            .into_iter()
            .flatten()
            .flatten();
        let read = |path: PathBuf| {
            std::fs::read_to_string(path)
                .ok()
                .map(|s| s.trim_end().to_owned())
        };
        let ours = |dir: PathBuf| {
            read(dir.join("dm/name"))
                .filter(|name| name.contains(&install))
                .or_else(|| {
                    read(dir.join("loop/backing_file")).filter(|file| file.starts_with(&state))
                })
        };
        blocks.filter_map(|entry| ours(entry.path())).collect()
    }
}

fn files(dir: &Path, into: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // Skips the database's files, the reserve and the logs, which may be written at any time.
        if name.starts_with("fcd.db") || name == "reserve" || name == "console.log" {
            continue;
        }
        into.insert(format!("file {}", path.display()));
        if path.is_dir() {
            files(&path, into);
        }
    }
}

fn poll(watch: &fcd::testing::store::Watch, left: Duration) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let timeout =
        PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(watch.fd(), PollFlags::POLLIN)], timeout).unwrap();
}

/// Polls until the condition is true, and panics at the deadline. This is for conditions that have
/// no descriptor to wait on.
#[track_caller]
pub fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = soon();
    while !is_so() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        std::thread::yield_now();
    }
}

/// Runs `body` while another thread holds what `take` returns, such as the guard of a lock.
pub fn while_held<G, T>(take: impl FnOnce() -> G + Send, body: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (held, is_held) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let _guard = take();
            held.send(()).unwrap();
            let _ = released.recv();
        });
        is_held.recv().unwrap();
        let result = body();
        drop(release);
        result
    })
}

/// Runs `body` while another thread holds the lock of `vm`.
pub fn while_locked<T>(world: &World, vm: &Vm, body: impl FnOnce() -> T) -> T {
    let locks = &world.daemon().core.locks.vm;
    while_held(|| locks.lock(&vm.id), body)
}
