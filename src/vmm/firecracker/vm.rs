//! Talks to a running VMM about its guest.

use super::api::Booted;
use super::configure::limit;
use super::pipes::{METRICS_PIPE, open_pipe};
use super::running::{booted, gone, place};
use super::{jail, metrics, save, vsock};
use crate::config::VmmLimits;
use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::dial::{self, Deadline};
use crate::vmm::{SaveTo, Vm, VmRef, VmmSpec};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long a guest may take to accept a connection to its vsock. The guest may have to start a
/// program first.
const GUEST_DEADLINE: Duration = Duration::from_secs(20);

/// A running VM of Firecracker.
pub(super) struct FirecrackerVm {
    pub at: VmRef,
    /// The configured `limits`: control groups are required, or best-effort.
    pub limits: VmmLimits,
}

impl FirecrackerVm {
    fn process(&self, doing: &str) -> Result<Process> {
        Process::open(&self.at.identity)?.ok_or_else(|| gone(doing))
    }

    /// Runs one conversation with the VMM.
    fn talk<T>(
        &self,
        doing: &str,
        cancel: &Cancel,
        ask: impl FnOnce(&mut Booted<'_>) -> Result<T>,
    ) -> Result<T> {
        let process = self.process(doing)?;
        let _blocking = region(Rank::VmmApi);
        let deadline = Deadline {
            at: Instant::now() + super::ANSWER_DEADLINE,
            cancel,
        };
        booted(&process, deadline, doing).and_then(|mut vmm| ask(&mut vmm))
    }
}

impl Vm for FirecrackerVm {
    fn pause(&self, cancel: &Cancel) -> Result<()> {
        self.talk("pause the guest", cancel, |vmm| vmm.pause())
    }

    fn resume(&self, cancel: &Cancel) -> Result<()> {
        self.talk("resume the guest", cancel, |vmm| vmm.resume())
    }

    fn save(&self, spec: &VmmSpec, to: SaveTo<'_>, cancel: &Cancel) -> Result<String> {
        let process = self.process(save::DOING)?;
        let _blocking = region(Rank::VmmApi);
        save::save_guest(&process, spec, self.limits, to, cancel)
    }

    fn set_rates(&self, spec: &VmmSpec, cancel: &Cancel) -> Result<()> {
        self.talk("limit the guest's devices", cancel, |vmm| limit(vmm, spec))?;
        jail::limit_io(self.limits, spec)
    }

    fn set_balloon(&self, keep_mib: u64, cancel: &Cancel) -> Result<()> {
        let amount_mib = self.at.mem_mib.saturating_sub(keep_mib);
        self.talk("set the balloon", cancel, |vmm| vmm.set_balloon(amount_mib))
    }

    fn balloon_mib(&self, cancel: &Cancel) -> Result<u64> {
        let given_mib = self.talk("read the size of the balloon", cancel, |vmm| {
            vmm.balloon_mib()
        })?;
        Ok(self.at.mem_mib.saturating_sub(given_mib))
    }

    fn metrics(&self, cancel: &Cancel) -> Result<Vec<serde_json::Value>> {
        let doing = "read the VMM's metrics";
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: it has exited"));
        let process = Process::open(&self.at.identity)?.ok_or_else(gone)?;
        let mut pipe = open_pipe(&place(&process, doing)?, METRICS_PIPE).map_err(|e| {
            e.context(doing)
                .hint("restart the VM if an earlier fcd started it: fcctl vm restart")
        })?;
        // Read the pipe first, because it may be too full for another line.
        let mut lines = metrics::read(&mut pipe, Vec::new()).map_err(|e| Error::io(doing, e))?;
        self.talk(doing, cancel, |vmm| vmm.flush_metrics())?;
        lines = metrics::read(&mut pipe, lines).map_err(|e| Error::io(doing, e))?;
        metrics::parse(&lines).ok_or_else(|| {
            Error::new(
                Kind::Busy,
                format!("{doing}: another caller read them at the same time"),
            )
            .hint("try again in a moment")
        })
    }

    fn connect(&self, port: u32, cancel: &Cancel) -> Result<UnixStream> {
        let doing = "connect to the guest's vsock";
        let process = self.process(doing)?;
        let place = place(&process, doing)?;
        vsock::require(&place)?;
        let _blocking = region(Rank::VmmApi);
        let deadline = Deadline {
            at: Instant::now() + GUEST_DEADLINE,
            cancel,
        };
        let socket =
            dial::connect(&place, vsock::SOCKET, &process, deadline)?.ok_or_else(|| gone(doing))?;
        vsock::open(socket, port, deadline)
    }

    fn press_ctrl_alt_del(&self, cancel: &Cancel) -> Result<()> {
        self.talk("press Ctrl-Alt-Del", cancel, |vmm| vmm.ctrl_alt_del())
    }
}
