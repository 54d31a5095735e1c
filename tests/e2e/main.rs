//! End-to-end tests with real daemons, real guests and real repositories. A test fails if a
//! requirement is missing; it is never skipped.
#![allow(clippy::disallowed_methods)] // Tests start processes of their own.

mod adjusting;
mod another_host;
mod another_init;
mod auto_ports;
mod big;
mod bridge;
mod capabilities;
mod committed;
mod copies;
mod copying;
mod crash_points;
mod devcontainer;
mod disks;
mod ends;
mod exec;
mod export;
mod faults;
mod firecracker;
mod first_light;
mod full_disk;
mod full_image;
mod host;
mod hostile;
mod image_faults;
mod kernels;
mod lifecycle;
mod older_disk;
mod package;
mod plain_ssh;
mod process;
mod promise;
mod provisioning;
mod pull_faults;
mod pulled;
#[path = "../it/lock_fuzz/random.rs"]
mod random;
mod registered;
mod registries;
mod repositories;
mod runtime;
mod secrets;
mod sftp;
mod snapshots;
mod soak;
mod terminal;
mod tree;
