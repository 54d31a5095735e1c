//! Workspaces: importing a tree into a guest, and exporting a patch or a tree. The caller packs and
//! unpacks; the daemon only relays the bytes.
//!
//! # The stream
//! In either direction the FIFO carries chunks: a length (four bytes, big-endian, at most
//! [`CHUNK_BYTES_MAX`]) and that many bytes. A chunk of length 0 ends the payload. One JSON
//! [`Trailer`] follows, up to the end of file. A stream without a trailer that matches its payload
//! is incomplete.
//!
//! # The payload of an import
//! One line `fcd-import 1 <meta_bytes>\n`, then `meta_bytes` bytes of a tar archive for the
//! guest-side script (git objects, index entries, the list of what is sent), then a tar archive of
//! the tree itself.
//!
//! # The payload of an export
//! One line `fcd-export 1 <count> <bytes>\n`, then `bytes` bytes of records that name paths that
//! could not be exported. A record is a letter, a space, the path and NUL. The letters are `r` (the
//! `.git` of a repository that was created in the guest), `s` (files in a submodule, or in a
//! repository of the caller that was not sent) and `n` (a name that git refuses). A long list is
//! truncated, but `count` includes the omitted records. The patch or the tar follows. The guest
//! writes the whole payload.

use super::call::calls;
use super::vm::Vm;
use serde::{Deserialize, Serialize};

pub const CHUNK_BYTES_MAX: usize = 256 * 1024;
/// The longest trailer, in bytes of JSON.
pub const TRAILER_BYTES_MAX: usize = 4096;

/// The totals that the sender claims. The receiver compares them with what has arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trailer {
    /// The number of files, links and directories in the tree. 0 in an export, because the daemon
    /// does not inspect the payload.
    pub entries: u64,
    /// The size of the payload.
    pub bytes: u64,
    /// The digest of the payload in hexadecimal.
    pub sha256: String,
}

/// One descriptor is passed: the read end of a FIFO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    pub vm: String,
    /// An absolute path below one of the allowed roots, such as `/root/<name of the tree>`.
    pub guest_path: String,
    /// The working directory of commands, relative to `guest_path`. Empty means `guest_path`
    /// itself.
    #[serde(default)]
    pub subdir: String,
    #[serde(default)]
    pub readonly: bool,
    /// Also replace files that the guest has changed since the last import.
    #[serde(default)]
    pub overwrite: bool,
    /// Fail with `busy` if another import or export of this VM is in progress.
    #[serde(default)]
    pub no_wait: bool,
    /// The expected size, for the progress bar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_expected: Option<u64>,
    /// True if the payload is an ordinary tar. The paths in the tar were not checked, and no list
    /// of its files is sent.
    #[serde(default)]
    pub raw_tar: bool,
}

/// The guest is ready for the stream. It keeps the paths that it has changed since the last import,
/// so the caller leaves them out. In each path, `%` and bytes that are not printable ASCII are
/// percent-encoded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    pub keep: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrepareReply {
    pub vm: Vm,
    /// The paths that the guest has changed and kept, encoded as in [`Ready`].
    pub kept: Vec<String>,
    pub entries: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportKind {
    /// A binary git patch against the tree that was sent.
    Patch,
    /// A tar of the current tree: the files that were sent and those that git does not ignore.
    Tree,
}

/// One descriptor is passed: the write end of a FIFO.
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
    /// The size of the payload. The receiver counts the changes itself, because the guest is not
    /// trusted.
    pub bytes: u64,
}

calls! {
    WorkspacePrepare = "workspace.prepare" (PrepareRequest) -> PrepareReply
        [Owner, Keyed, CancelOperation, TakesFds, feature "workspace"];
    WorkspaceExport = "workspace.export" (ExportRequest) -> ExportReply
        [Owner, Keyed, CancelOperation, TakesFds, feature "workspace"];
}
