//! Answers calls with the daemon. The table in `api::table` lists the requirements of each call.
//! They are checked here for all calls, and the handlers below get parsed parameters.

use super::op_wait::{OpWait, ended, raw};
use super::{CallError, CallResult, Connection, Handler, IncomingCall};
use crate::api::call::{Access, CallInfo, FdPassing, Key, OnDisconnect};
use crate::api::daemon::{
    ApiVersion, ConfigReply, ConfigSource, ConfigValue, InfoReply, NounCall as Fcd,
};
use crate::api::event::{EventsWatchRequest, NounCall as Event};
use crate::api::exec::{ExecStartRequest, NounCall as Exec};
use crate::api::frame::Note;
use crate::api::image::NounCall as Image;
use crate::api::kernel::NounCall as Kernel;
use crate::api::op::{NounCall as Op, OpReply};
use crate::api::snapshot::NounCall as Snapshot;
use crate::api::table::{self, AnyCall};
use crate::api::vm::{NounCall as Vm, VmConnectRequest, VmCreateRequest, VmPruneReply, VmReply};
use crate::api::workspace::{NounCall as Workspace, PrepareRequest};
use crate::api::{Empty, VERSION_MAJOR, VERSION_MINOR};
use crate::config::Origin;
use crate::daemon::{CallOutcome, Caller, Daemon, ExecIo, HeldKey, Keyed, Notes};
use crate::error::{Error, Kind, Result};
use crate::ids::SessionId;
use serde::Serialize;
use serde_json::value::RawValue;
use std::os::fd::OwnedFd;

/// Answers calls with a daemon.
pub struct Dispatch {
    daemon: Daemon,
}

impl Dispatch {
    pub fn new(daemon: Daemon) -> Self {
        Self { daemon }
    }

    /// Checks the requirements that do not depend on parameters.
    fn check(
        &self,
        info: &CallInfo,
        caller: &Caller,
        call: &mut IncomingCall<'_>,
    ) -> std::result::Result<(), CallError> {
        if info.fds != FdPassing::TakesFds {
            call.take_fds::<0>()?;
        }
        if self.daemon.core.is_closing() || self.daemon.core.uninstalling.is_cancelled() {
            return Err(
                Error::new(Kind::ShuttingDown, "the daemon is shutting down")
                    .hint("try again when it is back")
                    .into(),
            );
        }
        if info.access == Access::Privileged && !caller.is_privileged() {
            let e = Error::new(
                Kind::Denied,
                format!(
                    "{}: only root and the user who runs fcd may do this",
                    info.method
                ),
            );
            return Err(e.hint("run it as root or as the user who runs fcd").into());
        }
        if info.key == Key::Unkeyed && call.key.is_some() {
            return Err(must_be_unkeyed(info.method).into());
        }
        Ok(())
    }
}

impl Handler for Dispatch {
    fn call(&self, mut call: IncomingCall<'_>, connection: &Connection<'_>) -> CallResult {
        let method = call.method;
        let unknown = || CallError::unknown_method(method);
        let info = table::find(method).ok_or_else(unknown)?;
        let _label = crate::locks::operation_scope(info.method);
        let caller = Caller {
            uid: call.peer.uid,
            gid: call.peer.gid,
            pid: call.peer.pid,
        };
        self.check(info, &caller, &mut call)?;
        let parsed = AnyCall::parse(method, call.params).ok_or_else(unknown)?;
        let request = parsed.map_err(|e| call.invalid_params(e))?;
        let fds = std::mem::take(&mut call.fds);
        if call.key.is_some() && holds(&request) {
            return Err(must_be_unkeyed("vm.create with hold").into());
        }

        let wait = OpWait {
            core: &self.daemon.core,
            connection,
            more: call.more,
        };
        let mut key = None;
        if let Some(text) = call.key {
            match self
                .daemon
                .keys
                .claim_key(&caller, text, method, call.params)?
            {
                Keyed::Same(op) if info.on_disconnect.is_operation() => {
                    // An earlier call began the operation, so this one does not cancel it.
                    return wait.follow(
                        CallOutcome::Joined(op.id),
                        OnDisconnect::FinishOperation,
                        None,
                    );
                }
                Keyed::Same(op) => return ended(*op),
                Keyed::New(held) => key = Some(held),
            }
        }
        let context = CallContext {
            daemon: &self.daemon,
            caller,
            connection,
            wait: &wait,
        };
        let handled = context.handle(request, fds, &mut key)?;
        debug_assert_eq!(
            matches!(handled, HandlerReply::Operation(..)),
            info.on_disconnect.is_operation(),
            "the row of {method}"
        );
        match handled {
            HandlerReply::Value(reply) => {
                if let Some(held) = key {
                    let value = serde_json::from_str(reply.get())
                        .map_err(|e| Error::internal("read a reply").with_source(e))?;
                    held.record(CallOutcome::Done(value));
                }
                Ok(reply)
            }
            HandlerReply::Operation(outcome, notes) => {
                let outcome = if let Some(held) = key {
                    held.record(outcome)
                } else {
                    outcome
                };
                wait.follow(outcome, info.on_disconnect, notes.as_ref())
            }
        }
    }
}

