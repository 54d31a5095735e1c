//! Tests of the `firecracker` driver with the real program. Most of them run in a test host, where
//! nested virtualization runs the guests. `scripts/test` runs them if a binary exists
//! (`FCD_FIRECRACKER` or in PATH), and otherwise reports that it is missing.

mod bench;
mod control_plane;

use crate::another_host::{PLACE, TestHost};
use crate::host::runtimes;
use crate::runtime::{copy_busybox, write_image};
use fcd::testing::ids::Tag;
use fcd::testing::vmm::console::Consoles;
use fcd::testing::vmm::firecracker::Firecracker;
use fcd::testing::vmm::{GuestNetwork, VmmSpec};
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CONFIG: &str = "[vmm]\ndriver = \"firecracker\"\n[firecracker]\nbinary = \"/srv/f/bin/firecracker\"\njailer = \"/srv/f/bin/jailer\"\n\
                      [network]\ndriver = \"bridge\"\n[disk]\ndriver = \"dm-snapshot\"\n[limits]\ntransfer_idle_s = 3600\n";

fn binary() -> PathBuf {
    std::env::var_os("FCD_FIRECRACKER")
        .expect("FCD_FIRECRACKER must name a Firecracker binary: see scripts/test")
        .into()
}

/// Returns the path of the jailer: `FCD_JAILER`, or the jailer beside the binary.
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
    // The jailer creates its own device nodes, so only root needs access to the host's. The guests
    // have IPv6, because the host has an IPv6 address.
    host.sh("chmod 600 /dev/kvm /dev/net/tun; ip -6 address add 2001:db8::2/128 dev lo");
    host.start_daemon_with(CONFIG);
    host
}

/// The daemon dies at the n-th effect or commit of a start. The next daemon removes all leftovers
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

/// A server for the guest. It sends its host name and the line that it received to every client of
/// vsock port 5000.
const GREETER: &str = r#"socket(S, 40, 1, 0) or die "socket: $!";
bind(S, pack("SSLLCx3", 40, 0, 5000, 0xffffffff, 0)) or die "bind: $!";
listen(S, 5) or die "listen: $!";
print STDERR "listens\n";
while (accept(C, S)) { my $got = <C>; open(H, "/proc/sys/kernel/hostname"); my $name = <H>; chomp $name; print C "$name got $got"; close C }
"#;

/// Starts the server in the guest and checks its greeting. The server's first socket loads the
/// vsock driver.
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

/// The guest is unreachable over SSH. Its init handles Ctrl-Alt-Del, syncs and powers off.
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

/// Tests power-off, panic and reset with a running daemon, after its restart, and while no daemon
/// runs.
#[test]
#[ignore = "needs a Firecracker binary: scripts/test"]
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

