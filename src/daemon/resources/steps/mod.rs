//! The boot steps that take nothing that has to be given back. What they write is in the VM's
//! directory, where the next boot replaces it and a delete removes it.

pub(super) mod restored_disks;
pub(super) mod root_disk;
pub(super) mod seed;
pub(super) mod synced_files;
pub(super) mod work_disk;
