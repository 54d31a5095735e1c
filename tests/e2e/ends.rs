//! How a guest ended, as its VM says: with the daemon running, after a restart of it, and when it ended while no daemon ran.

use crate::host::{Host, signal, vmm_processes, wait_for};

/// From the order in the guest to its end: long enough to end the daemon meanwhile.
const DELAY_S: u64 = 3;

/// What a guest does, and what its VM says then.
struct End {
    name: &'static str,
    script: &'static str,
    state: &'static str,
    reason: &'static str,
    /// The reason where nobody was there to see it.
    unseen: &'static str,
}

/// QEMU's log says so. Nobody recorded the console, which would tell the two apart.
const UNSEEN_RESET: &str = "while the daemon did not run: the guest was reset, as its VMM's log says";

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
    /// In a moment, whatever becomes of the connection.
    fn order(&self, host: &Host) {
        let script = format!("(sleep {DELAY_S}; {}) > /dev/null 2>&1 < /dev/null &", self.script);
        host.ok(&["exec", self.name, "--", "setsid", "sh", "-c", &script]);
    }

    #[track_caller]
    fn is_told(&self, host: &Host, reason: &str) {
        wait_for("the VM comes to rest", || (host.show(self.name, "state") != "running").then_some(()));
        let told = (host.show(self.name, "state"), host.show(self.name, "reason"));
        let fits = told.0 == self.state && told.1.as_str().is_some_and(|told| told.contains(reason));
        assert!(fits, "{}: {told:?}, not {} because {reason:?}", self.name, self.state);
    }
}

fn boot_all(host: &Host) {
    for end in &ENDS {
        host.ok(&["vm", "create", "--name", end.name, "--memory", "256M"]);
        host.ok(&["start", end.name]);
    }
}

#[test]
fn guest_that_ends_is_told_apart_by_how_it_ended() {
    let host = Host::start();
    boot_all(&host);
    for end in &ENDS {
        end.order(&host);
    }
    ENDS.iter().for_each(|end| end.is_told(&host, end.reason));
}

#[test]
fn guest_that_ends_after_a_restart_of_the_daemon_is_told_apart_as_well() {
    let mut host = Host::start();
    boot_all(&host);
    host.kill_daemon();
    host.relaunch();
    for end in &ENDS {
        wait_for("it was looked at", || host.fcctl(&["exec", end.name, "--", "true"]).status.success().then_some(()));
        end.order(&host);
    }
    ENDS.iter().for_each(|end| end.is_told(&host, end.reason));
}

#[test]
fn guest_that_ends_while_no_daemon_runs_is_judged_by_disk_and_log() {
    let mut host = Host::start();
    boot_all(&host);
    for end in &ENDS {
        end.order(&host);
    }
    host.kill_daemon();
    wait_for("all have ended", || vmm_processes(&host.state()).is_empty().then_some(()));
    host.relaunch();
    ENDS.iter().for_each(|end| end.is_told(&host, end.unseen));
}

#[test]
fn vmm_that_is_told_to_end_is_no_reset_of_its_guest() {
    let host = Host::start();
    host.boot("box");
    signal(vmm_processes(&host.state())[0], "TERM");
    wait_for("the VM comes to rest", || (host.show("box", "state") != "running").then_some(()));
    let told = (host.show("box", "state"), host.show("box", "reason"));
    assert!(told.0 == "failed" && told.1.as_str().unwrap().contains("the VMM was ended from the host (host-signal)"), "{told:?}");
}
