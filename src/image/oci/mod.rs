//! OCI images: from a reference and blobs to a bootable ext4 file.
//!
//! This is a library without network and without knowledge of the daemon. The caller gives blobs
//! ([`manifest::Blobs`]), which come from a registry or from an archive.
//!
//! Everything here parses hostile bytes. The readers are functions over `Read` or over slices, with
//! limits on every size and count ([`limits`]) and with fuzz targets.

mod digest;
mod errors;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod limits;
pub mod manifest;
mod platform;
pub mod reference;

pub use digest::Digest;
pub use manifest::{Blobs, Descriptor, Image, Layer, resolve};
pub use platform::Platform;
pub use reference::{Location, Reference};
