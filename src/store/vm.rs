//! Table `vms`: one row per VM, which holds the VM's state for as long as the VM exists.

use super::sql::{self, json};
use crate::api::port::{AutoPorts, Port};
use crate::api::vm::{CommandDefaults, Init, Net, Pending, RateLimits, Restart, Synced, VmState};
use crate::host::process::Identity;
use crate::ids::{HostName, ImageRef, KernelName, Labels, OpId, RuntimeId, VmId, VmName};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The transition that follows the one in progress. It is recorded in advance, so that no other
/// request gets in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// A start follows, because the stop in progress is the first half of a restart.
    Restart,
}

/// The tap of a VM that was started on the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TapFact {
    pub name: String,
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The guest's IPv6 address, if it has one.
    pub address6: Option<Ipv6Addr>,
}

/// The image, sizes, settings and labels of a VM. A fork and a restore of its snapshot have the
/// same shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmShape {
    pub image: ImageRef,
    /// The digest of the image when the VM was created. `None` if an earlier fcd created the VM.
    pub image_digest: Option<String>,
    /// The kernel that the VM boots instead of the image's kernel, if one was chosen.
    pub kernel: Option<KernelName>,
    /// The guest runtime of the last boot, if the image has no init of its own.
    pub runtime: Option<RuntimeId>,
    pub init: Init,
    pub vcpus: u32,
    pub mem_mib: u64,
    pub disk_bytes: u64,
    pub work_disk_bytes: Option<u64>,
    pub rates: RateLimits,
    pub net: Net,
    pub labels: Labels,
    /// The values of the variables are in a file of the VM's directory.
    pub commands: CommandDefaults,
}

/// A VM. Any change of its members needs a new schema version: see `schema.rs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmRow {
    pub id: VmId,
    /// The VM's name, which is unique among the rows.
    pub name: VmName,
    pub owner_uid: u32,
    pub state: VmState,
    pub reason: Option<String>,
    #[serde(flatten)]
    pub shape: VmShape,
    /// The VM's published ports. No two ports overlap, even of different VMs, and no port is 0.
    pub ports: Vec<Port>,
    /// The automatic forwards, if the owner wants them. The open ports are also in `ports`. They
    /// are forgotten when the VM ends, at the latest at its next start.
    pub auto_ports: Option<AutoPorts>,
    /// The host name of the guest, if it is not the VM's name.
    pub host_name: Option<HostName>,
    /// The name servers that the guest queries. If the list is empty, the guest queries fcd's.
    pub dns: Vec<IpAddr>,
    pub pending: Option<Pending>,
    pub rm: bool,
    pub restart: Restart,
    /// The time when the VM was created, in seconds since the epoch.
    pub created_at: u64,
    pub started_at: Option<u64>,
    /// The operation that owns the VM now.
    pub op: Option<OpId>,
    pub intent: Option<Intent>,
    /// The VM's generation, which grows by one with every boot.
    pub generation: u64,
    /// A small number that is unique among the rows. The VMM's uid is a base plus this slot.
    pub slot: u32,
    pub identity: Option<Identity>,
    pub ssh_addr: Option<SocketAddr>,
    /// The tap of the last start. `None` with user-mode networking.
    pub tap: Option<TapFact>,
    pub disk_driver: Option<String>,
    /// The version of the init on the VM's root disk (`image.json`). 0 if the image has no
    /// version or the VM has no disk yet.
    pub guest_version: u32,
    pub driver: Option<String>,
    /// The guest's public host key, raw (RFC 4253, 6.6).
    pub host_key: Option<Vec<u8>>,
    pub synced: Option<Synced>,
    /// True if the running VMM does not respond.
    pub unresponsive: bool,
    /// True if the owner of the running VM wants it to be paused.
    pub paused: bool,
    /// True if, at the last start, the VMM had a balloon and the initramfs had the balloon driver.
    pub has_balloon: bool,
    /// The memory, in MiB, that the owner lets the running VM keep.
    pub balloon_mib: Option<u64>,
}

impl VmRow {
    /// Removes published ports, also those that fcd added automatically.
    pub fn remove_ports(&mut self, ports: &[Port]) {
        self.ports.retain(|port| !ports.contains(port));
        if let Some(auto) = &mut self.auto_ports {
            auto.open.retain(|port| !ports.contains(port));
        }
    }

    /// Forgets the guest's listeners, because the guest has ended.
    pub fn forget_listeners(&mut self) {
        if let Some(auto) = &mut self.auto_ports {
            let AutoPorts { open, .. } = std::mem::take(auto);
            self.ports.retain(|port| !open.contains(port));
        }
    }
}

pub(super) const CREATE: &str = "CREATE TABLE vms (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, slot INTEGER NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;";

