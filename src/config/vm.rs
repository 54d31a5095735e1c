//! The section `[vm]`.

use super::section::section;
use crate::ids::ImageRef;

section! {
    /// The settings of a new VM that its creator does not specify.
    pub struct VmDefaults {
        /// The image.
        image: ImageRef = "default".parse().expect("a valid name"),
        /// The number of vCPUs.
        vcpus: u32 = 1,
        /// Memory in MiB, at least 128.
        mem_mib: u64 = 1024,
    }
}
