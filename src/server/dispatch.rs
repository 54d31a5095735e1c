//! Maps methods to calls of the daemon, and waits for operations on behalf of their callers.

use super::{CallError, CallResult, Connection, Handler, IncomingCall};
use crate::api::daemon::{ApiVersion, Doctor, InfoReply};
use crate::api::event::EventsWatch;
use crate::api::exec::{ExecResize, ExecSignal, ExecStart};
use crate::api::frame::Note;
use crate::api::image::{ImageBuild, ImageDelete, ImageList};
use crate::api::kernel::{KernelDelete, KernelImport, KernelList, KernelShow};
use crate::api::op::{Op, OpCancel, OpList, OpReply, OpShow, OpStarted, OpState, OpWait};
use crate::api::snapshot::{SnapshotCreate, SnapshotDelete, SnapshotList, SnapshotRestore, SnapshotShow};
use crate::api::vm::{
    VmBalloon, VmConnect, VmCreate, VmDelete, VmFork, VmKill, VmList, VmLogs, VmMetrics, VmPause, VmPrune, VmReply, VmRestart,
    VmResume, VmSet, VmShow, VmSshConfig, VmStart, VmStatsCall, VmStop, VmWait,
};
use crate::api::workspace::{WorkspaceExport, WorkspacePrepare};
use crate::api::{Call, VERSION_MAJOR, VERSION_MINOR};
use crate::daemon::{CallOutcome, Caller, Daemon, ExecIo, Gone, Hangup, HeldKey, Keyed, Notes, WatchLine};
use crate::error::{Error, Kind};
use crate::ids::OpId;
use crate::locks::CancelCause;
use serde::Serialize;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The features that were added since the first version of the protocol.
const FEATURES: &[&str] = &["workspace", "exec", "image_build", "events", "snapshots", "kernels", "vsock"];

impl WatchLine for Connection<'_> {
    fn hangup(&self) -> Hangup<'_> {
        Hangup(self.fd())
    }
    fn send_note(&self, note: Note) -> io::Result<()> {
        self.notify(note)
    }
    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        self.send(bytes, None)
    }
    fn socket(&self) -> Option<Arc<UnixStream>> {
        Some(Connection::socket(self))
    }
}

/// Answers calls with a daemon.
pub struct Dispatch {
    daemon: Daemon,
}

impl Dispatch {
    pub fn new(daemon: Daemon) -> Self {
        Self { daemon }
    }
}

/// What happens to an operation if its caller disconnects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnHangup {
    Cancel,
    /// Used for stop, kill and delete, which always finish.
    GoOn,
}

impl Handler for Dispatch {
    fn call(&self, mut call: IncomingCall<'_>, connection: &Connection<'_>) -> CallResult {
        let peer = call.peer;
        let caller = Caller { uid: peer.uid, gid: peer.gid, pid: peer.pid };
        if !matches!(call.method, ExecStart::METHOD | WorkspacePrepare::METHOD | WorkspaceExport::METHOD) {
            call.take_fds::<0>()?;
        }
        if self.daemon.core.is_closing() {
            return Err(Error::new(Kind::ShuttingDown, "the daemon is shutting down").hint("try again when it is back").into());
        }
        let context = CallContext { daemon: &self.daemon, caller, connection, more: call.more };
        if call.method.starts_with("vm.") { context.vm(call) } else { context.other(call) }
    }
}

/// One call with its caller and connection.
struct CallContext<'a> {
    daemon: &'a Daemon,
    caller: Caller,
    connection: &'a Connection<'a>,
    more: bool,
}

