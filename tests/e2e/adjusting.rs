//! Tests with a real guest whose disks have rate limits, and whose balloon gives memory back to the
//! host and takes it again.

use crate::host::{Host, vmm_processes, wait_for, wait_for_or};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// Sends a command directly to QEMU's monitor. The monitor serves one client at a time, so the test
/// makes no calls to the daemon until this returns.
fn qmp(host: &Host, vm: &str, command: &str) -> Value {
    let id = host.show(vm, "id");
    // The socket's path is too long for a socket address, so the test connects through a descriptor
    // of the directory.
    let run = host
        .state()
        .join("vms")
        .join(id.as_str().unwrap())
        .join("run");
    let dir = std::fs::File::open(run).unwrap();
    let at = format!(
        "/proc/self/fd/{}/control.sock",
        std::os::fd::AsRawFd::as_raw_fd(&dir)
    );
    let mut stream = UnixStream::connect(at).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut ask = |command: &str| {
        writeln!(stream, "{}", json!({ "execute": command })).unwrap();
        loop {
            let answer: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert!(answer.get("error").is_none(), "{answer}");
            if let Some(answer) = answer.get("return") {
                return answer.clone();
            }
        }
    };
    ask("qmp_capabilities");
    ask(command)
}

/// Returns the limits of the disks by node: bytes and operations per second, or 0 for no limit.
fn limits(host: &Host, vm: &str) -> Vec<(String, u64, u64)> {
    let devices = qmp(host, vm, "query-block");
    let of = |device: &Value| {
        let inserted = &device["inserted"];
        (
            inserted["node-name"].as_str().unwrap().to_owned(),
            inserted["bps"].as_u64().unwrap(),
            inserted["iops"].as_u64().unwrap(),
        )
    };
    let mut all: Vec<_> = devices.as_array().unwrap().iter().map(of).collect();
    all.sort();
    all
}

fn named(all: [(&str, u64, u64); 3]) -> Vec<(String, u64, u64)> {
    all.map(|(name, bytes, ops)| (name.to_owned(), bytes, ops))
        .to_vec()
}

/// Reads from a disk, bypassing the guest's cache. Returns the time that the read took.
fn read_disk(host: &Host, disk: &str, bytes: u64) -> Duration {
    let begun = Instant::now();
    host.sh(
        "a",
        &format!(
            "dd if=/dev/{disk} of=/dev/null bs=64k count={} iflag=direct 2> /dev/null",
            bytes >> 16
        ),
    );
    begun.elapsed()
}

fn available_mib(host: &Host) -> u64 {
    host.sh(
        "a",
        "sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
    )
    .trim()
    .parse::<u64>()
    .unwrap()
        >> 10
}

/// Returns the resident memory of a process in MiB.
fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