/// Restores memory and disks of one moment in the same VM and in two others at the same time. Every
/// jail has the disks at the same paths.
fn restores_snapshots(host: &TestHost) {
    host.sh("fcctl vm create --name s --memory 256M --work-disk 32M && fcctl start s");
    host.sh("fcctl exec s -- sh -c 'echo disk > /root/mark; echo work > /work/mark; echo memory > /dev/shm/mark
         echo 0 > /dev/shm/count
         (i=0; while :; do i=$((i+1)); echo $i > /dev/shm/new; mv /dev/shm/new /dev/shm/count; sleep 0.1; done) > /dev/null 2>&1 < /dev/null &'");
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
        // The guest has the IPv6 address of its own VM and no other, and the host reaches it there.
        let ipv6 = host.sh(&format!(
            "at=$(fcctl inspect --format '{{{{.IP6}}}}' {vm}); head -c 7 < /dev/tcp/$at/22; echo; echo $at/128
             fcctl exec {vm} -- /usr/lib/fcd/bin/ip -6 -o address show dev eth0 | sed -n '/fe80:/d; s/.* inet6 \\([^ ]*\\) .*/\\1/p'"
        ));
        let lines: Vec<&str> = ipv6.lines().collect();
        assert!(
            lines.len() == 3 && lines[0] == "SSH-2.0" && lines[1] == lines[2],
            "{vm}: {ipv6}"
        );
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
    // Firecracker exits when it cannot load a damaged snapshot. The error is reported, and nothing
    // is left behind.
    let broken = host.sh("fcctl stop s > /dev/null; for f in state/snapshots/*/private/devices; do echo broken > $f; done; fcctl snapshot restore one 2>&1 || true");
    assert!(broken.contains("load the saved guest"), "{broken}");
    assert_eq!(
        host.sh("fcctl start s > /dev/null; fcctl exec s -- cat /root/mark"),
        "s\n",
        "after the failed restore, the VM has its own disk again"
    );
    assert_eq!(
        host.sh("fcctl exec twin -- echo on; fcctl snapshot delete one; ls state/snapshots"),
        "on\none: deleted\n"
    );
    host.sh("fcctl rm -f s twin third");
}

#[test]
#[ignore = "needs a Firecracker binary: scripts/test"]
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
    // Ports of the running guest change.
    assert_eq!(
        host.sh("fcctl port add a 1026:22"),
        "22/tcp -> 127.0.0.1:1026\n"
    );
    let added = "head -c 7 < /dev/tcp/127.0.0.1/1026";
    assert!(host.sh(added).starts_with("SSH-2.0"));
    host.sh("fcctl port rm a 1026:22");
    assert_eq!(
        host.sh(&format!("({added}) 2> /dev/null || echo closed")),
        "closed\n"
    );
    assert!(host.sh("fcctl logs a").contains("ssh is up"));
    // A directory is copied to the guest, and the guest's changes are exported.
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
    // The VMM has not inherited any descriptor from the daemon.
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
    // The VMM is the first process of its PID namespace.
    assert_eq!(
        host.sh("sed -n 's/^NSpid:.*\\t//p' /proc/$(pgrep -x firecracker)/status"),
        "1\n"
    );
    adjusts(&host);
    let nobody = host.sh("fcctl vm connect a 1 2>&1 || true");
    assert!(
        nobody.contains("nothing in the guest listens on vsock port 1")
            || nobody.contains("does not respond"),
        "{nobody}"
    );
    greets(&host, "a");
    // The guest is paused and resumed.
    assert_eq!(host.sh("fcctl vm pause a"), "a: running (paused)\n");
    assert!(
        host.sh("fcctl exec a -- true 2>&1 || true")
            .contains("is paused")
    );
    assert_eq!(
        host.sh("fcctl vm resume a; fcctl exec a -- echo on"),
        "a: running\non\n"
    );
    assert_eq!(
        greeting(&host, "a"),
        "a got hello\n",
        "the vsock also works after the resume"
    );
    // The daemon is killed, and the next daemon adopts the guest.
    let pid = host.sh("pgrep -x firecracker");
    host.sh("pkill -KILL -x fcd; until ! pgrep -x fcd; do sleep 0.1; done");
    host.start_daemon_with(CONFIG);
    assert_eq!(
        host.sh("fcctl exec a -- cat /root/mark /work/mark"),
        "kept\nkept\n"
    );
    assert_eq!(host.sh("pgrep -x firecracker"), pid);
    // A stop syncs and ends the guest even if an import is stalled. After the next start, the guest
    // has its data.
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
    // Deleting a booting VM does not wait for the boot.
    host.sh("fcctl vm create --name b; fcctl start b & until pgrep -x firecracker > /dev/null; do sleep 0.05; done
             fcctl rm -f b; wait $! || true");
    host.sh("fcctl rm -f a");
    assert_eq!(host.devices(), "");
    assert_eq!(
        host.sh("fcctl ps -aq; fcctl doctor --leaks"),
        "fcd has left nothing behind on this host\n"
    );
}

/// An image with its own files only boots with the guest runtime, whose disk is the third drive.
#[test]
#[ignore = "needs a Firecracker binary: scripts/test"]
fn image_of_one_static_program_boots() {
    let host = boot();
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("scratch"));
    copy_busybox(&runtimes(), &tree.join("app/busybox"));
    write_image(&image, "scratch", &tree, json!({"env": ["PATH=/app"]}));
    host.bring(&image, "images");
    for runtime in std::fs::read_dir(runtimes()).unwrap().flatten() {
        host.bring(&runtime.path(), "runtimes");
    }
    host.sh(
        "fcctl vm create --name a --image scratch --memory 256M --work-disk 64M; fcctl start a",
    );
    let shown = host.sh("fcctl vm show a");
    assert!(shown.contains("firecracker (kvm, jailed)"), "{shown}");
    assert_eq!(
        host.sh("fcctl exec a -- busybox sh -c 'echo kept | /app/busybox tee /mark /work/mark; exit 7' || echo status $?"),
        "kept\nstatus 7\n"
    );
    host.sh("mkdir repo; cd repo; git init -q; echo hello > greeting; git add greeting
             git -c user.name=a -c user.email=a@b commit -q -m first; fcctl workspace prepare a . --guest-path /workspace/repo");
    host.sh(
        "fcctl exec a -- sh -c 'echo changed > /workspace/repo/greeting'; cd repo; fcctl workspace apply a",
    );
    assert_eq!(host.sh("cat repo/greeting"), "changed\n");
    // The jailed VMM cannot write the runtime, which all VMs share.
    let modes = host.sh("stat -c '%U %a' state/runtimes/*/runtime.ext4");
    assert_eq!(modes, "root 444\n");
    assert_eq!(
        host.sh("fcctl stop a"),
        "a: stopped, the guest's data was synced\n"
    );
    host.sh("fcctl start a");
    assert_eq!(
        host.sh("fcctl exec a -- busybox cat /mark /work/mark"),
        "kept\nkept\n"
    );
    host.sh("fcctl vm fork a b");
    assert_eq!(host.sh("fcctl exec b -- busybox cat /mark"), "kept\n");
    host.sh("fcctl rm -f a b");
    assert_eq!(host.devices(), "");
    assert_eq!(
        host.sh("fcctl doctor --leaks"),
        "fcd has left nothing behind on this host\n"
    );
}

/// The VMM and its control group apply the rates, and the metrics show this. The balloon returns
/// memory and takes it back.
fn adjusts(host: &TestHost) {
    let io_max = || host.sh("cut -d' ' -f2- /sys/fs/cgroup/fcd-*/fc-*-1/io.max");
    let both = |rate: &str| format!("{rate}\n").repeat(2);
    // The limits are on the snapshot's device and on the device of the work disk.
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
    // The throttling may be in the metrics of this minute or of an earlier one.
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

/// Creates empty disks in `dir/vm`. Returns the spec of a VM that uses them.
fn control_plane_spec(dir: &Path, kernel: &Path) -> VmmSpec {
    let vm = dir.join("vm");
    for name in ["disk", "seed"] {
        std::fs::File::create(vm.join(name))
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
    }
    // No other process has this tag.
    let tag = Tag::new(
        &format!("{:08x}", std::process::id()),
        &"0123456789ab".parse().unwrap(),
        1,
    );
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
        ..fcd::testing::vmm::fake::spec(tag, dir)
    }
}

fn new_driver() -> Firecracker {
    let config = fcd::testing::config::Firecracker {
        binary: binary(),
        ..Default::default()
    };
    Firecracker::new(config, 0..0, Arc::new(Consoles::try_new().unwrap())).unwrap()
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
