//! The crash budget of recovery. A stop or a delete that an earlier daemon left is resumed; but if
//! a daemon dies while it does that, the guest may be the cause, and would kill every daemon at its
//! start. So no attempt is repeated the same way.
//!
//! | what the last daemon died in | what the next one does |
//! |---|---|
//! | nothing that it resumed | resumes what was under way |
//! | a stop that was resumed | resumes it, but ends the VMM without asking the guest |
//! | that, or a delete that was resumed | writes the VM down as `failed`, then ends the VMM and cleans up |
//! | that, too | leaves the VM, which is `failed`, to its owner |
//!
//! A record in the store's `meta` table is durable before each attempt and says that it is under
//! way; a daemon that finds it so knows that its predecessor died there. Once one has died, also a
//! stop that somebody asks for does not ask the guest. The record goes with the VM's next start or
//! with the VM. An orderly end of the daemon is not a death.

use super::access::Caller;
use super::adoption;
use super::adoption::Adopter;
use super::core::Core;
use super::records::{Attempts, Record, read, survive, write};
use crate::api::daemon::Check;
use crate::ids::VmId;
use crate::store::{State, Tx};

const PREFIX: &str = "recovery/";

pub(super) fn name(vm: &VmId) -> String {
    format!("{PREFIX}{vm}")
}

/// Daemons that died in attempts to recover the VM, not counting one that is under way.
fn deaths(state: &State, vm: &VmId) -> u32 {
    read(state, &name(vm)).deaths
}

pub(super) fn deaths_at_start(state: &State, vm: &VmId) -> u32 {
    read(state, &name(vm)).deaths_at_start()
}

/// The attempt that begins with this change.
pub(super) fn begin(tx: &mut Tx, vm: &VmId) {
    let deaths = deaths_at_start(tx, vm);
    write(tx, &name(vm), Record { deaths, is_under_way: true, is_left_alone: false });
}

/// The daemon survived the attempt.
pub(super) fn end(tx: &mut Tx, vm: &VmId) {
    survive(tx, &name(vm));
}

/// The VM begins another life, or is gone.
pub(super) fn forget(tx: &mut Tx, vm: &VmId) {
    tx.remove_meta(&name(vm));
    adoption::forget(tx, vm);
}

/// Whether nothing of the VM is to be touched on the daemon's own account.
pub(super) fn is_left_alone(state: &State, vm: &VmId) -> bool {
    read(state, &name(vm)).is_left_alone
}

/// Recovers VMs within the crash budget.
#[derive(Clone)]
pub struct Recovery {
    pub(super) core: Core,
    pub(super) adopter: Adopter,
    pub(super) attempts: Attempts,
}

impl Recovery {
    /// How many daemons died in attempts to recover the VM.
    pub(super) fn recovery_deaths(&self, vm: &VmId) -> u32 {
        self.core.store.read(|s| deaths(s, vm))
    }

    /// Why a VM that comes to rest was not asked to shut down, if that is so because of its record.
    pub(super) fn recovery_note(&self, vm: &VmId) -> Option<String> {
        let why = match (self.recovery_deaths(vm), self.core.store.read(|s| adoption::left_alone(s, vm))) {
            (0, None) => return None,
            (0, Some(deaths)) => adoption::times(deaths),
            (deaths, _) => times(deaths),
        };
        Some(format!("its VMM was ended without asking the guest, because {why}"))
    }

    /// At an orderly end of the daemon: what is still under way did not kill it.
    pub(super) fn end_all_attempts(&self) {
        self.adopter.end_all();
        let begun = self.attempts.take();
        let names = begun.iter().flat_map(|vm| [name(vm), adoption::name(vm)]);
        let under_way: Vec<String> = self.core.store.read(|s| names.filter(|name| read(s, name).is_under_way).collect());
        if under_way.is_empty() {
            return;
        }
        let ended = self.core.change(true, |tx| {
            under_way.iter().for_each(|name| survive(tx, name));
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("write down that the daemon ends in good order: {e}");
        }
    }

    /// Names the VMs that have cost daemons, as far as the caller may see them.
    pub(super) fn recovery_check(&self, caller: &Caller) -> Check {
        const ID: &str = "recovery";
        let (resumed, adopted) = self.core.store.read(|s| {
            let shown = |vm: VmId, deaths: u32| {
                let row = s.vm(&vm).filter(|row| deaths > 0 && caller.may_see(row.owner_uid))?;
                Some(format!("VM {} ({deaths})", row.name))
            };
            let resumed = recorded(s).filter_map(|vm| shown(vm.clone(), deaths(s, &vm))).collect::<Vec<_>>();
            let adopted = s.metas().filter_map(adoption::vm_of);
            (resumed, adopted.filter_map(|vm| shown(vm.clone(), adoption::deaths(s, &vm))).collect::<Vec<_>>())
        });
        let named = |doing: &str, vms: &[String]| (!vms.is_empty()).then(|| format!("{doing} {}", vms.join(", ")));
        let found = [named("resumed a stop or a delete of", &resumed), named("adopted", &adopted)];
        let found: Vec<_> = found.into_iter().flatten().collect();
        if found.is_empty() {
            return Check::ok(ID, "no daemon died while it resumed or adopted what an earlier one had left");
        }
        let text = format!("daemons died while they {}", found.join(", and while they "));
        Check::warn(ID, text, "see why in the daemon's log; delete the VM (fcctl rm -f NAME), or start it again")
    }
}

fn recorded(state: &State) -> impl Iterator<Item = VmId> {
    state.metas().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok())
}

pub(super) fn times(deaths: u32) -> String {
    match deaths {
        1 => "the daemon died while it resumed a stop or a delete of this VM".to_owned(),
        n => format!("the daemon died {n} times while it resumed a stop or a delete of this VM"),
    }
}
