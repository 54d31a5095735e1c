//! Kernels that VMs boot instead of their image's.

use super::calls;
use crate::ids::KernelName;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    pub name: KernelName,
    /// `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// In its initramfs; what else a guest needs to come up is built in.
    pub modules: Vec<String>,
    /// Seconds since the epoch.
    pub imported_at: u64,
    /// What it takes on the host.
    pub bytes: u64,
    /// VMs that boot it.
    pub vms: u64,
}

/// For root and the daemon's own uid: the daemon reads the files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelImportRequest {
    /// An ELF file (`vmlinux`) or a bzImage (`vmlinuz`) on the daemon's host; absolute.
    pub path: PathBuf,
    /// From its version when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<KernelName>,
    /// The directory of its `modules.dep`; `/lib/modules/VERSION` when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelRequest {
    pub kernel: KernelName,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelReply {
    pub kernel: Kernel,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelListReply<K = Kernel> {
    /// In the order of their names.
    pub kernels: Vec<K>,
    /// There are more: ask again with `after` set to this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelDeleteReply {
    pub deleted: KernelName,
}

calls! {
    /// An operation; hang-up cancels it. A kernel of that name must not exist.
    KernelImport = "kernel.import" (KernelImportRequest) -> KernelReply;
    KernelList = "kernel.list" (super::page::ListRequest) -> KernelListReply;
    KernelShow = "kernel.show" (KernelRequest) -> KernelReply;
    /// Refused while VMs boot it.
    KernelDelete = "kernel.delete" (KernelRequest) -> KernelDeleteReply;
}

super::page::list_calls! { KernelList: kernels of Kernel; }
