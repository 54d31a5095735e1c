//! One connection of the fuzzer. It sends random requests and records the replies.

use super::faults::Round;
use super::others::{KERNEL, is_end};
use super::{GRACE_MS, MANY_VMS, Random, VMS};
use crate::keys;
use crate::world::*;
use fcd::testing::api::Call;
use fcd::testing::api::exec::{ExecStart, ExecStartRequest};
use fcd::testing::api::frame::{Note, Response};
use fcd::testing::api::image::{ImageBuild, ImageBuildRequest, ImageList};
use fcd::testing::api::op::{OpCancel, OpList, OpListRequest, OpRequest, OpShow, OpState};
use fcd::testing::api::stream::ChunkWriter;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{ExportKind, ExportRequest, WorkspaceExport, WorkspacePrepare};
use fcd::testing::client::{Client, Event, Failure};
use fcd::testing::daemon::history::Verb;
use fcd::testing::error::Kind;
use fcd::testing::guest::fake::{Answer, Gate, Readiness};
use fcd::testing::ids::{OpId, VmId};
use std::collections::BTreeMap;
use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A command that runs until something else ends it.
const HELD: &str = "hold";
/// How long an actor waits for a call that may never end before it hangs up.
const PATIENCE: Duration = Duration::from_millis(20);

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

pub fn name(n: u64) -> String {
    format!("vm-{n}")
}

/// Makes every guest run the command [`HELD`] until something else ends it.
pub fn script_guests(world: &World) {
    let never = Gate::closed();
    world
        .guest
        .on(HELD, move |_| Answer::status(0).hold(&never));
}

/// The VM that the first call with each key made. Later calls must get the same one.
#[derive(Default)]
pub struct Once(Mutex<BTreeMap<String, VmId>>);

impl Once {
    pub fn is_first(&self, key: &str, made: &VmId) {
        let mut all = self.0.lock().unwrap();
        let first = all.entry(key.to_owned()).or_insert_with(|| made.clone());
        assert_eq!(first, made, "key {key} made two VMs");
    }
}

/// How many calls of each method ended in each way: `ok` or a kind of error.
pub type Outcomes = BTreeMap<(&'static str, String), u64>;

/// The things that the actors of a round share.
pub struct Stage<'a> {
    pub world: &'a World,
    pub round: Round,
    pub replies: &'a AtomicU64,
    pub once: Once,
    pub outcomes: &'a Mutex<Outcomes>,
}

pub struct Actor<'a> {
    pub(super) world: &'a World,
    pub(super) round: Round,
    pub(super) random: Random,
    pub(super) client: Client,
    pub(super) once: &'a Once,
    pub(super) outcomes: &'a Mutex<Outcomes>,
    replies: &'a AtomicU64,
    seen: Vec<Seen>,
    /// True once the daemon has closed.
    pub(super) over: bool,
}

impl<'a> Actor<'a> {
    pub fn new(stage: &'a Stage<'a>, random: Random) -> Self {
        Self {
            world: stage.world,
            round: stage.round,
            random,
            client: stage.world.client(),
            once: &stage.once,
            outcomes: stage.outcomes,
            replies: stage.replies,
            seen: Vec::new(),
            over: false,
        }
    }

    pub fn play(mut self, requests: u64) -> Vec<Seen> {
        for _ in 0..requests {
            if self.over {
                break;
            }
            self.act();
            self.replies.fetch_add(1, Ordering::SeqCst);
        }
        self.seen
    }

    fn act(&mut self) {
        let vm = name(self.random.below(VMS));
        match self.random.below(145) {
            100.. => self.act_otherwise(&vm),
            0..12 => self.create(&vm),
            12..32 => self.verb::<VmStart>(&vm, Verb::Start, &request(&vm)),
            32..40 => self.stop(&vm),
            40..45 => self.verb::<VmKill>(&vm, Verb::Kill, &request(&vm)),
            45..51 => {
                let request = VmStopRequest {
                    timeout_ms: Some(GRACE_MS),
                    ..stop(&vm)
                };
                self.verb::<VmRestart>(&vm, Verb::Restart, &request);
            }
            51..59 => {
                let force = !self.random.one_in(3);
                let verb = if force {
                    Verb::DeleteForce
                } else {
                    Verb::Delete
                };
                self.verb::<VmDelete>(
                    &vm,
                    verb,
                    &VmDeleteRequest {
                        force,
                        ..delete(&vm)
                    },
                );
            }
            59..63 => {
                let request = VmSetRequest {
                    vm: vm.clone(),
                    vcpus: Some(1 + self.random.below(2) as u32),
                    ..Default::default()
                };
                self.verb::<VmSet>(&vm, Verb::Set, &request);
            }
            63..72 => self.import(&vm),
            72..76 => self.export(&vm),
            76..82 => self.exec(&vm),
            82..86 => self.cancel_something(),
            86..88 => self.look(&vm),
            88..90 => self.adjust(&vm),
            90..93 => self.images(),
            93..96 => self.start_and_hang_up(&vm),
            96..100 => self.fate(&vm),
        }
    }

