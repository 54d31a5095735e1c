//! Changes the rates of a running VM's devices and the size of its balloon.
//!
//! As with a pause, the row is changed first. Then the driver is called until the applied values
//! match the row. So if two callers change a VM at once, the later change wins, regardless of the
//! order in which the driver answers. If the driver refuses, the change of the row is undone. If
//! the daemon dies before it has called the driver, the next daemon applies the row to the VM.

use super::access::Caller;
use super::controls::Controls;
use super::network::no_rate_in_user_mode;
use super::settings::changes_size;
use super::transitions::Verb;
use crate::api::vm::{RateLimits, VmBalloonReply, VmBalloonRequest, VmSetRequest, VmState};
use crate::config::MEM_MIB_MIN;
use crate::error::{Error, Kind, Result};
use crate::ids::VmId;
use crate::locks::KeyGuard;
use crate::store::{Ticket, VmRow};
use crate::vmm::{GuestNetwork, Identity};

/// The lowest rate, in bytes per second. At a lower rate, a guest reads its own programs too slowly
/// to boot.
const BYTES_PER_S_MIN: u64 = 64 << 10;
const BYTES_PER_S_MAX: u64 = 1 << 40;
/// The highest network rate that the kernel's packet filter accepts (nft(8)).
const NET_BYTES_PER_S_MAX: u64 = 16 << 30;
const OPS_PER_S_MIN: u64 = 10;
const OPS_PER_S_MAX: u64 = 1_000_000_000;

impl Controls {
    /// Checks that the rates are within bounds and can be enforced.
    ///
    /// # Errors
    /// `invalid_argument` for a rate out of bounds; `unsupported` if nothing could enforce a
    /// network rate.
    pub(super) fn check_rates(&self, change: &RateLimits) -> Result<()> {
        let bytes = ("bytes", BYTES_PER_S_MIN..=BYTES_PER_S_MAX, "64K to 1T");
        let ops = (
            "operations",
            OPS_PER_S_MIN..=OPS_PER_S_MAX,
            "10 to 1000000000",
        );
        let packets = ("bytes", BYTES_PER_S_MIN..=NET_BYTES_PER_S_MAX, "64K to 16G");
        let checks = [
            (change.disk_bytes_per_s, &bytes),
            (change.disk_ops_per_s, &ops),
            (change.net_rx_bytes_per_s, &packets),
            (change.net_tx_bytes_per_s, &packets),
        ];
        for (rate, (what, bounds, shown)) in checks {
            if let Some(n) = rate.filter(|n| *n > 0 && !bounds.contains(n)) {
                return Err(Error::invalid(format!(
                    "a rate of {n} {what} per second: use {shown}"
                ))
                .hint("0 or none removes the limit"));
            }
        }
        if change.limits_network() && self.networks.net.is_none() {
            return Err(no_rate_in_user_mode());
        }
        Ok(())
    }

