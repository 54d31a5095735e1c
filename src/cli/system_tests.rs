use super::super::tests::{Start, check, fcctl, fcctl_from, vm};
use super::*;
use crate::client::fake::Fake;
use expect_test::expect;
use serde_json::json;

/// Returns the space that objects of every kind use.
fn space() -> Vec<SpaceUse> {
    let of = |kind, count, active, bytes, reclaimable_bytes, names: &[&str]| SpaceUse {
        count,
        active,
        bytes,
        reclaimable_bytes,
        reclaimable: names.iter().map(|name| (*name).to_owned()).collect(),
        ..SpaceUse::new(kind)
    };
    vec![
        of(SpaceKind::Vms, 2, 1, 3 << 30, 1 << 30, &[]),
        of(
            SpaceKind::Images,
            3,
            1,
            5 << 30,
            2 << 30,
            &["app", "gcc:13"],
        ),
        of(SpaceKind::Layers, 4, 0, 1 << 29, 1 << 29, &[]),
        of(
            SpaceKind::Runtimes,
            2,
            1,
            1 << 28,
            1 << 27,
            &["0123456789ab"],
        ),
        of(SpaceKind::Kernels, 0, 0, 0, 0, &[]),
        of(SpaceKind::Snapshots, 1, 1, 1 << 30, 0, &[]),
    ]
}

/// Starts a daemon with two VMs and objects of every kind.
fn daemon() -> Fake {
    Fake::start(|r| match r.method.as_str() {
        "fcd.space" => r.result(json!({ "kinds": space() })),
        "vm.list" => {
            let uid = nix::unistd::geteuid().as_raw();
            let mine = |name, state| Vm {
                owner_uid: uid,
                ..vm(name, state)
            };
            let other = Vm {
                owner_uid: uid + 1,
                ..vm("other", VmState::Stopped)
            };
            let (web, db) = (mine("web", VmState::Running), mine("db", VmState::Stopped));
            r.result(json!({ "vms": [web, db, other] }));
        }
        "vm.delete" => {
            let reply = json!({ "deleted": r.params["vm"] });
            r.result(reply);
        }
        "image.delete" if r.params["image"] == "gcc:13" => {
            let e = Error::new(
                crate::error::Kind::Conflict,
                "delete image gcc:13: it is used",
            );
            r.fault(e.hint("delete them first"));
        }
        "image.delete" => {
            let reply = json!({ "deleted": r.params["image"] });
            r.result(reply);
        }
        _ => {
            r.result(json!({ "images": [], "layers": 4, "runtimes": ["0123456789ab"], "bytes": 9 }))
        }
    })
}

