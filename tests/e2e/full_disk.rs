//! Tests with a full disk under the state directory. A call that needs space reports the full disk
//! and leaves nothing behind, the daemon keeps running, and everything works again when there is
//! space.

use crate::host::{Host, text, wait_for};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

/// The size of the disk: room for the image, one or two VMs, and a small import.
const DISK_MIB: u64 = 512;
const MIB: u64 = 1 << 20;

/// Checks the status, kind, message and hint of a call that failed because the disk is full.
#[track_caller]
fn full(out: &Output, status: i32) {
    let (stdout, stderr) = text(out);
    assert_eq!(out.status.code(), Some(status), "{stdout}{stderr}");
    let error: serde_json::Value =
        serde_json::from_str(&stderr).unwrap_or_else(|e| panic!("{e}: {stderr}"));
    assert_eq!(
        (&error["error"]["code"], &error["error"]["kind"]),
        (&"host".into(), &"disk_full".into()),
        "{error}"
    );
    for part in ["message", "hint"] {
        assert!(
            error["error"][part].as_str().is_some_and(|s| !s.is_empty()),
            "{part}: {error}"
        );
    }
    println!("{} ({})", error["error"]["message"], error["error"]["hint"]);
}

pub fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // Skips the files of SQLite and of the store, which may appear and disappear at any time,
        // and the file that fills the disk.
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            files_below(&path, found);
        } else if !name.starts_with("fcd.db") && name != "reserve" && name != "fill" {
            found.push(path);
        }
    }
}

/// Returns the VMs with their states, the daemon's processes and directories, and all files of the
/// state directory.
fn census(host: &Host) -> (Vec<String>, Vec<String>, Vec<PathBuf>) {
    let mut files = Vec::new();
    files_below(&host.state(), &mut files);
    files.sort();
    let vms = host.json(&["ps", "-a"]);
    let rows = vms
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| format!("{} {}", vm["name"], vm["state"]))
        .collect();
    (rows, host.census(), files)
}

/// Waits until the daemon has noticed the free space.
fn writable(host: &Host) {
    wait_for("changes are accepted again", || {
        host.fcctl(&["vm", "create", "--name", "probe"])
            .status
            .success()
            .then_some(())
    });
    host.ok(&["rm", "probe"]);
}

/// Waits until the guest of "box" runs.
fn resumed(host: &Host) {
    wait_for("the guest resumes", || {
        host.fcctl(&["exec", "box", "--", "true"])
            .status
            .success()
            .then_some(())
    });
}

/// With a completely full disk, nothing can start, a guest is paused only when it writes, and
/// everything can be deleted.
#[test]
fn full_host_disk_pauses_guest_and_allows_delete() {
    let mut host = Host::on_small_disk(DISK_MIB);
    host.boot("box");
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("small"), "x").unwrap();
    let path = tree.path().to_str().unwrap();
    let before = census(&host);
    host.ok(&["vm", "create", "--name", "other"]);
    host.sh("box", "sync");
    host.disk().fill(0);
    let refused = |host: &Host| {
        full(&host.fcctl(&["--json", "start", "other"]), 1);
        full(&host.fcctl(&["--json", "image", "build", "second"]), 1);
        full(
            &host.fcctl(&["--json", "workspace", "prepare", "box", path]),
            1,
        );
        full(
            &host.fcctl(&["--json", "run", "--rm", path, "--", "true"]),
            125,
        );
        // The import made the guest write, so QEMU has paused the guest.
        full(&host.fcctl(&["--json", "exec", "box", "--", "true"]), 125);
    };
    // The guest works until it writes, which may happen at any time.
    let served = host.fcctl(&["--json", "exec", "box", "--", "true"]);
    if !served.status.success() {
        full(&served, 125);
    }
    refused(&host);
    // The database's log has reserved space, so the row may still be written. If the call succeeds,
    // the row is durable.
    let created = host.fcctl(&["--json", "vm", "create", "--name", "third"]);
    if !created.status.success() {
        full(&created, 1);
    }
    host.kill_daemon();
    host.relaunch();
    wait_for("both VMs are reconciled", || {
        let looked = |vm| text(&host.fcctl(&["--json", "start", vm])).1;
        (!["box", "other"]
            .into_iter()
            .any(|vm| looked(vm).contains("\"busy\"")))
        .then_some(())
    });
    refused(&host);
    // The new daemon knows that the VM should run, but the guest must stay paused.
    assert!(!host.log().contains("the guest is resumed"));
    assert_eq!(
        host.fcctl(&["vm", "show", "third"]).status.success(),
        created.status.success()
    );
    host.ok(&["rm", "other"]);
    host.ok(&["rm", "--force", "third"]);
    assert_eq!(census(&host), before);
    host.disk().free();
    writable(&host);
    resumed(&host);
    host.ok(&["vm", "create", "--name", "other"]);
    host.ok(&["workspace", "prepare", "box", path]);
    host.ok(&["start", "other"]);
    assert_eq!(host.sh("other", "echo served"), "served\n");
    host.ok(&["stop", "other", "box"]);
    host.ok(&["rm", "other"]);
    assert_eq!(
        census(&host).1,
        before
            .1
            .into_iter()
            .filter(|f| !f.starts_with("process"))
            .collect::<Vec<_>>()
    );
}

/// When space runs out, guests are paused at their next write. When there is space again, they are
/// resumed.
#[test]
fn guest_resumes_when_host_disk_has_space() {
    let host = Host::on_small_disk(DISK_MIB);
    host.boot("box");
    host.sh("box", "(while sleep 0.2; do echo tick; done) >/dev/shm/ticks 2>&1 </dev/null & echo $! >/dev/shm/ticker");
    let before = census(&host);
    host.ok(&["vm", "create", "--name", "other"]);
    host.disk().fill(400 << 10);
    full(&host.fcctl(&["--json", "start", "other"]), 1);
    assert_eq!(host.show("other", "state"), "failed");
    host.ok(&["rm", "other"]);
    assert_eq!(census(&host), before);

    let tree = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..12 * MIB as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    fs::write(tree.path().join("big"), bytes).unwrap();
    let path = tree.path().to_str().unwrap();
    host.disk().free();
    writable(&host);
    // The guest may also have been paused by one of its own writes.
    resumed(&host);
    host.disk().fill(4 * MIB);
    full(
        &host.fcctl(&["--json", "workspace", "prepare", "box", path]),
        1,
    );
    assert_eq!(host.show("box", "workspace")["state"], "incomplete");
    assert_eq!(
        host.show("box", "reason"),
        "paused: the host's disk is full"
    );
    full(&host.fcctl(&["--json", "exec", "box", "--", "true"]), 125);
    assert_eq!((census(&host).0, host.census()), (before.0, before.1));

    host.disk().free();
    resumed(&host);
    assert!(host.show("box", "reason").is_null());
    // The guest was not restarted.
    host.sh("box", "kill $(cat /dev/shm/ticker)");
    writable(&host);
    host.ok(&["workspace", "prepare", "box", path]);
    assert_eq!(host.show("box", "workspace")["state"], "complete");
    let sum = |dir: &str| host.sh("box", &format!("sha256sum <{dir}/big"));
    let ours = std::process::Command::new("sha256sum")
        .stdin(fs::File::open(tree.path().join("big")).unwrap())
        .output()
        .unwrap();
    assert_eq!(sum("."), text(&ours).0);
    assert!(
        host.ok(&["stop", "box"])
            .contains("the guest's data was synced")
    );
}
