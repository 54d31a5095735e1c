//! Workspaces: a tree goes into a guest, a patch or a tree comes back.
//!
//! Three parts that share nothing but formats:
//! - the host side with the caller's rights, used by `fcctl`: [`plan`] says what a tree consists of and streams it,
//!   [`raw_tar`] passes on a tar of the caller's, [`unpack`] and [`patch`] write what comes back, [`apply`] puts a patch
//!   into the caller's tree;
//! - [`remote`]: the command lines that the daemon runs in the guest, and the parsers of what they print;
//! - [`encode`] and [`guest_path`]: paths in JSON, and where a workspace may lie in a guest.
//!
//! # One prepare
//! `begin` (dirty mark, what the guest changed) -> the caller packs, leaving that out -> `receive` (stdin: the payload)
//! -> the daemon verifies the trailer -> `finish` (index, baseline, sync, complete mark). Cut off anywhere, the
//! workspace stays marked dirty.

pub mod apply;
mod beneath;
pub mod encode;
mod git;
pub mod guest_path;
pub mod left;
mod mtime;
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

/// Longest path inside a tree, in bytes. The guest's tar and git open paths whole, and `PATH_MAX` is 4096.
pub const PATH_BYTES_MAX: usize = 4000;
/// Most entries of a tree in either direction.
pub const ENTRIES_MAX: u64 = 5_000_000;
