//! Tests of saved and restored guests: a restore brings back memory and disks of one moment, in the
//! same VM or in several VMs at the same time.

use crate::bridge::{
    ask_outside_over_ipv6, enter_a_host_with_an_outside, on_the_bridge, seen_outside_over_ipv6,
};
use crate::host::{Host, text, wait_for};
use std::net::Ipv6Addr;
use std::time::{SystemTime, UNIX_EPOCH};

/// A script that creates a file on the disk, a file in memory, and a process that counts.
const SCENE: &str = "echo disk >/root/mark; echo memory >/dev/shm/mark; \
    echo 0 >/dev/shm/count; \
    (i=0; while :; do i=$((i+1)); echo $i >/dev/shm/new; mv /dev/shm/new /dev/shm/count; sleep 0.1; done) >/dev/null 2>&1 </dev/null & \
    echo $! >/dev/shm/counter";
const STATE: &str = "cat /root/mark /dev/shm/mark; cat /proc/sys/kernel/random/boot_id";
/// Limit of the error of a restored guest's clock, in seconds.
const CLOCK_OFF_MAX: u64 = 8;

fn count(host: &Host, vm: &str) -> u64 {
    let text = host.sh(vm, "cat /dev/shm/count");
    text.trim().parse().unwrap()
}

/// Checks that the counting process still counts.
#[track_caller]
pub fn counts_on(host: &Host, vm: &str) {
    assert_eq!(
        host.sh(vm, "kill -0 $(cat /dev/shm/counter) && echo lives"),
        "lives\n"
    );
    let from = count(host, vm);
    wait_for("the process counts on", || {
        (count(host, vm) > from).then_some(())
    });
}

#[track_caller]
fn clock_is_right(host: &Host, vm: &str) {
    let guests: u64 = host.sh(vm, "date +%s").trim().parse().unwrap();
    let ours = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(guests.abs_diff(ours) < CLOCK_OFF_MAX, "{guests} and {ours}");
}

/// Checks that the guest has the IPv6 address of its VM, if it has one, and no other.
#[track_caller]
fn ipv6_is_right(host: &Host, vm: &str) {
    let on_bridge = host.show(vm, "ip6").as_str().map(str::to_owned);
    let address = on_bridge.clone().or_else(|| {
        let has_it = host.show(vm, "ip").is_null() && crate::process::has_ipv6();
        has_it.then(|| "fec0::15".to_owned())
    });
    let line = address.map(|a| format!("{:032x}\n", u128::from(a.parse::<Ipv6Addr>().unwrap())));
    let script = "grep eth0 /proc/net/if_inet6 | grep -v ^fe80 | cut -c 1-32";
    assert_eq!(host.sh(vm, script), line.unwrap_or_default(), "{vm}");
    if on_bridge.is_some() {
        assert_eq!(ask_outside_over_ipv6(host, vm), seen_outside_over_ipv6());
    }
}

#[track_caller]
fn refused(host: &Host, args: &[&str], kind: &str) {
    let out = host.fcctl(&[&["--json"], args].concat());
    let (_, stderr) = text(&out);
    assert!(
        !out.status.success() && stderr.contains(&format!("\"kind\":\"{kind}\"")),
        "{args:?}: {stderr}"
    );
}

