//! The boot steps that acquire no resources. They write only to the VM's directory, where the next
//! boot replaces their files and a delete removes them.

pub(super) mod restored_disks;
pub(super) mod root_disk;
pub(super) mod seed;
pub(super) mod synced_files;
pub(super) mod work_disk;
