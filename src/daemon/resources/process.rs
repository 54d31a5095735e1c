//! The VMM, found again by the tag in its arguments.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::Result;
use crate::store::VmRow;

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
        match daemon.vmm.find(name)? {
            Some(identity) => daemon.kill_vmm(&identity),
            None => Ok(()),
        }
    }

    fn uses_the_others(&self) -> bool {
        true
    }

    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        daemon.vmm.list(&daemon.tag_prefix())
    }

    fn checks(&self, host: &HostView<'_>) -> Vec<Check> {
        host.vmm.checks()
    }
}
