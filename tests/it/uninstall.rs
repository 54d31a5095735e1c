//! Removal of a whole installation.

use crate::process::Process;
use crate::world::*;
use expect_test::{Expect, expect};
use fcd::testing::api::daemon::{Uninstall, UninstallRequest};
use fcd::testing::api::image::ImageList;
use fcd::testing::error::Kind;
use std::process::{Command, Stdio};

const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");

/// Runs fcctl without a terminal. Returns its status and what it printed.
fn fcctl(process: &Process, args: &[&str]) -> String {
    let out = Command::new(FCCTL)
        .args(args)
        .env_clear()
        .env("FCD_SOCKET", process.socket())
        .env("HOME", process.dir())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let printed = format!(
        "status {}\n{}{}",
        out.status.code().unwrap(),
        text(out.stdout),
        text(out.stderr)
    );
    printed.replace(process.dir().to_str().unwrap(), "DIR")
}

#[track_caller]
fn check(process: &Process, args: &[&str], expected: Expect) {
    expected.assert_eq(&fcctl(process, args));
}

/// Lists the names in a directory.
fn names(process: &Process, dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(process.dir().join(dir))
        .into_iter()
        .flatten();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn uninstall_removes_everything_but_files_of_others() {
    let mut process = Process::start(|_| {});
    make_image(&process.dir().join("state"), "default");
    fcctl(&process, &["create", "db"]);
    let keys = process.dir().join(".local/state/fcctl/ssh");
    std::fs::write(process.dir().join("state/notes"), "mine").unwrap();
    check(
        &process,
        &["system", "uninstall", "-n"],
        expect![[r#"
        status 0
        would remove:
          VM db (created)
          VMs: 1, 0 B
          images: 1, 72 KiB
          directory DIR/state
          socket DIR/fcd.sock
        72 KiB in all
        to be kept, because fcd did not make it:
          DIR/state/notes
    "#]],
    );
    check(
        &process,
        &["system", "uninstall"],
        expect![[r#"
        status 2
        to be removed:
          VM db (created)
          VMs: 1, 0 B
          images: 1, 72 KiB
          directory DIR/state
          socket DIR/fcd.sock
        72 KiB in all
        to be kept, because fcd did not make it:
          DIR/state/notes
        fcctl: uninstall: there is no terminal to ask for confirmation
        hint: review the list (fcctl system uninstall --dry-run), then add --yes
    "#]],
    );
    check(
        &process,
        &["system", "uninstall", "--yes"],
        expect![[r#"
            status 0
            to be removed:
              VM db (created)
              VMs: 1, 0 B
              images: 1, 72 KiB
              directory DIR/state
              socket DIR/fcd.sock
            72 KiB in all
            to be kept, because fcd did not make it:
              DIR/state/notes
            removed fcd and 72 KiB
        "#]],
    );
    assert!(process.end().success(), "{}", process.log());
    assert_eq!(names(&process, "state"), ["notes"]);
    assert_eq!(names(&process, "claims"), ["lock"]);
    assert!(!process.socket().exists() && !keys.exists());
    check(
        &process,
        &["ps"],
        expect![[r#"
        status 5
        fcctl: no daemon at DIR/fcd.sock: the socket does not exist
        hint: start the daemon (fcd), or name its socket (--socket S or FCD_SOCKET)
    "#]],
    );
}

#[test]
fn uninstall_is_refused_while_there_are_vms_and_refuses_calls_afterwards() {
    let world = World::new();
    world.running("web");
    let uninstall = |dry_run| world.call::<Uninstall>(&UninstallRequest { dry_run });
    let refused = uninstall(false).unwrap_err().fault;
    assert_eq!(refused.kind, Kind::Conflict.name());
    assert!(refused.message.contains("web"), "{}", refused.message);
    // Everything in the state directory is known to be fcd's.
    assert_eq!(uninstall(true).unwrap().kept, [""; 0]);
    world.delete("web").unwrap();
    let mut connected = world.client();
    assert_eq!(uninstall(false).unwrap().kept, [""; 0]);
    let refused = connected
        .call::<ImageList>(&Default::default())
        .unwrap_err();
    assert_eq!(refused.fault.kind, Kind::ShuttingDown.name());
}
