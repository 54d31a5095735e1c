//! What can be changed about a running VM: pause (`pause.rs`), rates and balloon (`adjust.rs`), and
//! its settings (`settings.rs`). The row says how the VM should be. Then the driver is asked to
//! make it so.

use super::capacity::Capacity;
use super::core::Core;
use super::looks::Looks;
use super::network::Networks;
use super::runtime::Runtimes;
use super::spec::Specs;
use super::views::Views;
use crate::image::Images;
use crate::vmm::Driver;
use std::sync::Arc;

/// Changes running VMs.
#[derive(Clone)]
pub struct Controls {
    pub(super) core: Core,
    pub(super) views: Views,
    pub(super) networks: Networks,
    pub(super) specs: Specs,
    pub(super) capacity: Capacity,
    pub(super) looks: Arc<Looks>,
    pub(super) runtimes: Runtimes,
    pub(super) images: Images,
    pub(super) vmm: Arc<dyn Driver>,
}
