//! Changes running VMs: pause (`pause.rs`), rates and balloon (`adjust.rs`), ports
//! (`port_changes.rs`), and settings (`settings.rs`). Each change is written to the row before the
//! driver applies it. Only a removed port leaves the VMM first, and the row afterwards.

use super::capacity::Capacity;
use super::core::Core;
use super::network::Networks;
use super::port_claims::PortClaims;
use super::runtime::Runtimes;
use super::spec::Specs;
use super::unreconciled::Unreconciled;
use super::views::Views;
use super::vmms::Vmms;
use crate::image::Images;
use std::sync::Arc;

/// Changes running VMs.
#[derive(Clone)]
pub struct Controls {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) networks: Networks,
    pub(super) specs: Specs,
    pub(super) capacity: Capacity,
    pub(super) unreconciled: Arc<Unreconciled>,
    pub(super) runtimes: Runtimes,
    pub(super) images: Images,
    pub(super) vmms: Vmms,
    pub(super) port_claims: Arc<PortClaims>,
}
