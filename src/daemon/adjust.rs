//! What of a guest that runs can be changed: what its devices move in a second, and the memory that
//! it keeps. As with a pause the row says first how it should be, then the driver is told, until
//! what it was told last is what the row says: of two callers the later one wins, whichever
//! driver's answer comes last. A refusal takes back what was asked, and a daemon that died between
//! is made up for by the next.

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
use crate::vmm::{GuestNetwork, Identity, VmmSpec};

/// A guest that reads its own programs at less than this does not come up.
const BYTES_PER_S_MIN: u64 = 64 << 10;
const BYTES_PER_S_MAX: u64 = 1 << 40;
/// The kernel's packet filter counts up to here: nft(8) refuses more.
const NET_BYTES_PER_S_MAX: u64 = 16 << 30;
const OPS_PER_S_MIN: u64 = 10;
const OPS_PER_S_MAX: u64 = 1_000_000_000;

impl Controls {
    /// # Errors
    /// `invalid_argument`; `unsupported` where nothing could limit the guest's network.
    pub(super) fn check_rates(&self, change: &RateLimits) -> Result<()> {
        let bytes = ("bytes", BYTES_PER_S_MIN..=BYTES_PER_S_MAX, "64K to 1T");
        let ops = ("operations", OPS_PER_S_MIN..=OPS_PER_S_MAX, "10 to 1000000000");
        let packets = ("bytes", BYTES_PER_S_MIN..=NET_BYTES_PER_S_MAX, "64K to 16G");
        let checks = [
            (change.disk_bytes_per_s, &bytes),
            (change.disk_ops_per_s, &ops),
            (change.net_rx_bytes_per_s, &packets),
            (change.net_tx_bytes_per_s, &packets),
        ];
        for (rate, (what, bounds, shown)) in checks {
            if let Some(n) = rate.filter(|n| *n > 0 && !bounds.contains(n)) {
                return Err(
                    Error::invalid(format!("a rate of {n} {what} in a second: give {shown}")).hint("0 or none is no limit")
                );
            }
        }
        if change.limits_network() && self.networks.net.is_none() {
            return Err(no_rate_in_user_mode());
        }
        Ok(())
    }

