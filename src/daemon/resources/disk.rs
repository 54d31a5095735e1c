//! A VM's root disk. It lies in the VM's directory and goes with it.

use super::{Resource, Span};
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
        daemon.prepare_disk(&boot.row, boot.image, &boot.spec, boot.claim)?;
        // What the disk became is in the row by now.
        boot.row = daemon.row(&boot.row.id)?;
        boot.spec = daemon.spec(&boot.row, boot.image);
        Ok(())
    }

    fn release(&self, _daemon: &Daemon, _name: &str) -> Result<()> {
        Ok(())
    }
    fn found(&self, _daemon: &Daemon) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}
