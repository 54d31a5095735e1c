use super::*;
use crate::store::{SnapshotRow, WorkspaceRow};
use rusqlite::Connection;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::os::unix::fs::{PermissionsExt, symlink};

/// Creates, fills and closes a store, damages its files with `harm`, and opens it again. Returns
/// the directory and the result of the second open.
fn harmed(harm: impl FnOnce(&Path, &Path)) -> (TempDir, Result<Store>) {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    (0..200).for_each(|n| put(&store, n).unwrap().detach());
    store.close();
    let path = dir.path().join(schema::FILE_NAME);
    harm(dir.path(), &path);
    let before = std::fs::read(&path).ok();
    let opened = Store::open(dir.path());
    if opened.is_err() {
        assert_eq!(
            std::fs::read(&path).ok(),
            before,
            "a refused file is left as it is"
        );
    }
    (dir, opened)
}

#[track_caller]
fn check_refused(harm: impl FnOnce(&Path, &Path), says: &str) {
    let (dir, opened) = harmed(harm);
    let e = opened.map(drop).unwrap_err();
    assert_eq!(e.kind(), Kind::StoreRefused, "{e:?}");
    let text = format!("{e:?}");
    assert!(
        text.contains(says) && text.contains(dir.path().to_str().unwrap()),
        "{text}"
    );
    assert!(e.hint_text().is_some(), "{text}");
}

fn sql(path: &Path, text: &str) {
    Connection::open(path).unwrap().execute_batch(text).unwrap();
}

#[test]
fn file_that_is_not_a_database_is_refused() {
    check_refused(
        |_, path| std::fs::write(path, "hello, not a database".repeat(100)).unwrap(),
        "not a database",
    );
}

#[test]
fn empty_file_is_refused() {
    check_refused(|_, path| std::fs::write(path, "").unwrap(), "is empty");
}

#[test]
fn foreign_database_is_refused() {
    check_refused(
        |_, path| sql(path, "PRAGMA application_id = 7"),
        "was not made by fcd",
    );
}

#[test]
fn newer_version_is_refused() {
    check_refused(
        |_, path| {
            sql(
                path,
                "PRAGMA user_version = 99; DELETE FROM store_info WHERE name = 'fcd_version'",
            )
        },
        "was written by a newer fcd (schema 99)",
    );
    check_refused(
        |_, path| sql(path, "PRAGMA user_version = 0"),
        "has the unknown schema 0",
    );
}

#[test]
fn newer_database_is_refused_with_version_to_install() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().detach();
    store.close();
    let path = dir.path().join(schema::FILE_NAME);
    let writer = || {
        let c = rusqlite::Connection::open(&path).unwrap();
        let version = schema::info(&c, schema::WRITER).unwrap();
        c.close().unwrap();
        version
    };
    assert_eq!(writer().as_deref(), Some(schema::THIS_VERSION));
    // The next writer records its version.
    sql(
        &path,
        "UPDATE store_info SET value = '0.0.1' WHERE name = 'fcd_version'",
    );
    let store = Store::open(dir.path()).unwrap();
    put(&store, 2).unwrap().detach();
    store.close();
    assert_eq!(writer().as_deref(), Some(schema::THIS_VERSION));
    sql(
        &path,
        "PRAGMA user_version = 99; UPDATE store_info SET value = '9.1.0' WHERE name = 'fcd_version'",
    );
    let e = Store::open(dir.path()).map(drop).unwrap_err();
    let this = schema::THIS_VERSION;
    let shown = path.display();
    assert_eq!(
        e.to_string(),
        format!("database {shown} was written by fcd 9.1.0 (schema 99); this is fcd {this}")
    );
    let hint = "install fcd 9.1.0 or newer; a database cannot be downgraded";
    assert_eq!(e.hint_text(), Some(hint));
}

#[test]
fn corrupt_page_is_refused() {
    let spoil = |_: &Path, path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let len = bytes.len();
        bytes[4096 * 8 + 16..len].fill(0xa5);
        std::fs::write(path, bytes).unwrap();
    };
    check_refused(spoil, "damaged");
}

