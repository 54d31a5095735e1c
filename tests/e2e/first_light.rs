//! Tests of fcd's main use: run a command on a repository in a VM, and keep the VM when the daemon
//! restarts.

use crate::host::{Host, vmm_processes};
use std::process::Command;

/// Creates a repository with one commit.
pub fn repository(dir: &std::path::Path) {
    let script = "git init -q -b main && git config user.name T && git config user.email t@example.invalid \
        && printf 'all:\\n\\ttrue\\n' > Makefile && echo hello > hello.txt && git add -A && git commit -qm 'First commit'";
    let status = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn run_copies_repository_and_returns_command_status() {
    let host = Host::start();
    let repo = tempfile::tempdir().unwrap();
    repository(repo.path());
    let path = repo.path().to_str().unwrap();
    let out = host.fcctl(&[
        "run",
        "--rm",
        path,
        "--",
        "sh",
        "-c",
        "git log --oneline | head -3; ls; exit 7",
    ]);
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert_eq!(out.status.code(), Some(7), "{stdout}{stderr}{}", host.log());
    assert!(
        stdout.contains("First commit") && stdout.contains("hello.txt"),
        "{stdout}"
    );
    assert_eq!(host.census(), Vec::<String>::new());
}

#[test]
fn running_vm_outlives_daemon() {
    let mut host = Host::start();
    host.boot("survivor");
    let before = vmm_processes(&host.state());
    assert_eq!(before.len(), 1);
    host.kill_daemon();
    assert_eq!(vmm_processes(&host.state()), before);
    host.relaunch();
    crate::host::wait_for("the VM is reconciled", || {
        host.fcctl(&["exec", "survivor", "--", "true"])
            .status
            .success()
            .then_some(())
    });
    assert_eq!(host.json(&["vm", "show", "survivor"])["state"], "running");
    assert_eq!(host.sh("survivor", "echo $((6*7))"), "42\n");
    assert_eq!(vmm_processes(&host.state()), before);
}
