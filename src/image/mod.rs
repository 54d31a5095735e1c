//! Images: a root file system with its kernel and initramfs, built from the distribution's archive, and the
//! registry of them on disk.
//!
//! An image is a directory `<state>/images/<name>` with `rootfs.ext4`, `vmlinux`, `initrd` and `image.json`. It
//! appears whole, by one rename, and never changes afterwards: the disks of VMs stand on it.
//!
//! What an image expects of its VMM: the first virtio disk is the root disk (`/dev/vda`), the second the seed drive
//! (`/dev/vdb`), one virtio network interface (`eth0`), virtio over PCI or over MMIO; a console at `ttyS0`.
//! It needs nothing on the kernel's command line; [`BOOT_ARGS`] makes it faster.

pub mod build;
mod checks;
mod cpio;
mod kernel;
pub mod kernels;
mod registry;
mod sources;

pub use build::{BuildSpec, build};
pub use checks::checks;
pub use registry::{BALLOON_SINCE, CTRL_ALT_DEL_SINCE, ImageInfo, Images, kernel_path};

/// Kernel arguments for any VMM, beside the console's and those of its clock: no self-tests of the crypto modules
/// (0.2 s under emulation), entropy from the processor, a panic ends the VM at once.
pub const BOOT_ARGS: &[&str] =
    &["quiet", "panic=-1", "reboot=t", "net.ifnames=0", "cryptomgr.notests", "random.trust_cpu=on", "audit=0"];

/// Virtual size of an image's root disk, when its builder does not say. Sparse: it costs what is in it.
pub const DISK_BYTES_DEFAULT: u64 = 8 << 30;

/// The guest's command for a clean end. It writes `synced` to stdout once the disks are written, ends with
/// status 0, and a moment later the VM powers off, so that the VMM exits by itself.
pub const SHUTDOWN_COMMAND: &str = "/sbin/fcd-shutdown";
