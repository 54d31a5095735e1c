//! Why a cancel token fired.

use std::fmt;

/// Why a [`Cancel`](super::Cancel) token fired. Code decides by the variant. The text is for
/// people: messages show it after "cancelled: ".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelCause {
    /// Somebody asked for exactly this, for example with `fcctl op cancel`.
    Requested,
    CallerHungUp,
    /// A signal ended `fcctl`.
    Interrupted,
    VmStopped,
    VmKilled,
    VmRestarted,
    VmDeleted,
    /// The VMM ended without being asked to. The text says how, as the VM's reason does.
    VmmEnded(String),
    /// Guests whose disks cannot grow are paused when this happens.
    HostDiskFull,
    /// A transfer moved fewer bytes than the configuration demands.
    TooSlow,
    /// A forced request does not wait for a graceful one.
    Forced,
    /// The operation that began this one was cancelled.
    ParentCancelled,
    DaemonStops,
    /// The command of the guest, or the call, has ended.
    CommandEnded,
    /// What the token belongs to has ended. For tokens that are used as events.
    Finished,
}

impl fmt::Display for CancelCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CancelCause::Requested => "op cancel was asked for",
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
            CancelCause::ParentCancelled => "what it was for was cancelled",
            CancelCause::DaemonStops => "the daemon is shutting down",
            CancelCause::CommandEnded => "the command has ended",
            CancelCause::Finished => "it has ended",
        })
    }
}

/// Callers find the cause as the source of a `cancelled` error.
impl std::error::Error for CancelCause {}
