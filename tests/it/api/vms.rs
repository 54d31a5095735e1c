//! Goldens of the calls about VMs.

use super::{call, id, line, name, reply, request, vm};
use expect_test::expect;
use fcd::testing::api::Empty;
use fcd::testing::api::vm::*;
use std::borrow::Cow;

fn brief() -> VmBrief<'static> {
    VmBrief {
        id: Cow::Owned(id()),
        name: Cow::Owned(name("web")),
        state: VmState::Running,
        reason: Some("why".into()),
        image: Cow::Owned(name("default")),
        short_digest: Some("0123456789ab".into()),
        vcpus: 1,
        mem_mib: 1024,
        disk_bytes: 4096,
        created_at: 1,
        unresponsive: false,
        paused: true,
        ports: Cow::Owned(vm().ports),
        refused_ports: vec![3000],
        ip: vm().ip,
        ip6: vm().ip6,
        workspace: Some(WorkspaceInfo {
            guest_path: "/root/app".into(),
            workdir: "/root/app/src".into(),
            state: WorkspaceState::Complete,
            readonly: false,
            entries: 12,
            bytes: 4096,
            prepared_at: 2,
        }),
        labels: vm().labels,
    }
}

fn stop() -> VmStopRequest {
    VmStopRequest {
        vm: "web".into(),
        force: true,
        timeout_ms: Some(7),
        keep: false,
    }
}

#[test]
fn vm_golden_with_every_member() {
    expect![[r#"{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":{"vcpus":2,"mem_mib":null,"disk_bytes":null,"disk_bytes_per_s":null,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":{"guest_path":"/root/x","workdir":"/root/x/y","state":"incomplete","readonly":true,"entries":4,"bytes":5,"prepared_at":6},"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}"#]].assert_eq(&line(&vm()));
}

#[test]
fn vm_goldens() {
    call::<VmCreate>(
        VmCreateRequest {
            name: Some(name("web")),
            kernel: Some("linux".parse().unwrap()),
            init: Some(Init::Image),
            image: Some(name("default")),
            vcpus: Some(1),
            mem_mib: Some(2),
            disk_bytes: Some(3),
            work_disk_bytes: Some(4),
            disk_bytes_per_s: Some(5),
            disk_ops_per_s: Some(0),
            net_rx_bytes_per_s: None,
            net_tx_bytes_per_s: None,
            net: Some(fcd::testing::api::vm::Net::None),
            ports: vm().ports,
            auto_ports: true,
            labels: vm().labels,
            host_name: vm().host_name,
            dns: vm().dns,
            user: vm().commands.user,
            workdir: vm().commands.workdir,
            env: vec![("A".into(), "1".into())],
            rm: true,
            restart: Restart::Always,
            hold: true,
        },
        reply(),
        expect![[r#"
            vm.create
            {"name":"web","image":"default","kernel":"linux","init":"image","vcpus":1,"mem_mib":2,"disk_bytes":3,"work_disk_bytes":4,"disk_bytes_per_s":5,"disk_ops_per_s":0,"net":"none","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":true,"labels":{"ci":"yes"},"host_name":"build","dns":["1.1.1.1"],"user":"dev","workdir":"/srv/app","env":[["A","1"]],"rm":true,"restart":"always","hold":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmStart>(
        request(),
        reply(),
        expect![[r#"
            vm.start
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmStop>(
        stop(),
        reply(),
        expect![[r#"
            vm.stop
            {"vm":"web","force":true,"timeout_ms":7}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmRestart>(
        stop(),
        reply(),
        expect![[r#"
            vm.restart
            {"vm":"web","force":true,"timeout_ms":7}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmResume>(
        request(),
        reply(),
        expect![[r#"
            vm.resume
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmKill>(
        request(),
        reply(),
        expect![[r#"
            vm.kill
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
                    short_digest: None,
                    workspace: None,
                    paused: false,
                    labels: Default::default(),
                    ports: Cow::Borrowed(&[]),
                    refused_ports: Vec::new(),
                    ip: None,
                    ip6: None,
                    ..brief()
                },
            ],
            next: None,
        },
        expect![[r#"
            vm.list
            {"all":true,"brief":true,"limit":500}
            {"vms":[{"id":"0123456789ab","name":"web","state":"running","reason":"why","image":"default","short_digest":"0123456789ab","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"created_at":1,"paused":true,"ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"refused_ports":[3000],"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","workspace":{"guest_path":"/root/app","workdir":"/root/app/src","state":"complete","readonly":false,"entries":12,"bytes":4096,"prepared_at":2},"labels":{"ci":"yes"}},{"id":"0123456789ab","name":"web","state":"running","image":"default","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"created_at":1}]}
        "#]],
    );
    call::<VmShow>(
        request(),
        reply(),
        expect![[r#"
            vm.show
            {"vm":"web"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
            labels: vm().labels,
            remove_labels: vec![name("old")],
            ..VmSetRequest::default()
        },
        reply(),
        expect![[r#"
            vm.set
            {"vm":"web","vcpus":1,"mem_mib":2,"disk_bytes":3,"net_tx_bytes_per_s":0,"now":true,"labels":{"ci":"yes"},"remove_labels":["old"]}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmRename>(
        VmRenameRequest {
            vm: "web".into(),
            name: name("shop"),
        },
        reply(),
        expect![[r#"
            vm.rename
            {"vm":"web","name":"shop"}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":{"vcpus":2,"mem_mib":null,"disk_bytes":null,"disk_bytes_per_s":null,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":{"guest_path":"/root/x","workdir":"/root/x/y","state":"incomplete","readonly":true,"entries":4,"bytes":5,"prepared_at":6},"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}},"kept_mib":1024}
        "#]],
    );
    let ports = vm().ports;
    let request = VmPortsRequest {
        vm: "web".into(),
        ports: ports.clone(),
        auto: true,
    };
    let reply_with = || VmPortsReply {
        vm: Vm {
            pending: None,
            workspace: None,
            ..vm()
        },
        ports: ports.clone(),
    };
    call::<VmPortAdd>(
        request.clone(),
        reply_with(),
        expect![[r#"
            vm.port_add
            {"vm":"web","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}},"ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}]}
        "#]],
    );
    call::<VmPortRemove>(
        request,
        reply_with(),
        expect![[r#"
            vm.port_remove
            {"vm":"web","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto":true}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}},"ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}]}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
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
        SshConfigRequest {
            vm: "web".into(),
            user: Some("dev".into()),
        },
        SshConfigReply {
            vm: id(),
            name: name("web"),
            addr: "127.0.0.1:22".parse().unwrap(),
            user: "dev".into(),
            private_key: "KEY".into(),
            host_key: "ssh-ed25519 AAAA".into(),
            workdir: None,
            env_file: Some("/etc/x".into()),
        },
        expect![[r#"
            vm.ssh_config
            {"vm":"web","user":"dev"}
            {"vm":"0123456789ab","name":"web","addr":"127.0.0.1:22","user":"dev","private_key":"KEY","host_key":"ssh-ed25519 AAAA","workdir":null,"env_file":"/etc/x"}
        "#]],
    );
}
