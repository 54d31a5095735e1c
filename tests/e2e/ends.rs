//! Tests of the reported reason for a guest's end: the guest ends under the daemon that started it,
//! under the next daemon, or while no daemon runs.

use crate::host::{Host, signal, vmm_processes, wait_for};

/// The time until a guest ends. It is long enough to stop the daemon first.
const DELAY_S: u64 = 3;

/// A way for a guest to end, and the reported reasons.
struct End {
    name: &'static str,
    script: &'static str,
    state: &'static str,
    reason: &'static str,
    /// The reason if no daemon was running.
    unseen: &'static str,
}

/// The reported reason for a panic or a reset that no daemon saw. It comes from QEMU's log, which
/// does not distinguish the two. The console would, but no daemon recorded it.
const UNSEEN_RESET: &str =
    "while fcd was not running: the guest was reset, according to the VMM's log";

const ENDS: [End; 3] = [
    End {
        name: "off",
        script: "kill -TERM 1",
        state: "stopped",
        reason: "the guest shut itself down",
        unseen: "the guest shut itself down",
    },
    End {
        name: "panic",
        script: "echo c > /proc/sysrq-trigger",
        state: "failed",
        reason: "the guest's kernel panicked: sysrq triggered crash",
        unseen: UNSEEN_RESET,
    },
    End {
        name: "reset",
        script: "echo b > /proc/sysrq-trigger",
        state: "failed",
        reason: "the guest was reset without a shutdown",
        unseen: UNSEEN_RESET,
    },
];

impl End {
    /// Makes the guest end after the delay, even after this connection has closed.
    fn order(&self, host: &Host) {
        let script = format!(
            "(sleep {DELAY_S}; {}) > /dev/null 2>&1 < /dev/null &",
            self.script
        );
        host.ok(&["exec", self.name, "--", "setsid", "sh", "-c", &script]);
    }

    #[track_caller]
    fn is_reported(&self, host: &Host, reason: &str) {
        wait_for("the VM no longer runs", || {
            (host.show(self.name, "state") != "running").then_some(())
        });
        let reported = (
            host.show(self.name, "state"),
            host.show(self.name, "reason"),
        );
        let fits = reported.0 == self.state
            && reported
                .1
                .as_str()
                .is_some_and(|reported| reported.contains(reason));
        assert!(
            fits,
            "{}: {reported:?}, not {} because {reason:?}",
            self.name, self.state
        );
    }
}

fn boot_all(host: &Host) {
    for end in &ENDS {
        host.ok(&["vm", "create", "--name", end.name, "--memory", "256M"]);
        host.ok(&["start", end.name]);
    }
}

#[test]
fn reason_of_ended_guest_is_reported() {
    let host = Host::start();
    boot_all(&host);
    for end in &ENDS {
        end.order(&host);
    }
    ENDS.iter()
        .for_each(|end| end.is_reported(&host, end.reason));
}

#[test]
fn reason_of_guest_ended_after_daemon_restart_is_reported() {
    let mut host = Host::start();
    boot_all(&host);
    host.kill_daemon();
    host.relaunch();
    for end in &ENDS {
        wait_for("the VM is reconciled", || {
            host.fcctl(&["exec", end.name, "--", "true"])
                .status
                .success()
                .then_some(())
        });
        end.order(&host);
    }
    ENDS.iter()
        .for_each(|end| end.is_reported(&host, end.reason));
}

#[test]
fn guest_that_ends_while_no_daemon_runs_is_judged_by_disk_and_log() {
    let mut host = Host::start();
    boot_all(&host);
    for end in &ENDS {
        end.order(&host);
    }
    host.kill_daemon();
    wait_for("all have ended", || {
        vmm_processes(&host.state()).is_empty().then_some(())
    });
    host.relaunch();
    ENDS.iter()
        .for_each(|end| end.is_reported(&host, end.unseen));
}

#[test]
fn vmm_ended_from_host_is_not_reported_as_guest_reset() {
    let host = Host::start();
    host.boot("box");
    signal(vmm_processes(&host.state())[0], "TERM");
    wait_for("the VM no longer runs", || {
        (host.show("box", "state") != "running").then_some(())
    });
    let reported = (host.show("box", "state"), host.show("box", "reason"));
    assert!(
        reported.0 == "failed"
            && reported
                .1
                .as_str()
                .unwrap()
                .contains("the VMM was ended from the host (host-signal)"),
        "{reported:?}"
    );
}