    fn create(&mut self, vm: &str) {
        let request = VmCreateRequest {
            name: Some(vm.parse().unwrap()),
            kernel: self.random.one_in(8).then(|| KERNEL.parse().unwrap()),
            ..Default::default()
        };
        let made = self.client.call::<VmCreate>(&request);
        if let Err(e) = &made
            && self.round.is_plain()
        {
            let expected = e.is(Kind::NameTaken) || e.is(Kind::KernelNotFound);
            assert!(expected, "{e:?}");
        }
        if let Some(made) = self.accept(made) {
            self.world.place(&made.vm.id);
        }
    }

    fn stop(&mut self, vm: &str) {
        let force = self.random.one_in(4);
        let verb = if force { Verb::StopForce } else { Verb::Stop };
        self.verb::<VmStop>(
            vm,
            verb,
            &VmStopRequest {
                force,
                timeout_ms: Some(GRACE_MS),
                ..stop(vm)
            },
        );
    }

    /// Makes one call, waits for its end, and records the reply.
    fn verb<C: Call>(&mut self, vm: &str, verb: Verb, request: &C::Request) {
        let (sent, mut op) = (Instant::now(), None);
        let result = follow::<C>(&mut self.client, request, &mut op);
        self.count(C::METHOD, result.as_ref().err());
        self.saw(vm, verb, sent, op, &result.map(drop));
    }

    fn saw(
        &mut self,
        vm: &str,
        verb: Verb,
        sent: Instant,
        op: Option<OpId>,
        result: &Result<(), Failure>,
    ) {
        let received = Instant::now();
        if let Err(e) = result
            && self.round.closes
            && is_end(e)
        {
            self.over = true;
            return;
        }
        if let Some(op) = &op {
            self.is_what_the_operation_says(op, result);
        }
        let reply = match result {
            Ok(()) => Reply::Ok,
            Err(e) if e.is(Kind::WrongState) && op.is_none() => {
                Reply::Refused(e.fault.message.clone())
            }
            Err(e) if e.is(Kind::VmNotFound) && op.is_none() => Reply::NotFound,
            Err(e) => {
                assert!(!e.is(Kind::Internal), "{e:?}");
                Reply::Failed(e.fault.kind.clone())
            }
        };
        self.seen.push(Seen {
            name: vm.to_owned(),
            verb,
            sent,
            received,
            op,
            reply,
        });
    }

    /// Checks that a caller that began or joined an operation got the operation's result.
    fn is_what_the_operation_says(&mut self, op: &OpId, result: &Result<(), Failure>) {
        // The registry drops old finished operations.
        let Ok(reply) = self
            .client
            .call::<OpShow>(&OpRequest { op: op.to_string() })
        else {
            return;
        };
        let said = reply.op;
        match result {
            Ok(()) => assert_eq!(said.state, OpState::Ok, "{said:?}"),
            Err(e) => assert_eq!(
                said.error.as_ref().map(|f| &f.kind),
                Some(&e.fault.kind),
                "{e:?} {said:?}"
            ),
        }
    }

    fn import(&mut self, vm: &str) {
        let (read, write) = pipe();
        let Some(mut call) = self.begin::<WorkspacePrepare>(prepare(vm), vec![read]) else {
            return;
        };
        let mut stream = std::fs::File::from(write);
        match self.random.below(3) {
            // The payload is complete, is truncated, or stalls in the middle of a chunk.
            0 => {
                let mut writer = ChunkWriter::new(stream);
                // If the import was refused, the daemon reads nothing.
                _ = writer
                    .write_all(b"some payload")
                    .and_then(|()| writer.finish(3).map(drop));
            }
            1 => drop(stream.write_all(b"\0\0\0\x04some")),
            _ => {
                drop(stream.write_all(b"\0\0\x10\0some"));
                self.give_up(&mut call);
                return drop(stream);
            }
        }
        self.give_up(&mut call);
    }

    fn export(&mut self, vm: &str) {
        let (read, write) = pipe();
        let request = ExportRequest {
            vm: vm.to_owned(),
            kind: ExportKind::Patch,
            no_wait: self.random.one_in(2),
        };
        let Some(mut call) = self.begin::<WorkspaceExport>(request, vec![write]) else {
            return;
        };
        self.give_up(&mut call);
        drop(read);
    }

    fn exec(&mut self, vm: &str) {
        let command = if self.random.one_in(2) { HELD } else { "true" };
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
        let Some(mut call) = self.begin::<ExecStart>(request, vec![]) else {
            return;
        };
        self.give_up(&mut call);
    }

    /// Begins a call on its own connection.
    pub(super) fn begin<C: Call>(
        &mut self,
        request: C::Request,
        fds: Vec<OwnedFd>,
    ) -> Option<Running<C::Reply>>
    where
        C::Request: Send + 'static,
        C::Reply: Send + 'static,
    {
        let client = Client::connect(&self.world.config.socket);
        let client = self.accept(client)?;
        Some(Running::begin::<C>(client, request, fds))
    }