#[test]
fn unreadable_row_is_refused() {
    let (_dir, opened) =
        harmed(|_, path| sql(path, "UPDATE vms SET body = '{}' WHERE name = 'vm-7'"));
    let e = opened.map(drop).unwrap_err();
    assert_eq!(e.kind(), Kind::StoreRefused);
    assert!(
        e.to_string()
            .contains("read row \"000000000007\" of table vms"),
        "{e}"
    );
}

#[test]
fn missing_write_ahead_log_is_refused() {
    // These are the files that a killed daemon leaves, but without the log.
    check_refused(
        |_, path| {
            sql(
                path,
                "UPDATE store_info SET value = '1' WHERE name = 'open'",
            )
        },
        "fcd.db-wal is missing",
    );
}

#[test]
fn write_ahead_log_without_database_is_refused() {
    let move_away = |dir: &Path, path: &Path| {
        std::fs::remove_file(path).unwrap();
        std::fs::write(dir.join("fcd.db-wal"), "x").unwrap();
    };
    check_refused(move_away, "is missing, but its write-ahead log exists");
}

#[test]
fn symbolic_link_is_refused() {
    let link = |dir: &Path, path: &Path| {
        std::fs::rename(path, dir.join("elsewhere")).unwrap();
        symlink(dir.join("elsewhere"), path).unwrap();
    };
    check_refused(link, "a symbolic link");
    check_refused(
        |dir, path| std::fs::hard_link(path, dir.join("second")).unwrap(),
        "one link",
    );
}

#[test]
fn directory_writable_by_others_is_refused() {
    let open_up = |dir: &Path, _: &Path| {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777)).unwrap()
    };
    check_refused(open_up, "writable by others");
}

#[test]
fn file_of_another_user_is_refused() {
    check_refused(
        |_, path| std::os::unix::fs::chown(path, Some(4321), None).unwrap(),
        "belongs to uid 4321",
    );
}

#[test]
fn file_accessible_to_others_gets_mode_0600() {
    let (dir, opened) = harmed(|_, path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap()
    });
    opened.unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap()) {
        assert_eq!(
            file.metadata().unwrap().permissions().mode() & 0o777,
            0o600,
            "{:?}",
            file.path()
        );
    }
}

#[test]
fn commits_overwrite_log_of_sufficient_length() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let log_bytes = || dir.path().join("fcd.db-wal").metadata().unwrap().len();
    assert_eq!(log_bytes(), schema::LOG_BYTES);
    // These are more pages than the log has room for, so the store folds the log.
    for n in 0..schema::LOG_FRAMES {
        put(&store, n).unwrap().wait(soon()).unwrap();
    }
    assert_eq!(log_bytes(), schema::LOG_BYTES);
    check_reopened(store, dir.path());
}

/// Checks that the settings in `.cargo/config.toml` apply to the build from any directory.
#[test]
fn sqlite_is_built_with_fdatasync() {
    assert!(
        option_env!("LIBSQLITE3_FLAGS").is_some_and(|flags| flags.contains("-DHAVE_FDATASYNC=1"))
    );
}

#[test]
fn second_daemon_on_same_directory_is_refused() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    let e = Store::open(dir.path()).map(drop).unwrap_err();
    assert_eq!(e.kind(), Kind::StoreRefused);
    assert!(
        e.hint_text().unwrap().starts_with("see which process"),
        "{e:?}"
    );
    put(&store, 1).unwrap().wait(soon()).unwrap();
}

