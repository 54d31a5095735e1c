//! The crash budget of recovery. A daemon resumes stops and deletes that an earlier daemon left. If
//! it dies while doing that, the guest may be the cause and would kill every later daemon too. So
//! no attempt is repeated in the same way.
//!
//! | where the last daemon died | what the next daemon does |
//! |---|---|
//! | not in a resumed operation | resumes what was in progress |
//! | in a resumed stop | resumes it, but kills the VMM without asking the guest |
//! | in such a kill, or in a resumed delete | marks the VM `failed`, kills the VMM and cleans up |
//! | in the clean-up of a failed VM | leaves the VM to its owner |
//!
//! Before each attempt, a durable record in the store's `meta` table marks the attempt as in
//! progress. A daemon that finds such a record knows that its predecessor died in the attempt. From
//! the first death on, a stop by a user does not ask the guest either. The record is removed at the
//! VM's next start or with the VM. A normal exit of the daemon is not a death.

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

/// Returns the number of daemons that died in attempts to recover the VM, without the current
/// attempt.
fn deaths(state: &State, vm: &VmId) -> u32 {
    read(state, &name(vm)).deaths
}

pub(super) fn deaths_at_start(state: &State, vm: &VmId) -> u32 {
    read(state, &name(vm)).deaths_at_start()
}

/// Records that an attempt begins.
pub(super) fn begin(tx: &mut Tx, vm: &VmId) {
    let deaths = deaths_at_start(tx, vm);
    write(
        tx,
        &name(vm),
        Record {
            deaths,
            is_under_way: true,
            is_left_alone: false,
        },
    );
}

/// Records that the daemon survived the attempt.
pub(super) fn end(tx: &mut Tx, vm: &VmId) {
    survive(tx, &name(vm));
}

/// Removes the records of a VM that starts again or is deleted.
pub(super) fn forget(tx: &mut Tx, vm: &VmId) {
    tx.remove_meta(&name(vm));
    adoption::forget(tx, vm);
}

/// True if the daemon must not touch the VM without a request.
pub(super) fn is_left_alone(state: &State, vm: &VmId) -> bool {
    read(state, &name(vm)).is_left_alone
}

/// Recovers VMs within the crash budget.
#[derive(Clone)]
pub(super) struct Recovery {
    pub(super) core: Core,
    pub(super) adopter: Adopter,
    pub(super) attempts: Attempts,
}

impl Recovery {
    /// Returns how many daemons died in attempts to recover the VM.
    pub(super) fn recovery_deaths(&self, vm: &VmId) -> u32 {
        self.core.store.read(|s| deaths(s, vm))
    }

    /// Explains why the guest was not asked to shut down. Returns None unless the reason is that
    /// daemons died while they recovered or adopted this VM.
    pub(super) fn recovery_note(&self, vm: &VmId) -> Option<String> {
        let why = match (
            self.recovery_deaths(vm),
            self.core.store.read(|s| adoption::left_alone(s, vm)),
        ) {
            (0, None) => return None,
            (0, Some(deaths)) => adoption::times(deaths),
            (deaths, _) => times(deaths),
        };
        Some(format!(
            "its VMM was killed without asking the guest, because {why}"
        ))
    }

    /// Records at a normal exit that the attempts in progress did not kill the daemon.
    pub(super) fn end_all_attempts(&self) {
        self.adopter.end_all();
        let attempted = self.attempts.take();
        let names = attempted
            .iter()
            .flat_map(|vm| [name(vm), adoption::name(vm)]);
        let in_progress: Vec<String> = self
            .core
            .store
            .read(|s| names.filter(|name| read(s, name).is_under_way).collect());
        if in_progress.is_empty() {
            return;
        }
        let ended = self.core.change(true, |tx| {
            in_progress.iter().for_each(|name| survive(tx, name));
            Ok(())
        });
        if let Err(e) = ended.map(|((), ticket)| ticket.detach()) {
            log::warn!("record that the daemon exits normally: {e}");
        }
    }

    /// Names the VMs whose recovery or adoption has killed daemons, as far as the caller may see
    /// them.
    pub(super) fn recovery_check(&self, caller: &Caller) -> Check {
        const ID: &str = "recovery";
        let (resumed, adopted) = self.core.store.read(|s| {
            let shown = |vm: VmId, deaths: u32| {
                let row = s
                    .vm(&vm)
                    .filter(|row| deaths > 0 && caller.may_see(row.owner_uid))?;
                Some(format!("VM {} ({deaths})", row.name))
            };
            let resumed = recorded(s)
                .filter_map(|vm| shown(vm.clone(), deaths(s, &vm)))
                .collect::<Vec<_>>();
            let adopted = s.metas().filter_map(adoption::vm_of);
            (
                resumed,
                adopted
                    .filter_map(|vm| shown(vm.clone(), adoption::deaths(s, &vm)))
                    .collect::<Vec<_>>(),
            )
        });
        let named = |doing: &str, vms: &[String]| {
            (!vms.is_empty()).then(|| format!("{doing} {}", vms.join(", ")))
        };
        let found = [
            named("resumed a stop or a delete of", &resumed),
            named("adopted", &adopted),
        ];
        let found: Vec<_> = found.into_iter().flatten().collect();
        if found.is_empty() {
            return Check::ok(ID, "recovery after a restart has never killed a daemon");
        }
        let text = format!(
            "daemons died while they {}",
            found.join(", and while they ")
        );
        Check::warn(
            ID,
            text,
            "see the daemon's log for the cause; delete the VM (fcctl rm -f NAME), or restart it",
        )
    }
}

fn recorded(state: &State) -> impl Iterator<Item = VmId> {
    state
        .metas()
        .filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok())
}

pub(super) fn times(deaths: u32) -> String {
    match deaths {
        1 => "the daemon died while it resumed a stop or a delete of this VM".to_owned(),
        n => format!("the daemon died {n} times while it resumed a stop or a delete of this VM"),
    }
}