    /// Whether a guest that is up can have this now.
    pub(super) fn may_adjust_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow, request: &VmSetRequest) -> Result<()> {
        if changes_size(request) {
            let message = format!("set vm {} now: vCPUs, memory and the size of the disk change at a start only", row.name);
            return Err(Error::new(Kind::WrongState, message)
                .hint(format!("leave --now out for them; then fcctl vm restart {}", row.name)));
        }
        self.may_talk_locked(vm, row)?;
        if request.rates().limits_network() && row.tap.is_none() { Err(no_rate_in_user_mode()) } else { Ok(()) }
    }

    fn may_talk_locked(&self, vm: &KeyGuard<'_, VmId>, row: &VmRow) -> Result<()> {
        self.core.allow_locked(vm, row, Verb::Guest)?;
        if row.unresponsive {
            return Err(Error::new(Kind::GuestUnavailable, format!("vm {}: its vmm does not answer", row.name))
                .hint(format!("wait until it does (fcctl events), or end it: fcctl stop --force {}", row.name)));
        }
        Ok(())
    }

    /// The row has it already; `before` is from before that.
    pub(super) fn adjust_rates(&self, before: &VmRow, change: &RateLimits) -> Result<()> {
        self.apply_rates(&before.id, before.generation).map_err(|e| {
            self.take_back_adjusted(before, &|row| take_back_rates(row, before, change));
            // Some of it may be done.
            if let Err(again) = self.apply_rates(&before.id, before.generation) {
                log::warn!("give vm {} the rates that it had: {again}", before.name);
            }
            refused(e, before, format!("set vm {} now", before.name))
        })
    }

    fn take_back_adjusted(&self, before: &VmRow, undo: &dyn Fn(&mut VmRow)) {
        let undone = self.core.change_row(&before.id, true, |row| {
            if row.generation == before.generation {
                undo(row);
            }
        });
        if let Err(e) = undone.map(Ticket::detach) {
            log::warn!("take back a change of vm {}: {e}", before.name);
        }
    }

    /// Tells the driver what the row says, and looks whether that is still what it says. A guest
    /// that has ended since has no use for it.
    fn settle<T: PartialEq>(
        &self,
        vm: &VmId,
        generation: u64,
        said: impl Fn(&VmRow) -> T,
        tell: impl Fn(&VmmSpec, &Identity, &T) -> Result<()>,
    ) -> Result<()> {
        let mut told = None;
        loop {
            let row = self.core.row(vm)?;
            let (true, Some(identity)) = (row.generation == generation && row.state == VmState::Running, &row.identity) else {
                return Ok(());
            };
            let wanted = said(&row);
            if told.as_ref() == Some(&wanted) {
                return Ok(());
            }
            tell(&self.specs.spec(&row, &self.images.get(&row.image)?), identity, &wanted)?;
            told = Some(wanted);
        }
    }

    fn apply_rates(&self, vm: &VmId, generation: u64) -> Result<()> {
        self.settle(
            vm,
            generation,
            |row| row.rates,
            |spec, identity, rates| {
                self.vmm.set_rates(spec, identity, &self.core.closing)?;
                let (Some(net), GuestNetwork::Tap { .. }) = (&self.networks.net, &spec.network) else { return Ok(()) };
                if self.vmm.limits_network(Some(identity)) {
                    return Ok(());
                }
                net.set_rates(&spec.tag, rates.net_rx_bytes_per_s, rates.net_tx_bytes_per_s)
            },
        )
    }

    fn apply_balloon(&self, vm: &VmId, generation: u64) -> Result<()> {
        let keep_mib = |row: &VmRow| row.balloon_mib.unwrap_or(row.mem_mib);
        self.settle(vm, generation, keep_mib, |spec, identity, keep_mib| {
            self.vmm.set_balloon(spec, identity, *keep_mib, &self.core.closing)
        })
    }

    /// A daemon may have died between the row and the driver.
    pub(super) fn adopt_adjusted(&self, row: &VmRow) {
        let balloon = if row.has_balloon { self.apply_balloon(&row.id, row.generation) } else { Ok(()) };
        for (what, done) in [("rates", self.apply_rates(&row.id, row.generation)), ("balloon", balloon)] {
            if let Err(e) = done {
                log::warn!("set the {what} of vm {} again: {e}", row.name);
            }
        }
    }

    /// Has the guest keep so much memory and give back the rest, if the request says how much, and
    /// looks what it keeps.
    pub fn balloon(&self, caller: &Caller, request: &VmBalloonRequest) -> Result<VmBalloonReply> {
        let row = self.core.resolve(caller, &request.vm)?;
        self.looks.ensure_looked_at(&row, Verb::Set, &self.core.closing)?;
        let doing = format!("balloon of vm {}", row.name);
        let (row, ticket) = {
            let guard = self.core.locks.vm.lock(&row.id);
            let row = self.core.row(guard.key())?;
            self.may_talk_locked(&guard, &row)?;
            check_balloon(&row, request.keep_mib)?;
            let change = |keep_mib| self.core.change(false, |tx| tx.update_vm(&guard, |r| r.balloon_mib = Some(keep_mib)));
            let ticket = request.keep_mib.map(change).transpose()?.map(|((), ticket)| ticket);
            (row, ticket)
        };
        if let Some(ticket) = ticket {
            self.core.wait_durable(ticket)?;
            self.apply_balloon(&row.id, row.generation).map_err(|e| {
                self.take_back_adjusted(&row, &|r| {
                    if r.balloon_mib == request.keep_mib {
                        r.balloon_mib = row.balloon_mib;
                    }
                });
                refused(e, &row, doing.clone())
            })?;
        }
        let now = self.core.row(&row.id)?;
        let identity = now.identity.as_ref().filter(|_| now.generation == row.generation).ok_or_else(|| {
            Error::new(Kind::WrongState, format!("{doing}: it has ended meanwhile")).hint(format!("fcctl vm show {}", row.name))
        })?;
        let spec = self.specs.spec(&now, &self.images.get(&now.image)?);
        let kept_mib = self.vmm.balloon_mib(&spec, identity, &self.core.closing).map_err(|e| refused(e, &row, doing))?;
        Ok(VmBalloonReply { vm: self.views.view(&row.id)?, kept_mib })
    }
}

/// By the driver.
fn refused(e: Error, row: &VmRow, doing: String) -> Error {
    let e = if e.hint_text().is_some() { e } else { e.hint(format!("see what became of it: fcctl vm show {}", row.name)) };
    e.context(doing)
}

/// What this change changed, unless somebody has changed it since.
fn take_back_rates(row: &mut VmRow, before: &VmRow, change: &RateLimits) {
    // A limit is ours if the request names it and the row still has what the request made of it.
    let wanted = before.rates.with(change);
    let changed_since = row.rates.zip_with(&wanted, |now, wanted| (now != wanted).then_some(1));
    let ours = change.zip_with(&changed_since, |asked, since| asked.filter(|_| since.is_none()));
    let keep = |ours: Option<u64>, old: Option<u64>| ours.and(old);
    let restored = ours.zip_with(&before.rates, keep);
    row.rates = RateLimits::or(&restored, &row.rates.zip_with(&ours, |now, ours| now.filter(|_| ours.is_none())));
    let Some(pending_before) = before.pending.as_ref().map(|p| p.rates) else { return };
    let mut pending = row.pending.take().unwrap_or_default();
    pending.rates = pending.rates.or(&ours.zip_with(&pending_before, keep));
    row.pending = Some(pending).filter(|p| *p != Default::default());
}

fn check_balloon(row: &VmRow, keep_mib: Option<u64>) -> Result<()> {
    if !row.has_balloon {
        let message = format!("balloon of vm {}: it was started from an image that an earlier fcd built", row.name);
        return Err(Error::new(Kind::Unsupported, message)
            .hint(format!("build the image again (fcctl image build {}), then fcctl vm restart {}", row.image, row.name)));
    }
    match keep_mib {
        Some(mib) if !(MEM_MIB_MIN..=row.mem_mib).contains(&mib) => {
            let message = format!("balloon of vm {}: it cannot keep {mib} MiB of its {}", row.name, row.mem_mib);
            Err(Error::invalid(message)
                .hint(format!("give {MEM_MIB_MIN}M to {}M; more, from its next start: fcctl vm set", row.mem_mib)))
        }
        _ => Ok(()),
    }
}