#[test]
fn incomplete_database_of_killed_daemon_is_made_again() {
    let dir = dir();
    std::fs::write(dir.path().join("fcd.db.new"), "half").unwrap();
    std::fs::write(dir.path().join("fcd.db.new-journal"), "half").unwrap();
    let store = Store::open(dir.path()).unwrap();
    let id = store.install_id().to_owned();
    assert!(id.len() == INSTALL_ID_LEN && id.bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(check_reopened(store, dir.path()).install_id(), id);
    let other = self::dir();
    assert_ne!(Store::open(other.path()).unwrap().install_id(), id);
}

#[test]
fn migration_is_atomic_and_keeps_a_copy() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().detach();
    store.close();
    let mut newer = schema::migrations();
    let now = newer.len();
    newer.push("CREATE TABLE extra (a TEXT) STRICT; INSERT INTO extra VALUES ('x'); SELECT no_such_function();".into());
    let e = schema::open(dir.path(), &newer).map(drop).unwrap_err();
    assert_eq!(e.kind(), Kind::StoreRefused);
    // The older version can still open the database.
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.read(|s| s.vms().count()), 1);
    store.close();

    newer[now] = "CREATE TABLE extra (a TEXT) STRICT; INSERT INTO extra VALUES ('x');".into();
    let c = schema::open(dir.path(), &newer).unwrap();
    assert_eq!(
        c.query_row("SELECT a FROM extra", [], |r| r.get::<_, String>(0))
            .unwrap(),
        "x"
    );
    schema::close(c).unwrap();
    assert_eq!(
        Store::open(dir.path()).map(drop).unwrap_err().kind(),
        Kind::StoreRefused
    );
    // The copy is a complete store.
    let old = self::dir();
    std::fs::copy(
        dir.path().join(format!("fcd.db.v{now}.bak")),
        old.path().join(schema::FILE_NAME),
    )
    .unwrap();
    assert_eq!(
        Store::open(old.path()).unwrap().read(|s| s.vms().count()),
        1
    );
}

#[test]
fn version_1_is_migrated() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().detach();
    store.close();
    // Rows of version 1 have no network and no `unresponsive`.
    let back = "UPDATE vms SET body = json_remove(body, '$.net', '$.tap', '$.unresponsive'); DROP TABLE snapshots; PRAGMA user_version = 1";
    sql(&dir.path().join(schema::FILE_NAME), back);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(
        store.read(|s| s.vms().map(|r| (**r).clone()).collect::<Vec<_>>()),
        [row(1)]
    );
}

#[test]
fn version_4_is_migrated() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().detach();
    store.close();
    // Rows of version 4 have no rates, no balloon and no kernel, even in pending settings.
    let back = "UPDATE vms SET body = json_set(json_remove(body, '$.rates', '$.has_balloon', '$.balloon_mib', '$.kernel'), \
                '$.pending', json('{\"vcpus\":2,\"mem_mib\":null,\"disk_bytes\":null}')); DROP TABLE snapshots; PRAGMA user_version = 4";
    sql(&dir.path().join(schema::FILE_NAME), back);
    let store = Store::open(dir.path()).unwrap();
    let pending = Some(crate::api::vm::Pending {
        vcpus: Some(2),
        ..Default::default()
    });
    assert_eq!(
        store.read(|s| s.vms().map(|r| (**r).clone()).collect::<Vec<_>>()),
        [VmRow { pending, ..row(1) }]
    );
}

/// Each entry has members of a VM, and the last schema version without these members.
const MEMBERS_ADDED: [(u32, &str); 9] = [
    (8, "'$.runtime'"),
    (9, "'$.image_digest'"),
    (10, "'$.init'"),
    (11, "'$.labels'"),
    (12, "'$.restart'"),
    (13, "'$.host_name', '$.dns'"),
    (14, "'$.commands'"),
    (15, "'$.tap.address6'"),
    (16, "'$.auto_ports'"),
];

#[test]
fn tap_of_earlier_version_has_no_ipv6_address() {
    let dir = dir();
    let store = Store::open(dir.path()).unwrap();
    put(&store, 1).unwrap().detach();
    store.close();
    let back = r#"UPDATE vms SET body = json_set(body, '$.tap', json('{"name":"fc1a2b3c4d-1","address":"10.89.0.2"}')); PRAGMA user_version = 15"#;
    sql(&dir.path().join(schema::FILE_NAME), back);
    let store = Store::open(dir.path()).unwrap();
    let tap = store
        .read(|s| s.vms().find_map(|row| row.tap.clone()))
        .unwrap();
    assert_eq!((tap.address, tap.address6), ([10, 89, 0, 2].into(), None));
}