/// Tests all snapshot operations with the host's driver.
pub fn go_through(host: &Host) {
    host.ok(&["vm", "create", "--name", "box", "--work-disk", "64M"]);
    host.ok(&["start", "box"]);
    host.sh("box", SCENE);
    host.sh("box", "echo work >/work/mark");
    let then = host.sh("box", STATE);
    // Two snapshots are made in quick succession. Deleting the first must not affect the second.
    host.ok(&["snapshot", "create", "box", "--name", "zero"]);
    host.ok(&["snapshot", "create", "box", "--name", "one"]);
    host.ok(&["snapshot", "delete", "zero"]);
    counts_on(host, "box");
    refused(
        host,
        &["snapshot", "create", "box", "--name", "one"],
        "name_taken",
    );
    refused(host, &["snapshot", "restore", "one"], "wrong_state");
    refused(host, &["snapshot", "show", "none"], "snapshot_not_found");

    host.sh(
        "box",
        "echo later >/root/mark; echo later >/work/mark; echo later >/dev/shm/mark; sync",
    );
    host.ok(&["stop", "box"]);
    host.ok(&["snapshot", "restore", "one"]);
    assert_eq!(host.sh("box", STATE), then);
    assert_eq!(host.sh("box", "cat /work/mark"), "work\n");
    counts_on(host, "box");
    clock_is_right(host, "box");
    ipv6_is_right(host, "box");

    // Two more guests start from the same memory.
    host.ok(&["vm", "fork", "box", "twin"]);
    host.ok(&["snapshot", "restore", "one", "--as", "third"]);
    let all = ["box", "twin", "third"];
    for vm in all {
        assert_eq!(host.sh(vm, STATE), then, "{vm}");
        counts_on(host, vm);
        clock_is_right(host, vm);
        ipv6_is_right(host, vm);
        assert_eq!(
            host.sh(vm, "cat /work/mark; hostname; cat /etc/hostname"),
            format!("work\n{vm}\n{vm}\n")
        );
        host.sh(
            vm,
            &format!("echo {vm} >/root/mark; echo {vm} >/work/mark; sync"),
        );
    }
    for what in [
        "cat /etc/machine-id",
        "cat /run/fcd/seed/host_key",
        "head -c 32 /dev/urandom | od -An -tx1",
    ] {
        let mut said: Vec<String> = all.iter().map(|vm| host.sh(vm, what)).collect();
        said.sort();
        said.dedup();
        assert_eq!(said.len(), 3, "{what}");
    }
    for vm in all {
        assert_eq!(
            host.sh(vm, "cat /root/mark /work/mark"),
            format!("{vm}\n{vm}\n")
        );
        assert_eq!(host.show(vm, "rm"), false);
    }

    // A snapshot outlives its VM, and restored guests outlive the VM and the snapshot.
    host.ok(&["rm", "-f", "box"]);
    refused(host, &["snapshot", "restore", "one"], "vm_not_found");
    refused(
        host,
        &["snapshot", "restore", "one", "--as", "twin"],
        "name_taken",
    );
    host.ok(&["vm", "restart", "third"]);
    assert_eq!(
        host.sh("third", "cat /root/mark /work/mark"),
        "third\nthird\n"
    );
    host.ok(&["snapshot", "delete", "one"]);
    counts_on(host, "twin");
    host.ok(&["rm", "-f", "twin", "third"]);
    assert_eq!(
        std::fs::read_dir(host.state().join("snapshots"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(
        host.json(&["doctor", "--leaks"]).as_array().map(Vec::len),
        Some(0)
    );
}

/// Each VM on the bridge has its own address, and a restored guest switches to its VM's address.
#[test]
fn saved_guest_is_restored_at_another_address() {
    enter_a_host_with_an_outside();
    let host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    go_through(&host);
    assert_eq!(on_the_bridge(), (0, 0));
}

#[test]
fn guest_is_restored_to_saved_state() {
    go_through(&Host::start());
}

/// If QEMU continued an abandoned save, completing it would stop the guest.
#[test]
fn abandoned_save_leaves_guest_running() {
    let host = Host::start();
    host.boot("box");
    host.sh("box", SCENE);
    host.sh("box", "head -c 400M /dev/urandom >/dev/shm/ballast");
    let saving = host.spawn(&["snapshot", "create", "box"]);
    let memory = || {
        let dir = std::fs::read_dir(host.state().join("snapshots"))
            .unwrap()
            .flatten()
            .next()?;
        std::fs::metadata(dir.path().join("private/memory")).ok()
    };
    wait_for("some of the memory is saved", || {
        (memory()?.len() > 8 << 20).then_some(())
    });
    saving.signal("KILL");
    wait_for("no operation is in progress", || {
        host.json(&["op", "list"])
            .as_array()
            .unwrap()
            .is_empty()
            .then_some(())
    });
    assert_eq!(
        host.sh("box", "for i in 1 2 3 4 5; do sleep 1; done; echo on"),
        "on\n"
    );
    counts_on(&host, "box");
    assert_eq!(
        std::fs::read_dir(host.state().join("snapshots"))
            .unwrap()
            .count(),
        0
    );
    host.ok(&["snapshot", "create", "box", "--name", "one"]);
    counts_on(&host, "box");
    assert_eq!(
        host.ok(&["stop", "box"]),
        "box: stopped, the guest's data was synced\n"
    );
}
