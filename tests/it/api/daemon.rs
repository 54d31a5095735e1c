//! Goldens of the calls about the daemon itself: operations, images, kernels and its state.

use super::{call, id, line, name, op};
use expect_test::expect;
use fcd::testing::api::Empty;
use fcd::testing::api::daemon::*;
use fcd::testing::api::image::*;
use fcd::testing::api::kernel::*;
use fcd::testing::api::op::*;

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
        digest: None,
        source: None,
        recipe: None,
        file: None,
    }
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
        {"ops":[{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes","parts":[{"name":"3f1d2a4b5c6d","state":"downloading","done":1,"total":2}],"parts_total":2},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}]}
    "#]],
    );
    call::<OpShow>(
        one(),
        OpReply { op: op() },
        expect![[r#"
        op.show
        {"op":"0123"}
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes","parts":[{"name":"3f1d2a4b5c6d","state":"downloading","done":1,"total":2}],"parts_total":2},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
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
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes","parts":[{"name":"3f1d2a4b5c6d","state":"downloading","done":1,"total":2}],"parts_total":2},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
    "#]],
    );
    call::<OpCancel>(
        one(),
        OpReply { op: op() },
        expect![[r#"
        op.cancel
        {"op":"0123"}
        {"op":{"id":"0123456789ab","method":"vm.start","vm":"0123456789ab","owner_uid":1000,"state":"failed","may_cancel":true,"progress":{"stage":"copy","done":1,"total":2,"unit":"bytes","parts":[{"name":"3f1d2a4b5c6d","state":"downloading","done":1,"total":2}],"parts_total":2},"started_at":1,"ended_at":2,"result":{"vm":1},"error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
    "#]],
    );
    expect![[r#"{"op":"0123456789ab"}"#]].assert_eq(&line(&OpStarted { op: id() }));
}

#[test]
fn image_goldens() {
    let build = ImageBuildRequest {
        name: Some(name("default")),
        include: vec!["make".into()],
        minimal: true,
    };
    call::<ImageBuild>(
        build,
        ImageReply { image: image() },
        expect![[r#"
        image.build
        {"name":"default","include":["make"],"minimal":true}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}}
    "#]],
    );
    call::<ImageCommit>(
        ImageCommitRequest {
            vm: "web".into(),
            image: name("mine"),
            recipe: Some("sha256:aa".into()),
            temporary: true,
        },
        ImageReply {
            image: Image {
                digest: Some("sha256:bb".into()),
                recipe: Some("sha256:aa".into()),
                ..image()
            },
        },
        expect![[r#"
        image.commit
        {"vm":"web","image":"mine","recipe":"sha256:aa","temporary":true}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000,"digest":"sha256:bb","recipe":"sha256:aa"}}
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
    call::<ImagePull>(
        ImagePullRequest {
            source: PullSource::Registry {
                reference: "gcc:13".into(),
            },
            name: None,
            platform: Some("linux/amd64".into()),
            shared: false,
        },
        ImageReply { image: image() },
        expect![[r#"
        image.pull
        {"source":{"registry":{"reference":"gcc:13"}},"platform":"linux/amd64"}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}}
    "#]],
    );
    call::<ImageShow>(
        ImageRequest {
            image: name("default"),
        },
        ImageShowReply {
            image: image(),
            config: ImageConfig {
                cmd: vec!["sh".into()],
                ..Default::default()
            },
            layers: vec!["sha256:2".into()],
            history: vec![],
            history_omitted: 7,
        },
        expect![[r#"
        image.show
        {"image":"default"}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000},"config":{"user":"","env":[],"working_dir":"","entrypoint":[],"cmd":["sh"]},"layers":["sha256:2"],"history":[],"history_omitted":7}
    "#]],
    );
    call::<ImageRegister>(
        ImageRegisterRequest {
            image: name("mine"),
            kernel: Some(name("linux-6")),
        },
        ImageReply {
            image: Image {
                file: Some(ImageFile {
                    path: "/srv/root.ext4".into(),
                    changed: Some("it was written".into()),
                }),
                ..image()
            },
        },
        expect![[r#"
            image.register
            {"image":"mine","kernel":"linux-6"}
            {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000,"file":{"path":"/srv/root.ext4","changed":"it was written"}}}
        "#]],
    );
    call::<ImagePromote>(
        ImageRequest {
            image: name("mine"),
        },
        ImageReply { image: image() },
        expect![[r#"
            image.promote
            {"image":"mine"}
            {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}}
        "#]],
    );
    call::<ImageExport>(
        ImageExportRequest {
            image: name("mine"),
            format: ExportFormat::Raw,
        },
        ImageExportReply { bytes: 5 },
        expect![[r#"
            image.export
            {"image":"mine","format":"raw"}
            {"bytes":5}
        "#]],
    );
    call::<ImageTag>(
        ImageTagRequest {
            image: name("default"),
            name: name("other"),
            shared: true,
        },
        ImageReply { image: image() },
        expect![[r#"
        image.tag
        {"image":"default","name":"other","shared":true}
        {"image":{"name":"default","disk_bytes":1,"allocated_bytes":2,"kernel":"Linux 6.1","os":"Debian","built_at":3,"vms":4,"owner_uid":1000}}
    "#]],
    );
    call::<ImagePrune>(
        ImagePruneRequest { all: true },
        ImagePruneReply {
            images: vec![name("default")],
            layers: 1,
            runtimes: vec!["1".into()],
            bytes: 2,
        },
        expect![[r#"
        image.prune
        {"all":true}
        {"images":["default"],"layers":1,"runtimes":["1"],"bytes":2}
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
        driver: "qemu (tcg, microvm)".into(),
        network: "user".into(),
        disk_driver: Some("qcow2".into()),
    };
    call::<Info>(
        Empty {},
        info,
        expect![[r#"
            fcd.info
            {}
            {"api":{"major":1,"minor":0},"version":"0.1.0","features":["exec"],"pid":1,"uid":2,"state_dir":"/var/lib/fcd","uptime_s":3,"guest_roots":["/root"],"driver":"qemu (tcg, microvm)","network":"user","disk_driver":"qcow2"}
        "#]],
    );
    let space = SpaceUse {
        kind: SpaceKind::Images,
        count: 3,
        active: 2,
        bytes: 7,
        reclaimable_bytes: 5,
        reclaimable: vec!["app".into()],
    };
    call::<Space>(
        Empty {},
        SpaceReply { kinds: vec![space] },
        expect![[r#"
            fcd.space
            {}
            {"kinds":[{"kind":"images","count":3,"active":2,"bytes":7,"reclaimable_bytes":5,"reclaimable":["app"]}]}
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
    let value = |source, from: Option<&str>| ConfigValue {
        key: "vm.vcpus".into(),
        value: "2".into(),
        source,
        from: from.map(str::to_owned),
    };
    call::<ConfigShow>(
        Empty {},
        ConfigReply {
            values: vec![
                value(ConfigSource::File, Some("/c.toml")),
                value(ConfigSource::Default, None),
            ],
        },
        expect![[r#"
        fcd.config
        {}
        {"values":[{"key":"vm.vcpus","value":"2","source":"file","from":"/c.toml"},{"key":"vm.vcpus","value":"2","source":"default"}]}
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
    call::<Uninstall>(
        UninstallRequest { dry_run: true },
        UninstallReply {
            items: vec![InstalledItem {
                kind: "bridge".into(),
                name: "fcbr0".into(),
            }],
            kept: vec!["/s/notes".into()],
        },
        expect![[r#"
        fcd.uninstall
        {"dry_run":true}
        {"items":[{"kind":"bridge","name":"fcbr0"}],"kept":["/s/notes"]}
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
        durable_waits: vec![party("c")],
        classes: vec![LockClass {
            class: "vm_locks".into(),
            waits: vec![7],
            holds: vec![0, 3, 4],
        }],
        edges: vec![LockEdge {
            from: "vm_locks".into(),
            to: "store".into(),
            from_site: "src/a.rs:1:2".into(),
            to_site: "src/b.rs:3:4".into(),
        }],
        contention: vec![LockContention {
            class: "store".into(),
            site: "src/b.rs:3:4".into(),
            count: 5,
        }],
        log_lines_dropped: 6,
    };
    call::<DebugLocks>(
        Empty {},
        locks,
        expect![[r#"
        debug.locks
        {}
        {"locks":[{"set":"vm_locks","key":"0123","holder":{"thread":"a","operation":"vm.stop","for_us":5},"waiters":[{"thread":"b","operation":"vm.stop","for_us":5}]}],"violations":0,"checked":true,"durable_waits":[{"thread":"c","operation":"vm.stop","for_us":5}],"classes":[{"class":"vm_locks","waits":[7],"holds":[0,3,4]}],"edges":[{"from":"vm_locks","to":"store","from_site":"src/a.rs:1:2","to_site":"src/b.rs:3:4"}],"contention":[{"class":"store","site":"src/b.rs:3:4","count":5}],"log_lines_dropped":6}
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
