use super::super::tests::{NOW_S, Start, check, fcctl, fcctl_from, two_vms, vm};
use super::*;
use crate::api::frame::Note;
use crate::api::op::Progress;
use crate::api::vm::{LogChunk, Pending, Synced, Vm, WorkspaceState};
use crate::client::fake::Fake;
use expect_test::expect;
use serde_json::json;

#[test]
fn show_prints_all_details() {
    let fake = Fake::start(|r| {
        let full = Vm {
            pending: Some(Pending {
                vcpus: Some(4),
                mem_mib: Some(2048),
                ..Pending::default()
            }),
            disk_bytes_per_s: Some(50 << 20),
            disk_ops_per_s: Some(1000),
            net_rx_bytes_per_s: Some(3 << 20),
            net_tx_bytes_per_s: None,
            balloon_mib: Some(512),
            pid: Some(77),
            ssh_addr: Some("127.0.0.1:2222".parse().unwrap()),
            driver: Some("qemu (tcg, microvm)".to_owned()),
            disk_driver: Some("reflink".to_owned()),
            started_at: Some(NOW_S - 61),
            synced: Some(Synced::Timeout),
            rm: true,
            workspace: Some(crate::api::vm::WorkspaceInfo {
                guest_path: "/root/app".to_owned(),
                workdir: "/root/app/src".to_owned(),
                state: WorkspaceState::Complete,
                readonly: true,
                entries: 12,
                bytes: 3 << 20,
                prepared_at: NOW_S - 30,
            }),
            ..vm("web", VmState::Running)
        };
        r.result(json!({"vm": full}));
    });
    check(
        &fake,
        &["vm", "show", "web"],
        expect![[r#"
            > vm.show {"vm":"web"}
            name        web
            id          000000776562
            state       running
            owner       uid 1000
            image       default
            vcpus       1
            memory      1 GiB
            disk        4 GiB (reflink)
            rates       disk 50 MiB/s, disk operations 1000/s, receives 3 MiB/s
            balloon     asked to keep 512 MiB of its memory
            next start  4 vCPUs, 2 GiB of memory
            driver      qemu (tcg, microvm)
            process     77
            ssh         127.0.0.1:2222
            created     1h ago
            started     1m ago
            removed     when it stops or its creator disconnects
            synced      no: the guest did not respond in time at the last stop
            workspace   /root/app, read-only
            starts in   /root/app/src
            holds       12 entries, 3 MiB, 30s ago
            status 0
        "#]],
    );
}

#[test]
fn show_with_template_prints_its_fields() {
    let fake = two_vms();
    check(
        &fake,
        &["inspect", "-f", "{{.Name}}: {{.State}}", "web", "db"],
        expect![[r#"
            > vm.show {"vm":"web"}
            > vm.show {"vm":"db"}
            web: stopped
            db: stopped
            status 0
        "#]],
    );
    check(
        &fake,
        &["inspect", "--format", "{{.IPAddress}}", "web"],
        expect![[r#"
            ! fcctl: --format has an unknown field: ".IPAddress"
            ! hint: fields: .ID .Name .State .Status .Image .Digest .VCPUs .Memory .Size .Created .Started .IP .IP6 .Ports .SSH .Workspace .Labels .Driver .PID .Owner
            status 2
        "#]],
    );
    for json in [&["-f", "json"][..], &["--format", "json"], &["--json"]] {
        let ran = fcctl(&fake, &[&["inspect", "web"], json].concat());
        let shown: Vm = serde_json::from_slice(&ran.out).unwrap();
        assert_eq!(shown.name.as_str(), "web");
    }
}

#[test]
fn create_prints_the_name() {
    let fake = Fake::start(|r| r.result(json!({"vm": vm("brave-otter", VmState::Created)})));
    check(
        &fake,
        &[
            "vm", "create", "--cpus", "2", "--memory", "2G", "--disk", "10G",
        ],
        expect![[r#"
        > vm.create {"disk_bytes":10737418240,"hold":false,"mem_mib":2048,"rm":false,"vcpus":2}
        brave-otter
        status 0
    "#]],
    );
}

#[test]
fn create_passes_host_name_and_name_servers() {
    let fake = Fake::start(|r| r.result(json!({"vm": vm("web", VmState::Created)})));
    check(
        &fake,
        &[
            "create",
            "web",
            "--hostname",
            "ci.example.com",
            "--dns",
            "1.1.1.1",
            "--dns",
            "::1",
        ],
        expect![[r#"
            > vm.create {"dns":["1.1.1.1","::1"],"hold":false,"host_name":"ci.example.com","name":"web","rm":false}
            web
            status 0
        "#]],
    );
    check(
        &fake,
        &["create", "web", "--hostname", "a_b"],
        expect![[r#"
            ! fcctl: invalid value 'a_b' for '--hostname <NAME>': host name "a_b" is not valid
            ! hint: use at most 63 letters, digits and -, with dots in between, such as build-1 or ci.example.com
            status 2
        "#]],
    );
}

#[test]
fn stop_reports_whether_data_was_synced() {
    for (synced, words) in [
        (Synced::Yes, "was synced"),
        (Synced::No, "was not synced"),
        (Synced::Timeout, "did not sync its data in time"),
    ] {
        let fake = Fake::start(move |mut r| {
            r.note(Note::Progress(Progress {
                stage: "sync".to_owned(),
                ..Progress::default()
            }));
            r.result(json!({"vm": Vm { synced: Some(synced), ..vm("web", VmState::Stopped) }}));
        });
        let ran = fcctl(&fake, &["stop", "-t", "5s", "web"]);
        let text = String::from_utf8(ran.out).unwrap();
        assert!(
            text.starts_with("web: stopped, ") && text.contains(words),
            "{text}"
        );
        assert_eq!(
            (ran.status, ran.err.as_str()),
            (0, "fcctl: stop web: sync\n")
        );
        assert_eq!(
            fake.calls(),
            [r#"vm.stop {"force":false,"timeout_ms":5000,"vm":"web"}"#]
        );
    }
}

#[test]
fn set_reports_when_change_applies() {
    let fake = Fake::start(|r| {
        let pending = (r.params["vm"] == "web").then(|| Pending {
            vcpus: Some(4),
            ..Pending::default()
        });
        r.result(json!({"vm": Vm { pending, ..vm("web", VmState::Running) }}));
    });
    check(
        &fake,
        &["vm", "set", "web", "--vcpus", "4", "--disk", "10G"],
        expect![[r#"
        > vm.set {"disk_bytes":10737418240,"vcpus":4,"vm":"web"}
        web: 4 vCPUs, 10 GiB of disk, applied at next start; now: fcctl vm restart web
        status 0
    "#]],
    );
    check(
        &fake,
        &[
            "vm",
            "set",
            "web",
            "--disk-bps",
            "50M",
            "--disk-iops",
            "none",
            "--net-tx-bps",
            "1M/s",
        ],
        expect![[r#"
        > vm.set {"disk_bytes_per_s":52428800,"disk_ops_per_s":0,"net_tx_bytes_per_s":1048576,"vm":"web"}
        web: disk 50 MiB/s, disk operations unlimited, sends 1 MiB/s, applied at next start; now: --now, or fcctl vm restart web
        status 0
    "#]],
    );
    check(
        &fake,
        &[
            "vm",
            "set",
            "web",
            "--disk-bps",
            "0",
            "--net-rx-bps",
            "3G",
            "--now",
        ],
        expect![[r#"
        > vm.set {"disk_bytes_per_s":0,"net_rx_bytes_per_s":3221225472,"now":true,"vm":"web"}
        web: disk unlimited, receives 3 GiB/s, applied now
        status 0
    "#]],
    );
    assert_eq!(fcctl(&fake, &["vm", "set", "web", "--now"]).status, 2);
    assert_eq!(
        fcctl(&fake, &["vm", "set", "web", "--disk-iops", "1K"]).status,
        2
    );
    check(
        &fake,
        &["vm", "set", "db", "--memory", "2G"],
        expect![[r#"
        > vm.set {"mem_mib":2048,"vm":"db"}
        web: 2 GiB of memory, applied at next start
        status 0
    "#]],
    );
}

#[test]
fn set_changes_labels() {
    let fake = Fake::start(|r| {
        let labels = serde_json::from_str(r#"{"ci":"yes","draft":""}"#).unwrap();
        let vm = vm("web", VmState::Running);
        r.result(json!({"vm": Vm { labels, ..vm }}));
    });
    check(
        &fake,
        &[
            "set", "web", "--label", "ci=yes", "-l", "draft", "-l", "old-",
        ],
        expect![[r#"
            > vm.set {"labels":{"ci":"yes","draft":""},"remove_labels":["old"],"vm":"web"}
            web: labels ci=yes, draft
            status 0
        "#]],
    );
    check(
        &fake,
        &["vm", "set", "web", "--remove-label", "old", "--vcpus", "2"],
        expect![[r#"
            > vm.set {"remove_labels":["old"],"vcpus":2,"vm":"web"}
            web: 2 vCPUs, applied at next start
            web: labels ci=yes, draft
            status 0
        "#]],
    );
    check(
        &fake,
        &["create", "web", "--label", "ci=yes", "--label", "draft"],
        expect![[r#"
            > vm.create {"hold":false,"labels":{"ci":"yes","draft":""},"name":"web","rm":false}
            web
            status 0
        "#]],
    );
    check(
        &fake,
        &["create", "web", "--label", "c i=yes"],
        expect![[r#"
            ! fcctl: invalid value 'c i=yes' for '--label <KEY[=VALUE]>': label key "c i" is not valid
            ! hint: use at most 128 letters, digits, and . _ - / in between, such as ci or com.example/owner
            status 2
        "#]],
    );
    let many: Vec<String> = (0..33).map(|n| format!("--label=k{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    check(
        &fake,
        &[&["create", "web"], &many[..]].concat(),
        expect![[r#"
            ! fcctl: a VM has at most 32 labels, and these are 33
            ! hint: leave some out
            status 2
        "#]],
    );
}

#[test]
fn rename_reports_the_new_name() {
    let fake = Fake::start(|r| {
        if r.params["name"] == "db" {
            let e = crate::error::Error::new(
                crate::error::Kind::NameTaken,
                "rename VM web: the name db is taken",
            );
            return r.fault(e.hint("choose another name: fcctl ps -a lists yours"));
        }
        let state = match r.params["vm"] == "web" {
            true => VmState::Running,
            false => VmState::Stopped,
        };
        r.result(json!({"vm": vm("shop", state)}));
    });
    check(
        &fake,
        &["rename", "web", "shop"],
        expect![[r#"
            > vm.rename {"name":"shop","vm":"web"}
            web: renamed to shop; the guest's host name changes at its next start
            status 0
        "#]],
    );
    check(
        &fake,
        &["vm", "rename", "old", "shop"],
        expect![[r#"
            > vm.rename {"name":"shop","vm":"old"}
            old: renamed to shop
            status 0
        "#]],
    );
    check(
        &fake,
        &["rename", "web", "db"],
        expect![[r#"
            > vm.rename {"name":"db","vm":"web"}
            ! fcctl: rename VM web: the name db is taken
            ! hint: choose another name: fcctl ps -a lists yours
            status 4
        "#]],
    );
    check(
        &fake,
        &["rename", "web", "Shop"],
        expect![[r#"
            ! fcctl: invalid value 'Shop' for '<NAME>': VM name "Shop" is not valid
            ! hint: use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -
            status 2
        "#]],
    );
}

#[test]
fn balloon_requests_memory_to_keep() {
    let fake = Fake::start(|r| {
        let balloon_mib = r.params["keep_mib"].as_u64();
        r.result(
            json!({"vm": Vm { balloon_mib, ..vm("web", VmState::Running) }, "kept_mib": 1024}),
        );
    });
    check(
        &fake,
        &["vm", "balloon", "web"],
        expect![[r#"
        > vm.balloon {"vm":"web"}
        web: keeps 1 GiB of 1 GiB
        status 0
    "#]],
    );
    check(
        &fake,
        &["vm", "balloon", "web", "512M"],
        expect![[r#"
            > vm.balloon {"keep_mib":512,"vm":"web"}
            web: keeps 1 GiB of 1 GiB, and is asked to keep 512 MiB
            status 0
        "#]],
    );
    assert_eq!(fcctl(&fake, &["vm", "balloon", "web", "1.5G"]).status, 2);
}

#[test]
fn rm_deletes_with_and_without_force() {
    let fake = two_vms();
    check(
        &fake,
        &["rm", "-f", "web"],
        expect![[r#"
        > vm.delete {"force":true,"if_exists":true,"vm":"web"}
        web: deleted
        status 0
    "#]],
    );
    // This is `rm -f $(fcctl ps -aq)` when there are no VMs.
    check(
        &fake,
        &["rm", "-f"],
        expect![[r#"
        status 0
    "#]],
    );
    assert_eq!(fcctl(&fake, &["rm"]).status, 2);
    let fake = Fake::start(|r| r.result(json!({"deleted": null})));
    check(
        &fake,
        &["vm", "delete", "--if-exists", "x"],
        expect![[r#"
            > vm.delete {"force":false,"if_exists":true,"vm":"x"}
            x: did not exist
            status 0
        "#]],
    );
}

#[test]
fn wait_and_prune_call_the_daemon() {
    let fake = Fake::start(|r| {
        r.result(json!({"vm": vm("web", VmState::Running), "deleted": ["000000776562"]}));
    });
    check(
        &fake,
        &["vm", "wait", "web", "--state", "running", "-t", "1m"],
        expect![[r#"
        > vm.wait {"state":"running","timeout_ms":60000,"vm":"web"}
        web: running
        status 0
    "#]],
    );
    check(
        &fake,
        &["vm", "prune"],
        expect![[r#"
        > vm.prune {}
        000000776562
        1 VM deleted
        status 0
    "#]],
    );
    assert!(
        fcctl(&fake, &["vm", "wait", "web", "--state", "asleep"])
            .err
            .contains("a state is one of created, starting")
    );
}

#[test]
fn logs_without_terminal_are_unchanged() {
    let fake = Fake::start(|mut r| {
        r.note(Note::Log(LogChunk {
            text: "one \u{1b}[31mred\n".to_owned(),
        }));
        r.note(Note::Log(LogChunk {
            text: "two".to_owned(),
        }));
        r.result(json!({"bytes": 3}));
    });
    let ran = fcctl(&fake, &["logs", "web", "-n", "5"]);
    assert_eq!(
        (ran.status, ran.out.as_slice()),
        (0, &b"one \x1b[31mred\ntwo"[..])
    );
    assert_eq!(
        fake.calls(),
        [r#"vm.logs {"follow":false,"tail":5,"vm":"web"}"#]
    );
    let ran = fcctl(&fake, &["logs", "web", "--json"]);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&ran.out).unwrap()["text"],
        "one \u{1b}[31mred\ntwo"
    );
    assert_eq!(fcctl(&fake, &["logs", "-f", "web", "--json"]).status, 2);
}

#[test]
fn logs_full_disk_fails() {
    let fake = Fake::start(|mut r| {
        r.note(Note::Log(LogChunk {
            text: "hello\n".into(),
        }));
        r.result(json!({"bytes": 6}));
    });
    let start = Start {
        stdout: std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap(),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["logs", "web"]);
    assert!(
        ran.status == 1 && ran.err.starts_with("fcctl: write to stdout: "),
        "{} {}",
        ran.status,
        ran.err
    );
}

#[test]
fn fork_passes_labels() {
    let fake = Fake::start(|r| r.result(json!({ "vm": vm("twin", VmState::Running) })));
    check(
        &fake,
        &["fork", "web", "twin", "--label", "stage=2", "-l", "ci"],
        expect![[r#"
            > vm.fork {"labels":{"ci":"","stage":"2"},"name":"twin","vm":"web"}
            twin
            status 0
        "#]],
    );
}
