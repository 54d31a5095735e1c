//! The fuzzer's calls whose result the transition table does not decide alone: snapshots, forks,
//! pauses, waits, holds, keys, ports, events, images and kernels.

use super::actor::{Actor, name};
use super::{GRACE_MS, VMS};
use crate::keys;
use crate::world::*;
use fcd::testing::api::Call;
use fcd::testing::api::event::{EventsWatch, EventsWatchRequest};
use fcd::testing::api::image::*;
use fcd::testing::api::kernel::*;
use fcd::testing::api::port::{Port, Protocol, loopback};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;

/// The kernel that every round begins with.
pub const KERNEL: &str = "mine";
/// How many names there are for images, snapshots and keys. With few names, calls collide.
const NAMES: u64 = 3;

impl Actor<'_> {
    /// Makes one of these calls.
    pub fn act_otherwise(&mut self, vm: &str) {
        match self.random.below(16) {
            0 => self.pause_or_resume(vm),
            1 => self.wait(vm),
            2 => self.hold(vm),
            3..6 => self.snapshot(vm),
            6 => self.fork(vm),
            7 => self.mark(vm),
            8 => self.prune(),
            9 => self.create_with_key(),
            10 => self.start_with_key(vm),
            11 => self.watch_events(),
            12 => self.ports(vm),
            13 => self.kernels(),
            14 => self.tag_or_commit(vm),
            _ => self.observe(vm),
        }
    }

    /// Makes a call that may be refused, and checks that its error is one for a user.
    fn attempt<C: Call>(&mut self, request: &C::Request) -> Option<C::Reply> {
        let told = self.client.call::<C>(request);
        self.count(C::METHOD, told.as_ref().err());
        self.accept(told)
    }

    /// Counts the outcome of a call.
    pub fn count(&self, method: &'static str, failure: Option<&Failure>) {
        let how = failure.map_or("ok", |e| &e.fault.kind);
        let mut outcomes = self.outcomes.lock().unwrap();
        *outcomes.entry((method, how.to_owned())).or_default() += 1;
    }

    /// Makes a call on a connection of its own, and hangs up if it does not end soon.
    fn attempt_briefly<C: Call>(&mut self, request: C::Request)
    where
        C::Request: Send + 'static,
        C::Reply: Send + 'static,
    {
        if let Some(mut call) = self.begin::<C>(request, vec![]) {
            self.give_up(&mut call);
        }
    }

    fn some_name(&mut self, prefix: &str) -> String {
        format!("{prefix}-{}", self.random.below(NAMES))
    }

    fn pause_or_resume(&mut self, vm: &str) {
        if self.random.one_in(2) {
            self.attempt::<VmPause>(&request(vm));
        } else {
            self.attempt::<VmResume>(&request(vm));
        }
    }

    fn wait(&mut self, vm: &str) {
        let states = [VmState::Running, VmState::Stopped, VmState::Deleting];
        let request = VmWaitRequest {
            vm: vm.to_owned(),
            state: Some(states[self.random.below(3) as usize]),
            timeout_ms: self.random.one_in(2).then_some(GRACE_MS),
        };
        self.attempt_briefly::<VmWait>(request);
    }

    /// Holds a new VM for a moment. The hang-up deletes the VM, whatever it is doing then.
    fn hold(&mut self, vm: &str) {
        let request = VmCreateRequest {
            name: Some(vm.parse().unwrap()),
            rm: true,
            hold: true,
            ..Default::default()
        };
        self.attempt_briefly::<VmCreate>(request);
    }

    fn snapshot(&mut self, vm: &str) {
        let name = self.some_name("saved");
        match self.random.below(6) {
            0..3 => self.attempt_briefly::<SnapshotCreate>(SnapshotCreateRequest {
                vm: vm.to_owned(),
                name: Some(name.parse().unwrap()),
            }),
            3 => drop(self.attempt::<SnapshotDelete>(&SnapshotRequest { snapshot: name })),
            n => self.restore((n == 4).then_some(vm)),
        }
    }

    /// Restores a snapshot, in its own VM or in a new one.
    fn restore(&mut self, new_vm: Option<&str>) {
        let saved = self.attempt::<SnapshotList>(&SnapshotListRequest::default());
        let saved = saved.map_or(vec![], |reply| reply.snapshots);
        if saved.is_empty() {
            return;
        }
        let snapshot = &saved[self.random.below(saved.len() as u64) as usize];
        self.attempt_briefly::<SnapshotRestore>(SnapshotRestoreRequest {
            snapshot: snapshot.id.to_string(),
            new_vm: new_vm.map(|name| name.parse().unwrap()),
        });
    }

    fn fork(&mut self, vm: &str) {
        let clone = name(self.random.below(VMS));
        let request = VmForkRequest {
            vm: vm.to_owned(),
            name: Some(clone.parse().unwrap()),
            ..Default::default()
        };
        self.attempt_briefly::<VmFork>(request);
    }

    /// Decides whether the VM is deleted when it stops.
    fn mark(&mut self, vm: &str) {
        let request = VmSetRequest {
            vm: vm.to_owned(),
            rm: Some(self.random.one_in(2)),
            ..Default::default()
        };
        self.attempt::<VmSet>(&request);
    }

    fn prune(&mut self) {
        // Pruning often would leave little else to do.
        if self.random.one_in(3) {
            self.attempt::<VmPrune>(&Default::default());
        }
    }

    /// Two creations with one key are one VM.
    fn create_with_key(&mut self) {
        let (n, key) = (self.random.below(VMS), self.some_name("created"));
        let params = format!(r#"{{"name":"{key}-{n}"}}"#);
        let Some(response) = self.send("vm.create", &params, &format!("{key}-{n}")) else {
            return;
        };
        if response.error.is_none() {
            let made = keys::vm(&response).id;
            self.once.is_first(&format!("{key}-{n}"), &made);
        }
    }

    fn start_with_key(&mut self, vm: &str) {
        let key = self.some_name("started");
        let params = format!(r#"{{"vm":"{vm}"}}"#);
        self.send("vm.start", &params, &format!("{key}-{vm}"));
    }

    fn watch_events(&mut self) {
        let since = self.random.one_in(2).then(|| self.random.below(200));
        self.attempt_briefly::<EventsWatch>(EventsWatchRequest { since });
    }

    fn ports(&mut self, vm: &str) {
        let has = self.attempt::<VmShow>(&request(vm)).map(|r| r.vm.ports);
        let request = |ports| VmPortsRequest {
            vm: vm.to_owned(),
            ports,
            auto: false,
        };
        match has.as_deref() {
            Some([first, ..]) if self.random.one_in(2) => {
                self.attempt::<VmPortRemove>(&request(vec![*first]));
            }
            _ => {
                let port = Port {
                    host_addr: loopback(),
                    host_port: 0,
                    guest_port: 80 + self.random.below(4) as u16,
                    protocol: Protocol::Tcp,
                };
                self.attempt::<VmPortAdd>(&request(vec![port]));
            }
        }
    }

    fn kernels(&mut self) {
        let kernel = KernelRequest {
            kernel: KERNEL.parse().unwrap(),
        };
        match self.random.below(8) {
            0 => drop(self.attempt::<KernelDelete>(&kernel)),
            1..4 => drop(self.attempt::<KernelShow>(&kernel)),
            4 => {
                let request = KernelImportRequest {
                    path: "/no/such/kernel".into(),
                    name: None,
                    modules: None,
                };
                self.attempt_briefly::<KernelImport>(request);
            }
            _ => drop(self.attempt::<KernelList>(&Default::default())),
        }
    }

    fn tag_or_commit(&mut self, vm: &str) {
        let image = self.some_name("image").parse().unwrap();
        match self.random.below(6) {
            0..2 => drop(self.attempt::<ImageTag>(&ImageTagRequest {
                image: "default".parse().unwrap(),
                name: image,
                shared: false,
            })),
            2 => drop(self.attempt::<ImageDelete>(&ImageRequest { image })),
            3 => self.attempt_briefly::<ImageCommit>(ImageCommitRequest {
                vm: vm.to_owned(),
                image,
                recipe: None,
                temporary: false,
            }),
            4 => drop(self.attempt::<ImagePrune>(&Default::default())),
            _ => drop(self.attempt::<VmCreate>(&VmCreateRequest {
                name: Some(vm.parse().unwrap()),
                image: Some(image),
                ..Default::default()
            })),
        }
    }

    /// Makes calls that only read.
    fn observe(&mut self, vm: &str) {
        self.attempt::<VmStatsCall>(&Default::default());
        self.attempt::<fcd::testing::api::daemon::DebugLocks>(&Default::default());
        self.attempt_briefly::<VmLogs>(VmLogsRequest {
            vm: vm.to_owned(),
            tail: None,
            follow: true,
        });
    }

    /// Returns the reply, or `None` after an error that a caller may get.
    pub fn accept<T>(&mut self, told: Result<T, Failure>) -> Option<T> {
        let e = match told {
            Ok(reply) => return Some(reply),
            Err(e) => e,
        };
        self.over |= self.round.closes && is_end(&e);
        assert!(
            !e.is(Kind::Internal)
                && e.fault.hint.as_deref() != Some("")
                && (self.over || !is_end(&e)),
            "{e:?}"
        );
        None
    }
}

/// True for the error of a call to a daemon that has closed.
pub fn is_end(e: &Failure) -> bool {
    e.is(Kind::ShuttingDown) || e.fault.kind.starts_with("daemon_")
}
