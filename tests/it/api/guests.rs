//! Goldens of the calls that use a guest: `exec`, workspaces and snapshots.

use super::{call, id, line, reply};
use expect_test::expect;
use fcd::testing::api::Empty;
use fcd::testing::api::exec::*;
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::*;

#[test]
fn exec_goldens() {
    let size = PtySize { rows: 24, cols: 80 };
    call::<ExecStart>(
        ExecStartRequest {
            vm: "web".into(),
            argv: vec!["ls".into()],
            env: vec![("A".into(), "b".into())],
            workdir: Some("/".into()),
            user: Some("dev:adm".into()),
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
            {"vm":"web","argv":["ls"],"env":[["A","b"]],"workdir":"/","user":"dev:adm","pty":{"size":{"rows":24,"cols":80},"term":"xterm"},"streams":["stdin","stdout","stderr","command"],"no_wait_children":true}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}},"kept":["a%20b"],"entries":1,"bytes":2}
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
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
    call::<VmFork>(
        VmForkRequest {
            vm: "web".into(),
            name: Some("twin".parse().unwrap()),
            labels: serde_json::from_str(r#"{"ci":"yes"}"#).unwrap(),
        },
        reply(),
        expect![[r#"
            vm.fork
            {"vm":"web","name":"twin","labels":{"ci":"yes"}}
            {"vm":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        "#]],
    );
}