/// A row of an earlier version lacks everything that later versions added.
#[test]
fn versions_with_fewer_members_are_migrated() {
    for (at, (version, _)) in MEMBERS_ADDED.iter().enumerate() {
        let dir = dir();
        let store = Store::open(dir.path()).unwrap();
        put(&store, 1).unwrap().detach();
        store.close();
        let added: Vec<&str> = MEMBERS_ADDED[at..]
            .iter()
            .map(|(_, names)| *names)
            .collect();
        let back = format!(
            "UPDATE vms SET body = json_remove(body, {}); PRAGMA user_version = {version}",
            added.join(", ")
        );
        sql(&dir.path().join(schema::FILE_NAME), &back);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(
            store.read(|s| s.vms().map(|r| (**r).clone()).collect::<Vec<_>>()),
            [row(1)],
            "version {version}"
        );
    }
}

/// Checks that `body`, which an earlier build wrote, keeps its members when read and written again,
/// and that a row with an unknown member is refused.
#[track_caller]
fn check_body<T: Serialize + DeserializeOwned>(body: &str) {
    let row: T = serde_json::from_str(body).unwrap();
    let before: Value = serde_json::from_str(body).unwrap();
    assert_eq!(serde_json::to_value(row).unwrap(), before);
    let newer = body.replacen('{', "{\"new\":1,", 1);
    let e = serde_json::from_str::<T>(&newer).map(drop).unwrap_err();
    assert!(e.to_string().starts_with("unknown field `new`"), "{e}");
}

#[test]
fn rows_have_the_members_of_earlier_builds() {
    check_body::<VmRow>(
        r#"{"id":"000000000001","name":"vm-1","owner_uid":1000,"state":"created","reason":null,"image":"default","image_digest":"sha256:1","kernel":"linux","runtime":null,"init":"image","vcpus":1,"mem_mib":512,"disk_bytes":1073741824,"work_disk_bytes":4096,"rates":{"disk_bytes_per_s":5,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"net":"nat","labels":{"ci":"yes"},"commands":{"user":"dev","workdir":null,"env":["A"]},"ports":[],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"host_name":"build","dns":["1.1.1.1"],"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":null,"op":null,"intent":null,"generation":0,"slot":1,"identity":null,"ssh_addr":null,"tap":null,"disk_driver":null,"guest_version":0,"driver":null,"host_key":null,"synced":null,"unresponsive":false,"paused":false,"has_balloon":false,"balloon_mib":null}"#,
    );
    check_body::<WorkspaceRow>(
        r#"{"vm":"000000000001","guest_path":"/root/x","workdir":"/root/x","state":"incomplete","readonly":false,"entries":0,"bytes":18446744073709551615,"prepared_at":2,"generation":1}"#,
    );
    check_body::<SnapshotRow>(
        r#"{"id":"000000000002","name":"a","owner_uid":1000,"vm":"000000000001","vm_name":"vm-1","created_at":1,"image":"default","image_digest":"sha256:1","kernel":null,"runtime":"0123456789ab","init":"fcd","vcpus":1,"mem_mib":512,"disk_bytes":4096,"work_disk_bytes":null,"disk_driver":"qcow2","guest_version":1,"net":"none","rates":{"disk_bytes_per_s":null,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null},"labels":{},"commands":{"user":null,"workdir":"/x","env":[]},"has_balloon":true,"balloon_mib":null,"on_bridge":false,"driver":"qemu (tcg, microvm)","vmm_version":null,"workspace":{"vm":"000000000001","guest_path":"/root/x","workdir":"/root/x","state":"complete","readonly":true,"entries":3,"bytes":4,"prepared_at":2,"generation":1},"bytes":7}"#,
    );
}
