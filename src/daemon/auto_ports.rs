//! Forwards the ports on which processes in a guest listen, for VMs whose owners asked for that
//! (`--publish auto`). Each such VM has a thread while it runs. The thread asks the guest for its
//! listeners, compares them with the row ([`plan`]), and adds and removes ports like a call of the
//! owner would (`port_changes.rs`). It holds no lock while it waits for the guest.
//!
//! The row lists the forwards under `auto_ports`, and among the VM's other ports. So everything
//! that deals with ports deals with these, too. A forward that is refused is recorded there once,
//! and is tried again only after its listener has ended. The end of the VM clears both lists.
//!
//! The guest may answer anything at any time. An answer is bounded, an answer of another form
//! changes nothing, and the number of changes in any time is bounded ([`Allowance`]), because each
//! is durable and an event.

use super::access::Caller;
use super::auto_plan::{forward_of, plan};
use super::controls::Controls;
use super::core::Core;
use super::guest_scripts::Layout;
use super::guests::Guests;
use super::port_changes::By;
use super::ports::{require_free, without_network};
use super::runtime::{Runtimes, Use, User};
use super::transitions::Verb;
use crate::api::exec::Exit;
use crate::api::port::{Port, RefusalCause, RefusedPort};
use crate::api::vm::{Net, VmPortsReply, VmPortsRequest, VmState};
use crate::disk::Network as SeedNetwork;
use crate::error::{Error, Kind, Result};
use crate::guest::listeners::{self, LISTENERS_MAX, Listeners};
use crate::guest::{Script, Transport, run_script};
use crate::ids::VmId;
use crate::locks::{Cancel, Mutex};
use crate::net;
use crate::sched::{HashSet, Instant};
use crate::store::VmRow;
use crate::workspace::remote;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

/// The time between two answers of a guest and, in the guest, between two looks at its listeners.
const PERIOD: Duration = Duration::from_secs(1);
/// How long to wait after a guest did not answer.
const RETRY_PERIOD: Duration = Duration::from_secs(5);
/// How long a guest waits for a change before it answers.
const LOOK_LIMIT: Duration = Duration::from_secs(30);
/// How long a guest may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// The most bytes of an answer. An address takes at most 38.
const ANSWER_BYTES_MAX: usize = 32 * 1024;
/// How many ports may be added or refused at once.
const CHANGES_MAX: usize = LISTENERS_MAX;
/// The time after which one more port may be added or refused.
const CHANGE_PERIOD: Duration = Duration::from_secs(5);

/// A boot of a VM whose listeners are followed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct FollowedBoot {
    vm: VmId,
    generation: u64,
}

/// Limits how often a guest can make the daemon add or refuse a port.
struct Allowance {
    left: usize,
    /// The time of the last refill.
    at: Instant,
}

/// Forwards the ports on which guests listen.
#[derive(Clone)]
pub struct AutoForwarder {
    pub(super) core: Core,
    pub(super) controls: Controls,
    pub(super) guests: Guests,
    pub(super) runtimes: Runtimes,
    pub(super) transport: Arc<dyn Transport>,
    /// The boots that have a thread.
    pub(super) followed: Arc<Mutex<HashSet<FollowedBoot>>>,
}

impl AutoForwarder {
    /// Like [`Controls::add_ports`]. With `auto`, also begins to follow the guest's listeners.
    ///
    /// # Errors
    /// Those of [`Controls::add_ports`].
    pub fn add_ports(&self, caller: &Caller, request: &VmPortsRequest) -> Result<VmPortsReply> {
        if !request.auto {
            return self.controls.add_ports(caller, request);
        }
        let found = self.core.resolve(caller, &request.vm)?;
        let was_on = self.set(&found, true)?.is_some();
        let added = if request.ports.is_empty() {
            self.reply(&found.id, Vec::new())
        } else {
            self.controls.add_ports(caller, request)
        };
        if added.is_err() && !was_on {
            if let Err(e) = self.set(&found, false) {
                log::warn!("undo a change of VM {}: {e}", found.name);
            }
        } else {
            self.follow(&found.id);
        }
        added
    }

