//! Reports the host resources that VMs use. The counters are read at each call; nothing is stored.

use super::access::Caller;
use super::controls::Controls;
use super::listing::Position;
use super::listing::VmScan;
use super::views::Views;
use crate::api::page;
use crate::api::vm::{VmMetricsReply, VmState, VmStats, VmStatsReply, VmStatsRequest};
use crate::error::{Error, Kind, Result};
use crate::host::time::since_epoch;
use crate::host::usage;
use crate::store::VmRow;
use serde_json::value::RawValue;

impl Views {
    /// Returns the stats of the named VMs. If none are named, returns those of all running VMs that
    /// the caller may see.
    pub fn stats(
        &self,
        caller: &Caller,
        request: &VmStatsRequest,
    ) -> Result<VmStatsReply<Box<RawValue>>> {
        let named = |vm: &String| -> Result<VmStats> {
            let row = self.core.resolve(caller, vm)?;
            self.stats_of(&row)
                .map_err(|e| e.context(format!("stats of VM {}", row.name)))
        };
        if !request.vms.is_empty() {
            // The cursor is an index into the list in the request.
            let after = request
                .after
                .as_deref()
                .map(|text| text.parse::<usize>().map_err(|_| page::bad_cursor(text)));
            let from = after
                .transpose()?
                .map_or(0, |after| after.saturating_add(1))
                .min(request.vms.len());
            let stats = request.vms[from..]
                .iter()
                .map(named)
                .collect::<Result<Vec<_>>>()?;
            let (stats, next) = page::fill(request.limit, (from..).zip(stats))?;
            return Ok(VmStatsReply { stats, next });
        }
        let after = request
            .after
            .as_deref()
            .map(Position::parse)
            .transpose()?
            .map(|Position(at, id)| (at, id));
        // VMs that do not run, and VMs that were deleted during the call, are left out.
        let rows = VmScan::new(&self.core.store, caller, after, |row| {
            row.identity.is_some()
        });
        let all = rows.filter_map(|seen| {
            let stats = self.stats_of(&seen.row).ok()?;
            Some((Position(seen.row.created_at, seen.row.id.clone()), stats))
        });
        let (stats, next) = page::fill(request.limit, all)?;
        Ok(VmStatsReply { stats, next })
    }

    fn stats_of(&self, row: &VmRow) -> Result<VmStats> {
        let identity = row.identity.as_ref().filter(|_| {
            matches!(
                row.state,
                VmState::Running | VmState::Stopping | VmState::Starting
            )
        });
        let identity = identity.ok_or_else(|| {
            Error::new(Kind::WrongState, format!("it is {}", row.state.name()))
                .hint(format!("start it first: fcctl start {}", row.name))
        })?;
        let used = usage::of(identity)
            .map_err(|e| e.hint(format!("see its state: fcctl vm show {}", row.name)))?;
        // The host sends what the guest receives.
        let (sent, received) = row
            .tap
            .as_ref()
            .and_then(|tap| crate::net::received_and_sent(&tap.name))
            .unzip();
        Ok(VmStats {
            vm: row.id.clone(),
            name: row.name.clone(),
            at_ms: u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX),
            cpu_ns: used.cpu_ns,
            memory_bytes: used.memory_bytes,
            memory_max_bytes: row.shape.mem_mib << 20,
            disk_read_bytes: used.disk_read_bytes,
            disk_written_bytes: used.disk_written_bytes,
            net_received_bytes: received,
            net_sent_bytes: sent,
        })
    }
}

impl Controls {
    /// Returns the metrics of the VM's VMM, in the VMM's own format.
    pub fn metrics(&self, caller: &Caller, vm: &str) -> Result<VmMetricsReply> {
        let row = self.core.resolve(caller, vm)?;
        let doing = || format!("metrics of VM {}", row.name);
        let identity = row
            .identity
            .as_ref()
            .filter(|_| row.state == VmState::Running)
            .ok_or_else(|| {
                Error::new(
                    Kind::WrongState,
                    format!("{}: it is {}", doing(), row.state.name()),
                )
                .hint(format!("start it first: fcctl start {}", row.name))
            })?;
        let metrics = self
            .vmms
            .vm(&row, identity)
            .and_then(|vm| vm.metrics(&self.core.closing))
            .map_err(|e| e.context(doing()))?;
        Ok(VmMetricsReply {
            vm: row.id.clone(),
            name: row.name.clone(),
            driver: row.driver.clone(),
            metrics,
        })
    }
}
