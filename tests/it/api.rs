//! One golden per message on the wire, so that a change shows in review, and the table of error
//! kinds.

use expect_test::{Expect, expect};
use fcd::api::daemon::*;
use fcd::api::exec::*;
use fcd::api::fault::Fault;
use fcd::api::frame::*;
use fcd::api::image::*;
use fcd::api::kernel::*;
use fcd::api::op::*;
use fcd::api::snapshot::*;
use fcd::api::vm::*;
use fcd::api::workspace::*;
use fcd::api::{Call, Empty};
use fcd::error::{Error, Kind};
use serde::{Serialize, de::DeserializeOwned};
use std::borrow::Cow;
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

fn brief() -> VmBrief<'static> {
    VmBrief {
        id: Cow::Owned(id()),
        name: Cow::Owned(name("web")),
        state: VmState::Running,
        reason: Some("why".into()),
        image: Cow::Owned(name("default")),
        vcpus: 1,
        mem_mib: 1024,
        created_at: 1,
        unresponsive: false,
        paused: true,
        workspace: Some(WorkspaceInfo {
            guest_path: "/root/app".into(),
            workdir: "/root/app/src".into(),
            state: WorkspaceState::Complete,
            readonly: false,
            entries: 12,
            bytes: 4096,
            prepared_at: 2,
        }),
    }
}

