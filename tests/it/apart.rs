//! Tests of what is the whole process's (its log, the hook of the lock checker) run in a process of their own.

use std::process::{Command, Stdio};

/// Deadline of the whole process; on a loaded machine most take a second.
const DEADLINE_S: &str = "60";

/// Runs this ignored test by itself and shows what it printed if it fails.
#[track_caller]
pub fn run_apart(test: &str, stderr: impl Into<Stdio>) {
    let out = Command::new("timeout")
        .args(["-k", "5", DEADLINE_S])
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test])
        .stdin(Stdio::null())
        .stderr(stderr)
        .output()
        .unwrap();
    assert!(out.status.success(), "{:?}: {}", out.status, String::from_utf8_lossy(&out.stdout));
}
