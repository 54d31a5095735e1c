//! Sends a tree into a guest's workspace and brings a patch or a tree back.
//!
//! The module has four parts, which share only data formats:
//! - The host side runs with the caller's rights, in `fcctl`. [`plan`] decides what a tree consists
//!   of and streams it, [`raw_tar`] forwards a tar that the caller made, [`unpack`] and [`patch`]
//!   write what comes back, and [`apply`] applies a patch to the caller's tree.
//! - [`remote`] builds the command lines that the daemon runs in the guest and parses what they
//!   print.
//! - [`copy`] is for `fcctl cp`, which needs no workspace.
//! - [`encode`] and [`guest_path`] encode paths for JSON and check where a workspace may be in a
//!   guest.
//!
//! Nothing here holds a lock or starts a thread. The daemon never reads the caller's tree, and
//! nothing in the tree or the guest is trusted: names, archives and patches are all checked.
//!
//! # One import
//! - `begin` marks the workspace dirty and lists what the guest changed.
//! - The caller packs the tree without those paths.
//! - `receive` reads the payload on stdin.
//! - The daemon verifies the stream's trailer.
//! - `finish` writes the index and the baseline, syncs, and marks the workspace complete.
//!
//! If an import is interrupted at any point, the workspace stays marked dirty.

pub mod apply;
mod attributes;
mod beneath;
pub mod caller_env;
pub mod copy;
pub mod encode;
mod git;
mod git_texts;
pub mod guest_path;
pub mod left;
mod mtime;
pub mod options;
pub mod patch;
pub mod plan;
pub mod raw_tar;
pub mod remote;
pub mod room;
mod tar_writer;
pub mod unpack;
mod walk;

#[cfg(test)]
mod tests;

/// Maximum length of a path inside a tree, in bytes. The guest's tar and git open whole paths, and
/// `PATH_MAX` is 4096.
pub const PATH_BYTES_MAX: usize = 4000;
/// Maximum number of entries in a tree, in either direction.
pub const ENTRIES_MAX: u64 = 5_000_000;
