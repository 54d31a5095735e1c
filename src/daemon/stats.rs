//! What VMs use of the host. Nothing is kept: counters are read when somebody asks.

use super::{Caller, Daemon};
use crate::api::vm::{VmMetricsReply, VmState, VmStats, VmStatsReply, VmStatsRequest};
use crate::error::{Error, Kind, Result};
use crate::host::usage;
use crate::store::VmRow;
use std::time::{SystemTime, UNIX_EPOCH};

impl Daemon {
    /// Those that are named, or all of the caller's that run.
    pub fn stats(&self, caller: &Caller, request: &VmStatsRequest) -> Result<VmStatsReply> {
        let named = |vm: &String| -> Result<VmStats> {
            let row = self.resolve(caller, vm)?;
            self.stats_of(&row).map_err(|e| e.context(format!("stats of vm {}", row.name)))
        };
        if !request.vms.is_empty() {
            return Ok(VmStatsReply { stats: request.vms.iter().map(named).collect::<Result<_>>()? });
        }
        let mut rows: Vec<VmRow> =
            self.store.read(|s| s.vms().filter(|r| caller.may_see(r.owner_uid)).map(|r| (**r).clone()).collect());
        rows.sort_by(|a, b| a.name.cmp(&b.name));
        // One that does not run, or is gone by now, is left out.
        Ok(VmStatsReply { stats: rows.iter().filter_map(|row| self.stats_of(row).ok()).collect() })
    }

    /// What its VMM counts, in its own words.
    pub fn metrics(&self, caller: &Caller, vm: &str) -> Result<VmMetricsReply> {
        let row = self.resolve(caller, vm)?;
        let doing = || format!("metrics of vm {}", row.name);
        let identity = row.identity.as_ref().filter(|_| row.state == VmState::Running).ok_or_else(|| {
            Error::new(Kind::WrongState, format!("{}: it is {}", doing(), row.state.name()))
                .hint(format!("start it first: fcctl start {}", row.name))
        })?;
        let spec = self.spec(&row, &self.images.get(&row.image)?);
        let metrics = self.vmm.metrics(&spec, identity, &self.closing).map_err(|e| e.context(doing()))?;
        Ok(VmMetricsReply { vm: row.id.clone(), name: row.name.clone(), driver: row.driver.clone(), metrics })
    }

    fn stats_of(&self, row: &VmRow) -> Result<VmStats> {
        let identity =
            row.identity.as_ref().filter(|_| matches!(row.state, VmState::Running | VmState::Stopping | VmState::Starting));
        let identity = identity.ok_or_else(|| {
            Error::new(Kind::WrongState, format!("it is {}", row.state.name()))
                .hint(format!("start it first: fcctl start {}", row.name))
        })?;
        let used = usage::of(identity).map_err(|e| e.hint(format!("see what became of it: fcctl vm show {}", row.name)))?;
        // What the host sends to the tap the guest receives.
        let (sent, received) = row.tap.as_ref().and_then(|tap| crate::net::received_and_sent(&tap.name)).unzip();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(VmStats {
            vm: row.id.clone(),
            name: row.name.clone(),
            at_ms: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
            cpu_ns: used.cpu_ns,
            memory_bytes: used.memory_bytes,
            memory_max_bytes: row.mem_mib << 20,
            disk_read_bytes: used.disk_read_bytes,
            disk_written_bytes: used.disk_written_bytes,
            net_received_bytes: received,
            net_sent_bytes: sent,
        })
    }
}
