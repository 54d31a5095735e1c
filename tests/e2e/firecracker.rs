//! Tests of the driver `firecracker` with the real program in a test host, where nested
//! virtualisation runs the same guests. `scripts/test` runs them if there is a binary
//! (`FCD_FIRECRACKER` or on the PATH), and reports it if there is none.

use crate::another_host::{PLACE, TestHost};
use fcd::api::vm::RateLimits;
use fcd::error::Kind;
use fcd::locks::Cancel;
use fcd::vmm::console::Consoles;
use fcd::vmm::firecracker::Firecracker;
use fcd::vmm::{Driver, GuestNetwork, SaveTo, Saved, VmmSpec};
use nix::sched::{CloneFlags, unshare};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CONFIG: &str = "[vmm]\ndriver = \"firecracker\"\n[firecracker]\nbinary = \"/srv/f/bin/firecracker\"\njailer = \"/srv/f/bin/jailer\"\n\
                      [network]\ndriver = \"bridge\"\n[disk]\ndriver = \"dm-snapshot\"\n[limits]\ntransfer_idle_s = 3600\n";

fn binary() -> PathBuf {
    std::env::var_os("FCD_FIRECRACKER")
        .expect("FCD_FIRECRACKER names the binary: scripts/test says how")
        .into()
}

/// The jailer of the same release.
fn jailer() -> PathBuf {
    std::env::var_os("FCD_JAILER").map_or_else(|| binary().with_file_name("jailer"), PathBuf::from)
}

fn boot() -> TestHost {
    let host = TestHost::boot();
    host.bring_programs();
    for (from, name) in [(binary(), "firecracker"), (jailer(), "jailer")] {
        host.pipe(
            &format!("lz4 -1 -c '{}'", from.display()),
            &format!("lz4 -dc > {PLACE}/bin/{name}; chmod 755 {PLACE}/bin/{name}"),
        );
    }
    host.bring_image();
    // The jailer makes nodes of its own, so only root needs those of the host.
    host.sh("chmod 600 /dev/kvm /dev/net/tun");
    host.start_daemon_with(CONFIG);
    host
}

/// The daemon dies at the n-th effect or commit of a start. The next daemon leaves nothing behind
/// and starts the guest.
fn dies_at(host: &TestHost, n: u64) {
    host.sh(&format!(
        "echo {n} > die-at.new; mv die-at.new die-at; fcctl start a 2> /dev/null || true; rm die-at
         pkill -KILL -x fcd || true; until ! pgrep -x fcd > /dev/null; do sleep 0.1; done"
    ));
    host.start_daemon_with(CONFIG);
    host.sh("until fcctl vm show a | grep -qE '^state +(stopped|running)$'; do sleep 0.1; done");
    let (state, leaks) = (
        host.sh("fcctl vm show a | grep ^state"),
        host.sh("fcctl doctor --leaks"),
    );
    assert_eq!(
        leaks, "fcd has left nothing behind on this host\n",
        "killed at point {n}"
    );
    let jails =
        host.sh("ls -d /sys/fs/cgroup/fcd-*/fc-* state/vms/*/jail/*/* 2> /dev/null | wc -l");
    assert_eq!(
        jails,
        if state.contains("running") {
            "2\n"
        } else {
            "0\n"
        },
        "killed at point {n}: {state}"
    );
    host.sh("fcctl start a");
    assert_eq!(host.sh("fcctl exec a -- cat /root/mark"), "kept\n");
    host.sh("fcctl stop a");
}

/// A server in the guest. It sends its host's name and the line that it received to every client of
/// vsock port 5000.
const GREETER: &str = r#"socket(S, 40, 1, 0) or die "socket: $!";
bind(S, pack("SSLLCx3", 40, 0, 5000, 0xffffffff, 0)) or die "bind: $!";
listen(S, 5) or die "listen: $!";
print STDERR "listens\n";
while (accept(C, S)) { my $got = <C>; open(H, "/proc/sys/kernel/hostname"); my $name = <H>; chomp $name; print C "$name got $got"; close C }
"#;