    /// Like [`Controls::remove_ports`]. With `auto`, also removes the automatic forwards, and stops
    /// following the guest's listeners.
    ///
    /// # Errors
    /// Those of [`Controls::remove_ports`], and `invalid_argument` if the listeners are not
    /// followed.
    pub fn remove_ports(&self, caller: &Caller, request: &VmPortsRequest) -> Result<VmPortsReply> {
        if !request.auto {
            return self.controls.remove_ports(caller, request);
        }
        let found = self.core.resolve(caller, &request.vm)?;
        if found.auto_ports.is_none() {
            let text = format!("VM {} does not forward ports automatically", found.name);
            return Err(
                Error::invalid(text).hint(format!("list its ports: fcctl port {}", found.name))
            );
        }
        let mut removed = request.ports.clone();
        if !removed.is_empty() {
            self.controls.remove_ports(caller, request)?;
        }
        let open = self.set(&found, false)?.unwrap_or_default();
        if !open.is_empty() {
            self.remove_rest(&found, &open)?;
            removed.extend(open);
        }
        self.reply(&found.id, removed)
    }

    /// Removes ports, of which the thread may just have removed some.
    fn remove_rest(&self, found: &VmRow, open: &[Port]) -> Result<()> {
        match self.controls.remove_ports_by(By::Owner, found, open) {
            Err(e) if e.kind() == Kind::InvalidArgument => {}
            removed => return removed.map(drop),
        }
        let row = self.core.row(&found.id)?;
        let is_left = |port: &&Port| row.ports.contains(port);
        let left: Vec<Port> = open.iter().filter(is_left).copied().collect();
        if left.is_empty() {
            return Ok(());
        }
        self.controls
            .remove_ports_by(By::Owner, found, &left)
            .map(drop)
    }

    fn reply(&self, vm: &VmId, ports: Vec<Port>) -> Result<VmPortsReply> {
        let vm = self.controls.views.view(vm)?;
        Ok(VmPortsReply { vm, ports })
    }

    /// Records durably whether to follow the listeners. Returns what was open if they were followed
    /// before.
    fn set(&self, found: &VmRow, is_on: bool) -> Result<Option<Vec<Port>>> {
        self.controls
            .unreconciled
            .ensure_reconciled(found, Verb::Set, &self.core.closing)?;
        let (before, ticket) = {
            let guard = self.core.locks.vm.lock(&found.id);
            let row = self.core.row(guard.key())?;
            self.controls.may_change_ports_locked(&guard, &row)?;
            if is_on && row.shape.net == Net::None {
                return Err(without_network());
            }
            let change = |row: &mut VmRow| {
                let kept = row.auto_ports.take().unwrap_or_default();
                row.auto_ports = is_on.then_some(kept);
            };
            let ((), ticket) = self.core.change(false, |tx| tx.update_vm(&guard, change))?;
            (row.auto_ports.map(|auto| auto.open), ticket)
        };
        self.core.wait_durable(ticket)?;
        Ok(before)
    }

    /// Starts the thread that follows the listeners of a running VM, if its owner asked for that.
    pub(super) fn follow(&self, vm: &VmId) {
        let Ok(row) = self.core.row(vm) else { return };
        let boot = FollowedBoot::of(&row);
        if !boot.is_on(&row) {
            return;
        }
        let forwarder = self.clone();
        let started = self.core.spawn(&format!("ports-{vm}"), move || {
            // If a thread was about to end when it was needed again, it sees that itself.
            while forwarder.followed.lock().insert(boot.clone()) {
                let result = forwarder.follow_boot(&boot);
                forwarder.followed.lock().remove(&boot);
                if let Err(e) = result {
                    return log::warn!("follow the listeners of VM {}: {e}", boot.vm);
                }
                let is_on = forwarder
                    .core
                    .row(&boot.vm)
                    .is_ok_and(|row| boot.is_on(&row));
                if !is_on || forwarder.core.closing.is_cancelled() {
                    return;
                }
            }
        });
        if let Err(e) = started {
            log::error!("start a thread for the listeners of VM {vm}: {e}");
        }
    }

    /// Follows the listeners until the boot ends, its owner stops that, or the daemon closes.
    fn follow_boot(&self, boot: &FollowedBoot) -> Result<()> {
        let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
        let Some(_user) = self.join(boot, &cancel) else {
            return Ok(());
        };
        let (mut seen, mut has_warned) = (Vec::new(), false);
        let mut allowance = Allowance::new(Instant::now());
        while !(cancel.is_cancelled() || self.core.closing.is_cancelled()) {
            let row = match self.core.row(&boot.vm) {
                Ok(row) if boot.is_on(&row) => row,
                _ => return Ok(()),
            };
            let looked = self.look(&row, &mut seen, &mut allowance, &cancel);
            let pause = looked.unwrap_or_else(|e| {
                // Warn once, because a guest could fill the log.
                let is_news = !has_warned && !cancel.is_cancelled() && !self.is_silent(boot);
                if is_news {
                    log::warn!("ask VM {} for its listeners: {e}; retrying", row.name);
                    has_warned = true;
                }
                RETRY_PERIOD
            });
            crate::host::wait::sleep(pause, &cancel)
                .map_err(|e| Error::io("wait for the guest", e))?;
        }
        Ok(())
    }