impl CallContext<'_> {
    fn vm(&self, call: IncomingCall<'_>) -> CallResult {
        let (d, c) = (self.daemon, &self.caller);
        match call.method {
            VmCreate::METHOD => self.create(&call),
            VmStart::METHOD => {
                let request: <VmStart as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.lifecycle.start(c, &request.vm))
            }
            VmStop::METHOD => {
                let request = call.parse()?;
                self.keyed(&call, OnHangup::GoOn, || d.lifecycle.stop(c, &request))
            }
            VmRestart::METHOD => {
                let request = call.parse()?;
                self.keyed(&call, OnHangup::GoOn, || d.lifecycle.restart(c, &request))
            }
            VmKill::METHOD => {
                let request: <VmKill as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::GoOn, || d.lifecycle.kill(c, &request.vm))
            }
            VmDelete::METHOD => {
                let request = call.parse()?;
                self.keyed(&call, OnHangup::GoOn, || d.lifecycle.delete(c, &request))
            }
            VmList::METHOD => answer(&d.views.list(c, &call.parse()?)?),
            VmShow::METHOD => {
                let request: <VmShow as Call>::Request = call.parse()?;
                answer(&d.views.show(c, &request.vm)?)
            }
            VmSet::METHOD => {
                let request = call.parse()?;
                self.keyed_value(&call, |_| value(&VmReply { vm: d.controls.set(c, &request)? }), true)
            }
            VmBalloon::METHOD => {
                let request = call.parse()?;
                self.keyed_value(&call, |_| value(&d.controls.balloon(c, &request)?), true)
            }
            VmPause::METHOD => {
                let request: <VmPause as Call>::Request = call.parse()?;
                self.keyed_value(&call, |_| value(&VmReply { vm: d.controls.pause_vm(c, &request.vm)? }), true)
            }
            VmResume::METHOD => {
                let request: <VmResume as Call>::Request = call.parse()?;
                self.keyed_value(&call, |_| value(&VmReply { vm: d.controls.resume_vm(c, &request.vm)? }), true)
            }
            VmFork::METHOD => {
                let request: <VmFork as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.snapshots.fork(c, request))
            }
            VmLogs::METHOD => {
                let request = call.parse()?;
                let mut send = |chunk| self.connection.notify(Note::Log(chunk));
                answer(&d.sessions.logs(c, &request, self.hangup(), &mut send)?)
            }
            VmWait::METHOD => answer(&d.views.wait_state(c, &call.parse()?, self.hangup())?),
            VmPrune::METHOD => self.prune(&call),
            VmStatsCall::METHOD => answer(&d.views.stats(c, &call.parse()?)?),
            VmConnect::METHOD => {
                let (vm, stream) = d.sessions.connect(c, &call.parse()?)?;
                self.connection.pass(stream.into());
                answer(&VmReply { vm })
            }
            VmMetrics::METHOD => {
                let request: <VmMetrics as Call>::Request = call.parse()?;
                answer(&d.controls.metrics(c, &request.vm)?)
            }
            VmSshConfig::METHOD => {
                let request: <VmSshConfig as Call>::Request = call.parse()?;
                answer(&d.sessions.ssh_config(c, &request.vm)?)
            }
            other => Err(CallError::unknown_method(other)),
        }
    }

    fn other(&self, mut call: IncomingCall<'_>) -> CallResult {
        let (d, c) = (self.daemon, &self.caller);
        match call.method {
            ExecStart::METHOD => self.exec(call),
            ExecResize::METHOD => answer(&d.sessions.exec_resize(c, &call.parse()?).map(|()| crate::api::Empty {})?),
            ExecSignal::METHOD => answer(&d.sessions.exec_signal(c, &call.parse()?).map(|()| crate::api::Empty {})?),
            WorkspacePrepare::METHOD => {
                let (request, notes) = (call.parse()?, Notes::new()?);
                let fds = std::mem::take(&mut call.fds);
                let (begun, on_hangup) = self.once(&call, OnHangup::Cancel, || d.transfers.prepare(c, request, fds, &notes))?;
                self.follow(begun, on_hangup, Some(&notes))
            }
            WorkspaceExport::METHOD => {
                let request = call.parse()?;
                let fds = std::mem::take(&mut call.fds);
                self.keyed(&call, OnHangup::Cancel, || d.transfers.export(c, request, fds))
            }
            SnapshotCreate::METHOD => {
                let request: <SnapshotCreate as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.snapshots.snapshot_create(c, request))
            }
            SnapshotList::METHOD => answer(&d.snapshots.snapshot_list(c, &call.parse()?)?),
            SnapshotShow::METHOD => {
                let request: <SnapshotShow as Call>::Request = call.parse()?;
                answer(&d.snapshots.snapshot_show(c, &request.snapshot)?)
            }
            SnapshotDelete::METHOD => {
                let request: <SnapshotDelete as Call>::Request = call.parse()?;
                self.keyed_value(&call, |_| value(&d.snapshots.snapshot_delete(c, &request.snapshot)?), true)
            }
            SnapshotRestore::METHOD => {
                let request: <SnapshotRestore as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.snapshots.snapshot_restore(c, request))
            }
            OpList::METHOD => answer(&d.core.op_list(c, &call.parse()?)?),
            OpShow::METHOD => {
                let request: <OpShow as Call>::Request = call.parse()?;
                answer(&OpReply { op: d.core.op_find(c, &request.op)? })
            }
            OpWait::METHOD => self.op_wait(&call),
            OpCancel::METHOD => {
                let request: <OpCancel as Call>::Request = call.parse()?;
                answer(&d.core.op_cancel(c, &request.op)?)
            }
            EventsWatch::METHOD => self.events(&call),
            ImageBuild::METHOD => {
                let request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.images.image_build(c, &request))
            }
            ImageList::METHOD => answer(&d.images.image_list(&call.parse()?)?),
            ImageDelete::METHOD => {
                let request: <ImageDelete as Call>::Request = call.parse()?;
                self.keyed_value(&call, |_| value(&d.images.image_delete(c, &request.image)?), true)
            }
            KernelImport::METHOD => {
                let request: <KernelImport as Call>::Request = call.parse()?;
                self.keyed(&call, OnHangup::Cancel, || d.kernels.kernel_import(c, request))
            }
            KernelList::METHOD => answer(&d.kernels.kernel_list(&call.parse()?)?),
            KernelShow::METHOD => {
                let request: <KernelShow as Call>::Request = call.parse()?;
                answer(&d.kernels.kernel_show(&request.kernel)?)
            }
            KernelDelete::METHOD => {
                let request: <KernelDelete as Call>::Request = call.parse()?;
                answer(&d.kernels.kernel_delete(c, &request.kernel)?)
            }
            crate::api::daemon::Info::METHOD => {
                let crate::api::Empty {} = call.parse()?;
                answer(&self.info())
            }
            Doctor::METHOD => {
                let crate::api::Empty {} = call.parse()?;
                answer(&d.doctor.doctor(c)?)
            }
            crate::api::daemon::Leaks::METHOD => {
                let request: <crate::api::daemon::Leaks as Call>::Request = call.parse()?;
                answer(&d.doctor.leaks(c, request.fix)?)
            }
            crate::api::daemon::DebugLocks::METHOD => {
                let crate::api::Empty {} = call.parse()?;
                answer(&d.core.debug_locks())
            }
            other => Err(CallError::unknown_method(other)),
        }
    }

    fn hangup(&self) -> Hangup<'_> {
        Hangup(self.connection.fd())
    }

    fn info(&self) -> InfoReply {
        InfoReply {
            api: ApiVersion { major: VERSION_MAJOR, minor: VERSION_MINOR },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: FEATURES.iter().map(|f| (*f).to_owned()).collect(),
            pid: std::process::id(),
            uid: nix::unistd::geteuid().as_raw(),
            state_dir: self.daemon.config.state_dir.display().to_string(),
            uptime_s: self.daemon.uptime().as_secs(),
            guest_roots: self.daemon.transfers.guest_roots(),
        }
    }

    fn create(&self, call: &IncomingCall<'_>) -> CallResult {
        let request: <VmCreate as Call>::Request = call.parse()?;
        if request.hold && !self.more {
            let e = Error::invalid("vm.create with hold must be called with more");
            return Err(e.hint("call it with \"more\": true").into());
        }
        if !request.hold {
            return self.keyed_value(
                call,
                |key| value(&VmReply { vm: self.daemon.creator.create_keyed(&self.caller, &request, key)? }),
                false,
            );
        }
        if call.key.is_some() {
            let e = Error::invalid("vm.create with hold must be called without a key");
            return Err(e.hint("leave the key out").into());
        }
        let vm = self.daemon.creator.create(&self.caller, &request)?;
        // If this note cannot be sent, the caller has disconnected, which the hold notices at once.
        let _ = self.connection.notify(Note::Created(Box::new(vm.clone())));
        answer(&self.daemon.lifecycle.hold(vm, self.hangup())?)
    }

    /// Starts what the call asks for, or finds the operation that an earlier call with the same key
    /// started.
    fn once(
        &self,
        call: &IncomingCall<'_>,
        on_hangup: OnHangup,
        begin: impl FnOnce() -> crate::error::Result<CallOutcome>,
    ) -> Result<(CallOutcome, OnHangup), CallError> {
        let Some(key) = call.key else { return Ok((begin()?, on_hangup)) };
        match self.daemon.keys.claim_key(&self.caller, key, call.method, call.params)? {
            Keyed::Same(op) => Ok((CallOutcome::Joined(op.id), OnHangup::GoOn)),
            Keyed::New(held) => Ok((held.record(begin()?), on_hangup)),
        }
    }

    fn keyed(
        &self,
        call: &IncomingCall<'_>,
        on_hangup: OnHangup,
        begin: impl FnOnce() -> crate::error::Result<CallOutcome>,
    ) -> CallResult {
        let (begun, on_hangup) = self.once(call, on_hangup, begin)?;
        self.follow(begun, on_hangup, None)
    }

    /// The same for calls that are answered at once. `record` is false if `make` records the key
    /// itself.
    fn keyed_value(
        &self,
        call: &IncomingCall<'_>,
        make: impl FnOnce(Option<&HeldKey>) -> Result<Value, CallError>,
        record: bool,
    ) -> CallResult {
        let Some(key) = call.key else { return answer(&make(None)?) };
        match self.daemon.keys.claim_key(&self.caller, key, call.method, call.params)? {
            Keyed::Same(op) => ended(*op),
            Keyed::New(held) => {
                let value = make(Some(&held))?;
                if record {
                    held.record(CallOutcome::Done(value.clone()));
                }
                answer(&value)
            }
        }
    }

    fn prune(&self, call: &IncomingCall<'_>) -> CallResult {
        let crate::api::Empty {} = call.parse()?;
        let (mut reply, begun) = self.daemon.lifecycle.prune(&self.caller)?;
        let mut kept = Vec::new();
        for (id, begun) in reply.deleted.into_iter().zip(begun) {
            if self.follow_quietly(begun) {
                kept.push(id);
            }
        }
        reply.deleted = kept;
        answer(&reply)
    }

    /// Waits for an operation. Returns true if it succeeded.
    fn follow_quietly(&self, begun: CallOutcome) -> bool {
        match begun {
            CallOutcome::Done(_) => true,
            CallOutcome::Op(op) | CallOutcome::Joined(op) => {
                matches!(self.wait_op(&op, None, None, &mut |_| {}), Ok(Some(op)) if op.state == OpState::Ok)
            }
        }
    }

    fn exec(&self, mut call: IncomingCall<'_>) -> CallResult {
        let request: <ExecStart as Call>::Request = call.parse()?;
        let io = ExecIo::accept(&request.streams, std::mem::take(&mut call.fds))?;
        let mut session_made = |session: &crate::ids::SessionId| {
            let _ = self.connection.notify(Note::Session { session: session.clone() });
        };
        answer(&self.daemon.sessions.exec(&self.caller, &request, io, self.connection.fd(), &mut session_made)?)
    }

    fn events(&self, call: &IncomingCall<'_>) -> CallResult {
        let request = call.parse()?;
        if !self.more {
            let e = Error::invalid("events.watch must be called with more");
            return Err(e.hint("call it with \"more\": true").into());
        }
        answer(&self.daemon.watchers.watch_events(&self.caller, &request, self.connection)?)
    }

    fn op_wait(&self, call: &IncomingCall<'_>) -> CallResult {
        let request: <OpWait as Call>::Request = call.parse()?;
        let op = self.daemon.core.op_find(&self.caller, &request.op)?;
        let deadline = request.timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        let mut notify = |note| {
            if self.more {
                let _ = self.connection.notify(note);
            }
        };
        match self.wait_op(&op.id, deadline, None, &mut notify) {
            Ok(Some(op)) => answer(&OpReply { op }),
            Ok(None) => {
                Err(CallError::from(Error::new(Kind::Timeout, format!("operation {} is still running", op.id))).with_op(op.id))
            }
            Err(Gone) => Err(gone().into()),
        }
    }

    /// Answers a call that has started something: at once without `more`, and otherwise when it has
    /// ended.
    fn follow(&self, begun: CallOutcome, on_hangup: OnHangup, notes: Option<&Notes>) -> CallResult {
        let (id, owned) = match begun {
            CallOutcome::Done(value) => return answer(&value),
            CallOutcome::Op(id) => (id, true),
            CallOutcome::Joined(id) => (id, false),
        };
        if !self.more {
            // The operation may fail at once because its start could not be recorded.
            self.daemon.core.wait_begun().map_err(|e| CallError::from(e).with_op(id.clone()))?;
            return answer(&OpStarted { op: id });
        }
        let _ = self.connection.notify(Note::Op { op: id.clone() });
        let mut notify = |note| {
            // A failed write means that the caller has disconnected. `poll` reports that as well.
            let _ = self.connection.notify(note);
        };
        match self.wait_op(&id, None, notes, &mut notify) {
            Ok(Some(op)) => ended(op),
            Ok(None) => Err(Error::internal("a wait without a deadline timed out").into()),
            Err(Gone) => {
                if owned && on_hangup == OnHangup::Cancel {
                    // It may have ended in the meantime.
                    let _ = self.daemon.core.ops.cancel(&id, CancelCause::CallerHungUp);
                }
                Err(CallError::from(gone()).with_op(id))
            }
        }
    }

    /// Waits for an operation and returns it. None at the deadline.
    fn wait_op(
        &self,
        id: &OpId,
        deadline: Option<Instant>,
        notes: Option<&Notes>,
        notify: &mut dyn FnMut(Note),
    ) -> Result<Option<Op>, Gone> {
        let Ok(mut watcher) = self.daemon.core.ops.watch(id) else { return Ok(self.daemon.core.op_kept(id).ok()) };
        loop {
            for note in notes.map(Notes::take).unwrap_or_default() {
                notify(note);
            }
            match watcher.next() {
                Some(crate::daemon::OpEvent::Progress(progress)) => notify(Note::Progress(progress)),
                Some(crate::daemon::OpEvent::Ended(op)) => return Ok(Some(*op)),
                None => {
                    let mut fds = vec![watcher.fd()];
                    fds.extend(notes.map(Notes::fd));
                    if !self.hangup().wait(&fds, deadline)? {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::Cancelled, "the caller disconnected")
}

fn value(reply: &impl Serialize) -> Result<Value, CallError> {
    serde_json::to_value(reply).map_err(|e| Error::internal("write a reply").with_source(e).into())
}

fn answer(reply: &impl Serialize) -> CallResult {
    to_raw_value(reply).map_err(|e| CallError::from(Error::internal("write a reply").with_source(e)))
}

/// Turns an operation that has ended into the answer of its call.
fn ended(op: Op) -> Result<Box<RawValue>, CallError> {
    match (op.result, op.error) {
        (_, Some(fault)) => Err(CallError { code: crate::api::frame::rpc_code::DOMAIN, fault }.with_op(op.id)),
        (Some(result), None) => answer(&result),
        (None, None) => Err(CallError::from(Error::internal("the operation has no result")).with_op(op.id)),
    }
}