    /// Checks that the change can be applied to the running guest.
    pub(super) fn may_adjust_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
        request: &VmSetRequest,
    ) -> Result<()> {
        if changes_size(request) {
            let message = format!(
                "set VM {} now: vCPUs, memory and disk size change only at a start",
                row.name
            );
            return Err(Error::new(Kind::WrongState, message).hint(format!(
                "leave out --now, then fcctl vm restart {}",
                row.name
            )));
        }
        self.require_responsive_locked(vm, row)?;
        if request.rates().limits_network() && row.tap.is_none() {
            Err(no_rate_in_user_mode())
        } else {
            Ok(())
        }
    }

    pub(super) fn require_responsive_locked(
        &self,
        vm: &KeyGuard<'_, VmId>,
        row: &VmRow,
    ) -> Result<()> {
        self.core.allow_locked(vm, row, Verb::Guest)?;
        if row.unresponsive {
            return Err(Error::new(
                Kind::GuestUnavailable,
                format!("VM {}: its VMM does not respond", row.name),
            )
            .hint(format!(
                "wait until it responds (fcctl events), or run fcctl stop --force {}",
                row.name
            )));
        }
        Ok(())
    }

    /// Applies the rates that the row already has. If the driver refuses them, restores the rates
    /// of `before`, which is the row before the change.
    pub(super) fn adjust_rates(&self, before: &VmRow, change: &RateLimits) -> Result<()> {
        self.apply_rates(&before.id, before.generation)
            .map_err(|e| {
                self.undo_change(before, &|row| undo_rates(row, before, change));
                // The driver may have applied a part of the change.
                if let Err(again) = self.apply_rates(&before.id, before.generation) {
                    log::warn!("restore the rates of VM {}: {again}", before.name);
                }
                refused(e, before, format!("set VM {} now", before.name))
            })
    }

    fn undo_change(&self, before: &VmRow, undo: &dyn Fn(&mut VmRow)) {
        let undone = self.core.change_row(&before.id, true, |row| {
            if row.generation == before.generation {
                undo(row);
            }
        });
        if let Err(e) = undone.map(Ticket::detach) {
            log::warn!("undo a change of VM {}: {e}", before.name);
        }
    }

    /// Calls `apply` with the value that `wanted` reads from the row, until the row still has the
    /// value that was applied. Does nothing for a guest that has ended.
    fn settle<T: PartialEq>(
        &self,
        vm: &VmId,
        generation: u64,
        wanted: impl Fn(&VmRow) -> T,
        apply: impl Fn(&VmRow, &Identity, &T) -> Result<()>,
    ) -> Result<()> {
        let mut applied = None;
        loop {
            let row = self.core.row(vm)?;
            let (true, Some(identity)) = (
                row.generation == generation && row.state == VmState::Running,
                &row.identity,
            ) else {
                return Ok(());
            };
            let value = wanted(&row);
            if applied.as_ref() == Some(&value) {
                return Ok(());
            }
            apply(&row, identity, &value)?;
            applied = Some(value);
        }
    }

    fn apply_rates(&self, vm: &VmId, generation: u64) -> Result<()> {
        self.settle(
            vm,
            generation,
            |row| row.shape.rates,
            |row, identity, rates| {
                let spec = self.specs.spec(row, &self.images.get(&row.shape.image)?);
                let running = self.vmms.vm(row, identity)?;
                running.set_rates(&spec, &self.core.closing)?;
                let (Some(net), GuestNetwork::Tap { .. }) = (&self.networks.net, &spec.network)
                else {
                    return Ok(());
                };
                let capabilities = self.vmms.vmm.capabilities_of(identity);
                if capabilities.is_some_and(|c| c.limits_network) {
                    return Ok(());
                }
                net.set_rates(
                    spec.tag.as_str(),
                    rates.net_rx_bytes_per_s,
                    rates.net_tx_bytes_per_s,
                )
            },
        )
    }

    fn apply_balloon(&self, vm: &VmId, generation: u64) -> Result<()> {
        let keep_mib = |row: &VmRow| row.balloon_mib.unwrap_or(row.shape.mem_mib);
        self.settle(vm, generation, keep_mib, |row, identity, keep_mib| {
            let running = self.vmms.vm(row, identity)?;
            running.set_balloon(*keep_mib, &self.core.closing)
        })
    }

    /// Applies rates and balloon to an adopted VM, because the earlier daemon may have died after
    /// it changed the row and before it called the driver.
    pub(super) fn adopt_adjusted(&self, row: &VmRow) {
        let balloon = if row.has_balloon {
            self.apply_balloon(&row.id, row.generation)
        } else {
            Ok(())
        };
        for (what, done) in [
            ("rates", self.apply_rates(&row.id, row.generation)),
            ("balloon", balloon),
        ] {
            if let Err(e) = done {
                log::warn!("set the {what} of VM {} again: {e}", row.name);
            }
        }
    }

    /// If the request sets a size, changes how much memory the guest keeps. Returns how much it
    /// keeps now.
    pub fn balloon(&self, caller: &Caller, request: &VmBalloonRequest) -> Result<VmBalloonReply> {
        let row = self.core.resolve(caller, &request.vm)?;
        self.unreconciled
            .ensure_reconciled(&row, Verb::Set, &self.core.closing)?;
        let doing = format!("balloon of VM {}", row.name);
        let (row, ticket) = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.require_responsive_locked(&guard, &row)?;
            check_balloon(&row, request.keep_mib)?;
            let change = |keep_mib| {
                self.core.change(false, |tx| {
                    tx.update_vm(&guard, |r| r.balloon_mib = Some(keep_mib))
                })
            };
            let ticket = request
                .keep_mib
                .map(change)
                .transpose()?
                .map(|((), ticket)| ticket);
            (row, ticket)
        };
        if let Some(ticket) = ticket {
            self.core.wait_durable(ticket)?;
            self.apply_balloon(&row.id, row.generation).map_err(|e| {
                self.undo_change(&row, &|r| {
                    if r.balloon_mib == request.keep_mib {
                        r.balloon_mib = row.balloon_mib;
                    }
                });
                refused(e, &row, doing.clone())
            })?;
        }
        let now = self.core.row(&row.id)?;
        let identity = now
            .identity
            .as_ref()
            .filter(|_| now.generation == row.generation)
            .ok_or_else(|| {
                Error::new(Kind::WrongState, format!("{doing}: the guest has ended"))
                    .hint(format!("fcctl vm show {}", row.name))
            })?;
        let kept_mib = self
            .vmms
            .vm(&now, identity)
            .and_then(|vm| vm.balloon_mib(&self.core.closing))
            .map_err(|e| refused(e, &row, doing))?;
        Ok(VmBalloonReply {
            vm: self.views.view(&row.id)?,
            kept_mib,
        })
    }
}

