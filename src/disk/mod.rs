//! Root disks and seed drives.
