//! A caller. It makes its requests one after the other, and checks each answer.

use crate::client::{Client, Failure};
use crate::plan::{Ask, Fate, Payload, Request};
use crate::world::{EndedGuest, GUEST_PATH, HELD, World};
use fcd::testing::api::Call;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::frame::Note;
use fcd::testing::api::op::{OpCancel, OpList, OpListRequest, OpRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::stream::ChunkWriter;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{
    ExportKind, ExportRequest, PrepareRequest, WorkspaceExport, WorkspacePrepare,
};
use fcd::testing::daemon::history::Verb;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::{Gate, Readiness};
use fcd::testing::ids::{OpId, VmId};
use fcd::testing::sched::Instant;
use fcd::testing::sched::sim::{self, Group};
use fcd::testing::store::memory;
use fcd::testing::vmm::{End, Exit};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// How long a call may take to notice that its guest ends.
const REACTION: Duration = Duration::from_millis(500);
/// How long a caller waits for a call that may never end before it hangs up.
const IMPATIENCE: Duration = Duration::from_secs(3);
const GRACE_MS: u64 = 2_000;

/// The result of a call for its caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Ok,
    /// `wrong_state`, with its message.
    Refused(String),
    NotFound,
    Failed(String),
}

/// A call whose result the transition table decides.
#[derive(Clone, Debug)]
pub struct Seen {
    pub name: String,
    pub verb: Verb,
    pub sent: Instant,
    pub received: Instant,
    /// The operation that the call began, joined or superseded.
    pub op: Option<OpId>,
    pub reply: Reply,
}

/// A VM that a caller knows to have existed.
#[derive(Clone, Debug, PartialEq)]
pub struct Acknowledged {
    pub vm: VmId,
    pub is_deleted: bool,
}

#[derive(Default)]
pub struct Log {
    /// The calls of each daemon, by its group.
    pub seen: Vec<(Group, Seen)>,
    pub acknowledged: Vec<Acknowledged>,
    /// True if a caller has asked for the deletion of a VM of this number.
    pub deletes: [bool; 8],
    pub requests: u64,
}

pub fn name(n: u64) -> String {
    format!("vm-{n}")
}

pub struct Actor {
    pub world: Arc<World>,
    pub number: usize,
    pub log: Log,
    client: Option<(Group, Client)>,
}

fn uid(number: usize) -> u32 {
    if number == 0 { 0 } else { 1000 }
}

fn request(vm: &str) -> VmRequest {
    VmRequest { vm: vm.into() }
}

