//! The causes for which a cancel token fires.

use std::fmt;

/// The cause for which a [`Cancel`](super::Cancel) token fired. Code branches on the variant.
/// Messages show the text to people, after "cancelled: ".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelCause {
    /// A user cancelled the operation, for example with `fcctl op cancel`.
    Requested,
    CallerHungUp,
    /// A signal ended `fcctl`.
    Interrupted,
    VmStopped,
    VmKilled,
    VmRestarted,
    VmDeleted,
    /// The VMM ended unexpectedly. The text describes the end, and is also the VM's `reason`.
    VmmEnded(String),
    /// The host has no space left for the disks of guests, so they are paused.
    HostDiskFull,
    /// A transfer was slower than the configured minimum.
    TooSlow,
    /// A forced request replaced a graceful one.
    Forced,
    /// The operation that started this one was cancelled.
    ParentCancelled,
    DaemonStops,
    /// The command in the guest or the call has ended.
    CommandEnded,
    /// The owner of the token has ended. Tokens that serve as events fire with this cause.
    Finished,
}

impl fmt::Display for CancelCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CancelCause::Requested => "op cancel was requested",
            CancelCause::CallerHungUp => "the caller hung up",
            CancelCause::Interrupted => "interrupted",
            CancelCause::VmStopped => "the VM was stopped",
            CancelCause::VmKilled => "the VM was killed",
            CancelCause::VmRestarted => "the VM was restarted",
            CancelCause::VmDeleted => "the VM was deleted",
            CancelCause::VmmEnded(how) => how,
            CancelCause::HostDiskFull => "the host's disk is full",
            CancelCause::TooSlow => "the transfer is too slow",
            CancelCause::Forced => "forced",
            CancelCause::ParentCancelled => "the operation that needed it was cancelled",
            CancelCause::DaemonStops => "the daemon is shutting down",
            CancelCause::CommandEnded => "the command has ended",
            CancelCause::Finished => "no longer needed",
        })
    }
}

/// Callers find the cause as the source of a `cancelled` error.
impl std::error::Error for CancelCause {}
