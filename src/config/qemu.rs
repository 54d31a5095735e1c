//! The section `[qemu]`.

use super::section::{choices, section};
use std::path::PathBuf;

choices! {
    /// How QEMU runs a guest's CPUs.
    pub enum Accel {
        /// KVM if it works, else emulation.
        Auto = "auto",
        /// KVM only. Starting a VM fails if it does not work.
        Kvm = "kvm",
        /// Emulation. It works on every host, and is much slower.
        Tcg = "tcg",
    }
}

choices! {
    /// QEMU's machine type.
    pub enum Machine {
        /// microvm if the kernel boots on it, else q35.
        Auto = "auto",
        /// A small machine without PCI, which boots fastest.
        Microvm = "microvm",
        /// An ordinary PC with PCI Express.
        Q35 = "q35",
    }
}

section! {
    /// How VMs run on QEMU, and under which uids.
    pub struct Qemu {
        /// The program.
        binary: PathBuf = "qemu-system-x86_64".into(),
        /// How the guests' CPUs run.
        accel: Accel = Accel::Auto,
        /// The machine type.
        machine: Machine = Machine::Auto,
        /// First of the uids that VMs run under when the daemon is root. A VM's gid is the same
        /// number. The default is above systemd's range for containers and below its range for
        /// foreign images.
        uid_base: u32 = 1_900_000_000,
        /// Number of these uids. The last one is for the helper processes of the name server and of
        /// images. A VM keeps its uid, so fcd refuses to start if the VMs that exist do not fit.
        uid_count: u32 = 65_536,
        /// Keeps guests with user-mode networking from reaching anything. Their SSH port and
        /// published ports can still be reached.
        isolated: bool = false,
    }
}

impl Qemu {
    /// Returns the uids that VMs run under when the daemon is root.
    pub fn uids(&self) -> std::ops::Range<u32> {
        self.uid_base..self.uid_base.saturating_add(self.uid_count)
    }

    /// Returns the uid of the helper processes that belong to no VM. It is the last of the range,
    /// which no VM gets.
    pub fn helper_uid(&self) -> u32 {
        self.uid_base
            .saturating_add(self.uid_count.saturating_sub(1))
    }
}
