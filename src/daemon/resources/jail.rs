//! The jail of a VMM: its root directory and its control group. The driver makes them when it
//! starts the VMM, so no boot step does. They are removed when the VMM has exited.

use super::{HostView, Resource, Resources, Span};
use crate::api::daemon::Check;
use crate::daemon::core::VMS_DIR;
use crate::error::{Error, Result};
use crate::ids::Tag;
use crate::store::VmRow;

pub(super) struct Jail;

impl Resource for Jail {
    fn kind(&self) -> &'static str {
        "jail"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, resources: &Resources, row: &VmRow) -> Option<String> {
        resources
            .vmm
            .capabilities()
            .leaves_remains
            .then(|| resources.core.tag(row).to_string())
    }

    fn release(&self, resources: &Resources, name: &str) -> Result<()> {
        let tag: Tag = name
            .parse()
            .map_err(|e: Error| e.context("remove a jail"))?;
        resources.vmm.clear(&resources.core.vm_dir(tag.vm()), &tag)
    }

    fn found(&self, resources: &Resources) -> Result<Vec<String>> {
        resources.vmm.remains(
            &resources.core.state_dir.join(VMS_DIR),
            resources.core.store.install_id(),
        )
    }
}

pub(super) fn checks(host: &HostView<'_>) -> Vec<Check> {
    let dir = super::existing(&host.config.state_dir);
    if !host.vmm.capabilities().leaves_remains {
        return Vec::new();
    }
    vec![match crate::vmm::firecracker::require_mount(dir) {
        Ok(()) => Check::ok(
            "jail-mount",
            format!("jails can be made below {}", dir.display()),
        ),
        Err(e) => Check::fail(
            "jail-mount",
            e.to_string(),
            e.hint_text().unwrap_or("use another state_dir"),
        ),
    }]
}
