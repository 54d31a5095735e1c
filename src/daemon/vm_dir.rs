//! The files in a VM's directory.

/// The root disk.
pub(super) const DISK_FILE: &str = "disk";
/// The second disk, which some VMs have.
pub(super) const WORK_DISK_FILE: &str = "work";
/// The changes to a root disk that is a device-mapper snapshot.
pub(super) const CHANGES_FILE: &str = "changes";
/// The seed drive.
pub(super) const SEED_FILE: &str = "seed";
/// The private key that the daemon uses to log in.
pub(super) const KEY_FILE: &str = "key";
/// The private host key of the guest's SSH server.
pub(super) const HOST_KEY_FILE: &str = "host_key";
/// The variables of the VM's commands, with their values.
pub(super) const ENV_FILE: &str = "environment";
/// A link to the kernel of an image that only the daemon can read.
pub(super) const KERNEL_FILE: &str = "kernel";
/// A link to the initramfs of such an image.
pub(super) const INITRD_FILE: &str = "initrd";
