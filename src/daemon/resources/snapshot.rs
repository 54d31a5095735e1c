//! A snapshot's directory while it is made or removed: one that is whole has a row and is in no ledger. A boot that goes on from one
//! takes its disks here.

use super::{Resource, Span};
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::error::{Error, Kind, Result};
use crate::ids::SnapshotId;
use crate::store::VmRow;

pub(in crate::daemon) const KIND: &str = "snapshot";

pub(super) struct Snapshot;

impl Resource for Snapshot {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, _daemon: &Daemon, _row: &VmRow) -> Option<String> {
        None
    }
    fn doing(&self) -> &'static str {
        "take the snapshot's disks"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        if boot.claim.restore.is_none() {
            return Ok(());
        }
        daemon.take_disks(boot)
    }

    fn release(&self, daemon: &Daemon, name: &str) -> Result<()> {
        let id: SnapshotId = name.parse()?;
        let kept = || Error::new(Kind::Busy, format!("remove snapshot {id}: it is being made, or whole"));
        if self.is_in_use(daemon, name) {
            return Err(kept());
        }
        let dir = daemon.snapshot_files(&id).dir;
        crate::host::fs::remove_tree(&dir).map_err(|e| Error::io(format!("remove {}", dir.display()), e))
    }

    fn found(&self, daemon: &Daemon) -> Result<Vec<String>> {
        let dir = daemon.snapshots_dir();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {}", dir.display()), e)),
        };
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        Ok(names.filter(|name| name.parse::<SnapshotId>().is_ok()).collect())
    }

    /// Made by this daemon first, then whole: in this order, for between the two it is both.
    fn is_in_use(&self, daemon: &Daemon, name: &str) -> bool {
        let Ok(id) = name.parse() else { return true };
        daemon.captures.contains(&id) || daemon.store.read(|s| s.snapshot(&id).is_some())
    }
}
