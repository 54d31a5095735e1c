//! The VMM, found again by the tag in its arguments.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::{Error, Kind, Result};
use crate::store::VmRow;

/// Processes with the same tag that are ended before one gives up.
const PRETENDERS_MAX: u32 = 64;

pub(super) struct VmmProcess;

impl Resource for VmmProcess {
    fn kind(&self) -> &'static str {
        "process"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, daemon: &Daemon, row: &VmRow) -> Option<String> {
        Some(daemon.tag(row))
    }
    fn doing(&self) -> &'static str {
        "start the vmm"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        boot.running = Some(daemon.start_vmm(boot.claim, &boot.spec)?);
        Ok(())
    }

    fn release(&self, daemon: &Daemon, name: &str) -> Result<()> {
        // More than one only where a VMM was taken over and pretends to be another.
        for _ in 0..PRETENDERS_MAX {
            let Some(identity) = daemon.find_vmm(name)? else { return Ok(()) };
            daemon.kill_vmm(&identity)?;
        }
        Err(Error::new(Kind::VmmFailed, format!("end the vmm of {name}: there is always another")).hint("ps ax | grep fc-"))
    }

    fn uses_the_others(&self) -> bool {
        true
    }

    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        Ok(daemon.vmm.list(&daemon.tag_prefix())?.into_iter().map(|vmm| vmm.tag).collect())
    }

    fn checks(&self, host: &HostView<'_>) -> Vec<Check> {
        host.vmm.checks()
    }
}
