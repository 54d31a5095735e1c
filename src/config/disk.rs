//! The section `[disk]`.

use super::section::{choices, section};

choices! {
    /// How a VM's root disk is made from its image.
    pub enum DiskDriver {
        /// The first of reflink, qcow2 and dm-snapshot that the host and the VMM support. Never
        /// copy.
        Auto = "auto",
        /// A copy that shares blocks with the image. Needs a file system with reflinks, such as XFS
        /// or Btrfs.
        Reflink = "reflink",
        /// A file on top of the image. QEMU only.
        Qcow2 = "qcow2",
        /// A device-mapper snapshot of the image. Needs root.
        DmSnapshot = "dm-snapshot",
        /// A full copy.
        Copy = "copy",
    }
}

section! {
    /// Root disks. A VM keeps the kind of disk that it was created with.
    pub struct Disk {
        /// How root disks are made.
        driver: DiskDriver = DiskDriver::Auto,
    }
}