#[test]
fn df_shows_each_kind() {
    let fake = daemon();
    check(
        &fake,
        &["system", "df"],
        expect![[r#"
        > fcd.space {}
        TYPE            COUNT  ACTIVE  SIZE     RECLAIMABLE
        VMs             2      1       3 GiB    1 GiB
        images          3      1       5 GiB    2 GiB
        cached layers   4      -       512 MiB  512 MiB
        guest runtimes  2      1       256 MiB  128 MiB
        kernels         0      0       0 B      0 B
        snapshots       1      1       1 GiB    0 B
        status 0
    "#]],
    );
    let ran = fcctl(&fake, &["system", "df", "--json"]);
    let kinds: Vec<SpaceUse> = serde_json::from_slice(&ran.out).unwrap();
    assert_eq!(kinds.len(), 6);
}

#[test]
fn info_fits_one_screen() {
    let fcd = InfoReply {
        api: crate::api::daemon::ApiVersion { major: 1, minor: 0 },
        version: "1.2.3".to_owned(),
        features: Vec::new(),
        pid: 7,
        uid: 0,
        state_dir: "/var/lib/fcd".to_owned(),
        uptime_s: 7200,
        guest_roots: Vec::new(),
        driver: "qemu (tcg, microvm)".to_owned(),
        network: "user".to_owned(),
        disk_driver: Some("qcow2".to_owned()),
    };
    let of = |state, count| StateCount { state, count };
    let overview = Overview {
        fcctl: "1.2.3",
        fcd,
        vms: vec![of(VmState::Running, 1), of(VmState::Stopped, 2)],
        space: space(),
    };
    expect![[r#"
        fcctl           1.2.3
        fcd             1.2.3, pid 7, uid 0, up 2h
        socket          /run/fcd/fcd.sock
        state           /var/lib/fcd
        driver          qemu (tcg, microvm)
        network         user
        root disks      qcow2
        VMs             3 (1 running, 2 stopped), 3 GiB
        images          3, 1 in use, 5 GiB
        cached layers   4, 512 MiB
        guest runtimes  2, 1 in use, 256 MiB
        kernels         0, 0 in use, 0 B
        snapshots       1, 1 in use, 1 GiB
    "#]]
    .assert_eq(&sheet(&overview, "/run/fcd/fcd.sock"));
}

#[test]
fn info_counts_vms_by_state() {
    let fake = daemon();
    for info in [&["info", "--json"][..], &["system", "info", "--json"]] {
        let ran = fcctl(&fake, info);
        let document: serde_json::Value = serde_json::from_slice(&ran.out).unwrap();
        let counts = json!([
            {"state": "running", "count": 1}, {"state": "stopped", "count": 2}
        ]);
        assert_eq!(document["vms"], counts);
        assert_eq!(document["space"].as_array().unwrap().len(), 6);
    }
}

#[test]
fn prune_names_what_it_would_remove() {
    let fake = daemon();
    check(
        &fake,
        &["system", "prune", "--dry-run"],
        expect![[r#"
        > fcd.space {}
        would remove:
          guest runtime 0123456789ab
          4 cached layers
        640 MiB in all
        status 0
    "#]],
    );
    check(
        &fake,
        &["system", "prune", "-n", "--all", "--vms"],
        expect![[r#"
            > vm.list {"all":true}
            > fcd.space {}
            would remove:
              VM db
              image app
              image gcc:13
              guest runtime 0123456789ab
              4 cached layers
            3.6 GiB in all
            status 0
        "#]],
    );
    check(
        &fake,
        &["system", "prune", "-n", "-a", "--json"],
        expect![[r#"
            > fcd.space {}
            {
              "vms": [],
              "images": [
                "app",
                "gcc:13"
              ],
              "runtimes": [
                "0123456789ab"
              ],
              "layers": 4,
              "bytes": 2818572288
            }
            status 0
        "#]],
    );
}

#[test]
fn prune_without_terminal_needs_force() {
    let fake = daemon();
    check(
        &fake,
        &["system", "prune"],
        expect![[r#"
        > fcd.space {}
        to be removed:
          guest runtime 0123456789ab
          4 cached layers
        640 MiB in all
        ! fcctl: prune: there is no terminal to ask for confirmation
        ! hint: review the list (fcctl system prune --dry-run), then add --force
        status 2
    "#]],
    );
    let ran = fcctl_from(&fake, Start::default(), &["system", "prune", "--json"]);
    assert!(ran.status == 2 && ran.out.is_empty(), "{}", ran.err);
}

#[test]
fn prune_removes_only_what_it_named() {
    let fake = daemon();
    check(
        &fake,
        &["system", "prune", "-f"],
        expect![[r#"
        > fcd.space {}
        > image.prune {"all":false}
        > fcd.space {}
        removed:
          guest runtime 0123456789ab
          4 cached layers
        0 B in all
        status 0
    "#]],
    );
    check(
        &fake,
        &["system", "prune", "-f", "-a", "--vms"],
        expect![[r#"
            > vm.list {"all":true}
            > fcd.space {}
            > vm.delete {"force":false,"if_exists":true,"vm":"000000006462"}
            > image.delete {"image":"app"}
            > image.delete {"image":"gcc:13"}
            > image.prune {"all":false}
            > fcd.space {}
            removed:
              VM db
              image app
              guest runtime 0123456789ab
              4 cached layers
            0 B in all
            ! fcctl: delete image gcc:13: it is used
            ! hint: delete them first
            status 4
        "#]],
    );
}

#[test]
fn prune_of_nothing_says_so() {
    let fake = Fake::start(|r| r.result(json!({ "kinds": [] })));
    check(
        &fake,
        &["system", "prune"],
        expect![[r#"
        > fcd.space {}
        nothing to remove
        status 0
    "#]],
    );
}
