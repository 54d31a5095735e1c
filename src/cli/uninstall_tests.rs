use super::super::tests::{check, vm};
use super::*;
use crate::client::fake::Fake;
use expect_test::expect;
use serde_json::json;

/// Starts a daemon with these VMs.
fn daemon(vms: &[(&'static str, VmState)]) -> Fake {
    let vms: Vec<_> = vms.iter().map(|(name, state)| vm(name, *state)).collect();
    Fake::start(move |r| {
        match r.method.as_str() {
        "fcd.uninstall" => r.result(json!({
            "items": [
                {"kind": "directory", "name": "/s"},
                {"kind": "socket", "name": "/r/fcd.sock"},
                {"kind": "table", "name": "inet fcd_0000000a"},
                {"kind": "control_group", "name": "/g"}
            ],
            "kept": ["/s/notes"]
        })),
        "fcd.space" => r.result(json!({ "kinds": [
            {"kind": "images", "count": 2, "active": 1, "bytes": 3_u64 << 30, "reclaimable_bytes": 0},
            {"kind": "kernels", "count": 0, "active": 0, "bytes": 0, "reclaimable_bytes": 0}
        ]})),
        "vm.list" => r.result(json!({ "vms": vms })),
        other => panic!("{other}"),
    }
    })
}

#[test]
fn dry_run_lists_what_would_go_and_what_stays() {
    let fake = daemon(&[("web", VmState::Running), ("db", VmState::Stopped)]);
    check(
        &fake,
        &["system", "uninstall", "--dry-run"],
        expect![[r#"
            > fcd.uninstall {"dry_run":true}
            > vm.list {"all":true}
            > fcd.space {}
            would remove:
              VM web (running)
              VM db (stopped)
              images: 2, 3 GiB
              directory /s
              socket /r/fcd.sock
              table inet fcd_0000000a
              control group /g
            3 GiB in all
            to be kept, because fcd did not make it:
              /s/notes
            status 0
        "#]],
    );
    check(
        &fake,
        &["system", "uninstall", "-n", "--json"],
        expect![[r#"
            > fcd.uninstall {"dry_run":true}
            > vm.list {"all":true}
            > fcd.space {}
            {
              "removed": false,
              "vms": [
                {
                  "name": "web",
                  "state": "running"
                },
                {
                  "name": "db",
                  "state": "stopped"
                }
              ],
              "bytes": 3221225472,
              "items": [
                {
                  "kind": "directory",
                  "name": "/s"
                },
                {
                  "kind": "socket",
                  "name": "/r/fcd.sock"
                },
                {
                  "kind": "table",
                  "name": "inet fcd_0000000a"
                },
                {
                  "kind": "control_group",
                  "name": "/g"
                }
              ],
              "kept": [
                "/s/notes"
              ]
            }
            status 0
        "#]],
    );
}

#[test]
fn running_vms_need_force() {
    let fake = daemon(&[("web", VmState::Running), ("db", VmState::Starting)]);
    check(
        &fake,
        &["system", "uninstall", "--yes"],
        expect![[r#"
        > fcd.uninstall {"dry_run":true}
        > vm.list {"all":true}
        > fcd.space {}
        ! fcctl: uninstall: 2 VMs are running: web, db
        ! hint: shut down the guests: fcctl stop web db
        ! hint: or kill them, too: add --force
        status 1
    "#]],
    );
    let fake = daemon(&[("web", VmState::Running)]);
    check(
        &fake,
        &["system", "uninstall", "--force"],
        expect![[r#"
        > fcd.uninstall {"dry_run":true}
        > vm.list {"all":true}
        > fcd.space {}
        to be removed:
          VM web (running)
          images: 2, 3 GiB
          directory /s
          socket /r/fcd.sock
          table inet fcd_0000000a
          control group /g
        3 GiB in all
        to be kept, because fcd did not make it:
          /s/notes
        ! fcctl: uninstall: there is no terminal to ask for confirmation
        ! hint: review the list (fcctl system uninstall --dry-run), then add --yes
        status 2
    "#]],
    );
}

#[test]
fn uninstall_without_terminal_needs_yes() {
    let fake = daemon(&[]);
    check(
        &fake,
        &["system", "uninstall", "--json"],
        expect![[r#"
        > fcd.uninstall {"dry_run":true}
        > vm.list {"all":true}
        > fcd.space {}
        ! {"error":{"code":"invalid_argument","exit_status":2,"hint":"review the list (fcctl system uninstall --dry-run), then add --yes","kind":"invalid_argument","message":"uninstall: --json cannot ask for confirmation","retryable":false}}
        status 2
    "#]],
    );
}

fn system_fcd() -> InfoReply {
    InfoReply {
        api: crate::api::daemon::ApiVersion { major: 1, minor: 0 },
        version: "1.2.3".to_owned(),
        features: Vec::new(),
        pid: 7,
        uid: 0,
        state_dir: "/var/lib/fcd".to_owned(),
        uptime_s: 1,
        guest_roots: Vec::new(),
        driver: String::new(),
        network: String::new(),
        disk_driver: None,
    }
}

#[test]
fn package_is_removed_by_its_package_manager() {
    let root = tempfile::tempdir().unwrap();
    let info = root.path().join(PACKAGE_FILES);
    std::fs::create_dir_all(info.parent().unwrap()).unwrap();
    let refused = |fcd: &InfoReply, program: &str| {
        let refused = require_no_package(fcd, Path::new(program), root.path());
        refused.err().and_then(|e| e.fault.hint)
    };
    assert_eq!(refused(&system_fcd(), "/usr/bin/fcd"), None);
    std::fs::write(info, "/.\n/usr/bin\n/usr/bin/fcd\n").unwrap();
    let purge = Some("apt purge fcd".to_owned());
    assert_eq!(refused(&system_fcd(), "/usr/bin/fcd"), purge);
    assert_eq!(refused(&system_fcd(), "/usr/bin/fcd (deleted)"), purge);
    assert_eq!(refused(&system_fcd(), "/usr/local/bin/fcd"), None);
    let of_user = InfoReply {
        uid: 1000,
        state_dir: "/home/me/.local/state/fcd".to_owned(),
        ..system_fcd()
    };
    assert_eq!(refused(&of_user, "/usr/bin/fcd"), None);
}

#[test]
fn copied_programs_and_units_are_named() {
    let root = tempfile::tempdir().unwrap();
    let unit = root.path().join("etc/systemd/system/fcd.service");
    let config = root.path().join("etc/fcd/config.toml");
    for path in [&unit, &config] {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    let named = [unit, config].map(|path| path.display().to_string());
    assert_eq!(copied_files(&system_fcd(), root.path()), named);
    let other = InfoReply {
        state_dir: "/srv/fcd".to_owned(),
        ..system_fcd()
    };
    assert!(copied_files(&other, root.path()).is_empty());
}
