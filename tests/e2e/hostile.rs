//! Tests with bad input and broken guests. Each refused call has the right status, a message and a
//! hint, and leaves nothing behind.

use crate::host::{FCCTL, Host, text, vmm_processes, wait_for};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Limit of the time for a command that does not wait, including the time to free a VMM's memory.
const PROMPT: Duration = Duration::from_secs(5);

/// The uid of a user without VMs.
const STRANGER: u32 = 65534;

#[track_caller]
fn refused(out: &Output, status: i32, said: &str) {
    let (stdout, stderr) = text(out);
    assert_eq!(out.status.code(), Some(status), "{stdout}{stderr}");
    assert!(
        stderr.starts_with("fcctl: ") && stderr.contains(said),
        "{said:?} is not in: {stderr}"
    );
    assert!(stderr.contains("hint: ") || status == 2, "{stderr}");
}

/// Returns all VMs, and what they have on the host: VMM processes and directories.
fn everything(host: &Host) -> (String, Vec<String>) {
    (host.ok(&["ps", "-aq"]), host.census())
}

#[test]
fn bad_requests_change_nothing() {
    let host = Host::with_config("[limits]\nvms_per_uid_max = 300\n");
    host.ok(&["vm", "create", "--name", "taken"]);
    let before = everything(&host);
    let tree = tempfile::tempdir().unwrap();
    let tree = tree.path().to_str().unwrap();
    let check = |args: &[&str], status, said: &str| refused(&host.fcctl(args), status, said);
    check(&["vm", "show", "nope"], 3, "no VM \"nope\"");
    check(&["vm", "create", "--name", "taken"], 4, "taken");
    check(&["vm", "create", "--name", "Bad_Name"], 2, "Bad_Name");
    check(&["vm", "create", "--image", "nope"], 3, "nope");
    check(&["vm", "create", "--memory", "900T"], 1, "memory");
    check(&["vm", "create", "--memory", "1M"], 2, "memory");
    check(&["vm", "create", "--vcpus", "0"], 2, "vCPUs");
    check(&["vm", "create", "--disk", "1K"], 2, "disk");
    check(
        &["run", "--image", "127.0.0.1:1/nope", tree, "--", "true"],
        125,
        "nope",
    );
    check(&["run", "--memory", "900T", "--", "true"], 125, "memory");
    check(&["run", "/not/there", "--", "true"], 125, "/not/there");
    check(
        &["workspace", "prepare", "taken", "/not/there"],
        3,
        "/not/there",
    );
    check(&["workspace", "prepare", "taken", tree], 1, "start");
    check(&["workspace", "export", "taken"], 1, "start");
    check(&["op", "show", "abcdef012345"], 3, "abcdef012345");
    assert_eq!(everything(&host), before);
    racing_creates(&host);
    // Among 257 ids, at least two share their first two digits. Usually far fewer are needed.
    let mut ids = vec![host.show("taken", "id").as_str().unwrap()[..2].to_owned()];
    let twice = loop {
        let name = host.ok(&["vm", "create"]);
        let prefix = host.show(name.trim(), "id").as_str().unwrap()[..2].to_owned();
        if ids.contains(&prefix) {
            break prefix;
        }
        ids.push(prefix);
    };
    check(&["vm", "show", &twice], 2, "matches several VMs");
    check(&["rm", "-f", &twice], 2, "matches several VMs");
    host.ok(&["vm", "prune"]);
}

