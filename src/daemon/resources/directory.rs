//! A VM's directory: its keys, its seed, its disk, its console log.

use super::{Resource, Span};
use crate::daemon::boot::Boot;
use crate::daemon::{Daemon, VMS_DIR};
use crate::error::{Error, Result};
use crate::ids::VmId;
use crate::store::VmRow;
use std::path::Path;
use std::time::Duration;

/// Tries to remove a directory into which something is still written, and the time between them.
const REMOVE_TRIES_MAX: u32 = 100;
const REMOVE_PERIOD: Duration = Duration::from_millis(20);

pub(super) struct Directory;

impl Resource for Directory {
    fn kind(&self) -> &'static str {
        "directory"
    }
    fn span(&self) -> Span {
        Span::Life
    }
    fn intent(&self, daemon: &Daemon, row: &VmRow) -> Option<String> {
        Some(daemon.vm_dir(&row.id).display().to_string())
    }
    fn doing(&self) -> &'static str {
        "prepare the directory"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        drop(crate::host::fs::create_dir(&boot.spec.dir, 0o711)?);
        daemon.write_identity(&boot.row, &boot.spec)
    }

    fn release(&self, daemon: &Daemon, name: &str) -> Result<()> {
        let dir = Path::new(name);
        daemon.vmm.consoles().forget(dir);
        let mut tries = 0;
        loop {
            tries += 1;
            match std::fs::remove_dir_all(dir) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
                // What the guest said last is still being written to its log.
                Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty && tries < REMOVE_TRIES_MAX => {
                    daemon.pause(REMOVE_PERIOD);
                }
                Err(e) => return Err(Error::io(format!("remove {}", dir.display()), e)),
            }
        }
    }

    /// What has no id for a name is not ours.
    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        let vms = daemon.config.state_dir.join(VMS_DIR);
        let entries = match std::fs::read_dir(&vms) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {}", vms.display()), e)),
        };
        let is_id = |name: &std::ffi::OsStr| name.to_str().is_some_and(|n| n.parse::<VmId>().is_ok());
        Ok(entries.flatten().filter(|e| is_id(&e.file_name())).map(|e| e.path().display().to_string()).collect())
    }
}
