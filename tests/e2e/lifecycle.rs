//! Tests of a VM's life through `fcctl`: data after stops, settings, several VMs at once, `--rm`,
//! signals and draining.

use crate::host::{Host, signal, text, vmm_processes, wait_for};
use std::process::Command;
use std::time::{Duration, Instant};

/// Limit of the time for the daemon to exit after SIGTERM, plus a second for a busy machine.
const DRAIN_DEADLINE: Duration = Duration::from_secs(16);

/// Returns the number of vCPUs and the sizes of memory and root file system in MiB, as the guest
/// sees them.
fn shape(host: &Host, vm: &str) -> (u64, u64, u64) {
    let script = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo; df -m / | awk 'NR == 2 {print $2}'";
    let numbers: Vec<u64> = host
        .sh(vm, script)
        .lines()
        .map(|l| l.trim().parse().unwrap())
        .collect();
    (numbers[0], numbers[1], numbers[2])
}

#[test]
fn stop_keeps_data_and_next_start_applies_settings() {
    let host = Host::start();
    host.boot("keeper");
    let before = shape(&host, "keeper");
    assert_eq!(before.0, 1);
    host.sh("keeper", "echo precious > /root/kept");

    let disk = host.show("keeper", "disk_bytes").as_u64().unwrap() + (1 << 30);
    let said = host.ok(&[
        "vm",
        "set",
        "keeper",
        "--vcpus",
        "2",
        "--memory",
        "768M",
        "--disk",
        &disk.to_string(),
    ]);
    assert!(
        said.contains("applied at next start; now: fcctl vm restart keeper"),
        "{said}"
    );
    assert!(
        host.ok(&["vm", "show", "keeper"])
            .contains("next start  2 vCPUs, 768 MiB of memory, ")
    );
    assert_eq!(shape(&host, "keeper"), before);
    let (status, said) = host.fails(&["vm", "set", "keeper", "--disk", "1G"]);
    assert!(
        status == 2 && said.contains("cannot shrink"),
        "{status} {said}"
    );

    assert_eq!(
        host.ok(&["stop", "keeper"]),
        "keeper: stopped, the guest's data was synced\n"
    );
    assert_eq!(vmm_processes(&host.state()), Vec::<u32>::new());
    host.ok(&["stop", "keeper"]);
    assert_eq!(host.ok(&["start", "keeper"]), "keeper: running\n");
    assert_eq!(host.sh("keeper", "cat /root/kept"), "precious\n");
    let after = shape(&host, "keeper");
    assert!(
        after.0 == 2 && (600..=768).contains(&after.1) && after.2 > before.2 + 900,
        "{before:?} {after:?}"
    );

    let boot_id = host.sh(
        "keeper",
        "echo again > /root/kept; cat /proc/sys/kernel/random/boot_id",
    );
    let said = host.ok(&["vm", "restart", "keeper"]);
    assert!(said.starts_with("keeper: running"), "{said}");
    assert_ne!(
        host.sh("keeper", "cat /proc/sys/kernel/random/boot_id"),
        boot_id
    );
    assert_eq!(host.sh("keeper", "cat /root/kept"), "again\n");
    // After the boot, the console shows the kernel's errors.
    let level = "cut -f1 /proc/sys/kernel/printk";
    assert_eq!(host.sh("keeper", level), "4\n");

    assert_eq!(
        host.ok(&["vm", "kill", "keeper"]),
        "keeper: stopped, the guest's data was not synced\n"
    );
    let (status, said) = host.fails(&["vm", "kill", "keeper"]);
    assert!(status == 1 && said.contains("hint: "), "{said}");
    // The console log of a stopped VM contains all of its boots.
    let log = host.ok(&["logs", "keeper"]);
    assert!(log.matches("fcd-init: ssh is up").count() >= 3, "{log}");
    assert!(!log.contains("Fatal"), "{log}");
    assert_eq!(
        host.ok(&["logs", "--tail", "1", "keeper"])
            .trim_end()
            .lines()
            .count(),
        1
    );
    assert_eq!(host.ok(&["rm", "keeper"]), "keeper: deleted\n");
    assert_eq!(host.census(), Vec::<String>::new());
}