/// Twenty calls create a VM with the same name, and exactly one succeeds.
fn racing_creates(host: &Host) {
    let mut all: Vec<_> = (0..20)
        .map(|_| host.spawn(&["vm", "create", "--name", "wanted"]))
        .collect();
    let statuses: Vec<_> = all.iter_mut().map(|c| c.end().0.unwrap()).collect();
    assert_eq!(
        statuses.iter().filter(|s| **s == 0).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(
        statuses.iter().filter(|s| **s == 4).count(),
        19,
        "{statuses:?}"
    );
    host.ok(&["rm", "wanted"]);
}

/// Runs `fcctl` as another user. This socket accepts every user, and the uid decides what a caller
/// may do.
fn as_stranger(host: &Host, args: &[&str]) -> Output {
    fs::set_permissions(host.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    // The program is run through a descriptor, because the user may not be able to enter the
    // directories above it.
    let fcctl = fs::File::open(FCCTL).unwrap();
    let mut command = Command::new(format!("/proc/self/fd/{}", fcctl.as_raw_fd()));
    command
        .uid(STRANGER)
        .gid(STRANGER)
        .arg("--socket")
        .arg(host.socket());
    command
        .args(args)
        .env("HOME", "/nonexistent")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
}

/// fcctl reads a tree with the caller's rights, and a VM exists only for its owner and root.
#[test]
fn caller_sees_only_own_files_and_vms() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run the tests as root"
    );
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "roots"]);
    let before = everything(&host);
    // The tree must not be below the checkout, because then the whole checkout would be copied. It
    // is not in TMPDIR either, because that may be accessible only to root.
    let tree = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tree.path().join("open"), "x").unwrap();
    fs::write(tree.path().join("shut"), "x").unwrap();
    fs::set_permissions(tree.path().join("shut"), fs::Permissions::from_mode(0o600)).unwrap();
    refused(
        &as_stranger(&host, &["run", tree.path().to_str().unwrap(), "--", "true"]),
        125,
        "shut",
    );
    assert_eq!(everything(&host), before);

    assert_eq!(text(&as_stranger(&host, &["ps", "-aq"])).0, "");
    let id = host.show("roots", "id").as_str().unwrap().to_owned();
    for vm in ["roots", &id, &id[..4]] {
        for verb in [
            &["vm", "show"][..],
            &["start"],
            &["rm", "-f"],
            &["logs"],
            &["vm", "kill"],
        ] {
            let out = as_stranger(&host, &[verb, &[vm]].concat());
            // `rm -f` of a VM that does not exist succeeds.
            let expected = if verb[0] == "rm" { 0 } else { 3 };
            assert_eq!(
                out.status.code(),
                Some(expected),
                "{verb:?} {:?}",
                text(&out)
            );
        }
    }
    assert_eq!(everything(&host), before);
    let out = as_stranger(&host, &["vm", "create", "--name", "strangers"]);
    assert!(out.status.success(), "{:?}", text(&out));
    assert_eq!(
        text(&as_stranger(&host, &["ps", "-aq"])).0.lines().count(),
        1
    );
    assert_eq!(host.show("strangers", "owner_uid"), 65534);
}

#[test]
fn broken_guest_is_reported() {
    let host = Host::start();
    host.boot("box");
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("big"), vec![7; 8 << 20]).unwrap();
    let path = tree.path().to_str().unwrap();
    for bad in ["/etc", "../x", "/root/../etc/x", "/root"] {
        let out = host.fcctl(&["workspace", "prepare", "box", path, "--guest-path", bad]);
        refused(&out, 2, bad);
    }
    assert!(host.show("box", "workspace").is_null());
    a_full_disk(&host, path);
    a_dead_vmm(&host);
    a_hung_vmm(&host);
    another_host_key(&host);
}

fn a_full_disk(host: &Host, tree: &str) {
    // Filling the disk this way writes no data, neither in the guest nor on the host.
    host.sh(
        "box",
        "set -- $(df -k / | tail -n 1); fallocate -l $(($2 - $3 - 4096))K /root/fill; fallocate -l 1G /root/more; true",
    );
    let out = host.fcctl(&[
        "workspace",
        "prepare",
        "box",
        tree,
        "--guest-path",
        "/root/tree",
    ]);
    refused(&out, 1, "o space left");
    assert_eq!(host.show("box", "workspace")["state"], "incomplete");
    host.sh("box", "rm -f /root/fill /root/more");
    host.ok(&[
        "workspace",
        "prepare",
        "box",
        tree,
        "--guest-path",
        "/root/tree",
    ]);
    assert_eq!(host.show("box", "workspace")["state"], "complete");
    assert_eq!(
        host.sh("box", "pwd; stat -c %s big"),
        format!("/root/tree\n{}\n", 8 << 20)
    );
}