/// The result of a handler.
enum HandlerReply {
    Value(Box<RawValue>),
    /// The result of the operation is the reply. The notes are sent until it has ended.
    Operation(CallOutcome, Option<Notes>),
}

type HandlerResult = std::result::Result<HandlerReply, CallError>;

fn reply(reply: Result<impl Serialize>) -> HandlerResult {
    raw(&reply?).map(HandlerReply::Value)
}

fn operation(outcome: Result<CallOutcome>) -> HandlerResult {
    Ok(HandlerReply::Operation(outcome?, None))
}

/// One call with its caller and connection.
struct CallContext<'a> {
    daemon: &'a Daemon,
    caller: Caller,
    connection: &'a Connection<'a>,
    wait: &'a OpWait<'a>,
}

impl CallContext<'_> {
    /// Calls the handler. A handler that records the key itself takes it out of `key`.
    fn handle(&self, call: AnyCall, fds: Vec<OwnedFd>, key: &mut Option<HeldKey>) -> HandlerResult {
        let (d, c) = (self.daemon, &self.caller);
        match call {
            AnyCall::Vm(call) => self.vm(call, key),
            AnyCall::Exec(Exec::ExecStart(r)) => self.exec(&r, fds),
            AnyCall::Exec(Exec::ExecResize(r)) => {
                reply(d.sessions.exec_resize(c, &r).map(|()| Empty {}))
            }
            AnyCall::Exec(Exec::ExecSignal(r)) => {
                reply(d.sessions.exec_signal(c, &r).map(|()| Empty {}))
            }
            AnyCall::Workspace(Workspace::WorkspacePrepare(r)) => self.prepare(r, fds),
            AnyCall::Workspace(Workspace::WorkspaceExport(r)) => {
                operation(d.transfers.export(c, r, fds))
            }
            AnyCall::Snapshot(Snapshot::SnapshotCreate(r)) => {
                operation(d.snapshots.snapshot_create(c, r))
            }
            AnyCall::Snapshot(Snapshot::SnapshotList(r)) => reply(d.snapshots.snapshot_list(c, &r)),
            AnyCall::Snapshot(Snapshot::SnapshotShow(r)) => {
                reply(d.snapshots.snapshot_show(c, &r.snapshot))
            }
            AnyCall::Snapshot(Snapshot::SnapshotDelete(r)) => {
                reply(d.snapshots.snapshot_delete(c, &r.snapshot))
            }
            AnyCall::Snapshot(Snapshot::SnapshotRestore(r)) => {
                operation(d.snapshots.snapshot_restore(c, r))
            }
            AnyCall::Image(Image::ImageBuild(r)) => operation(d.images.image_build(c, &r)),
            AnyCall::Image(Image::ImagePull(r)) => operation(d.images.image_pull(c, r, fds)),
            AnyCall::Image(Image::ImageShow(r)) => reply(d.images.image_show(c, &r.image)),
            AnyCall::Image(Image::ImageTag(r)) => reply(d.images.image_tag(c, &r)),
            AnyCall::Image(Image::ImagePrune(r)) => reply(d.images.image_prune(c, &r)),
            AnyCall::Image(Image::ImageList(r)) => reply(d.images.image_list(c, &r)),
            AnyCall::Image(Image::ImageCommit(r)) => operation(d.images.image_commit(c, &r)),
            AnyCall::Image(Image::ImageRegister(r)) => {
                operation(d.images.image_register(c, r, fds))
            }
            AnyCall::Image(Image::ImagePromote(r)) => {
                operation(d.images.image_promote(c, &r.image))
            }
            AnyCall::Image(Image::ImageExport(r)) => operation(d.images.image_export(c, &r, fds)),
            AnyCall::Image(Image::ImageDelete(r)) => reply(d.images.image_delete(c, &r.image)),
            AnyCall::Kernel(Kernel::KernelImport(r)) => operation(d.kernels.kernel_import(c, r)),
            AnyCall::Kernel(Kernel::KernelList(r)) => reply(d.kernels.kernel_list(&r)),
            AnyCall::Kernel(Kernel::KernelShow(r)) => reply(d.kernels.kernel_show(&r.kernel)),
            AnyCall::Kernel(Kernel::KernelDelete(r)) => reply(d.kernels.kernel_delete(&r.kernel)),
            AnyCall::Op(Op::OpList(r)) => reply(d.core.op_list(c, &r)),
            AnyCall::Op(Op::OpShow(r)) => reply(d.core.op_find(c, &r.op).map(|op| OpReply { op })),
            AnyCall::Op(Op::OpWait(r)) => self.wait.op_wait(c, &r).map(HandlerReply::Value),
            AnyCall::Op(Op::OpCancel(r)) => reply(d.core.op_cancel(c, &r.op)),
            AnyCall::Event(Event::EventsWatch(r)) => self.events(&r),
            AnyCall::Daemon(Fcd::Info(Empty {})) => reply(Ok(self.info())),
            AnyCall::Daemon(Fcd::Space(Empty {})) => reply(d.images.space(c)),
            AnyCall::Daemon(Fcd::Doctor(Empty {})) => reply(d.doctor.doctor(c)),
            AnyCall::Daemon(Fcd::ConfigShow(Empty {})) => reply(Ok(self.config())),
            AnyCall::Daemon(Fcd::Leaks(r)) => reply(d.doctor.leaks(r.fix)),
            AnyCall::Daemon(Fcd::Uninstall(r)) => reply(d.uninstaller.uninstall(r)),
            AnyCall::Daemon(Fcd::DebugLocks(Empty {})) => reply(Ok(d.core.debug_locks())),
        }
    }

    fn vm(&self, call: Vm, key: &mut Option<HeldKey>) -> HandlerResult {
        let (d, c) = (self.daemon, &self.caller);
        match call {
            Vm::VmCreate(r) => self.create(&r, key),
            Vm::VmStart(r) => operation(d.lifecycle.start(c, &r.vm)),
            Vm::VmStop(r) => operation(d.lifecycle.stop(c, &r)),
            Vm::VmRestart(r) => operation(d.lifecycle.restart(c, &r)),
            Vm::VmKill(r) => operation(d.lifecycle.kill(c, &r.vm)),
            Vm::VmDelete(r) => operation(d.lifecycle.delete(c, &r)),
            Vm::VmList(r) => reply(d.views.list(c, &r)),
            Vm::VmShow(r) => reply(d.views.show(c, &r.vm)),
            Vm::VmStatsCall(r) => reply(d.views.stats(c, &r)),
            Vm::VmFork(r) => operation(d.snapshots.fork(c, r)),
            Vm::VmMetrics(r) => reply(d.controls.metrics(c, &r.vm)),
            Vm::VmConnect(r) => self.connect(&r),
            Vm::VmPause(r) => reply(d.controls.pause_vm(c, &r.vm).map(|vm| VmReply { vm })),
            Vm::VmResume(r) => reply(d.controls.resume_vm(c, &r.vm).map(|vm| VmReply { vm })),
            Vm::VmSet(r) => reply(d.controls.set(c, &r).map(|vm| VmReply { vm })),
            Vm::VmRename(r) => reply(d.controls.rename(c, &r).map(|vm| VmReply { vm })),
            Vm::VmBalloon(r) => reply(d.controls.balloon(c, &r)),
            Vm::VmPortAdd(r) => reply(d.auto_forwarder.add_ports(c, &r)),
            Vm::VmPortRemove(r) => reply(d.auto_forwarder.remove_ports(c, &r)),
            Vm::VmLogs(r) => reply(d.sessions.logs(c, &r, self.wait.hangup(), &mut |chunk| {
                self.connection.notify(Note::Log(chunk))
            })),
            Vm::VmWait(r) => reply(d.views.wait_state(c, &r, self.wait.hangup())),
            Vm::VmPrune(Empty {}) => self.prune(),
            Vm::VmSshConfig(r) => reply(d.sessions.ssh_config(c, &r)),
        }
    }

    fn create(&self, request: &VmCreateRequest, key: &mut Option<HeldKey>) -> HandlerResult {
        if !request.hold {
            // The VM and its key are recorded in one change of the store.
            let key = key.take();
            return reply(
                self.daemon
                    .creator
                    .create_keyed(&self.caller, request, key.as_ref())
                    .map(|vm| VmReply { vm }),
            );
        }
        self.require_more("vm.create with hold")?;
        let vm = self.daemon.creator.create(&self.caller, request)?;
        // If this note cannot be sent, the caller has disconnected. The hold notices that at once.
        let _ = self.connection.notify(Note::Created(Box::new(vm.clone())));
        reply(self.daemon.lifecycle.hold(vm, self.wait.hangup()))
    }

    fn connect(&self, request: &VmConnectRequest) -> HandlerResult {
        let (vm, stream) = self.daemon.sessions.connect(&self.caller, request)?;
        self.connection.pass(stream.into());
        reply(Ok(VmReply { vm }))
    }

    /// Waits for all deletions, and replies with those that succeeded.
    fn prune(&self) -> HandlerResult {
        let (pruned, begun) = self.daemon.lifecycle.prune(&self.caller)?;
        let (mut deleted, mut begun) = (pruned.deleted, begun.into_iter());
        deleted.retain(|_| begun.next().is_some_and(|begun| self.wait.succeeds(begun)));
        reply(Ok(VmPruneReply { deleted }))
    }

    fn exec(&self, request: &ExecStartRequest, fds: Vec<OwnedFd>) -> HandlerResult {
        let io = ExecIo::accept(&request.streams, fds)?;
        let mut session_made = |session: &SessionId| {
            let _ = self.connection.notify(Note::Session {
                session: session.clone(),
            });
        };
        reply(self.daemon.sessions.exec(
            &self.caller,
            request,
            io,
            self.connection.fd(),
            &mut session_made,
        ))
    }

    fn prepare(&self, request: PrepareRequest, fds: Vec<OwnedFd>) -> HandlerResult {
        let notes = Notes::new()?;
        let outcome = self
            .daemon
            .transfers
            .prepare(&self.caller, request, fds, &notes)?;
        Ok(HandlerReply::Operation(outcome, Some(notes)))
    }

    fn events(&self, request: &EventsWatchRequest) -> HandlerResult {
        self.require_more("events.watch")?;
        reply(
            self.daemon
                .watchers
                .watch_events(&self.caller, request, self.connection),
        )
    }

    fn require_more(&self, call: &str) -> Result<()> {
        if self.wait.more {
            return Ok(());
        }
        Err(Error::invalid(format!("{call} must be called with more"))
            .hint("call it with \"more\": true"))
    }

    fn config(&self) -> ConfigReply {
        let source = |origin| match origin {
            Origin::Default => ConfigSource::Default,
            Origin::File => ConfigSource::File,
            Origin::Environment => ConfigSource::Environment,
            Origin::Flag => ConfigSource::Flag,
        };
        let values = self.daemon.config.effective().into_iter();
        ConfigReply {
            values: values
                .map(|value| ConfigValue {
                    key: value.key,
                    value: value.value,
                    source: source(value.origin),
                    from: value.from,
                })
                .collect(),
        }
    }

    fn info(&self) -> InfoReply {
        InfoReply {
            api: ApiVersion {
                major: VERSION_MAJOR,
                minor: VERSION_MINOR,
            },
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: table::features(),
            pid: std::process::id(),
            uid: nix::unistd::geteuid().as_raw(),
            state_dir: self.daemon.config.state_dir.display().to_string(),
            uptime_s: self.daemon.uptime().as_secs(),
            guest_roots: self.daemon.transfers.guest_roots(),
            driver: self.daemon.doctor.driver(),
            network: self.daemon.doctor.network().to_owned(),
            disk_driver: self.daemon.images.disk_driver().map(str::to_owned),
        }
    }
}

/// True if the caller holds the VM that it creates.
fn holds(request: &AnyCall) -> bool {
    matches!(request, AnyCall::Vm(Vm::VmCreate(request)) if request.hold)
}

fn must_be_unkeyed(call: &str) -> Error {
    Error::invalid(format!("{call} must be called without a key")).hint("leave the key out")
}
