//! Workspaces: a tree goes in, a patch or a tree comes out. The caller packs and unpacks; the daemon relays.
//!
//! # The stream
//! In either direction the FIFO carries chunks: a length as four bytes, big-endian, and so many bytes, at most
//! [`CHUNK_BYTES_MAX`]. A chunk of length 0 ends the payload; what follows it up to the end of file is one JSON
//! [`Trailer`]. A stream without a trailer that fits its payload is never taken for a finished one.
//!
//! # The payload of an import
//! One line `fcd-import 1 <meta_bytes>\n`, then `meta_bytes` bytes of a tar archive for the guest-side script
//! (git objects, index entries, the list of what is sent), then a tar archive of the tree itself.
//!
//! # The payload of an export
//! One line `fcd-export 1 <count> <bytes>\n`, then so many bytes of records that name what could not be brought back:
//! a letter (`r`: the `.git` of a repository made in the guest, `s`: files in a submodule or in a repository of the
//! caller's that was not sent, `n`: a name that git refuses), a blank, the path, NUL. The list is cut where it is too
//! long, `count` is of all. Then the patch, or a tar. The guest writes all of it.

use super::calls;
use super::vm::Vm;
use serde::{Deserialize, Serialize};

pub const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of the trailer's JSON.
pub const TRAILER_BYTES_MAX: usize = 4096;

/// What the sender says it sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trailer {
    /// Entries of the tree: files, links and directories that were sent as such. 0 in an export, where nobody on the
    /// host has looked at the payload.
    pub entries: u64,
    /// Bytes of the payload.
    pub bytes: u64,
    /// Of the payload, hexadecimal.
    pub sha256: String,
}

/// With one descriptor: the read end of a FIFO. An operation; hang-up cancels it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    pub vm: String,
    /// Absolute, below one of the allowed roots; `/root/<name of the tree>` or so, chosen by the caller.
    pub guest_path: String,
    /// Below `guest_path`, relative: where commands start. Empty: `guest_path` itself.
    #[serde(default)]
    pub subdir: String,
    #[serde(default)]
    pub readonly: bool,
    /// Files that the guest changed since the last import are replaced too.
    #[serde(default)]
    pub overwrite: bool,
    /// Answer `busy` when another import or export of this VM is under way.
    #[serde(default)]
    pub no_wait: bool,
    /// For the progress bar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_expected: Option<u64>,
    /// An ordinary tar, whose paths nobody checked: no list of what is sent comes with it.
    #[serde(default)]
    pub raw_tar: bool,
}

/// The guest is ready for the stream; these paths it changed since the last import and keeps, so that the
/// caller leaves them out. Each is percent-encoded where its bytes are no printable ASCII, and `%` itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    pub keep: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareReply {
    pub vm: Vm,
    /// Changed in the guest and kept, encoded as in [`Ready`].
    pub kept: Vec<String>,
    pub entries: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportKind {
    /// A binary git patch against what was sent.
    Patch,
    /// A tar of the tree as it stands: what was sent and what git does not ignore.
    Tree,
}

/// With one descriptor: the write end of a FIFO. An operation; hang-up cancels it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRequest {
    pub vm: String,
    pub kind: ExportKind,
    #[serde(default)]
    pub no_wait: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportReply {
    /// Bytes of the payload. What they change is for the receiver to count: the guest's word is not passed on.
    pub bytes: u64,
}

calls! {
    WorkspacePrepare = "workspace.prepare" (PrepareRequest) -> PrepareReply;
    WorkspaceExport = "workspace.export" (ExportRequest) -> ExportReply;
}
