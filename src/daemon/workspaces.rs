//! Imports and exports. The VM's lock is held for a moment, to check the state and join its cancel set; the
//! workspace lock is held across the guest I/O, on the operation's own thread; a pool worker pumps.

use super::{Begun, Caller, Daemon, Notes, now_s, to_value};
use crate::api::frame::Note;
use crate::api::vm::WorkspaceState;
use crate::api::workspace::{ExportKind, ExportReply, ExportRequest, PrepareReply, PrepareRequest, Ready, Trailer};
use crate::error::{Error, Kind, Result};
use crate::guest::io::fifo::{self, Direction};
use crate::guest::io::{ChunkSink, ChunkSource, FdSink, FdSource, VecSink};
use crate::guest::{ExecSpec, Script, Sink, Source, Streams, Target, run_script};
use crate::ids::VmId;
use crate::locks::{Cancel, KeyGuard};
use crate::ops::OpHandle;
use crate::pool::Place;
use crate::store::{VmRow, WorkspaceRow};
use crate::workspace::{guest_path, remote};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// No transfer goes on for longer; one that stands still ends after `transfer_idle_s`.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// The guest-side scripts before and after a stream: they hash trees, on slow guests.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(1800);
/// What such a script may print: the names of the files that the guest changed.
const SCRIPT_OUTPUT_BYTES_MAX: usize = 512 * 1024;
/// What the receiving command may print: its complaint.
const COMPLAINT_BYTES_MAX: usize = 8 * 1024;
const TRAILER_DEADLINE: Duration = Duration::from_secs(30);

/// A transfer on its way: what its thread and its worker share.
struct Transfer {
    daemon: Daemon,
    op: Arc<OpHandle>,
    row: VmRow,
    target: Target,
    fifo: OwnedFd,
    /// Of the payload, so far.
    bytes: Arc<AtomicU64>,
}
