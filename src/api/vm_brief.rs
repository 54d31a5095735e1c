//! The members of a VM that a list shows.

use super::port::Port;
use super::vm_enums::{VmState, WorkspaceState};
use crate::ids::{ImageRef, Labels, VmId, VmName};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::net::{Ipv4Addr, Ipv6Addr};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspaceInfo {
    pub guest_path: String,
    /// The working directory of commands: `guest_path` or a directory below it.
    pub workdir: String,
    pub state: WorkspaceState,
    pub readonly: bool,
    /// The number of entries in the last complete import.
    pub entries: u64,
    pub bytes: u64,
    /// When the last import was completed or, if it is incomplete, when it began. In seconds since
    /// the epoch.
    pub prepared_at: u64,
}

/// The members of a VM that `fcctl ps` shows. They take about a fifth of the bytes of a
/// [`super::vm::Vm`] and have the same values, except for the digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmBrief<'a> {
    pub id: Cow<'a, VmId>,
    pub name: Cow<'a, VmName>,
    pub state: VmState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Cow<'a, str>>,
    pub image: Cow<'a, ImageRef>,
    /// The first digits of the image's digest, as [`super::image::short_digest`] returns
    /// them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub short_digest: Option<Cow<'a, str>>,
    pub vcpus: u32,
    pub mem_mib: u64,
    #[serde(default)]
    pub disk_bytes: u64,
    pub created_at: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unresponsive: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    #[serde(default, skip_serializing_if = "<[Port]>::is_empty")]
    pub ports: Cow<'a, [Port]>,
    /// The guest ports that have listeners and are not forwarded automatically.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused_ports: Vec<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip6: Option<Ipv6Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<WorkspaceInfo>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}
