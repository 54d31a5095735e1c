//! The enumerations in calls about VMs: states and settings.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The VM was never started.
    Created,
    Starting,
    Running,
    Stopping,
    Stopped,
    Deleting,
    Failed,
}

impl VmState {
    pub const ALL: [VmState; 7] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Deleting,
        VmState::Failed,
    ];
    pub const fn name(self) -> &'static str {
        match self {
            VmState::Created => "created",
            VmState::Starting => "starting",
            VmState::Running => "running",
            VmState::Stopping => "stopping",
            VmState::Stopped => "stopped",
            VmState::Deleting => "deleting",
            VmState::Failed => "failed",
        }
    }
}

/// The network that a guest can reach (`--net`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Net {
    /// The guest can use DNS and make outgoing connections through the host's address.
    #[default]
    Nat,
    /// The guest can reach nothing. The host can still reach the guest by SSH, so commands and
    /// copies work.
    None,
}

/// The first process of a guest that boots with a guest runtime (`--init`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// fcd's own init, which starts nothing but an SSH server.
    #[default]
    Fcd,
    /// The image's init, such as systemd. fcd's SSH server runs beside it.
    Image,
}

/// When the daemon starts a VM by itself (`--restart`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restart {
    /// Never.
    #[default]
    No,
    /// When the daemon starts after a reboot of the host that has ended the VM. A VM that was not
    /// running then is not started.
    Always,
}

impl Restart {
    pub fn is_no(&self) -> bool {
        *self == Self::No
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Always => "always",
        }
    }
}

/// The result of syncing the guest's file systems before its VMM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Synced {
    Yes,
    /// The guest was not asked to sync, because it was killed or had not booted.
    No,
    /// The guest was asked to sync but did not respond in time.
    Timeout,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkspaceState {
    /// An import began but was not completed and verified.
    Incomplete,
    Complete,
}