fn stop(vm: &str, force: bool) -> VmStopRequest {
    VmStopRequest {
        vm: vm.into(),
        force,
        timeout_ms: Some(GRACE_MS),
        keep: false,
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

impl Actor {
    pub fn new(world: Arc<World>, number: usize) -> Self {
        Self {
            world,
            number,
            log: Log::default(),
            client: None,
        }
    }

    pub fn play(&mut self, requests: &[Request]) {
        let number = self.number;
        for request in requests.iter().filter(|r| r.caller == number) {
            self.act(request);
            self.log.requests += 1;
        }
    }

    fn client(&mut self) -> &mut Client {
        let group = self.world.running().group;
        if self.client.as_ref().is_none_or(|(of, _)| *of != group) {
            self.client = Some((group, self.world.client(uid(self.number))));
        }
        &mut self.client.as_mut().expect("set above").1
    }

    fn act(&mut self, asked: &Request) {
        log::debug!("asks {asked:?}");
        let vm = name(asked.vm);
        match &asked.ask {
            Ask::Create { keyed } => self.create(&vm, *keyed),
            Ask::Start { hangs_up: true } => self.hang_up::<VmStart>(&request(&vm)),
            Ask::Start { hangs_up: false } => {
                self.verb::<VmStart>(asked, &request(&vm));
            }
            Ask::Stop { force } => self.verb::<VmStop>(asked, &stop(&vm, *force)),
            Ask::Kill => self.verb::<VmKill>(asked, &request(&vm)),
            Ask::Restart => self.verb::<VmRestart>(asked, &stop(&vm, false)),
            Ask::Delete { force } => self.delete(asked, *force),
            Ask::Set { vcpus } => {
                let request = VmSetRequest {
                    vm,
                    vcpus: Some(*vcpus),
                    ..Default::default()
                };
                self.verb::<VmSet>(asked, &request);
            }
            Ask::Rate(some) => {
                let request = VmSetRequest {
                    vm,
                    disk_ops_per_s: Some(*some),
                    now: true,
                    ..Default::default()
                };
                self.simple::<VmSet>(&request);
            }
            Ask::Balloon(some) => self.simple::<VmBalloon>(&VmBalloonRequest {
                vm,
                keep_mib: Some(*some),
            }),
            Ask::Pause => self.simple::<VmPause>(&request(&vm)),
            Ask::Resume => self.simple::<VmResume>(&request(&vm)),
            Ask::Show => self.simple::<VmShow>(&request(&vm)),
            Ask::List => self.simple::<VmList>(&VmListRequest::default()),
            Ask::Import(payload) => self.import(&vm, *payload),
            Ask::Export => self.export(&vm),
            Ask::Exec { holds } => self.exec(&vm, *holds),
            Ask::CancelOp => self.cancel_op(asked.vm),
            Ask::Snapshot => {
                let request = SnapshotCreateRequest { vm, name: None };
                self.operation::<SnapshotCreate>(&request);
            }
            Ask::Restore => self.restore(),
            Ask::ForgetSnapshots => self.forget_snapshots(),
            Ask::Fate(fate) => self.fate(&vm, *fate),
        }
    }

    /// Checks the answer to a call. A lost connection is right only if the daemon was killed.
    fn check<T>(&mut self, what: &str, result: Result<T, Failure>) -> Option<T> {
        log::debug!("{what}: {:?}", result.as_ref().map(|_| ()));
        match result {
            Ok(reply) => return Some(reply),
            Err(Failure::Late) => {
                sim::fail(&format!(
                    "{what}: no answer in {:?}",
                    crate::client::PATIENCE
                ));
            }
            Err(Failure::Lost) => self.client = None,
            Err(Failure::Fault(fault)) => {
                if fault.kind == Kind::Internal.name() || fault.message.is_empty() {
                    sim::fail(&format!("{what}: {fault:?}"));
                }
            }
        }
        None
    }

    fn simple<C: Call>(&mut self, request: &C::Request) {
        let result = self.client().call::<C>(request);
        self.check(C::METHOD, result);
    }

    fn operation<C: Call>(&mut self, request: &C::Request) -> Option<C::Reply> {
        let client = self.client();
        let sent = client.send::<C>(request, true, None, &[]);
        let result = sent.and_then(|()| client.reply::<C>(&mut |_| {}));
        self.check(C::METHOD, result)
    }

    fn create(&mut self, vm: &str, keyed: bool) {
        let request = VmCreateRequest {
            name: Some(vm.parse().unwrap()),
            ..Default::default()
        };
        let key = format!("create-{vm}-{}", self.number);
        let client = self.client();
        let sent = client.send::<VmCreate>(&request, false, keyed.then_some(&*key), &[]);
        let result = sent.and_then(|()| client.reply::<VmCreate>(&mut |_| {}));
        if let Some(made) = self.check("vm.create", result) {
            self.world.place(&made.vm.id);
            self.log.acknowledged.push(Acknowledged {
                vm: made.vm.id,
                is_deleted: false,
            });
        }
    }

    fn delete(&mut self, asked: &Request, force: bool) {
        self.log.deletes[asked.vm as usize] = true;
        let request = VmDeleteRequest {
            vm: name(asked.vm),
            force,
            if_exists: false,
        };
        self.verb::<VmDelete>(asked, &request);
    }

    /// Makes one call, waits for its end, and records the reply.
    fn verb<C: Call>(&mut self, asked: &Request, request: &C::Request) {
        let verb = asked.ask.verb().expect("a verb");
        let (sent, mut op) = (Instant::now(), None);
        let client = self.client();
        let begun = client.send::<C>(request, true, None, &[]);
        let mut on_note = |note| {
            if let Note::Op { op: id } = note {
                op = Some(id);
            }
        };
        let result = begun.and_then(|()| client.reply::<C>(&mut on_note));
        let received = Instant::now();
        let group = self.client.as_ref().map_or(0, |(group, _)| *group);
        if result.is_err() {
            self.check(C::METHOD, result.as_ref().map(|_| ()).map_err(Clone::clone));
        }
        let is_lost = matches!(result, Err(Failure::Lost));
        // A superseded operation changes nothing, so its end is recorded later.
        let is_superseded = matches!(&result, Err(e) if e.is(Kind::Superseded));
        if let Some(op) = op.as_ref().filter(|_| !is_lost && !is_superseded) {
            self.is_durable(C::METHOD, op);
        }
        let reply = match &result {
            Ok(_) => Reply::Ok,
            Err(Failure::Fault(fault)) if fault.kind == Kind::WrongState.name() && op.is_none() => {
                Reply::Refused(fault.message.clone())
            }
            Err(Failure::Fault(fault)) if fault.kind == Kind::VmNotFound.name() && op.is_none() => {
                Reply::NotFound
            }
            Err(Failure::Fault(fault)) => Reply::Failed(fault.kind.clone()),
            Err(Failure::Lost | Failure::Late) => return,
        };
        if verb.ends_guest() && reply == Reply::Ok {
            self.world.ends.lock().push(EndedGuest {
                vm: name(asked.vm),
                sent,
                answered: received,
            });
        }
        let seen = Seen {
            name: name(asked.vm),
            verb,
            sent,
            received,
            op,
            reply,
        };
        self.log.seen.push((group, seen));
    }

    /// Fails unless the end of an operation that was answered is durable. The store may refuse
    /// commits because of the history's fault; then the daemon answers from memory.
    fn is_durable(&self, what: &str, op: &OpId) {
        let is_faulty = self.world.points.has_failed_commit();
        if !is_faulty && memory::has_ended(&self.world.config.state_dir, op) == Some(false) {
            sim::fail(&format!(
                "{what}: answered before the end of {op} is durable"
            ));
        }
    }

    /// Begins a call and hangs up.
    fn hang_up<C: Call>(&mut self, request: &C::Request) {
        let mut client = self.world.client(uid(self.number));
        let _ = client.send::<C>(request, true, None, &[]);
        client.hang_up();
    }

    /// Makes a call that may never end, and hangs up after a while.
    fn impatient<C: Call>(&mut self, vm: &str, request: &C::Request, fds: &[OwnedFd]) {
        let mut client = self.world.client(uid(self.number));
        let deadline = Instant::now() + IMPATIENCE;
        let mut begun = None;
        // The first note after that of the operation says that the guest is in use.
        let mut on_note = |note| {
            if matches!(note, Note::Session { .. } | Note::Ready(_)) {
                begun.get_or_insert_with(Instant::now);
            }
        };
        let result = client
            .send::<C>(request, true, None, fds)
            .and_then(|()| client.reply_until::<C>(deadline, &mut on_note));
        client.hang_up();
        if let (Ok(None), Some(begun)) = (&result, begun) {
            let survived =
                self.world.ends.lock().iter().any(|end| {
                    end.vm == vm && end.sent > begun && end.answered + REACTION < deadline
                });
            // A call may not notice anything while an effect of its own takes long.
            if survived && !self.world.points.is_slow() {
                sim::fail(&format!("{} survived the end of its guest", C::METHOD));
            }
        }
        self.check(C::METHOD, result);
    }

    fn import(&mut self, vm: &str, payload: Payload) {
        let (read, write) = pipe();
        let mut stream = std::fs::File::from(write);
        // Everything fits into the pipe.
        match payload {
            Payload::Whole => {
                let mut writer = ChunkWriter::new(stream);
                let _ = writer
                    .write_all(b"some payload")
                    .and_then(|()| writer.finish(3).map(drop));
                stream = std::fs::File::open("/dev/null").unwrap();
            }
            Payload::Cut => {
                let _ = stream.write_all(b"\0\0\0\x04some");
                stream = std::fs::File::open("/dev/null").unwrap();
            }
            Payload::Stalled => drop(stream.write_all(b"\0\0\x10\0some")),
        }
        let request = PrepareRequest {
            vm: vm.into(),
            guest_path: GUEST_PATH.into(),
            subdir: String::new(),
            readonly: false,
            overwrite: false,
            no_wait: false,
            bytes_expected: None,
            raw_tar: false,
        };
        self.impatient::<WorkspacePrepare>(vm, &request, &[read]);
        drop(stream);
    }

    fn export(&mut self, vm: &str) {
        let (read, write) = pipe();
        let request = ExportRequest {
            vm: vm.to_owned(),
            kind: ExportKind::Patch,
            no_wait: false,
        };
        self.impatient::<WorkspaceExport>(vm, &request, &[write]);
        drop(read);
    }

    fn exec(&mut self, vm: &str, holds: bool) {
        let command = if holds { HELD } else { "true" };
        let request = ExecStartRequest {
            vm: vm.to_owned(),
            argv: vec![command.to_owned()],
            env: vec![],
            workdir: None,
            user: None,
            pty: None,
            streams: vec![],
            no_wait_children: false,
        };
        self.impatient::<ExecStart>(vm, &request, &[]);
    }

    fn cancel_op(&mut self, nth: u64) {
        let request = OpListRequest::default();
        let result = self.client().call::<OpList>(&request);
        let Some(list) = self.check("op.list", result) else {
            return;
        };
        if let Some(op) = list.ops.get(nth as usize % list.ops.len().max(1)) {
            self.simple::<OpCancel>(&OpRequest {
                op: op.id.to_string(),
            });
        }
    }

    fn snapshots(&mut self) -> Vec<Snapshot> {
        let result = self.client().call::<SnapshotList>(&Default::default());
        self.check("snapshot.list", result)
            .map(|list| list.snapshots)
            .unwrap_or_default()
    }

    fn restore(&mut self) {
        let snapshots = self.snapshots();
        let Some(snapshot) = snapshots.first() else {
            return;
        };
        let request = SnapshotRestoreRequest {
            snapshot: snapshot.id.to_string(),
            new_vm: None,
        };
        self.operation::<SnapshotRestore>(&request);
    }

    fn forget_snapshots(&mut self) {
        for snapshot in self.snapshots() {
            self.simple::<SnapshotDelete>(&SnapshotRequest {
                snapshot: snapshot.id.to_string(),
            });
        }
    }

    /// Makes the guest or its VMM do something on its own.
    fn fate(&mut self, vm: &str, fate: Fate) {
        let result = self.client().call::<VmShow>(&request(vm));
        let Some(shown) = self.check("vm.show", result) else {
            return;
        };
        let (id, guest) = (shown.vm.id, &self.world.guest);
        let Some(addr) = self.world.addr(&id) else {
            return;
        };
        match fate {
            Fate::VmmDies => drop(self.world.vmm.die(&id, &End::Vmm(Exit::Signal(9)))),
            Fate::ShutsDown => drop(self.world.vmm.die(&id, &End::GuestShutDown)),
            Fate::LosesConnections => guest.lose(addr),
            Fate::Hangs => guest.set_readiness(addr, Readiness::Gated(Gate::closed())),
            Fate::Answers => guest.set_readiness(addr, Readiness::Instant),
        }
    }
}
