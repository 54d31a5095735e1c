//! Images and kernels: building, pulling, importing and storing them.
//!
//! An image is a directory `<state>/images/<name>`, which is published with one rename and never
//! changes afterwards, because disks of VMs use it as their base. [`Images`] is the registry. There
//! are two kinds:
//!
//! - An image that is built from the distribution's packages has `rootfs.ext4`, `vmlinux`, `initrd`
//!   and `image.json`. Its init and its SSH server are part of the root file system.
//! - An OCI image has only `rootfs.ext4`, to which fcd adds nothing, `image.json` and
//!   `details.json`. It boots with a guest runtime ([`runtime`]). [`pull`] makes it.
//!
//! The root file system of an image that was registered is a user's file elsewhere ([`in_place`]).
//! [`register`] records it, and [`promote`] copies it into the store.
//!
//! A guest needs these devices from its VMM: the root disk as the first virtio disk (`/dev/vda`),
//! the seed drive as the second one (`/dev/vdb`), the guest runtime, if it has one, as the third
//! one (`/dev/vdc`), one virtio network interface (`eth0`), and a console at `ttyS0`. Virtio may be
//! over PCI or MMIO. No kernel arguments are required for an image with its own init, but
//! [`BOOT_ARGS`] makes the boot faster.

mod apt_texts;
pub mod build;
mod checks;
mod commit;
mod cpio;
mod digest;
mod directory;
mod disk_use;
#[cfg(test)]
#[path = "guest/enter/accounts.rs"]
mod enter_accounts;
#[cfg(test)]
#[path = "guest/enter/settings.rs"]
mod enter_settings;
pub mod export;
#[cfg(feature = "fuzz")]
pub mod ext4;
#[cfg(not(feature = "fuzz"))]
mod ext4;
pub mod fetch;
mod fsck;
mod helper_side;
mod history;
mod in_place;
mod initrd;
mod kernel;
pub mod kernels;
pub mod oci;
mod owner;
mod promote;
pub mod pull;
mod register;
mod registry;
pub mod runtime;
mod script;
mod share;
mod sources;
mod stamps;
mod superblock;
mod unpack;

pub use build::{BuildSpec, Profile, build};
pub use checks::checks;
pub use commit::{CommitSpec, commit};
pub use disk_use::DiskUse;
pub(crate) use export::{DiskSpec, OciArchive};
pub use history::shorten as shorten_history;
pub use in_place::InPlace;
pub use owner::owner_of;
pub use promote::promote;
pub use register::{RegisterSpec, Steps, register};
pub use registry::{
    BALLOON_SINCE, Boots, CONSOLE_LEVEL_SINCE, CTRL_ALT_DEL_SINCE, ImageInfo, Images, Tag,
    USER_LOGIN_SINCE, kernel_path,
};
pub use runtime::GuestRuntimes;

use crate::error::Result;

/// The kernel arguments for every VMM, to which the drivers add those of their machine. They
/// skip the self-tests of the crypto modules (0.2 s under emulation), take entropy from the
/// processor, and end the VM immediately after a panic.
pub const BOOT_ARGS: &[&str] = &[
    "quiet",
    "panic=-1",
    "reboot=t",
    "net.ifnames=0",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "audit=0",
];

/// The kernel argument for guests whose initramfs sets the level of the console. Until then, the
/// console shows only what ends the boot. Without PCI, every boot would show the error "PCI: Fatal:
/// No config space access function found", although nothing is wrong.
pub const QUIET_BOOT_ARG: &str = "loglevel=3";

/// Decides whether an image with these files may be published. It is called right before the
/// publication.
pub type Admit<'a> = dyn FnMut(DiskUse) -> Result<()> + 'a;

/// The default virtual size of an image's root disk. The file is sparse.
pub const DISK_BYTES_DEFAULT: u64 = 8 << 30;

/// The command for a clean shutdown in a guest that has its own init. It writes `synced` to stdout
/// once the disks are synced and exits with status 0. A moment later the VM powers off, and the VMM
/// exits. A guest runtime has its own command that does the same.
pub const SHUTDOWN_COMMAND: &str = "/sbin/fcd-shutdown";

/// Completes a script for PID 1 of a guest with the functions that both kinds of guests share.
fn init_script(script: &str) -> String {
    script.replace("# @COMMON@\n", include_str!("guest/common.sh"))
}