#[test]
fn verbs_take_several_vms_and_continue_after_error() {
    let host = Host::start();
    for name in ["alpha", "beta", "gamma"] {
        assert_eq!(
            host.ok(&["vm", "create", "--name", name]),
            format!("{name}\n")
        );
    }
    let mut events = host.spawn(&["events"]);
    events.says("alpha  is created");
    // Nothing has been printed yet. A follower gets the output of the first boot, or learns that
    // the VM was deleted.
    assert_eq!(host.ok(&["logs", "alpha"]), "");
    let mut following = host.spawn(&["logs", "-f", "alpha"]);
    let mut in_vain = host.spawn(&["logs", "-f", "gamma"]);
    let (status, said) = host.fails(&["start", "alpha", "nope", "beta"]);
    assert!(
        status == 3 && said.contains("no VM \"nope\"") && said.contains("hint: "),
        "{said}"
    );
    let id = host.show("alpha", "id").as_str().unwrap().to_owned();
    assert_eq!(host.show(&id[..11], "name"), "alpha");
    assert_eq!(host.ok(&["ps", "-q"]).lines().count(), 2);
    assert_eq!(host.ok(&["ps", "-aq"]).lines().count(), 3);

    let (status, said) = host.fails(&["rm", "alpha"]);
    assert!(
        status == 1 && said.contains("fcctl rm --force alpha"),
        "{said}"
    );
    assert_eq!(host.show("alpha", "state"), "running");
    run_on_a_taken_name(&host);
    let (status, _) = host.fails(&["vm", "wait", "--timeout", "100ms", "beta"]);
    assert_eq!(status, 124);
    let said = host.ok(&["vm", "prune"]);
    assert!(said.contains("1 VM deleted"), "{said}");
    assert_eq!(in_vain.end().0, Some(0), "{}", in_vain.stderr());

    let mut waiting = host.spawn(&["vm", "wait", "alpha"]);
    following.says("ssh is up");
    let out = host.fcctl(&["stop", "alpha", "nope", "beta"]);
    let (stdout, stderr) = text(&out);
    assert_eq!(out.status.code(), Some(3), "{stdout}{stderr}");
    assert_eq!(
        stdout
            .matches(": stopped, the guest's data was synced")
            .count(),
        2,
        "{stdout}{stderr}"
    );
    assert_eq!(waiting.end().0, Some(0));
    assert_eq!(waiting.stdout(), "alpha: stopped\n");
    following.says("shutting down");
    events.says("beta  vm.stop ok");
    events.signal("INT");
    // A signal ended the process. A shell would report the status 130.
    assert_eq!(events.end().0, None, "{}", events.stderr());
    let line = events
        .stdout()
        .lines()
        .find(|l| l.contains("alpha  starting -> running"))
        .map(str::len);
    assert_eq!(
        line,
        Some("12:01:02  alpha  starting -> running".len()),
        "{}",
        events.stdout()
    );

    let all = format!(
        "'{0}' --socket '{1}' rm -f $('{0}' --socket '{1}' ps -aq)",
        crate::host::FCCTL,
        host.socket().display()
    );
    assert!(
        Command::new("sh")
            .args(["-c", &all])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(following.end().0, Some(0), "{}", following.stderr());
    assert!(
        Command::new("sh")
            .args(["-c", &all])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(host.census(), Vec::<String>::new());
}

fn run_on_a_taken_name(host: &Host) {
    let before = host.census();
    let (status, said) = host.fails(&["run", "--name", "alpha", "--", "true"]);
    assert_eq!(status, 125, "{said}");
    for command in [
        "fcctl exec alpha",
        "fcctl rm -f alpha",
        "fcctl run --name alpha-2",
    ] {
        assert!(said.contains(command), "{said}");
    }
    assert_eq!(host.census(), before);
}

#[test]
fn run_without_rm_keeps_vm_and_forwards_signals() {
    let mut host = Host::start();
    let out = host.fcctl(&["run", "--", "sh", "-c", "exit 3"]);
    let (_, said) = text(&out);
    assert_eq!(out.status.code(), Some(3), "{said}");
    let name = host.json(&["ps"])[0]["name"].as_str().unwrap().to_owned();
    assert!(said.starts_with(&format!("fcctl: VM {name}\n")), "{said}");
    let last = said.lines().last().unwrap();
    for command in ["fcctl ssh", "fcctl stop", "fcctl rm -f"] {
        assert!(last.contains(&format!("{command} {name}")), "{said}");
    }

    let script = "trap 'echo got; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let mut trapped = host.spawn(&["exec", &name, "--", "sh", "-c", script]);
    trapped.says("ready");
    trapped.signal("INT");
    assert_eq!(trapped.end().0, Some(9), "{}", trapped.stderr());
    assert!(trapped.stdout().contains("got"));

    let script = "trap 'echo one more' INT; echo ready; while :; do sleep 0.1; done";
    let mut stubborn = host.spawn(&["exec", &name, "--", "sh", "-c", script]);
    stubborn.says("ready");
    stubborn.signal("INT");
    stubborn.says("one more");
    stubborn.signal("INT");
    stubborn.says("one more\none more");
    stubborn.signal("INT");
    assert_eq!(stubborn.end().0, Some(130));
    assert!(
        stubborn.stderr().contains("detached"),
        "{}",
        stubborn.stderr()
    );

    // SIGTERM drains the daemon: a command in a guest may run for some more seconds and is then
    // ended. The VM keeps running.
    let mut endless = host.spawn(&[
        "exec",
        &name,
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]);
    endless.says("ready");
    let before = vmm_processes(&host.state());
    assert_eq!(before.len(), 1);
    let begun = Instant::now();
    host.stop_daemon();
    assert!(begun.elapsed() < DRAIN_DEADLINE, "{:?}", begun.elapsed());
    assert_eq!(endless.end().0, Some(125), "{}", endless.stderr());
    assert_eq!(vmm_processes(&host.state()), before);
    host.relaunch();
    wait_for("the VM is reconciled", || {
        host.fcctl(&["exec", &name, "--", "true"])
            .status
            .success()
            .then_some(())
    });
    assert_eq!(vmm_processes(&host.state()), before);
}

#[test]
fn killed_daemon_completes_or_undoes_operations() {
    let mut host = Host::start();
    host.ok(&["vm", "create", "--name", "box"]);
    let mut start = host.spawn(&["start", "box"]);
    wait_for("the VMM runs", || {
        (vmm_processes(&host.state()).len() == 1).then_some(())
    });
    host.kill_daemon();
    assert_eq!(start.end().0, Some(5), "{}", start.stderr());
    host.relaunch();
    wait_for("the boot is undone", || {
        vmm_processes(&host.state()).is_empty().then_some(())
    });
    let looked_at = |host: &Host| {
        wait_for("the VM is reconciled", || {
            host.fcctl(&["start", "box"]).status.success().then_some(())
        })
    };
    looked_at(&host);

    let mut stop = host.spawn(&["stop", "box"]);
    wait_one(&host, "stopping");
    host.kill_daemon();
    stop.end();
    host.relaunch();
    host.ok(&["vm", "wait", "--timeout", "30s", "box"]);
    assert_eq!(
        (
            host.show("box", "state"),
            vmm_processes(&host.state()).len()
        ),
        ("stopped".into(), 0)
    );

    // The VMM dies while no daemon runs.
    looked_at(&host);
    host.kill_daemon();
    signal(vmm_processes(&host.state())[0], "KILL");
    wait_for("the VMM is dead", || {
        vmm_processes(&host.state()).is_empty().then_some(())
    });
    host.relaunch();
    wait_one(&host, "failed");
    assert!(
        host.show("box", "reason")
            .as_str()
            .unwrap()
            .contains("ended while fcd was not running, for an unknown reason"),
        "{}",
        host.show("box", "reason")
    );
    host.ok(&["rm", "box"]);
    assert_eq!(host.census(), Vec::<String>::new());
}

/// Waits until the only VM has this state.
fn wait_one(host: &Host, state: &str) {
    wait_for(state, || {
        let vms = host.json(&["ps", "-a"]);
        (vms.as_array().unwrap().len() == 1 && vms[0]["state"] == state).then_some(())
    });
}

fn wait_empty(host: &Host) {
    wait_for("nothing left", || {
        (host.census().is_empty() && host.fcctl(&["ps", "-aq"]).stdout.is_empty()).then_some(())
    });
}

#[test]
fn run_interrupted_before_command_cleans_up() {
    let host = Host::start();
    for rm in [&["--rm"][..], &[]] {
        let mut run = host.spawn(&[&["run"], rm, &["--", "echo", "it began"]].concat());
        wait_one(&host, "starting");
        run.signal("INT");
        assert_eq!(run.end().0, Some(130), "{}", run.stderr());
        assert!(
            !run.stdout().contains("began") && run.stderr().contains("interrupted"),
            "{}",
            run.stderr()
        );
        assert_eq!(host.ok(&["ps", "-aq"]), "");
        assert_eq!(host.census(), Vec::<String>::new());
    }
}

#[test]
fn rm_is_kept_after_killing_client_or_daemon() {
    let mut host = Host::start();
    let sleeper = [
        "run",
        "--rm",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ];
    let mut run = host.spawn(&sleeper);
    run.says("ready");
    run.signal("KILL");
    run.end();
    wait_empty(&host);

    let mut run = host.spawn(&sleeper);
    run.says("ready");
    host.kill_daemon();
    assert_eq!(run.end().0, Some(125), "{}", run.stderr());
    assert_eq!(vmm_processes(&host.state()).len(), 1);
    host.relaunch();
    wait_empty(&host);
    // Interrupt `run` during the boot.
    let mut run = host.spawn(&sleeper);
    wait_one(&host, "starting");
    signal(run.child.id(), "KILL");
    run.end();
    wait_empty(&host);
}