/// The migration to schema version 2, which adds `net` and `tap`.
pub(super) const ADD_NETWORK: &str =
    "UPDATE vms SET body = json_set(body, '$.net', 'nat', '$.tap', json('null'));";

/// The migration to schema version 3, which adds `unresponsive`.
pub(super) const ADD_UNRESPONSIVE: &str =
    "UPDATE vms SET body = json_set(body, '$.unresponsive', json('false'));";

/// The migration to schema version 4, which adds `work_disk_bytes`, `ports`, `guest_version` and
/// `paused`.
pub(super) const ADD_CAPABILITIES: &str = "UPDATE vms SET body = json_set(body, '$.work_disk_bytes', json('null'), '$.ports', json('[]'), '$.guest_version', 0, '$.paused', json('false'));";

/// The migration to schema version 6, which adds `rates`, `has_balloon` and `balloon_mib`.
pub(super) const ADD_RATES: &str = "UPDATE vms SET body = json_set(body, '$.rates', json('{}'), '$.has_balloon', json('false'), '$.balloon_mib', json('null'));";

/// The migration to schema version 7, which adds `kernel`.
pub(super) const ADD_KERNEL: &str =
    "UPDATE vms SET body = json_set(body, '$.kernel', json('null'));";

/// The migration to schema version 9, which adds `runtime` to VMs and snapshots.
pub(super) const ADD_RUNTIME: &str =
    "UPDATE vms SET body = json_set(body, '$.runtime', json('null'));
     UPDATE snapshots SET body = json_set(body, '$.runtime', json('null'));";

/// The migration to schema version 10, which adds `image_digest` to VMs and snapshots.
pub(super) const ADD_IMAGE_DIGEST: &str =
    "UPDATE vms SET body = json_set(body, '$.image_digest', json('null'));
     UPDATE snapshots SET body = json_set(body, '$.image_digest', json('null'));";

/// The migration to schema version 11, which adds `init` to VMs and snapshots.
pub(super) const ADD_INIT: &str = "UPDATE vms SET body = json_set(body, '$.init', 'fcd');
     UPDATE snapshots SET body = json_set(body, '$.init', 'fcd');";

/// The migration to schema version 12, which adds `labels` to VMs and snapshots.
pub(super) const ADD_LABELS: &str = "UPDATE vms SET body = json_set(body, '$.labels', json('{}'));
     UPDATE snapshots SET body = json_set(body, '$.labels', json('{}'));";

/// The migration to schema version 13, which adds `restart`.
pub(super) const ADD_RESTART: &str = "UPDATE vms SET body = json_set(body, '$.restart', 'no');";

/// The migration to schema version 14, which adds `host_name` and `dns`.
pub(super) const ADD_HOST_NAME: &str =
    "UPDATE vms SET body = json_set(body, '$.host_name', json('null'), '$.dns', json('[]'));";

/// The migration to schema version 15, which adds `commands` to VMs and snapshots.
pub(super) const ADD_COMMANDS: &str = "UPDATE vms SET body = json_set(body, '$.commands', json('{\"user\":null,\"workdir\":null,\"env\":[]}'));
     UPDATE snapshots SET body = json_set(body, '$.commands', json('{\"user\":null,\"workdir\":null,\"env\":[]}'));";

/// The migration to schema version 16, which adds `address6` to taps.
pub(super) const ADD_IPV6: &str = "UPDATE vms SET body = json_set(body, '$.tap.address6', json('null')) WHERE json_type(body, '$.tap') = 'object';";
/// The migration to schema version 17, which adds `auto_ports`.
pub(super) const ADD_AUTO_PORTS: &str =
    "UPDATE vms SET body = json_set(body, '$.auto_ports', json('null'));";

pub(super) fn save(c: &Connection, id: &VmId, row: Option<&VmRow>) -> rusqlite::Result<()> {
    let Some(row) = row else {
        return sql::delete(c, "DELETE FROM vms WHERE id = ?1", [id.as_str()]);
    };
    let body = json(row)?;
    let columns = params![id.as_str(), row.name.as_str(), row.slot, body];
    // Most changes keep the name and the slot. An upsert would write the indexes of both again even
    // then.
    let updated = c
        .prepare_cached("UPDATE vms SET body = ?4 WHERE id = ?1 AND name = ?2 AND slot = ?3")?
        .execute(columns)?;
    if updated > 0 {
        return Ok(());
    }
    // Never use OR REPLACE: it would silently remove another VM of the same name.
    c.prepare_cached(
        "INSERT INTO vms (id, name, slot, body) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET name = excluded.name, slot = excluded.slot, body = excluded.body",
    )?
    .execute(columns)
    .map(drop)
}

pub(super) fn load(c: &Connection) -> crate::error::Result<Vec<VmRow>> {
    sql::load(c, "vms", "SELECT id, body FROM vms ORDER BY id")
}
