//! Converts OCI images, from a reference and blobs to a bootable ext4 file.
//!
//! This library has no access to the network and does not depend on the daemon. The caller provides
//! the blobs ([`manifest::Blobs`]), which come from a registry or from an archive.
//!
//! Everything here parses hostile bytes. The readers are functions over `Read` or over slices, with
//! limits on every size and count ([`limits`]) and with fuzz targets.

mod acl;
mod archive;
#[cfg(test)]
#[path = "bench_tests.rs"]
mod bench;
mod budget;
mod copying;
mod decompress;
mod digest;
mod entry;
mod errors;
mod files;
mod filesystem;
mod flatten;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod header;
mod layer;
pub mod limits;
pub mod manifest;
mod merge;
mod os_release;
mod pax;
mod platform;
pub mod reference;
mod spool;
mod tar_reader;
#[cfg(test)]
mod test_image;
#[cfg(test)]
mod test_tar;
#[cfg(test)]
mod test_tree;

pub use acl::from_ext4 as acl_of_ext4;
pub use archive::{Archive, Wanted};
pub use digest::Digest;
pub use files::{LayerFile, LayerFiles};
pub use flatten::{Flatten, Progress, flatten};
pub use manifest::{Blobs, Descriptor, Image, Layer, check_config, resolve};
pub use platform::Platform;
pub use reference::Reference;