    /// Makes a call with a key. Returns its response, unless the daemon may close meanwhile.
    pub(super) fn send(&mut self, method: &str, params: &str, key: &str) -> Option<Response> {
        if self.round.closes {
            return None;
        }
        let response = keys::call(self.world, method, params, key, true);
        if response.error.is_some() {
            assert_ne!(keys::kind(&response), Kind::Internal.name(), "{response:?}");
        }
        Some(response)
    }

    /// Waits a little, then hangs up.
    pub(super) fn give_up<R>(&mut self, call: &mut Running<R>) {
        let until = Instant::now() + PATIENCE;
        match call.finish_unless(|| Instant::now() > until) {
            Some(told) => {
                self.count(call.method, told.as_ref().err());
                self.accept(told);
            }
            None => {
                call.hang_up();
                // The daemon closes the connection when it notices the hang-up.
                _ = call.finish(SOON);
            }
        }
    }

    fn start_and_hang_up(&mut self, vm: &str) {
        let Some(mut call) = self.begin::<VmStart>(request(vm), vec![]) else {
            return;
        };
        call.hang_up();
        _ = call.finish(SOON);
    }

    fn cancel_something(&mut self) {
        let told = self.client.call::<OpList>(&OpListRequest {
            all: false,
            ..Default::default()
        });
        let ops = self.accept(told).map_or(vec![], |reply| reply.ops);
        if ops.is_empty() {
            return;
        }
        let op = ops[self.random.below(ops.len() as u64) as usize]
            .id
            .to_string();
        // The operation may have ended, or may not be cancellable.
        _ = self.client.call::<OpCancel>(&OpRequest { op });
    }

    fn look(&mut self, vm: &str) {
        let told = self.client.call::<VmList>(&VmListRequest {
            all: true,
            ..Default::default()
        });
        let listed = self.accept(told).map_or(0, |reply| reply.vms.len());
        assert!(listed as u64 <= MANY_VMS);
        if let Err(e) = self.client.call::<VmShow>(&request(vm)) {
            assert!(e.is(Kind::VmNotFound) || self.round.closes, "{e:?}");
        }
    }

    /// Changes the settings of a running guest. The daemon may refuse the change.
    fn adjust(&mut self, vm: &str) {
        let (vm, some) = (vm.to_owned(), 128 + self.random.below(128));
        let done = if self.random.one_in(2) {
            let request = VmSetRequest {
                vm,
                disk_ops_per_s: Some(some),
                now: true,
                ..Default::default()
            };
            self.client.call::<VmSet>(&request).map(drop)
        } else {
            self.client
                .call::<VmBalloon>(&VmBalloonRequest {
                    vm,
                    keep_mib: Some(some),
                })
                .map(drop)
        };
        self.accept(done);
    }

    fn images(&mut self) {
        if self.random.one_in(2) {
            let told = self.client.call::<ImageList>(&Default::default());
            self.accept(told);
            return;
        }
        let request = ImageBuildRequest {
            name: Some("other".parse().unwrap()),
            ..Default::default()
        };
        // The build always fails because the fake host has no mmdebstrap.
        assert!(follow::<ImageBuild>(&mut self.client, &request, &mut None).is_err());
    }

    /// Makes the guest or its VMM do something on its own, such as die or stop answering.
    fn fate(&mut self, vm: &str) {
        let Ok(shown) = self.client.call::<VmShow>(&request(vm)) else {
            return;
        };
        let Some(addr) = self.addr(&shown.vm.id) else {
            return;
        };
        match self.random.below(6) {
            0 => {
                _ = self.world.vmm.die(
                    &shown.vm.id,
                    &fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9)),
                )
            }
            1 => {
                _ = self
                    .world
                    .vmm
                    .die(&shown.vm.id, &fcd::testing::vmm::End::GuestShutDown)
            }
            2 => self.world.guest.lose(addr),
            3 => _ = self.world.guest.stall_reads(addr, self.random.below(3)),
            4 => self.world.guest.stall_reads(addr, 0).open(),
            _ => {
                // The guest either stays silent until its boot times out or answers immediately.
                let hangs = self.random.one_in(2);
                let readiness = if hangs {
                    Readiness::Gated(Gate::closed())
                } else {
                    Readiness::Instant
                };
                self.world.guest.set_readiness(addr, readiness);
            }
        }
    }

    fn addr(&self, vm: &VmId) -> Option<SocketAddr> {
        self.world
            .daemon()
            .core
            .store
            .read(|s| s.vm(vm).and_then(|r| r.ssh_addr))
    }
}

/// Waits for a call's result, and records the operation's ID as soon as a note carries it.
fn follow<C: Call>(
    client: &mut Client,
    request: &C::Request,
    op: &mut Option<OpId>,
) -> Result<C::Reply, Failure> {
    let mut flight = client.begin::<C>(request, &[])?;
    loop {
        match flight.next_event()? {
            Event::Note(Note::Op { op: id }) => *op = Some(id),
            Event::Note(_) => {}
            Event::Reply(reply) => return Ok(reply),
        }
    }
}
