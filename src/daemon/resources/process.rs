//! The VMM process. The tag in its arguments identifies it.

use super::{Boot, BootStep, Resource, Resources, Span};
use crate::error::{Error, Kind, Result};
use crate::store::Ticket;
use crate::store::VmRow;
use crate::vmm::Running;

/// How many processes with the same tag are killed before the release fails.
const PRETENDERS_MAX: u32 = 64;

pub(super) struct VmmProcess;

impl BootStep for VmmProcess {
    fn stage(&self) -> &'static str {
        "start the VMM"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        boot.running = Some(resources.start_vmm(boot)?);
        Ok(())
    }
}

impl Resource for VmmProcess {
    fn kind(&self) -> &'static str {
        "process"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        Some(resources.core.tag(row).to_string())
    }
    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        // More than one process has the tag only if a compromised VMM pretends to be another VMM.
        for _ in 0..PRETENDERS_MAX {
            let Some(identity) = resources.vmms.find_vmm(name)? else {
                return Ok(());
            };
            resources.vmms.kill_vmm(&identity)?;
        }
        Err(Error::new(
            Kind::VmmFailed,
            format!("kill the VMM with tag {name}: new ones keep appearing"),
        )
        .hint("ps ax | grep fc-"))
    }

    fn blocks_release(&self) -> bool {
        true
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        Ok(resources
            .vmm
            .processes()
            .list(&resources.core.tag_prefix())?
            .into_iter()
            .map(|vmm| vmm.tag)
            .collect())
    }
}

impl Resources {
    fn start_vmm(&self, boot: &Boot<'_>) -> Result<Running> {
        let (spec, vm) = (&boot.spec, &boot.row.id);
        self.vmm.start(spec, boot.cancel, &mut |identity| {
            // The record need not be durable, because the process can also be found by its tag.
            let identity = identity.clone();
            let driver = self.vmm.describe();
            let has_balloon = spec.has_balloon;
            let recorded = self.core.change_row(vm, false, |r| {
                r.has_balloon = has_balloon;
                r.identity = Some(identity);
                r.driver = Some(driver);
            });
            if let Err(e) = recorded.map(Ticket::detach) {
                log::warn!("record the VMM of VM {vm}: {e}");
            }
        })
    }
}