    /// True if the guest cannot answer now, because it is paused, saved or unresponsive.
    fn is_silent(&self, boot: &FollowedBoot) -> bool {
        self.runtimes.is_paused(&boot.vm)
            || self.runtimes.is_held(&boot.vm)
            || self
                .core
                .row(&boot.vm)
                .is_ok_and(|row| row.paused || row.unresponsive)
    }

    /// Adds the thread to those that a stop of the VM cancels. Returns `None` if the VM does not
    /// run.
    fn join(&self, boot: &FollowedBoot, cancel: &Cancel) -> Option<User> {
        let guard = self.core.locks.vm.lock(&boot.vm);
        let row = self.core.row(guard.key()).ok()?;
        boot.is_on(&row)
            .then(|| self.runtimes.join(guard.key(), Use::Watch, cancel.clone()))
    }

    /// Waits for new listeners and changes the ports accordingly. `seen` is the last answer, or
    /// empty to get one at once. Returns how long to wait before the next look.
    fn look(
        &self,
        row: &VmRow,
        seen: &mut Vec<u8>,
        allowance: &mut Allowance,
        cancel: &Cancel,
    ) -> Result<Duration> {
        if self.is_silent(&FollowedBoot::of(row)) {
            return Ok(PERIOD);
        }
        let answer = self.ask(row, seen, cancel)?;
        seen.clear();
        let Some(listeners) = listeners::parse(&answer, address(row)) else {
            let text = "the guest's list of listeners has an unknown form";
            return Err(Error::new(Kind::GuestCommandFailed, text));
        };
        if self.apply(row, &listeners, allowance)? {
            *seen = answer;
            return Ok(PERIOD);
        }
        Ok(RETRY_PERIOD)
    }

    fn ask(&self, row: &VmRow, seen: &[u8], cancel: &Cancel) -> Result<Vec<u8>> {
        let command = Layout::of(row).listeners_command(LOOK_LIMIT);
        let script = Script {
            command: &command,
            stdin: seen,
            deadline: Instant::now() + ANSWER_DEADLINE,
            output_bytes_max: ANSWER_BYTES_MAX,
        };
        let target = self.guests.script_target(row)?;
        let output = run_script(self.transport.as_ref(), &target, &script, cancel)?;
        match output.exit {
            Exit::Status(0) => Ok(output.stdout),
            exit => Err(remote::failure("list listeners", &exit, &output.stderr)),
        }
    }

    /// Makes the ports match the listeners. Returns false if something is left for the next round.
    fn apply(&self, row: &VmRow, listeners: &Listeners, allowance: &mut Allowance) -> Result<bool> {
        let now = self.core.row(&row.id)?;
        let Some(auto) = now
            .auto_ports
            .as_ref()
            .filter(|_| now.generation == row.generation)
        else {
            return Ok(true);
        };
        let mut plan = plan(&now.ports, auto, listeners);
        let by = By::Watch {
            generation: row.generation,
        };
        if !plan.close.is_empty() {
            self.controls.remove_ports_by(by, row, &plan.close)?;
            log::info!(
                "VM {} no longer listens on {}",
                row.name,
                numbers(&plan.close)
            );
        }
        let allowed = allowance.take(plan.open.len(), Instant::now());
        let mut is_complete = allowed == plan.open.len();
        plan.open.truncate(allowed);
        let allowed = allowance.take(plan.refuse.len(), Instant::now());
        is_complete &= allowed == plan.refuse.len();
        plan.refuse.truncate(allowed);
        for port in plan.open {
            match self.open(by, row, port) {
                Ok(None) => {}
                Ok(Some(refused)) => plan.refuse.push(refused),
                Err(e) => {
                    log::debug!("forward port {port} of VM {}: {e}", row.name);
                    is_complete = false;
                    break;
                }
            }
        }
        self.change_refused(row, &plan.forget, plan.refuse)?;
        Ok(is_complete)
    }

