//! Contains one golden per message on the wire, so that a change shows in review, and the table of
//! error kinds.

mod daemon;
mod frames;
mod guests;
mod vms;

use expect_test::{Expect, expect};
use fcd::testing::api::Call;
use fcd::testing::api::fault::Fault;
use fcd::testing::api::op::*;
use fcd::testing::api::vm::*;
use fcd::testing::error::{Error, Kind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fmt::Write;

/// Serializes a message and checks that it parses back to the same value.
pub fn line<T: Serialize + DeserializeOwned>(message: &T) -> String {
    let text = serde_json::to_string(message).unwrap();
    let back: T = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(serde_json::to_string(&back).unwrap(), text);
    text
}

#[track_caller]
pub fn call<C: Call>(request: C::Request, reply: C::Reply, golden: Expect) {
    golden.assert_eq(&format!(
        "{}\n{}\n{}\n",
        C::METHOD,
        line(&request),
        line(&reply)
    ));
}

pub fn id<T: std::str::FromStr<Err = Error>>() -> T {
    "0123456789ab".parse().unwrap()
}

pub fn name<T: std::str::FromStr<Err = Error>>(text: &str) -> T {
    text.parse().unwrap()
}

pub fn vm() -> Vm {
    Vm {
        id: id(),
        name: name("web"),
        owner_uid: 1000,
        state: VmState::Running,
        reason: Some("why".into()),
        kernel: None,
        init: fcd::testing::api::vm::Init::Fcd,
        image: name("default"),
        image_digest: Some("sha256:1".into()),
        vcpus: 1,
        mem_mib: 1024,
        disk_bytes: 4096,
        work_disk_bytes: None,
        disk_bytes_per_s: Some(1 << 20),
        disk_ops_per_s: None,
        net_rx_bytes_per_s: None,
        net_tx_bytes_per_s: None,
        net: fcd::testing::api::vm::Net::Nat,
        ports: vec![fcd::testing::api::port::Port {
            host_addr: [127, 0, 0, 1].into(),
            host_port: 8080,
            guest_port: 80,
            protocol: fcd::testing::api::port::Protocol::Tcp,
        }],
        auto_ports: Some(fcd::testing::api::port::AutoPorts {
            open: vec![],
            refused: vec![fcd::testing::api::port::RefusedPort {
                guest_port: 3000,
                cause: fcd::testing::api::port::RefusalCause::Conflict,
                reason: "taken".into(),
            }],
        }),
        pending: Some(Pending {
            vcpus: Some(2),
            ..Pending::default()
        }),
        rm: false,
        restart: Restart::Always,
        created_at: 1,
        started_at: Some(2),
        op: Some(id()),
        pid: Some(3),
        ip: Some("10.89.0.2".parse().unwrap()),
        ip6: Some("fdfc:1a2b:3c4d::2".parse().unwrap()),
        ssh_addr: Some("127.0.0.1:22".parse().unwrap()),
        driver: Some("qemu (tcg, microvm)".into()),
        disk_driver: Some("qcow2".into()),
        synced: Some(Synced::Timeout),
        unresponsive: false,
        paused: false,
        balloon_mib: Some(512),
        workspace: Some(WorkspaceInfo {
            guest_path: "/root/x".into(),
            workdir: "/root/x/y".into(),
            state: WorkspaceState::Incomplete,
            readonly: true,
            entries: 4,
            bytes: 5,
            prepared_at: 6,
        }),
        host_name: Some("build".parse().unwrap()),
        dns: vec!["1.1.1.1".parse().unwrap()],
        commands: fcd::testing::api::vm::CommandDefaults {
            user: Some("dev".into()),
            workdir: Some("/srv/app".into()),
            env: vec!["A".into()],
        },
        labels: serde_json::from_str(r#"{"ci":"yes"}"#).unwrap(),
    }
}

pub fn fault() -> Fault {
    Fault {
        op: Some(id()),
        ..Fault::from(Error::new(Kind::PoolFull, "the queue is full").hint("try again"))
    }
}

fn progress() -> Progress {
    Progress {
        stage: "copy".into(),
        done: Some(1),
        total: Some(2),
        unit: Some("bytes".into()),
        parts: vec![fcd::testing::api::op::Part {
            name: "3f1d2a4b5c6d".into(),
            state: fcd::testing::api::op::PartState::Downloading,
            done: 1,
            total: 2,
        }],
        parts_total: Some(2),
    }
}

fn op() -> Op {
    Op {
        id: id(),
        method: "vm.start".into(),
        vm: Some(id()),
        owner_uid: 1000,
        state: OpState::Failed,
        may_cancel: true,
        progress: progress(),
        started_at: 1,
        ended_at: Some(2),
        result: Some(serde_json::json!({"vm": 1})),
        error: Some(fault()),
    }
}

fn request() -> VmRequest {
    VmRequest { vm: "web".into() }
}

fn reply() -> VmReply {
    VmReply {
        vm: Vm {
            workspace: None,
            pending: None,
            ..vm()
        },
    }
}

#[test]
fn every_method_has_a_golden() {
    let declared: BTreeSet<&str> = fcd::testing::api::table::calls()
        .map(|call| call.method)
        .collect();
    let goldens = [
        include_str!("daemon.rs"),
        include_str!("guests.rs"),
        include_str!("vms.rs"),
        include_str!("../event_wire.rs"),
    ];
    let goldens: BTreeSet<&str> = goldens
        .into_iter()
        .flat_map(str::lines)
        .map(str::trim_start)
        .collect();
    let missing: Vec<_> = declared.difference(&goldens).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The documented table gives, for each error kind, its code, `fcctl`'s exit status, and whether a
/// retry can help.
#[test]
fn kind_table_golden() {
    let mut table = String::from("| kind | code | exit | try again |\n|---|---|---|---|\n");
    for kind in Kind::ALL {
        let code = kind.code();
        let shown = serde_json::to_value(code).unwrap();
        let again = if kind.retryable() { "yes" } else { "" };
        writeln!(
            table,
            "| {} | {} | {} | {again} |",
            kind.name(),
            shown.as_str().unwrap(),
            code.exit_status()
        )
        .unwrap();
    }
    expect![[r#"
        | kind | code | exit | try again |
        |---|---|---|---|
        | vm_not_found | not_found | 3 |  |
        | image_not_found | not_found | 3 |  |
        | kernel_not_found | not_found | 3 |  |
        | snapshot_not_found | not_found | 3 |  |
        | operation_not_found | not_found | 3 |  |
        | session_not_found | not_found | 3 |  |
        | workspace_not_found | not_found | 3 |  |
        | reference_not_found | not_found | 3 |  |
        | path_not_found | not_found | 3 |  |
        | name_taken | already_exists | 4 |  |
        | target_exists | already_exists | 4 |  |
        | port_taken | already_exists | 4 |  |
        | invalid_argument | invalid_argument | 2 |  |
        | ambiguous_prefix | invalid_argument | 2 |  |
        | invalid_config | invalid_argument | 2 |  |
        | invalid_request | invalid_argument | 2 |  |
        | frame_too_large | invalid_argument | 2 |  |
        | method_not_found | invalid_argument | 2 |  |
        | invalid_guest_path | invalid_argument | 2 |  |
        | invalid_tree | invalid_argument | 2 |  |
        | invalid_image | invalid_argument | 2 |  |
        | wrong_state | wrong_state | 1 |  |
        | workspace_incomplete | wrong_state | 1 |  |
        | busy | busy | 4 | yes |
        | pool_full | busy | 4 | yes |
        | connection_limit | busy | 4 | yes |
        | operation_limit | busy | 4 | yes |
        | registry_busy | busy | 4 | yes |
        | shutting_down | busy | 4 | yes |
        | conflict | conflict | 4 |  |
        | idempotency_conflict | conflict | 4 |  |
        | superseded | conflict | 4 |  |
        | exhausted | exhausted | 1 |  |
        | vm_limit | exhausted | 1 |  |
        | memory_limit | exhausted | 1 |  |
        | guest_unavailable | guest_unavailable | 1 | yes |
        | guest_lost | guest_unavailable | 1 | yes |
        | host_key_mismatch | guest_unavailable | 1 |  |
        | guest_command_failed | guest_unavailable | 1 |  |
        | timeout | timeout | 124 | yes |
        | transfer_idle | timeout | 124 | yes |
        | boot_timeout | timeout | 124 | yes |
        | cancelled | cancelled | 130 |  |
        | host | host | 1 |  |
        | disk_full | host | 1 |  |
        | command_missing | host | 1 |  |
        | command_failed | host | 1 |  |
        | store_read_only | host | 1 |  |
        | store_refused | host | 1 |  |
        | vmm_failed | host | 1 |  |
        | registry_unreachable | host | 1 | yes |
        | registry_invalid | host | 1 |  |
        | denied | denied | 1 |  |
        | registry_denied | denied | 1 |  |
        | registry_untrusted | denied | 1 |  |
        | unsupported | unsupported | 1 |  |
        | version_mismatch | unsupported | 1 |  |
        | stream_incomplete | conflict | 4 | yes |
        | internal | internal | 1 |  |
    "#]]
    .assert_eq(&table);
}
