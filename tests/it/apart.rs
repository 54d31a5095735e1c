//! Runs a test that changes process-wide state (the log, or the lock checker's hook) in its own
//! process.

use std::process::{Command, Stdio};

/// The deadline for the whole process. Most processes take one second, even on a busy machine.
const DEADLINE_S: &str = "60";

/// Runs this ignored test in its own process. Panics with the process's stdout if the test fails.
#[track_caller]
pub fn run_in_own_process(test: &str, stderr: impl Into<Stdio>) {
    let out = Command::new("timeout")
        .args(["-k", "5", DEADLINE_S])
        .arg(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", test])
        .stdin(Stdio::null())
        .stderr(stderr)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{:?}: {}",
        out.status,
        String::from_utf8_lossy(&out.stdout)
    );
}