fn a_dead_vmm(host: &Host) {
    let mut sleeping = host.spawn(&[
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    sleeping.says("ready");
    crate::host::signal(vmm_processes(&host.state())[0], "KILL");
    let begun = Instant::now();
    wait_for("the VM has failed", || {
        (host.show("box", "state") == "failed").then_some(())
    });
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        host.ok(&["ps", "-a"]).contains("failed (the VMM died: "),
        "{}",
        host.ok(&["ps", "-a"])
    );
    let (status, within) = sleeping.end();
    assert!(
        status == Some(125) && within < Duration::from_secs(2),
        "{status:?} {within:?} {}",
        sleeping.stderr()
    );
    refused(&host.fcctl(&["exec", "box", "--", "true"]), 125, "failed");
    refused(
        &host.fcctl(&["workspace", "prepare", "box", "/tmp"]),
        1,
        "failed",
    );
    host.ok(&["start", "box"]);
}

/// fcd detects a hung VMM and does not use it until it responds again. A stop does not wait for a
/// hung VMM.
fn a_hung_vmm(host: &Host) {
    let vmm = vmm_processes(&host.state())[0];
    let mut events = host.spawn(&["events"]);
    crate::host::signal(vmm, "STOP");
    wait_for("the VM is unresponsive", || {
        host.show("box", "unresponsive")
            .as_bool()
            .unwrap()
            .then_some(())
    });
    assert!(
        host.ok(&["ps"]).contains("running (unresponsive)"),
        "{}",
        host.ok(&["ps"])
    );
    refused(
        &host.fcctl(&["exec", "box", "--", "true"]),
        125,
        "fcctl stop --force box",
    );
    refused(
        &host.fcctl(&["workspace", "prepare", "box", "/tmp"]),
        1,
        "does not respond",
    );
    crate::host::signal(vmm, "CONT");
    wait_for("the VM responds again", || {
        (!host.show("box", "unresponsive").as_bool().unwrap()).then_some(())
    });
    assert_eq!(host.sh("box", "echo well"), "well\n");
    events.says("VMM does not respond");
    events.says("VMM responds again");

    crate::host::signal(vmm, "STOP");
    wait_for("the VM is unresponsive", || {
        host.show("box", "unresponsive")
            .as_bool()
            .unwrap()
            .then_some(())
    });
    let begun = Instant::now();
    host.ok(&["stop", "box"]);
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "no grace for a VMM that does not respond: {:?}",
        begun.elapsed()
    );
    assert_eq!(
        (host.show("box", "state"), host.show("box", "synced")),
        ("stopped".into(), "no".into())
    );
    assert_eq!(vmm_processes(&host.state()), Vec::<u32>::new());
    host.ok(&["start", "box"]);
}

/// fcd does not talk to a guest with a wrong host key.
fn another_host_key(host: &Host) {
    let script = "cd /run/fcd/seed && rm -f host_key && ssh-keygen -q -t ed25519 -N '' -f host_key && \
        kill $(pidof sshd | tr ' ' '\\n' | sort -n | head -n 1)";
    host.fcctl(&["exec", "box", "--", "sh", "-c", script]);
    let said = wait_for("the guest's sshd has another key", || {
        let out = host.fcctl(&["--json", "exec", "box", "--", "true"]);
        let error: serde_json::Value = serde_json::from_slice(&out.stderr).unwrap_or_default();
        (out.status.code() == Some(125) && error["error"]["kind"] == "host_key_mismatch")
            .then_some(error)
    });
    assert_eq!(said["error"]["code"], "guest_unavailable", "{said}");
    assert!(said["error"]["hint"].is_string(), "{said}");
    let out = host.fcctl(&["stop", "box"]);
    assert!(
        text(&out).0.contains("stopped, but the guest did not sync"),
        "{:?}",
        text(&out)
    );
    // The next start restores the right key from the seed.
    host.ok(&["start", "box"]);
    assert_eq!(host.sh("box", "echo back"), "back\n");
}

#[test]
fn stop_and_delete_work_with_unread_log_and_hung_vmm() {
    let mut host = Host::with_unread_log();
    for verb in [&["stop", "--force", "box"][..], &["rm", "-f", "box"]] {
        host.fcctl(&["vm", "create", "--name", "box"]);
        host.ok(&["start", "box"]);
        crate::host::signal(vmm_processes(&host.state())[0], "STOP");
        wait_for("the VM is unresponsive", || {
            host.show("box", "unresponsive")
                .as_bool()
                .unwrap()
                .then_some(())
        });
        let begun = Instant::now();
        host.ok(verb);
        assert!(
            begun.elapsed() < PROMPT,
            "{verb:?} took {:?}",
            begun.elapsed()
        );
    }
    assert_eq!(vmm_processes(&host.state()), Vec::<u32>::new());
    // The daemon's exit does not wait for a reader of the log either.
    let begun = Instant::now();
    host.stop_daemon();
    assert!(
        begun.elapsed() < PROMPT,
        "the end of the daemon took {:?}",
        begun.elapsed()
    );
}