/// Adds context to an error of the driver, and a hint if the error does not have one.
pub(super) fn refused(e: Error, row: &VmRow, doing: String) -> Error {
    let e = if e.hint_text().is_some() {
        e
    } else {
        e.hint(format!("see its state: fcctl vm show {}", row.name))
    };
    e.context(doing)
}

/// Restores the rates that `change` set, unless they have been changed again since.
fn undo_rates(row: &mut VmRow, before: &VmRow, change: &RateLimits) {
    // A limit is `unchanged` if the request set it and the row still has the requested value.
    let wanted = before.shape.rates.with(change);
    let changed_since = row
        .shape
        .rates
        .zip_with(&wanted, |now, wanted| (now != wanted).then_some(1));
    let unchanged = change.zip_with(&changed_since, |asked, since| {
        asked.filter(|_| since.is_none())
    });
    let keep = |unchanged: Option<u64>, old: Option<u64>| unchanged.and(old);
    let restored = unchanged.zip_with(&before.shape.rates, keep);
    row.shape.rates = RateLimits::or(
        &restored,
        &row.shape.rates.zip_with(&unchanged, |now, unchanged| {
            now.filter(|_| unchanged.is_none())
        }),
    );
    let Some(pending_before) = before.pending.as_ref().map(|p| p.rates) else {
        return;
    };
    let mut pending = row.pending.take().unwrap_or_default();
    pending.rates = pending.rates.or(&unchanged.zip_with(&pending_before, keep));
    row.pending = Some(pending).filter(|p| *p != Default::default());
}

fn check_balloon(row: &VmRow, keep_mib: Option<u64>) -> Result<()> {
    if !row.has_balloon {
        let message = format!(
            "balloon of VM {}: its image was built by an earlier fcd",
            row.name
        );
        return Err(Error::new(Kind::Unsupported, message).hint(format!(
            "build the image again (fcctl image build {}), then fcctl vm restart {}",
            row.shape.image, row.name
        )));
    }
    match keep_mib {
        Some(mib) if !(MEM_MIB_MIN..=row.shape.mem_mib).contains(&mib) => {
            let message = format!(
                "balloon of VM {}: the guest cannot keep {mib} MiB of its {} MiB",
                row.name, row.shape.mem_mib
            );
            Err(Error::invalid(message).hint(format!(
                "use {MEM_MIB_MIN}M to {}M; for more, raise its memory with fcctl vm set",
                row.shape.mem_mib
            )))
        }
        _ => Ok(()),
    }
}
