//! A VM's root disk. It lies in the VM's directory and goes with it.

use super::{HostView, Resource, Span};
use crate::api::daemon::Check;
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::Result;
use crate::store::VmRow;

pub(super) struct Disk;

impl Resource for Disk {
    fn kind(&self) -> &'static str {
        "disk"
    }
    fn span(&self) -> Span {
        Span::Life
    }
    fn intent(&self, _daemon: &Daemon, _row: &VmRow) -> Option<String> {
        None
    }
    fn doing(&self) -> &'static str {
        "prepare the disk"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        if boot.claim.restore.is_some() {
            // It is the snapshot's, whole and as large as it was.
            return Ok(());
        }
        daemon.prepare_disk(&boot.row, boot.image, &boot.spec, boot.claim)?;
        // What the disk became is in the row by now.
        boot.row = daemon.row(&boot.row.id)?;
        boot.spec = daemon.boot_spec(boot.claim, &boot.row, boot.image);
        Ok(())
    }

    fn release(&self, _daemon: &Daemon, _name: &str) -> Result<()> {
        Ok(())
    }
    fn found(&self, _daemon: &Daemon) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn checks(&self, host: &HostView<'_>) -> Vec<Check> {
        vec![disk_check(host)]
    }
}

fn disk_check(host: &HostView<'_>) -> Check {
    let config = host.config;
    let dir = config.state_dir.display();
    match crate::daemon::room::probe(config, host.vmm, super::existing(&config.state_dir)) {
        Ok(probe) => Check::ok("root-disk", format!("root disks in {dir}: {} ({})", probe.method.name(), probe.reason)),
        Err(e) => Check::fail("root-disk", e.to_string(), e.hint_text().unwrap_or("check the directory's rights")),
    }
}
