mod changes;
mod crash;
mod events;
mod failures;
mod files;
mod turn;
mod vfs;

use super::*;
use crate::api::op::{Op, OpState, Progress};
use crate::api::vm::{RateLimits, VmState, WorkspaceInfo, WorkspaceState};
use crate::error::Kind;
use crate::ids::{OpId, VmId};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::TempDir;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// Returns the ID whose hexadecimal digits are `n`.
fn vm_id(n: u32) -> VmId {
    format!("{n:012x}").parse().unwrap()
}

fn op_id(n: u32) -> OpId {
    format!("{n:012x}").parse().unwrap()
}

fn row(n: u32) -> VmRow {
    VmRow {
        id: vm_id(n),
        name: format!("vm-{n}").parse().unwrap(),
        owner_uid: 1000,
        state: VmState::Created,
        reason: None,
        shape: VmShape {
            runtime: None,
            kernel: None,
            init: crate::api::vm::Init::Fcd,
            image: "default".parse().unwrap(),
            image_digest: None,
            vcpus: 1,
            mem_mib: 512,
            disk_bytes: 1 << 30,
            work_disk_bytes: None,
            net: crate::api::vm::Net::Nat,
            rates: RateLimits::default(),
            labels: crate::ids::Labels::default(),
            commands: crate::api::vm::CommandDefaults::default(),
        },
        ports: Vec::new(),
        auto_ports: None,
        host_name: None,
        dns: Vec::new(),
        pending: None,
        rm: false,
        restart: crate::api::vm::Restart::No,
        created_at: 1,
        started_at: None,
        op: None,
        intent: None,
        generation: 0,
        slot: n,
        identity: None,
        ssh_addr: None,
        tap: None,
        disk_driver: None,
        guest_version: 0,
        driver: None,
        host_key: None,
        synced: None,
        unresponsive: false,
        paused: false,
        has_balloon: false,
        balloon_mib: None,
    }
}

fn workspace(n: u32) -> WorkspaceRow {
    WorkspaceRow {
        vm: vm_id(n),
        info: WorkspaceInfo {
            guest_path: "/root/x".into(),
            workdir: "/root/x".into(),
            state: WorkspaceState::Incomplete,
            readonly: false,
            entries: 0,
            bytes: u64::MAX,
            prepared_at: 2,
        },
        generation: 0,
    }
}

fn op(n: u32, state: OpState) -> Op {
    Op {
        id: op_id(n),
        method: "vm.start".into(),
        vm: None,
        owner_uid: 0,
        state,
        may_cancel: true,
        progress: Progress::default(),
        started_at: u64::from(n),
        ended_at: state.has_ended().then_some(u64::from(n)),
        result: None,
        error: None,
    }
}

fn state(store: &Store) -> State {
    store.read(State::clone)
}

fn put(store: &Store, n: u32) -> Result<Ticket> {
    store
        .change(|tx| tx.put_vm(row(n)))
        .map(|((), ticket)| ticket)
}

/// Closes `store`, opens it again, and checks that the disk equals the memory of the closed store.
/// Returns the new store.
#[track_caller]
fn check_reopened(store: Store, dir: &Path) -> Store {
    let memory = state(&store);
    store.close();
    // A new listener gets the same snapshot as before.
    let Start::Snapshot { vms, .. } = store.subscribe(None, |_| true).unwrap().1 else {
        panic!("not a snapshot")
    };
    let seen = |row: &Arc<VmRow>| Seen {
        row: row.clone(),
        workspace: memory.workspace(&row.id).cloned(),
    };
    assert_eq!(vms, memory.vms().map(seen).collect::<Vec<_>>());
    let again = Store::open(dir).unwrap();
    assert_eq!(state(&again), memory);
    again
}