    /// Forwards one port. Returns why that is refused. An error may be gone in the next round.
    fn open(&self, by: By, row: &VmRow, guest_port: u16) -> Result<Option<RefusedPort>> {
        let owner = Caller {
            uid: row.owner_uid,
            gid: 0,
            pid: 0,
        };
        let port = forward_of(guest_port);
        // Check this before the row has the port, because every change of the row is an event.
        let added = self.require_free(&port).and_then(|()| {
            self.controls
                .add_ports_by(by, &owner, row, &[port])
                .map(drop)
        });
        match added {
            Err(e) if is_final(e.kind()) => {
                log::info!("VM {}: port {guest_port} is not forwarded: {e}", row.name);
                Ok(Some(RefusedPort {
                    guest_port,
                    cause: RefusalCause::Conflict,
                    reason: e.to_string(),
                }))
            }
            added => added.map(|()| None),
        }
    }

    /// Refuses a port that another VM or a program on the host has.
    fn require_free(&self, port: &Port) -> Result<()> {
        let ports = [*port];
        self.core.store.read(|state| require_free(state, &ports))?;
        net::require_free_ports(&ports).map_err(|e| match e.kind() {
            Kind::PortTaken => {
                let text = format!("a program on this host uses port {port}");
                Error::new(Kind::PortTaken, text)
            }
            _ => e,
        })
    }

    /// Changes which ports are refused in this boot.
    fn change_refused(&self, seen: &VmRow, forget: &[u16], add: Vec<RefusedPort>) -> Result<()> {
        if forget.is_empty() && add.is_empty() {
            return Ok(());
        }
        let ticket = self.core.change_row(&seen.id, false, |row| {
            if let Some(auto) = &mut row.auto_ports
                && row.generation == seen.generation
                && row.state == VmState::Running
            {
                auto.refused
                    .retain(|port| !forget.contains(&port.guest_port));
                auto.refused.extend(add);
            }
        })?;
        self.core.wait_durable(ticket)
    }
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            left: CHANGES_MAX,
            at: now,
        }
    }

    /// Takes at most `wanted` changes, and returns how many.
    fn take(&mut self, wanted: usize, now: Instant) -> usize {
        let periods = now.duration_since(self.at).as_secs() / CHANGE_PERIOD.as_secs();
        if periods > 0 {
            let refill = usize::try_from(periods).unwrap_or(CHANGES_MAX);
            self.left = self.left.saturating_add(refill).min(CHANGES_MAX);
            self.at = now;
        }
        let taken = wanted.min(self.left);
        self.left -= taken;
        taken
    }
}

impl FollowedBoot {
    fn of(row: &VmRow) -> Self {
        Self {
            vm: row.id.clone(),
            generation: row.generation,
        }
    }

    /// True if this boot lasts, and the owner wants its listeners to be followed.
    fn is_on(&self, row: &VmRow) -> bool {
        row.generation == self.generation
            && row.state == VmState::Running
            && row.auto_ports.is_some()
    }
}

/// True if another attempt makes sense only after the listener has ended.
fn is_final(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::PortTaken
            | Kind::Denied
            | Kind::InvalidArgument
            | Kind::Unsupported
            | Kind::VmmFailed
    )
}

/// Returns the address to which the host forwards.
fn address(row: &VmRow) -> Ipv4Addr {
    match (&row.tap, SeedNetwork::user_mode().address) {
        (Some(tap), _) => tap.address,
        (None, IpAddr::V4(address)) => address,
        (None, IpAddr::V6(_)) => Ipv4Addr::UNSPECIFIED,
    }
}

fn numbers(ports: &[Port]) -> String {
    let numbers: Vec<String> = ports
        .iter()
        .map(|port| port.guest_port.to_string())
        .collect();
    numbers.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_bounded_in_any_time() {
        let start = Instant::now();
        let after = |periods: u32| start + CHANGE_PERIOD * periods;
        let mut allowance = Allowance::new(start);
        assert_eq!(allowance.take(60, start), 60);
        assert_eq!(allowance.take(60, start), CHANGES_MAX - 60);
        assert_eq!(allowance.take(1, start), 0);
        assert_eq!(allowance.take(60, after(1)), 1);
        assert_eq!(allowance.take(60, after(3)), 2);
        assert_eq!(allowance.take(1000, after(1_000_000)), CHANGES_MAX);
    }
}