pub fn vm() -> Vm {
    Vm {
        id: id(),
        name: name("web"),
        owner_uid: 1000,
        state: VmState::Running,
        reason: Some("why".into()),
        kernel: None,
        image: name("default"),
        vcpus: 1,
        mem_mib: 1024,
        disk_bytes: 4096,
        work_disk_bytes: None,
        disk_bytes_per_s: Some(1 << 20),
        disk_ops_per_s: None,
        net_rx_bytes_per_s: None,
        net_tx_bytes_per_s: None,
        net: fcd::api::vm::Net::Nat,
        ports: vec![fcd::api::port::Port {
            host_addr: [127, 0, 0, 1].into(),
            host_port: 8080,
            guest_port: 80,
            protocol: fcd::api::port::Protocol::Tcp,
        }],
        pending: Some(Pending {
            vcpus: Some(2),
            ..Pending::default()
        }),
        rm: false,
        created_at: 1,
        started_at: Some(2),
        op: Some(id()),
        pid: Some(3),
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

fn image() -> Image {
    Image {
        name: name("default"),
        disk_bytes: 1,
        allocated_bytes: 2,
        kernel: "Linux 6.1".into(),
        os: "Debian".into(),
        built_at: 3,
        vms: 4,
        owner_uid: Some(1000),
    }
}

fn request() -> VmRequest {
    VmRequest { vm: "web".into() }
}
fn stop() -> VmStopRequest {
    VmStopRequest {
        vm: "web".into(),
        force: true,
        timeout_ms: Some(7),
    }
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
fn vm_golden_with_every_member() {
    expect![[r#"{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":{"vcpus":2,"mem_mib":null,"disk_bytes":null,"disk_bytes_per_s":null,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":{"guest_path":"/root/x","workdir":"/root/x/y","state":"incomplete","readonly":true,"entries":4,"bytes":5,"prepared_at":6}}"#]].assert_eq(&line(&vm()));
}

#[test]
fn vm_goldens() {
    call::<VmCreate>(
        VmCreateRequest {
            name: Some(name("web")),
            kernel: Some("linux".parse().unwrap()),
            image: Some(name("default")),
            vcpus: Some(1),
            mem_mib: Some(2),
            disk_bytes: Some(3),
            work_disk_bytes: Some(4),
            disk_bytes_per_s: Some(5),
            disk_ops_per_s: Some(0),
            net_rx_bytes_per_s: None,
            net_tx_bytes_per_s: None,
            net: Some(fcd::api::vm::Net::None),
            ports: vm().ports,
            rm: true,
            hold: true,
        },
        reply(),
        expect![[r#"
            vm.create
            {"name":"web","image":"default","kernel":"linux","vcpus":1,"mem_mib":2,"disk_bytes":3,"work_disk_bytes":4,"disk_bytes_per_s":5,"disk_ops_per_s":0,"net":"none","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"rm":true,"hold":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmStart>(
        request(),
        reply(),
        expect![[r#"
            vm.start
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmStop>(
        stop(),
        reply(),
        expect![[r#"
            vm.stop
            {"vm":"web","force":true,"timeout_ms":7}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmRestart>(
        stop(),
        reply(),
        expect![[r#"
            vm.restart
            {"vm":"web","force":true,"timeout_ms":7}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    let stats = VmStats {
        vm: id(),
        name: name("web"),
        at_ms: 1,
        cpu_ns: 2,
        memory_bytes: 3,
        memory_max_bytes: 4,
        disk_read_bytes: Some(5),
        disk_written_bytes: Some(6),
        net_received_bytes: None,
        net_sent_bytes: None,
    };
    call::<VmStatsCall>(
        VmStatsRequest {
            vms: vec!["web".into()],
            ..Default::default()
        },
        VmStatsReply {
            stats: vec![stats],
            next: None,
        },
        expect![[r#"
        vm.stats
        {"vms":["web"]}
        {"stats":[{"vm":"0123456789ab","name":"web","at_ms":1,"cpu_ns":2,"memory_bytes":3,"memory_max_bytes":4,"disk_read_bytes":5,"disk_written_bytes":6,"net_received_bytes":null,"net_sent_bytes":null}]}
    "#]],
    );
    call::<VmPause>(
        request(),
        reply(),
        expect![[r#"
            vm.pause
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmResume>(
        request(),
        reply(),
        expect![[r#"
            vm.resume
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmKill>(
        request(),
        reply(),
        expect![[r#"
            vm.kill
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmDelete>(
        VmDeleteRequest {
            vm: "web".into(),
            force: true,
            if_exists: true,
        },
        VmDeleteReply {
            deleted: Some(id()),
        },
        expect![[r#"
            vm.delete
            {"vm":"web","force":true,"if_exists":true}
            {"deleted":"0123456789ab"}
        "#]],
    );
    call::<VmList>(
        VmListRequest {
            all: true,
            ..Default::default()
        },
        VmListReply {
            vms: vec![],
            next: Some("1763800000-0123456789ab".into()),
        },
        expect![[r#"
            vm.list
            {"all":true}
            {"vms":[],"next":"1763800000-0123456789ab"}
        "#]],
    );
    call::<VmListBrief>(
        VmListRequest {
            all: true,
            brief: true,
            limit: Some(500),
            ..Default::default()
        },
        VmListReply {
            vms: vec![
                brief(),
                VmBrief {
                    reason: None,
                    workspace: None,
                    paused: false,
                    ..brief()
                },
            ],
            next: None,
        },
        expect![[r#"
            vm.list
            {"all":true,"brief":true,"limit":500}
            {"vms":[{"id":"0123456789ab","name":"web","state":"running","reason":"why","image":"default","vcpus":1,"mem_mib":1024,"created_at":1,"paused":true,"workspace":{"guest_path":"/root/app","workdir":"/root/app/src","state":"complete","readonly":false,"entries":12,"bytes":4096,"prepared_at":2}},{"id":"0123456789ab","name":"web","state":"running","image":"default","vcpus":1,"mem_mib":1024,"created_at":1}]}
        "#]],
    );
    call::<VmShow>(
        request(),
        reply(),
        expect![[r#"
            vm.show
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmSet>(
        VmSetRequest {
            vm: "web".into(),
            vcpus: Some(1),
            mem_mib: Some(2),
            disk_bytes: Some(3),
            net_tx_bytes_per_s: Some(0),
            now: true,
            ..VmSetRequest::default()
        },
        reply(),
        expect![[r#"
            vm.set
            {"vm":"web","vcpus":1,"mem_mib":2,"disk_bytes":3,"net_tx_bytes_per_s":0,"now":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmMetrics>(
        request(),
        VmMetricsReply {
            vm: id(),
            name: name("web"),
            driver: Some("firecracker (kvm)".into()),
            metrics: vec![serde_json::json!({"utc_timestamp_ms": 7})],
        },
        expect![[r#"
            vm.metrics
            {"vm":"web"}
            {"vm":"0123456789ab","name":"web","driver":"firecracker (kvm)","metrics":[{"utc_timestamp_ms":7}]}
        "#]],
    );
    call::<VmConnect>(
        VmConnectRequest {
            vm: "web".into(),
            port: 5000,
        },
        VmReply {
            vm: Vm {
                pending: None,
                workspace: None,
                ..vm()
            },
        },
        expect![[r#"
            vm.connect
            {"vm":"web","port":5000}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmBalloon>(
        VmBalloonRequest {
            vm: "web".into(),
            keep_mib: Some(512),
        },
        VmBalloonReply {
            vm: vm(),
            kept_mib: 1024,
        },
        expect![[r#"
            vm.balloon
            {"vm":"web","keep_mib":512}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":{"vcpus":2,"mem_mib":null,"disk_bytes":null,"disk_bytes_per_s":null,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":{"guest_path":"/root/x","workdir":"/root/x/y","state":"incomplete","readonly":true,"entries":4,"bytes":5,"prepared_at":6}},"kept_mib":1024}
        "#]],
    );
    call::<VmLogs>(
        VmLogsRequest {
            vm: "web".into(),
            tail: Some(3),
            follow: true,
        },
        LogsReply { bytes: 4 },
        expect![[r#"
        vm.logs
        {"vm":"web","tail":3,"follow":true}
        {"bytes":4}
    "#]],
    );
    call::<VmWait>(
        VmWaitRequest {
            vm: "web".into(),
            state: Some(VmState::Stopped),
            timeout_ms: Some(5),
        },
        reply(),
        expect![[r#"
            vm.wait
            {"vm":"web","state":"stopped","timeout_ms":5}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmPrune>(
        Empty {},
        VmPruneReply {
            deleted: vec![id()],
        },
        expect![[r#"
        vm.prune
        {}
        {"deleted":["0123456789ab"]}
    "#]],
    );
    call::<VmSshConfig>(
        request(),
        SshConfigReply {
            vm: id(),
            name: name("web"),
            addr: "127.0.0.1:22".parse().unwrap(),
            user: "root".into(),
            private_key: "KEY".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            workdir: None,
        },
        expect![[r#"
            vm.ssh_config
            {"vm":"web"}
            {"vm":"0123456789ab","name":"web","addr":"127.0.0.1:22","user":"root","private_key":"KEY","host_key":"ssh-ed25519 AAAA","workdir":null}
        "#]],
    );
}

#[test]
fn exec_goldens() {
    let size = PtySize { rows: 24, cols: 80 };
    call::<ExecStart>(
        ExecStartRequest {
            vm: "web".into(),
            argv: vec!["ls".into()],
            env: vec![("A".into(), "b".into())],
            workdir: Some("/".into()),
            pty: Some(Pty {
                size,
                term: "xterm".into(),
            }),
            streams: vec![
                Stream::Stdin,
                Stream::Stdout,
                Stream::Stderr,
                Stream::Command,
            ],
            no_wait_children: true,
        },
        ExecReply {
            exit: Exit::Status(3),
        },
        expect![[r#"
            exec.start
            {"vm":"web","argv":["ls"],"env":[["A","b"]],"workdir":"/","pty":{"size":{"rows":24,"cols":80},"term":"xterm"},"streams":["stdin","stdout","stderr","command"],"no_wait_children":true}
            {"exit":{"status":3}}
        "#]],
    );
    call::<ExecResize>(
        ExecResizeRequest {
            session: id(),
            size,
        },
        Empty {},
        expect![[r#"
        exec.resize
        {"session":"0123456789ab","size":{"rows":24,"cols":80}}
        {}
    "#]],
    );
    call::<ExecSignal>(
        ExecSignalRequest {
            session: id(),
            signal: "INT".into(),
        },
        Empty {},
        expect![[r#"
        exec.signal
        {"session":"0123456789ab","signal":"INT"}
        {}
    "#]],
    );
    expect![[r#"{"signal":"TERM"}"#]].assert_eq(&line(&Exit::Signal("TERM".into())));
}

#[test]
fn workspace_goldens() {
    call::<WorkspacePrepare>(
        PrepareRequest {
            vm: "web".into(),
            guest_path: "/root/x".into(),
            subdir: "y".into(),
            readonly: true,
            overwrite: true,
            no_wait: true,
            bytes_expected: Some(1),
            raw_tar: true,
        },
        PrepareReply {
            vm: reply().vm,
            kept: vec!["a%20b".into()],
            entries: 1,
            bytes: 2,
        },
        expect![[r#"
            workspace.prepare
            {"vm":"web","guest_path":"/root/x","subdir":"y","readonly":true,"overwrite":true,"no_wait":true,"bytes_expected":1,"raw_tar":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null},"kept":["a%20b"],"entries":1,"bytes":2}
        "#]],
    );
    call::<WorkspaceExport>(
        ExportRequest {
            vm: "web".into(),
            kind: ExportKind::Patch,
            no_wait: true,
        },
        ExportReply { bytes: 2 },
        expect![[r#"
            workspace.export
            {"vm":"web","kind":"patch","no_wait":true}
            {"bytes":2}
        "#]],
    );
    expect![[r#"{"entries":1,"bytes":2,"sha256":"ab"}"#]].assert_eq(&line(&Trailer {
        entries: 1,
        bytes: 2,
        sha256: "ab".into(),
    }));
}

#[test]
fn operation_goldens() {
    let one = || OpRequest { op: "0123".into() };
    call::<OpList>(
        OpListRequest {
            all: true,
            ..Default::default()
        },
        OpListReply {
            ops: vec![op()],
            next: None,
        },
        expect![[r#"
        op.list
        {"all":true}
        {"ops":[{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes"},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}]}
    "#]],
    );
    call::<OpShow>(
        one(),
        OpReply { op: op() },
        expect![[r#"
        op.show
        {"op":"0123"}
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes"},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
    "#]],
    );
    call::<OpWait>(
        OpWaitRequest {
            op: "0123".into(),
            timeout_ms: Some(1),
        },
        OpReply { op: op() },
        expect![[r#"
        op.wait
        {"op":"0123","timeout_ms":1}
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes"},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
    "#]],
    );
    call::<OpCancel>(
        one(),
        OpReply { op: op() },
        expect![[r#"
        op.cancel
        {"op":"0123"}
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes"},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
    "#]],
    );
    expect![[r#"{"op":"0123456789ab"}"#]].assert_eq(&line(&OpStarted { op: id() }));
}

#[test]
fn image_goldens() {
    let build = ImageBuildRequest {
        name: Some(name("default")),
        include: vec!["make".into()],
    };
    call::<ImageBuild>(
        build,
        ImageReply { image: image() },
        expect![[r#"
        image.build
        {"name":"default","include":["make"]}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}}
    "#]],
    );
    call::<ImageList>(
        Default::default(),
        ImageListReply {
            images: vec![image()],
            next: None,
        },
        expect![[r#"
        image.list
        {}
        {"images":[{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}]}
    "#]],
    );
    call::<ImageDelete>(
        ImageRequest {
            image: name("default"),
        },
        ImageDeleteReply {
            deleted: name("default"),
        },
        expect![[r#"
        image.delete
        {"image":"default"}
        {"deleted":"default"}
    "#]],
    );
}

#[test]
fn daemon_goldens() {
    let info = InfoReply {
        api: ApiVersion { major: 1, minor: 0 },
        version: "0.1.0".into(),
        features: vec!["exec".into()],
        pid: 1,
        uid: 2,
        state_dir: "/var/lib/fcd".into(),
        uptime_s: 3,
        guest_roots: vec!["/root".into()],
    };
    call::<Info>(
        Empty {},
        info,
        expect![[r#"
        fcd.info
        {}
        {"api":{"major":1,"minor":0},"version":"0.1.0","features":["exec"],"pid":1,"uid":2,"state_dir":"/var/lib/fcd","uptime_s":3,"guest_roots":["/root"]}
    "#]],
    );
    let check = Check {
        id: "kvm".into(),
        severity: Severity::Warn,
        found: "none".into(),
        fix: Some("do".into()),
    };
    call::<Doctor>(
        Empty {},
        DoctorReply {
            checks: vec![check],
        },
        expect![[r#"
        fcd.doctor
        {}
        {"checks":[{"id":"kvm","severity":"warn","found":"none","fix":"do"}]}
    "#]],
    );
    let leak = Leak {
        kind: "process".into(),
        name: "fc-1-2-3".into(),
        why: "w".into(),
        removed: false,
        error: Some("e".into()),
    };
    call::<Leaks>(
        LeaksRequest { fix: true },
        LeaksReply { leaks: vec![leak] },
        expect![[r#"
        fcd.leaks
        {"fix":true}
        {"leaks":[{"kind":"process","name":"fc-1-2-3","why":"w","removed":false,"error":"e"}]}
    "#]],
    );
    let party = |thread: &str| LockParty {
        thread: thread.into(),
        operation: "vm.stop".into(),
        for_us: 5,
    };
    let record = LockRecord {
        set: "vm_locks".into(),
        key: "0123".into(),
        holder: Some(party("a")),
        waiters: vec![party("b")],
    };
    let locks = DebugLocksReply {
        locks: vec![record],
        violations: 0,
        checked: true,
    };
    call::<DebugLocks>(
        Empty {},
        locks,
        expect![[r#"
        debug.locks
        {}
        {"locks":[{"set":"vm_locks","key":"0123","holder":{"thread":"a","operation":"vm.stop","for_us":5},"waiters":[{"thread":"b","operation":"vm.stop","for_us":5}]}],"violations":0,"checked":true}
    "#]],
    );
}

#[test]
fn kernel_goldens() {
    let kernel = Kernel {
        name: "linux".parse().unwrap(),
        version: "6.1".into(),
        modules: vec!["virtio_blk.ko".into()],
        imported_at: 1,
        bytes: 2,
        vms: 3,
    };
    let named = KernelRequest {
        kernel: "linux".parse().unwrap(),
    };
    call::<KernelImport>(
        KernelImportRequest {
            path: "/boot/vmlinuz".into(),
            name: Some("linux".parse().unwrap()),
            modules: Some("/m".into()),
        },
        KernelReply {
            kernel: kernel.clone(),
        },
        expect![[r#"
            kernel.import
            {"path":"/boot/vmlinuz","name":"linux","modules":"/m"}
            {"kernel":{"name":"linux","version":"6.1","modules":["virtio_blk.ko"],"imported_at":1,"bytes":2,"vms":3}}
        "#]],
    );
    call::<KernelList>(
        Default::default(),
        KernelListReply {
            kernels: vec![kernel.clone()],
            next: None,
        },
        expect![[r#"
        kernel.list
        {}
        {"kernels":[{"name":"linux","version":"6.1","modules":["virtio_blk.ko"],"imported_at":1,"bytes":2,"vms":3}]}
    "#]],
    );
    call::<KernelShow>(
        named.clone(),
        KernelReply { kernel },
        expect![[r#"
        kernel.show
        {"kernel":"linux"}
        {"kernel":{"name":"linux","version":"6.1","modules":["virtio_blk.ko"],"imported_at":1,"bytes":2,"vms":3}}
    "#]],
    );
    call::<KernelDelete>(
        named,
        KernelDeleteReply {
            deleted: "linux".parse().unwrap(),
        },
        expect![[r#"
        kernel.delete
        {"kernel":"linux"}
        {"deleted":"linux"}
    "#]],
    );
}

#[test]
fn snapshot_goldens() {
    let snapshot = Snapshot {
        id: id(),
        name: "one".parse().unwrap(),
        owner_uid: 1000,
        vm: id(),
        vm_name: "web".parse().unwrap(),
        created_at: 1,
        image: "default".parse().unwrap(),
        vcpus: 1,
        mem_mib: 1024,
        disk_bytes: 4096,
        work_disk_bytes: Some(8192),
        net: Net::Nat,
        driver: "qemu (tcg, microvm)".into(),
        vmm_version: Some("7.2.22".into()),
        bytes: 7,
    };
    let named = SnapshotRequest {
        snapshot: "one".into(),
    };
    call::<SnapshotCreate>(
        SnapshotCreateRequest {
            vm: "web".into(),
            name: Some("one".parse().unwrap()),
        },
        SnapshotReply {
            snapshot: snapshot.clone(),
        },
        expect![[r#"
            snapshot.create
            {"vm":"web","name":"one"}
            {"snapshot":{"id":"0123456789ab","name":"one","owner_uid":1000,"vm":"0123456789ab","vm_name":"web","created_at":1,"image":"default","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":8192,"net":"nat","driver":"qemu (tcg, microvm)","vmm_version":"7.2.22","bytes":7}}
        "#]],
    );
    call::<SnapshotList>(
        SnapshotListRequest {
            vm: Some("web".into()),
            ..Default::default()
        },
        SnapshotListReply {
            snapshots: vec![snapshot.clone()],
            next: None,
        },
        expect![[r#"
            snapshot.list
            {"vm":"web"}
            {"snapshots":[{"id":"0123456789ab","name":"one","owner_uid":1000,"vm":"0123456789ab","vm_name":"web","created_at":1,"image":"default","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":8192,"net":"nat","driver":"qemu (tcg, microvm)","vmm_version":"7.2.22","bytes":7}]}
        "#]],
    );
    call::<SnapshotShow>(
        named.clone(),
        SnapshotReply { snapshot },
        expect![[r#"
        snapshot.show
        {"snapshot":"one"}
        {"snapshot":{"id":"0123456789ab","name":"one","owner_uid":1000,"vm":"0123456789ab","vm_name":"web","created_at":1,"image":"default","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":8192,"net":"nat","driver":"qemu (tcg, microvm)","vmm_version":"7.2.22","bytes":7}}
    "#]],
    );
    call::<SnapshotDelete>(
        named,
        SnapshotDeleteReply { deleted: id() },
        expect![[r#"
        snapshot.delete
        {"snapshot":"one"}
        {"deleted":"0123456789ab"}
    "#]],
    );
    call::<SnapshotRestore>(
        SnapshotRestoreRequest {
            snapshot: "one".into(),
            new_vm: Some("twin".parse().unwrap()),
        },
        reply(),
        expect![[r#"
            snapshot.restore
            {"snapshot":"one","new_vm":"twin"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
    call::<VmFork>(
        VmForkRequest {
            vm: "web".into(),
            name: Some("twin".parse().unwrap()),
        },
        reply(),
        expect![[r#"
            vm.fork
            {"vm":"web","name":"twin"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        "#]],
    );
}

#[test]
fn frame_goldens() {
    let mut all = String::new();
    let notes = [
        Note::Op { op: id() },
        Note::Progress(progress()),
        Note::Created(Box::new(reply().vm)),
        Note::Session { session: id() },
        Note::Ready(Ready {
            keep: vec!["a".into()],
        }),
        Note::Log(LogChunk {
            text: "hello\n".into(),
        }),
    ];
    for note in notes {
        let text = line(&Notification {
            jsonrpc: Version::V2,
            note: note.clone(),
        });
        match Line::<Box<serde_json::value::RawValue>>::parse(text.as_bytes()).unwrap() {
            Some(Line::Note(back)) => assert_eq!(back, note),
            other => panic!("{other:?}"),
        }
        writeln!(all, "{text}").unwrap();
    }
    let id = serde_json::value::RawValue::from_string("7".into()).unwrap();
    let params = serde_json::value::to_raw_value(&request()).unwrap();
    let request = Request {
        jsonrpc: Version::V2,
        id: &id,
        method: "vm.start".into(),
        params: Some(&params),
        more: true,
        key: Some("k".into()),
    };
    writeln!(all, "{}", serde_json::to_string(&request).unwrap()).unwrap();
    let error = RpcError {
        code: rpc_code::DOMAIN,
        message: "the queue is full".into(),
        data: Some(fault()),
    };
    writeln!(
        all,
        "{}",
        line(&Response::<()> {
            jsonrpc: Version::V2,
            id: id.clone(),
            result: None,
            error: Some(error)
        })
    )
    .unwrap();
    writeln!(
        all,
        "{}",
        line(&Response {
            jsonrpc: Version::V2,
            id,
            result: Some(params),
            error: None
        })
    )
    .unwrap();
    assert!(
        Line::<Box<serde_json::value::RawValue>>::parse(
            br#"{"jsonrpc":"2.0","method":"newer","params":{}}"#
        )
        .unwrap()
        .is_none()
    );
    expect![[r#"
        {"jsonrpc":"2.0","method":"op","params":{"op":"0123456789ab"}}
        {"jsonrpc":"2.0","method":"progress","params":{"stage":"copy","done":1,"total":2,"unit":"bytes"}}
        {"jsonrpc":"2.0","method":"created","params":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","kernel":null,"vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"pending":null,"rm":false,"created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null}}
        {"jsonrpc":"2.0","method":"session","params":{"session":"0123456789ab"}}
        {"jsonrpc":"2.0","method":"ready","params":{"keep":["a"]}}
        {"jsonrpc":"2.0","method":"log","params":{"text":"hello\n"}}
        {"jsonrpc":"2.0","id":7,"method":"vm.start","params":{"vm":"web"},"more":true,"key":"k"}
        {"jsonrpc":"2.0","id":7,"error":{"code":-32000,"message":"the queue is full","data":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
        {"jsonrpc":"2.0","id":7,"result":{"vm":"web"}}
    "#]].assert_eq(&all);
}

/// Every method has a golden above.
#[test]
fn every_method_has_a_golden() {
    let declared: BTreeSet<&str> = fcd::api::table::calls().map(|call| call.method).collect();
    let goldens = [include_str!("api.rs"), include_str!("event_wire.rs")].map(str::lines);
    let goldens: BTreeSet<&str> = goldens.into_iter().flatten().map(str::trim_start).collect();
    let missing: Vec<_> = declared.difference(&goldens).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The documented error kinds: code, exit status of `fcctl`, and whether a retry can help.
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
        | wrong_state | wrong_state | 1 |  |
        | workspace_incomplete | wrong_state | 1 |  |
        | busy | busy | 4 | yes |
        | pool_full | busy | 4 | yes |
        | connection_limit | busy | 4 | yes |
        | operation_limit | busy | 4 | yes |
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
        | denied | denied | 1 |  |
        | unsupported | unsupported | 1 |  |
        | version_mismatch | unsupported | 1 |  |
        | stream_incomplete | conflict | 4 | yes |
        | internal | internal | 1 |  |
    "#]]
    .assert_eq(&table);
}