#[test]
fn disk_limits_apply_and_balloon_returns_memory() {
    let mut host = Host::start();
    host.ok(&[
        "vm",
        "create",
        "--name",
        "a",
        "--work-disk",
        "64M",
        "--disk-bps",
        "200M",
        "--disk-iops",
        "5000",
    ]);
    host.ok(&["start", "a"]);
    assert_eq!(
        limits(&host, "a"),
        named([
            ("root", 200 * MIB, 5000),
            ("seed", 0, 0),
            ("work", 200 * MIB, 5000)
        ])
    );
    assert!(
        host.ok(&["vm", "show", "a"])
            .contains("rates       disk 200 MiB/s, disk operations 5000/s\n")
    );
    let said = host.ok(&[
        "vm",
        "set",
        "a",
        "--disk-bps",
        "2M",
        "--disk-iops",
        "none",
        "--now",
    ]);
    assert_eq!(
        said,
        "a: disk 2 MiB/s, disk operations unlimited, applied now\n"
    );
    assert_eq!(
        limits(&host, "a"),
        named([("root", 2 * MIB, 0), ("seed", 0, 0), ("work", 2 * MIB, 0)])
    );
    // Each disk has a limit of 2 MiB per second and may exceed it by a tenth at once. Reading 6 MiB
    // takes more than 2.7 seconds on any host.
    for disk in ["vda", "vdc"] {
        let took = read_disk(&host, disk, 6 * MIB);
        assert!(took > Duration::from_millis(2700), "{disk}: {took:?}");
    }
    let read = || {
        let reply = host.json(&["vm", "metrics", "a"]);
        let disks = reply["metrics"][0]["query-blockstats"]
            .as_array()
            .unwrap()
            .clone();
        let root = disks
            .iter()
            .find(|d| d["node-name"] == "root")
            .unwrap_or_else(|| panic!("{reply}"));
        root["stats"]["rd_bytes"].as_u64().unwrap()
    };
    let before = read();
    read_disk(&host, "vda", MIB);
    assert!(read() >= before + MIB);
    // The next daemon keeps the disks' limits and can remove them.
    host.kill_daemon();
    host.relaunch();
    wait_for("the VM is reconciled", || {
        host.fcctl(&["vm", "balloon", "a"])
            .status
            .success()
            .then_some(())
    });
    assert_eq!(limits(&host, "a")[0], ("root".to_owned(), 2 * MIB, 0));
    host.ok(&["vm", "set", "a", "--disk-bps", "none", "--now"]);
    assert_eq!(
        limits(&host, "a"),
        named([("root", 0, 0), ("seed", 0, 0), ("work", 0, 0)])
    );
    // User mode has no rates, and some settings cannot change while a guest runs.
    let (status, said) = host.fails(&["vm", "set", "a", "--net-rx-bps", "1M", "--now"]);
    assert!(
        status == 1
            && said.contains("user-mode networking has no rate limits")
            && said.contains("bridge"),
        "{status}: {said}"
    );
    let (status, said) = host.fails(&["vm", "set", "a", "--memory", "2G", "--now"]);
    assert!(
        status == 1 && said.contains("change only at a start"),
        "{status}: {said}"
    );

    let kept = |said: &mut String| {
        let reply = host.json(&["vm", "balloon", "a"]);
        *said = format!(
            "{} MiB kept, {} available",
            reply["kept_mib"],
            available_mib(&host)
        );
        reply["kept_mib"].as_u64().unwrap()
    };
    assert_eq!(
        host.ok(&["vm", "balloon", "a"]),
        "a: keeps 1 GiB of 1 GiB\n"
    );
    let before = available_mib(&host);
    host.ok(&["vm", "balloon", "a", "512M"]);
    wait_for_or("it gives memory back", &mut String::new(), |said| {
        (kept(said) == 512 && available_mib(&host) + 450 < before).then_some(())
    });
    assert_eq!(
        host.ok(&["vm", "balloon", "a"]),
        "a: keeps 512 MiB of 1 GiB\n"
    );
    assert!(
        host.ok(&["vm", "show", "a"])
            .contains("asked to keep 512 MiB of its memory\n")
    );
    host.ok(&["vm", "balloon", "a", "1G"]);
    wait_for_or("it takes memory again", &mut String::new(), |said| {
        (kept(said) == 1024 && available_mib(&host) + 100 > before).then_some(())
    });
    // Freed memory of the guest returns to the host, except for blocks in use: a guest reports only
    // free blocks of 2 MiB, and one page in use keeps its whole block.
    let vmm_mib = || {
        vmm_processes(&host.state())
            .iter()
            .map(|pid| resident_mib(*pid))
            .sum::<u64>()
    };
    host.sh("a", "head -c 400M /dev/zero > /dev/shm/used");
    let used = vmm_mib();
    host.sh("a", "rm /dev/shm/used");
    wait_for_or(
        "freed memory goes back to the host",
        &mut String::new(),
        |said| {
            let now = vmm_mib();
            *said = format!("{used} MiB, now {now}");
            (now + 150 < used).then_some(())
        },
    );
    let (status, said) = host.fails(&["vm", "balloon", "a", "2G"]);
    assert!(
        status == 2 && said.contains("cannot keep 2048 MiB of its 1024"),
        "{status}: {said}"
    );
}
