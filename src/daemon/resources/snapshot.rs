//! The directory of a snapshot while it is being made or removed. The directory of a complete
//! snapshot has a row and is not in the ledger. The operation that makes or removes a snapshot
//! writes the ledger row.

use super::{Resource, Resources, Span};
use crate::error::{Error, Kind, Result};
use crate::ids::SnapshotId;

pub(in crate::daemon) const KIND: &str = "snapshot";

pub(super) struct Snapshot;

impl Resource for Snapshot {
    fn kind(&self) -> &'static str {
        KIND
    }
    fn span(&self) -> Span {
        Span::Boot
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let id: SnapshotId = name.parse()?;
        let kept = || {
            Error::new(
                Kind::Busy,
                format!("remove snapshot {id}: it is being made or is complete"),
            )
        };
        if self.is_in_use(resources, name) {
            return Err(kept());
        }
        let dir = resources.snapshot_registry.files(&id).dir;
        crate::host::fs::remove_tree(&dir)
            .map_err(|e| Error::io(format!("remove {}", dir.display()), e))
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        crate::locks::may_block("file access");
        let dir = resources.snapshot_registry.dir();
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(format!("list {}", dir.display()), e)),
        };
        let names = entries
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok());
        Ok(names
            .filter(|name| name.parse::<SnapshotId>().is_ok())
            .collect())
    }

    /// Checks the registry first. A snapshot gets its row before it leaves the registry, so every
    /// snapshot is found in one of the two.
    fn is_in_use(&self, resources: &Resources, name: &str) -> bool {
        let Ok(id) = name.parse() else { return true };
        resources.snapshot_registry.contains(&id)
            || resources.core.store.read(|s| s.snapshot(&id).is_some())
    }
}