/// Starts the server in the guest. Its first socket loads the vsock driver.
fn greets(host: &TestHost, vm: &str) {
    host.sh(&format!(
        "cat > greeter.pl <<'END'\n{GREETER}END\nfcctl exec -i {vm} -- sh -c 'cat > /root/greeter.pl' < greeter.pl"
    ));
    let said = host.sh(&format!(
        "fcctl exec {vm} -- sh -c 'perl /root/greeter.pl > /root/greeter.log 2>&1 < /dev/null & until [ -s /root/greeter.log ]; do sleep 0.1; done; cat /root/greeter.log'"
    ));
    assert_eq!(said, "listens\n");
    assert_eq!(greeting(host, vm), format!("{vm} got hello\n"));
}

fn greeting(host: &TestHost, vm: &str) -> String {
    host.sh(&format!("echo hello | fcctl vm connect {vm} 5000"))
}

/// The guest cannot be reached over SSH. Its init handles Ctrl-Alt-Del, syncs and powers off.
fn goes_without_ssh(host: &TestHost) {
    host.sh("fcctl exec a -- sh -c 'echo late > /root/late; (sleep 1; /usr/lib/fcd/bin/ip link set eth0 down) > /dev/null 2>&1 < /dev/null &'
             until ! timeout 2 fcctl exec a -- true 2> /dev/null; do sleep 0.2; done");
    assert_eq!(
        host.sh("fcctl stop --timeout 40s a"),
        "a: stopped, the guest's data was synced\n"
    );
    assert!(host.sh("fcctl logs --tail 3 a").contains("disk is clean"));
    host.sh("fcctl start a");
    assert_eq!(host.sh("fcctl exec a -- cat /root/late"), "late\n");
}

/// Tests power-off, panic and reset with a running daemon, after its restart, and while none runs.
#[test]
#[ignore = "needs a binary of Firecracker's: scripts/test"]
fn real_guests_end() {
    let host = boot();
    host.sh("fcctl vm create --name a --memory 256M");
    const OFF: &str = "the guest shut itself down";
    const PANIC: &str = "the guest's kernel panicked: sysrq triggered crash";
    const UNSEEN: &str = "the VMM ended while fcd was not running, for an unknown reason";
    const RESET: &str = "the guest was reset without a shutdown";
    let order = |script: &str| {
        host.sh(&format!(
            "fcctl start a > /dev/null; fcctl exec a -- setsid sh -c '(sleep 3; {script}) > /dev/null 2>&1 < /dev/null &'"
        ));
    };
    let end_daemon =
        || host.sh("pkill -KILL -x fcd; until ! pgrep -x fcd > /dev/null; do sleep 0.1; done");
    let ends = |state: &str, reason: &str| {
        let shown = host.sh("until ! fcctl vm show a | grep -q '^state *running'; do sleep 0.2; done; fcctl vm show a");
        let has = |fact: &str, value: &str| {
            shown
                .lines()
                .any(|l| l.starts_with(fact) && l.contains(value))
        };
        assert!(
            has("state", state) && shown.contains(reason),
            "not {state} because {reason}: {shown}"
        );
    };
    let [off, panic, reset] = [
        "kill -TERM 1",
        "echo c > /proc/sysrq-trigger",
        "echo b > /proc/sysrq-trigger",
    ];
    for (script, state, reason) in [
        (off, "stopped", OFF),
        (panic, "failed", PANIC),
        (reset, "failed", RESET),
    ] {
        order(script);
        ends(state, reason);
    }
    for (script, state, reason) in [(off, "stopped", OFF), (panic, "failed", PANIC)] {
        host.sh("fcctl start a");
        end_daemon();
        host.start_daemon_with(CONFIG);
        host.sh("until fcctl exec a -- true 2> /dev/null; do sleep 0.5; done");
        order(script);
        ends(state, reason);
    }
    for (script, state, reason) in [(off, "stopped", OFF), (panic, "failed", UNSEEN)] {
        order(script);
        end_daemon();
        host.sh("until ! pgrep -x firecracker > /dev/null; do sleep 0.2; done");
        host.start_daemon_with(CONFIG);
        ends(state, reason);
    }
    host.sh("fcctl rm -f a");
    assert_eq!(host.devices(), "");
}

/// Restores memory and disks of one moment, in the same VM and in two others at the same time.
/// Every jail has the disks at the same paths.
fn restores_snapshots(host: &TestHost) {
    host.sh("fcctl vm create --name s --memory 256M --work-disk 32M && fcctl start s");
    host.sh("fcctl exec s -- sh -c 'echo disk > /root/mark; echo work > /work/mark; echo memory > /dev/shm/mark
         (i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.1; done) > /dev/null 2>&1 < /dev/null &'");
    let state = |vm: &str| {
        host.sh(&format!("fcctl exec {vm} -- cat /root/mark /work/mark /dev/shm/mark /proc/sys/kernel/random/boot_id"))
    };
    let counts = |vm: &str| {
        host.sh(&format!(
            "fcctl exec {vm} -- sh -c 'from=$(cat /dev/shm/count); until [ \"$(cat /dev/shm/count)\" -gt \"$from\" ]; do sleep 0.1; done'"
        ))
    };
    greets(host, "s");
    let then = state("s");
    assert_eq!(host.sh("fcctl snapshot create s --name one"), "one\n");
    counts("s");
    host.sh("fcctl exec s -- sh -c 'echo later | tee /root/mark /work/mark > /dev/shm/mark; sync'; fcctl stop s");
    assert_eq!(host.sh("fcctl snapshot restore one"), "s: running\n");
    assert_eq!(state("s"), then);
    counts("s");
    assert_eq!(
        host.sh("fcctl vm fork s twin; fcctl snapshot restore one --as third"),
        "twin\nthird: running\n"
    );
    for vm in ["s", "twin", "third"] {
        assert_eq!(state(vm), then, "{vm}");
        counts(vm);
        assert_eq!(
            greeting(host, vm),
            format!("{vm} got hello\n"),
            "the server keeps listening"
        );
        assert_eq!(
            host.sh(&format!(
                "fcctl exec {vm} -- sh -c 'hostname; echo {vm} > /root/mark; sync'"
            )),
            format!("{vm}\n")
        );
        let off = host.sh(&format!(
            "echo $(( $(fcctl exec {vm} -- date +%s) - $(date +%s) ))"
        ));
        assert!(off.trim().parse::<i64>().unwrap().abs() < 30, "{vm}: {off}");
    }
    for what in [
        "cat /etc/machine-id /run/fcd/seed/host_key",
        "head -c 32 /dev/urandom | od -An -tx1",
        "cat /sys/class/net/eth0/address",
        "cat /root/mark",
    ] {
        let lines =
            host.sh(&format!("for vm in s twin third; do fcctl exec $vm -- sh -c '{what}' | sha256sum; done | sort -u | wc -l"));
        assert_eq!(lines, "3\n", "{what}");
    }
    // A damaged snapshot cannot be loaded. The VMM exits, which is reported and leaves nothing
    // behind.
    let broken = host.sh("fcctl stop s > /dev/null; for f in state/snapshots/*/private/devices; do echo broken > $f; done; fcctl snapshot restore one 2>&1 || true");
    assert!(broken.contains("load the saved guest"), "{broken}");
    assert_eq!(
        host.sh("fcctl start s > /dev/null; fcctl exec s -- cat /root/mark"),
        "s\n",
        "it has its own disk again"
    );
    assert_eq!(
        host.sh("fcctl exec twin -- echo on; fcctl snapshot delete one; ls state/snapshots"),
        "on\none: deleted\n"
    );
    host.sh("fcctl rm -f s twin third");
}

#[test]
#[ignore = "needs a binary of Firecracker's: scripts/test"]
fn real_guests() {
    let host = boot();
    host.sh("fcctl vm create --name a -p 1022:22 --work-disk 64M --disk-bps 200M --net-tx-bps 100M && fcctl start a");
    let shown = host.sh("fcctl vm show a");
    assert!(
        shown.contains("firecracker (kvm, jailed)") && shown.contains("(dm-snapshot)"),
        "{shown}"
    );
    assert_eq!(
        host.sh("fcctl exec a -- sh -c 'echo kept | tee /root/mark /work/mark; exit 7' || echo status $?"),
        "kept\nstatus 7\n"
    );
    assert!(
        host.sh("head -c 7 < /dev/tcp/127.0.0.1/1022")
            .starts_with("SSH-2.0")
    );
    assert!(host.sh("fcctl logs a").contains("ssh is up"));
    // Copy a repository to the guest, and export its changes.
    host.sh("mkdir repo && cd repo && echo hello > greeting && fcctl workspace prepare a . --guest-path /root/repo");
    assert_eq!(
        host.sh("fcctl exec a -- cat /root/repo/greeting"),
        "hello\n"
    );
    host.sh(
        "fcctl exec a -- sh -c 'echo changed > /root/repo/greeting; echo new > /root/repo/new'",
    );
    host.sh("fcctl workspace export a --patch out.patch && cd repo && git init -q . && git apply ../out.patch");
    assert_eq!(host.sh("cat repo/greeting repo/new"), "changed\nnew\n");
    // The VMM has inherited no descriptor from the daemon.
    let open = host.sh("ls -l /proc/$(pgrep -x firecracker)/fd | sed -n 's/.*-> //p'");
    for target in open.lines() {
        let own = [
            "/dev/null",
            "socket:[",
            "anon_inode:",
            "/dev/kvm",
            "/dev/net/tun",
            "/disk",
            "/seed",
            "/work",
            "/console",
            "/metrics",
            "/vmlinux",
            "/initrd",
        ];
        let is_log =
            target.starts_with(&format!("{PLACE}/state/vms/")) && target.ends_with("/vmm.log");
        assert!(
            is_log || own.iter().any(|o| target.starts_with(o)),
            "{target} in {open}"
        );
    }
    // The jailed VMM has no privileges, sees only its own files, and has limits.
    let status = host.sh("grep -E '^(Uid|CapEff|Seccomp):' /proc/$(pgrep -x firecracker)/status | tr -s '\\t ' ' '; ls /proc/$(pgrep -x firecracker)/root/");
    assert!(
        status.contains("CapEff: 0000000000000000") && status.contains("Seccomp: 2"),
        "{status}"
    );
    assert!(
        !status.contains("Uid: 0 ") && status.contains("disk\n") && !status.contains("srv"),
        "{status}"
    );
    let limits =
        host.sh("cd /sys/fs/cgroup/fcd-*/fc-*-1; cat memory.max pids.max cpu.max; grep -cx $(pgrep -x firecracker) cgroup.procs");
    assert_eq!(
        limits,
        format!("{}\n17\n200000 100000\n1\n", (1024_u64 << 20) + (256 << 20))
    );
    // It is the first process of its own PID namespace.
    assert_eq!(
        host.sh("sed -n 's/^NSpid:.*\\t//p' /proc/$(pgrep -x firecracker)/status"),
        "1\n"
    );
    adjusts(&host);
    let nobody = host.sh("fcctl vm connect a 1 2>&1 || true");
    assert!(
        nobody.contains("nothing in the guest listens on vsock port 1")
            || nobody.contains("does not answer"),
        "{nobody}"
    );
    greets(&host, "a");
    // Pause and resume it.
    assert_eq!(host.sh("fcctl vm pause a"), "a: running (paused)\n");
    assert!(
        host.sh("fcctl exec a -- true 2>&1 || true")
            .contains("is paused")
    );
    assert_eq!(
        host.sh("fcctl vm resume a; fcctl exec a -- echo on"),
        "a: running\non\n"
    );
    assert_eq!(greeting(&host, "a"), "a got hello\n", "also by vsock");
    // The daemon is killed, and the next one adopts the guest.
    let pid = host.sh("pgrep -x firecracker");
    host.sh("pkill -KILL -x fcd; until ! pgrep -x fcd; do sleep 0.1; done");
    host.start_daemon_with(CONFIG);
    assert_eq!(
        host.sh("fcctl exec a -- cat /root/mark /work/mark"),
        "kept\nkept\n"
    );
    assert_eq!(host.sh("pgrep -x firecracker"), pid);
    // A stop syncs and ends the guest even if a process in it hangs. The next start has the data.
    let import = "{ head -c 100000 /dev/zero; exec sleep 3600; } | fcctl workspace prepare a --tar - --guest-path /root/stalled";
    let stopped = host.sh(&format!(
        "({import} > import.log 2>&1 && echo done > import.status || echo failed > import.status) & \
         until fcctl op list | grep -q workspace.prepare; do sleep 0.1; done; fcctl stop a; pkill -x sleep || true; until test -s import.status; do sleep 0.1; done"
    ));
    assert_eq!(host.sh("cat import.status"), "failed\n");
    assert!(stopped.contains("synced"), "{stopped}");
    assert_eq!(host.devices(), "");
    assert_eq!(
        host.sh("ls -d /sys/fs/cgroup/fcd-*/fc-* state/vms/*/jail 2> /dev/null || true"),
        ""
    );
    host.sh("fcctl start a");
    assert_eq!(
        host.sh("fcctl exec a -- cat /root/mark /work/mark"),
        "kept\nkept\n"
    );
    goes_without_ssh(&host);
    host.sh("fcctl stop a");
    for n in [3, 7, 11, 15] {
        dies_at(&host, n);
    }
    restores_snapshots(&host);
    // Deleting a booting VM waits for nothing.
    host.sh("fcctl vm create --name b; fcctl start b & until pgrep -x firecracker > /dev/null; do sleep 0.05; done
             fcctl rm -f b; wait $! || true");
    host.sh("fcctl rm -f a");
    assert_eq!(host.devices(), "");
    assert_eq!(
        host.sh("fcctl ps -aq; fcctl doctor --leaks"),
        "fcd has left nothing behind on this host\n"
    );
}

/// The VMM and its control group apply the rates, and the metrics show it. The guest returns memory
/// and takes it back.
fn adjusts(host: &TestHost) {
    let io_max = || host.sh("cut -d' ' -f2- /sys/fs/cgroup/fcd-*/fc-*-1/io.max");
    let both = |rate: &str| format!("{rate}\n").repeat(2);
    // The device of the snapshot, and the one with the work disk.
    assert_eq!(
        io_max(),
        both("rbps=419430400 wbps=419430400 riops=max wiops=max")
    );
    assert_eq!(
        host.sh("fcctl vm set a --disk-bps 1M --disk-iops 1000 --net-tx-bps none --now"),
        "a: disk 1 MiB/s, disk operations 1000/s, sends unlimited, applied now\n"
    );
    assert_eq!(
        io_max(),
        both("rbps=4194304 wbps=4194304 riops=2000 wiops=2000")
    );
    // Two of the six MiB pass at once.
    let begun = Instant::now();
    host.sh(
        "fcctl exec a -- dd if=/dev/vda of=/dev/null bs=64k count=96 iflag=direct 2> /dev/null",
    );
    assert!(
        begun.elapsed() > Duration::from_millis(3500),
        "{:?}",
        begun.elapsed()
    );
    // The metrics may be from this minute or an earlier one.
    let metrics: serde_json::Value = serde_json::from_str(&host.sh("fcctl vm metrics a")).unwrap();
    let disks: Vec<_> = metrics["metrics"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["block_root"])
        .collect();
    assert!(
        disks
            .iter()
            .any(|d| d["rate_limiter_throttled_events"].as_u64().unwrap() > 0),
        "{disks:?}"
    );
    host.sh("fcctl vm set a --disk-bps none --disk-iops none --now");
    assert_eq!(io_max(), "");
    assert_eq!(host.sh("fcctl vm balloon a 768M > /dev/null; until fcctl vm balloon a | grep -q 'keeps 768 MiB of 1 GiB$'; do sleep 0.2; done; fcctl vm balloon a 1G > /dev/null
        until fcctl vm balloon a | grep -q 'keeps 1 GiB of 1 GiB$'; do sleep 0.2; done; echo done"), "done\n");
}

/// A VM in `dir/vm` with empty disks.
fn control_plane_spec(dir: &Path, kernel: &Path) -> VmmSpec {
    let vm = dir.join("vm");
    for name in ["disk", "seed"] {
        std::fs::File::create(vm.join(name))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
    }
    // A tag that no other process has now.
    let tag = format!("fc-{:08x}-0123456789ab-1", std::process::id());
    VmmSpec {
        kernel: kernel.to_owned(),
        initrd: crate::host::image().join("initrd"),
        boot_args: "root=/dev/vda".into(),
        disk: vm.join("disk"),
        seed: vm.join("seed"),
        network: GuestNetwork::Tap {
            name: "fctest0".into(),
            mac: "02:fc:0a:59:00:05".into(),
            address: [10, 89, 0, 5].into(),
        },
        dir: vm,
        ..fcd::vmm::fake::spec("0123456789ab".parse().unwrap(), &tag, dir)
    }
}

fn new_driver() -> Firecracker {
    let config = fcd::config::Firecracker {
        binary: binary(),
        ..Default::default()
    };
    Firecracker::new(config, 0..0, Arc::new(Consoles::try_new().unwrap())).unwrap()
}

/// Runs the driver's state machine against the real program on this host's `/dev/kvm`. Whether the
/// guest boots does not matter.
#[test]
#[ignore = "needs a binary of Firecracker's: scripts/test"]
fn the_control_plane_on_this_hosts_kvm() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("NOT RUN, for there is no /dev/kvm: the control plane of firecracker");
        return;
    }
    // The image is built from packages, which cannot be downloaded in the namespace.
    let image = crate::host::image();
    // Firecracker creates a missing tap. In a namespace the tap disappears with the test.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (vm, never) = (dir.path().join("vm"), Cancel::try_new().unwrap());
    std::fs::create_dir(&vm).unwrap();
    let spec = |kernel: &Path| control_plane_spec(dir.path(), kernel);
    let tag = spec(image).tag;
    let first = new_driver();
    // A file that it cannot boot is refused with the reason, and leaves nothing behind.
    let e = first
        .start(&spec(&image.join("initrd")), &never, &mut |_| {})
        .unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.to_string().contains("Invalid Elf magic number"),
        "{e}"
    );
    assert_eq!(first.find(&tag).unwrap(), None);
    let spec = spec(&image.join("vmlinux"));
    let running = first.start(&spec, &never, &mut |_| {}).unwrap();
    // A second VMM cannot use the same tap.
    let second = VmmSpec {
        tag: format!("{tag}2"),
        dir: dir.path().join("other"),
        ..spec.clone()
    };
    std::fs::create_dir(&second.dir).unwrap();
    let e = first.start(&second, &never, &mut |_| {}).unwrap_err();
    assert!(
        e.kind() == Kind::Conflict && e.to_string().contains("(os error 16)"),
        "{e}"
    );
    for is_paused in [true, true, false, false, true] {
        first
            .set_paused(&vm, &running.identity, is_paused, &never)
            .unwrap();
    }
    // Limits can be set while it runs and while it is paused. This guest never loads a balloon's
    // driver.
    let with = |rates| VmmSpec {
        rates,
        ..spec.clone()
    };
    let none = RateLimits::default();
    let bytes = RateLimits {
        disk_bytes_per_s: Some(1 << 20),
        net_rx_bytes_per_s: Some(4 << 20),
        ..none
    };
    let operations = RateLimits {
        disk_ops_per_s: Some(100),
        net_tx_bytes_per_s: Some(3 << 20),
        ..none
    };
    for (rates, shown) in [
        (bytes, ["2097152", "null", "4194304", "null"]),
        (operations, ["null", "100", "null", "3145728"]),
        (none, ["null"; 4]),
    ] {
        first
            .set_rates(&with(rates), &running.identity, &never)
            .unwrap();
        let config = vm_config(&vm.join("run/api.sock"));
        let size = |of: &serde_json::Value, bucket: &str| of[bucket]["size"].to_string();
        // The drives are in no particular order.
        let limiter = |id: &str| {
            let drive = config["drives"]
                .as_array()
                .unwrap()
                .iter()
                .find(|d| d["drive_id"] == id);
            &drive.unwrap_or_else(|| panic!("{config}"))["rate_limiter"]
        };
        let (drive, seed, net) = (
            limiter("root"),
            limiter("seed"),
            &config["network-interfaces"][0],
        );
        let found = [
            size(drive, "bandwidth"),
            size(drive, "ops"),
            size(&net["rx_rate_limiter"], "bandwidth"),
            size(&net["tx_rate_limiter"], "bandwidth"),
        ];
        assert_eq!(found, shown, "{config}");
        assert!(seed.is_null(), "{config}");
    }
    // Each document contains what has happened since the one before.
    for _ in 0..2 {
        let metrics = first.metrics(&spec, &running.identity, &never).unwrap();
        let last = metrics.last().unwrap();
        assert!(
            last["utc_timestamp_ms"].as_u64().unwrap() > 0 && last["block_root"].is_object(),
            "{last}"
        );
    }
    // The socket exists, but nothing in the guest listens.
    assert_eq!(
        first
            .connect(&running.identity, 5000, &never)
            .unwrap_err()
            .kind(),
        Kind::Timeout
    );
    assert!(first.press_ctrl_alt_del(&running.identity, &never).unwrap());
    assert_eq!(
        first.balloon_mib(&spec, &running.identity, &never).unwrap(),
        128
    );
    let e = first
        .set_balloon(&spec, &running.identity, 128, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::Busy && e.to_string().contains("not activated"),
        "{e}"
    );
    let (memory, devices) = (dir.path().join("memory"), dir.path().join("devices"));
    for path in [&memory, &devices] {
        std::fs::write(path, "").unwrap();
    }
    let to = SaveTo {
        memory: &memory,
        devices: &devices,
    };
    first.save(&spec, &running.identity, to, &never).unwrap();
    let saved = std::fs::metadata(&memory).unwrap();
    assert_eq!(saved.len(), spec.mem_mib << 20);
    // Only the pages that the guest has touched are saved, which are few by now.
    let allocated_mib = (std::os::unix::fs::MetadataExt::blocks(&saved) * 512) >> 20;
    println!("saved: {allocated_mib} of {} MiB", spec.mem_mib);
    assert!(allocated_mib < spec.mem_mib * 3 / 4, "{allocated_mib} MiB");
    drop(first);
    let next = new_driver();
    assert_eq!(next.adopt(&spec, &running.identity).unwrap(), running);
    let (died, deaths) = std::sync::mpsc::channel();
    next.watch(
        &spec.dir,
        &running.identity,
        Box::new(move |how| died.send(how).unwrap()),
    )
    .unwrap();
    next.kill(&running.identity, Instant::now() + Duration::from_secs(30))
        .unwrap();
    assert!(deaths.recv_timeout(Duration::from_secs(30)).is_ok());
    assert_eq!(next.find(&tag).unwrap(), None);
    // Restore it with another tap. A damaged copy is refused and leaves nothing behind.
    let network = GuestNetwork::Tap {
        name: "fctest1".into(),
        mac: "02:fc:0a:59:00:06".into(),
        address: [10, 89, 0, 6].into(),
    };
    let saved = Saved {
        memory,
        devices: devices.clone(),
        driver: next.describe(),
    };
    let spec = VmmSpec {
        tag: format!("{tag}3"),
        network,
        saved: Some(saved),
        ..spec
    };
    let again = next.start(&spec, &never, &mut |_| {}).unwrap();
    next.kill(&again.identity, Instant::now() + Duration::from_secs(30))
        .unwrap();
    std::fs::write(&devices, "damaged").unwrap();
    let e = next.start(&spec, &never, &mut |_| {}).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("Load snapshot error"),
        "{e}"
    );
    assert_eq!(next.find(&spec.tag).unwrap(), None);
}

/// Returns the VM's configuration as the VMM reports it.
fn vm_config(socket: &Path) -> serde_json::Value {
    let mut api = UnixStream::connect(socket).unwrap();
    api.write_all(b"GET /vm/config HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let len = api.read(&mut piece).unwrap();
        answer.extend_from_slice(&piece[..len]);
        let text = String::from_utf8_lossy(&answer);
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        match serde_json::from_str(body) {
            Ok(config) => return config,
            Err(e) => assert!(len > 0, "{e}: {text}"),
        }
    }
}

const ROUNDS: usize = 40;

/// Makes the same calls as the driver with a bare socket. Returns the time from the process's start
/// to the answer to InstanceStart.
fn bare_start(dir: &Path, calls: &[(String, String)]) -> Duration {
    let socket = dir.join("bare.sock");
    for left in [&socket, &dir.join("bare.vsock")] {
        let _ = std::fs::remove_file(left);
    }
    let begun = Instant::now();
    let mut vmm = Command::new(binary())
        .args(["--id", "bare", "--api-sock"])
        .arg(&socket)
        .args(["--level", "Error"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut api = loop {
        match UnixStream::connect(&socket) {
            Ok(api) => break api,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    for (path, body) in calls {
        let request = format!(
            "PUT {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        api.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 4096];
        let len = api.read(&mut answer).unwrap();
        assert!(
            answer.starts_with(b"HTTP/1.1 204"),
            "{path}: {}",
            String::from_utf8_lossy(&answer[..len])
        );
    }
    let took = begun.elapsed();
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    took
}

fn percentile(took: &mut [Duration], p: usize) -> Duration {
    took.sort();
    took[(took.len() - 1) * p / 100]
}

/// Measures the time from create to the answer to InstanceStart, for the driver and for a bare
/// client in turn, on this host's `/dev/kvm`.
#[test]
#[ignore = "measures: scripts/bench boot"]
fn bench_boot() {
    crate::host::image();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let vm = dir.path().join("vm");
    std::fs::create_dir(&vm).unwrap();
    let spec = control_plane_spec(dir.path(), &crate::host::image().join("vmlinux"));
    let (image, never) = (crate::host::image().display(), Cancel::try_new().unwrap());
    let args = "root=/dev/vda console=ttyS0 reboot=k panic=-1 quiet";
    let drive = |id: &str, root: bool| {
        let path = vm.join(if root { "disk" } else { "seed" });
        let body = format!(
            r#"{{"drive_id":"{id}","path_on_host":"{}","is_root_device":{root},"is_read_only":{}}}"#,
            path.display(),
            !root
        );
        (format!("/drives/{id}"), body)
    };
    let calls: Vec<(String, String)> = vec![
        ("/machine-config".into(), r#"{"vcpu_count":1,"mem_size_mib":128}"#.into()),
        (
            "/boot-source".into(),
            format!(r#"{{"kernel_image_path":"{image}/vmlinux","initrd_path":"{image}/initrd","boot_args":"{args}"}}"#),
        ),
        drive("root", true),
        drive("seed", false),
        (
            "/network-interfaces/eth0".into(),
            r#"{"iface_id":"eth0","host_dev_name":"fcbare0","guest_mac":"02:fc:0a:59:00:06"}"#.into(),
        ),
        ("/entropy".into(), "{}".into()),
        ("/vsock".into(), format!(r#"{{"guest_cid":3,"uds_path":"{}"}}"#, dir.path().join("bare.vsock").display())),
        (
            "/balloon".into(),
            r#"{"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":60,"free_page_reporting":true}"#.into(),
        ),
        ("/serial".into(), format!(r#"{{"serial_out_path":"{}"}}"#, dir.path().join("serial").display())),
        ("/metrics".into(), format!(r#"{{"metrics_path":"{}"}}"#, dir.path().join("metrics").display())),
        ("/actions".into(), r#"{"action_type":"InstanceStart"}"#.into()),
    ];
    let driver = new_driver();
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(bare_start(dir.path(), &calls));
        let begun = Instant::now();
        let running = driver.start(&spec, &never, &mut |_| {}).unwrap();
        ours.push(begun.elapsed());
        driver
            .kill(&running.identity, Instant::now() + Duration::from_secs(30))
            .unwrap();
    }
    for p in [50, 90] {
        let (bare, ours) = (percentile(&mut bare, p), percentile(&mut ours, p));
        let ratio = ours.as_secs_f64() / bare.as_secs_f64();
        println!("p{p}: bare {bare:.1?}, driver {ours:.1?}, {ratio:.2} times");
    }
}
