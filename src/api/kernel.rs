//! Kernels that VMs can boot instead of their image's own.

use super::call::calls;
use crate::ids::KernelName;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    pub name: KernelName,
    /// The kernel's version, such as `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// The modules in its initramfs. Everything else that a guest needs to boot is built in.
    pub modules: Vec<String>,
    /// When the kernel was imported, in seconds since the epoch.
    pub imported_at: u64,
    /// The space that the kernel uses on the host.
    pub bytes: u64,
    /// The number of VMs that are set to boot the kernel.
    pub vms: u64,
}

/// The daemon reads the files with its own privileges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelImportRequest {
    /// The absolute path of an ELF file (`vmlinux`) or a bzImage (`vmlinuz`) on the daemon's host.
    pub path: PathBuf,
    /// The default name is derived from the version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<KernelName>,
    /// The directory that contains `modules.dep`; `/lib/modules/VERSION` if not given.
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
    /// The kernels, sorted by name.
    pub kernels: Vec<K>,
    /// The cursor of the next page, or None if there are no more items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelDeleteReply {
    pub deleted: KernelName,
}

calls! {
    /// Only root and the daemon's user may import, because the daemon reads the files with its own
    /// privileges. Fails if a kernel of that name exists.
    KernelImport = "kernel.import" (KernelImportRequest) -> KernelReply
        [Privileged, Keyed, CancelOperation, NoFds, feature "kernels"];
    KernelList = "kernel.list" (super::page::ListRequest) -> KernelListReply
        [Anybody, Unkeyed, Nothing, NoFds, feature "kernels"];
    KernelShow = "kernel.show" (KernelRequest) -> KernelReply [Anybody, Unkeyed, Nothing, NoFds, feature "kernels"];
    /// Fails with `conflict` while a VM or a snapshot uses the kernel.
    KernelDelete = "kernel.delete" (KernelRequest) -> KernelDeleteReply
        [Privileged, Unkeyed, Nothing, NoFds, feature "kernels"];
}

super::page::list_calls! { KernelList: kernels of Kernel; }
