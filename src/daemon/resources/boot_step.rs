//! A boot in progress and its steps.

use super::Resources;
use crate::daemon::snapshot_registry::Restore;
use crate::disk::{RestoreSeed, SeedFile};
use crate::error::{Error, Kind, Result};
use crate::image::ImageInfo;
use crate::locks::Cancel;
use crate::ops::OpHandle;
use crate::store::VmRow;
use crate::vmm::{Running, VmmSpec};

/// Something that a boot does on the host.
pub(super) trait BootStep: Send + Sync {
    /// Returns the progress stage to report while the step runs.
    fn stage(&self) -> &'static str;

    /// Performs the step if this boot needs it. Reuses or replaces what an earlier attempt left.
    /// Everything that must be undone after a failed boot must already be in the ledger.
    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()>;
}

/// A boot in progress: what its steps need, and what they have produced so far.
pub(in crate::daemon) struct Boot<'a> {
    pub op: &'a OpHandle,
    /// Aborts the boot.
    pub cancel: &'a Cancel,
    /// The snapshot that the boot restores.
    pub restore: Option<&'a Restore>,
    pub row: VmRow,
    pub image: &'a ImageInfo,
    pub spec: VmmSpec,
    /// Files to copy into the guest.
    pub files: Vec<SeedFile>,
    /// The seed that a restored guest gets after its memory is loaded.
    pub restore_seed: Option<RestoreSeed>,
    /// The ledger row of the disks that the VM had before the restore. None until the restore sets
    /// these disks aside.
    pub former_disks: Option<u64>,
    pub running: Option<Running>,
}

impl Boot<'_> {
    /// Fails if the guest's init is too old for `what`. An old init would silently ignore what it
    /// does not know.
    pub(crate) fn needs_guest(&self, what: &str) -> Result<()> {
        if self.row.guest_version >= 1 {
            return Ok(());
        }
        let message = format!(
            "give VM {} {what}: its image was built by an earlier fcd",
            self.row.name
        );
        Err(Error::new(Kind::Unsupported, message)
            .hint("build the image again (fcctl image build) and create a new VM from it"))
    }
}
