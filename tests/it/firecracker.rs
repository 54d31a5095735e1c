//! Tests the `firecracker` driver against a fake that answers like the real program
//! (`tests/fake/firecracker.rs`), and that is slow, hangs, dies or lies where a test asks for it.
//! `another_host::` in `e2e` runs the real one.

use expect_test::expect;
use fcd::api::vm::RateLimits;
use fcd::error::{Error, Kind};
use fcd::host::process::Process;
use fcd::locks::{Cancel, CancelCause};
use fcd::vmm::console::Consoles;
use fcd::vmm::firecracker::Firecracker;
use fcd::vmm::{Driver, GuestEvent, GuestNetwork, Identity, Running, SaveTo, Saved, VmmSpec};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fake-firecracker");
const SOON: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + SOON
}

struct Bench {
    dir: tempfile::TempDir,
    /// The prefix of this test's VMM tags, which no other test uses.
    prefix: String,
    driver: Firecracker,
}

impl Bench {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // A hard link with its own name, next to which the script is. Not a copy: a file that was
        // open for writing when another test forked cannot be executed.
        std::fs::hard_link(PROGRAM, dir.path().join("firecracker")).unwrap();
        std::fs::create_dir(dir.path().join("vm")).unwrap();
        for (name, bytes) in [
            ("vmlinux", b"\x7fELF".as_slice()),
            ("initrd", b"x"),
            ("vm/disk", b"x"),
            ("vm/seed", b"x"),
            ("vm/work", b"x"),
        ] {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let prefix = format!("fc-{}-", &fcd::ids::VmId::random().as_str()[..8]);
        let bench = Self {
            driver: driver(dir.path()),
            dir,
            prefix,
        };
        bench.script(script);
        bench
    }

    fn script(&self, script: &str) {
        std::fs::write(self.dir.path().join("script"), script).unwrap();
    }

    fn tag(&self) -> String {
        format!("{}0123456789ab-1", self.prefix)
    }

    fn spec(&self) -> VmmSpec {
        let path = |name: &str| self.dir.path().join(name);
        let base = fcd::vmm::fake::spec(
            "0123456789ab".parse().unwrap(),
            &self.tag(),
            self.dir.path(),
        );
        VmmSpec {
            dir: path("vm"),
            kernel: path("vmlinux"),
            initrd: path("initrd"),
            boot_args: "root=/dev/vda init=/sbin/fcd-init".into(),
            disk: path("vm/disk"),
            seed: path("vm/seed"),
            work_disk: Some(path("vm/work")),
            network: GuestNetwork::Tap {
                name: "fc0011aabb-1".into(),
                mac: "02:fc:0a:59:00:05".into(),
                address: [10, 89, 0, 5].into(),
            },
            ..base
        }
    }

    /// Returns the result and the process that the driver reported.
    fn start(&self, cancel: &Cancel) -> (fcd::error::Result<Running>, Option<Identity>) {
        let mut reported = None;
        let started = self.driver.start(&self.spec(), cancel, &mut |identity| {
            reported = Some(identity.clone())
        });
        (started, reported)
    }

    fn running(&self) -> Running {
        self.start(&Cancel::try_new().unwrap())
            .0
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Checks that the start fails and leaves no process.
    #[track_caller]
    fn fails(&self, cancel: &Cancel) -> Error {
        let (started, reported) = self.start(cancel);
        let e = started.unwrap_err();
        if let Some(identity) = reported {
            assert!(!self.driver.is_alive(&identity), "{e}");
        }
        assert_eq!(self.driver.list(&self.prefix).unwrap(), [], "{e}");
        e
    }

    fn requests(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("requests")).unwrap();
        text.replace(self.dir.path().to_str().unwrap(), "DIR")
    }

    fn console(&self) -> String {
        fcd::vmm::console::read(&self.dir.path().join("vm"), None).unwrap()
    }

    fn await_console(&self, text: &str) {
        let deadline = soon();
        while !self.console().contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not in {:?}",
                self.console()
            );
            std::thread::yield_now();
        }
    }
}

/// A test may end, or fail, while its VMM runs.
impl Drop for Bench {
    fn drop(&mut self) {
        for vmm in self.driver.list(&self.prefix).unwrap_or_default() {
            let _ = self.driver.kill(&vmm.identity, soon());
        }
    }
}

fn driver(dir: &Path) -> Firecracker {
    let config = fcd::config::Firecracker {
        binary: dir.join("firecracker"),
        ..Default::default()
    };
    Firecracker::new(config, 0..0, Arc::new(Consoles::try_new().unwrap()))
        .unwrap()
        .without_kvm()
}

/// The requests of a start, in order.
const REQUESTS: [(&str, &str); 13] = [
    ("GET", "/"),
    ("PUT", "/machine-config"),
    ("PUT", "/boot-source"),
    ("PUT", "/drives/root"),
    ("PUT", "/drives/seed"),
    ("PUT", "/drives/work"),
    ("PUT", "/network-interfaces/eth0"),
    ("PUT", "/entropy"),
    ("PUT", "/vsock"),
    ("PUT", "/balloon"),
    ("PUT", "/serial"),
    ("PUT", "/metrics"),
    ("PUT", "/actions"),
];

#[test]
fn start_configures_vm_and_runs_guest() {
    let bench = Bench::new("");
    let running = bench.running();
    assert_eq!(running.ssh_addr.to_string(), "10.89.0.5:22");
    expect![[r#"
        GET / 
        PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}
        PUT /boot-source {"kernel_image_path":"DIR/vmlinux","initrd_path":"DIR/initrd","boot_args":"root=/dev/vda init=/sbin/fcd-init console=ttyS0 reboot=k panic=-1 net.ifnames=0 quiet cryptomgr.notests random.trust_cpu=on audit=0 i8042.noaux i8042.nomux fcd.off=reset"}
        PUT /drives/root {"drive_id":"root","path_on_host":"DIR/vm/disk","is_root_device":true,"is_read_only":false,"cache_type":"Writeback"}
        PUT /drives/seed {"drive_id":"seed","path_on_host":"DIR/vm/seed","is_root_device":false,"is_read_only":true,"cache_type":"Writeback"}
        PUT /drives/work {"drive_id":"work","path_on_host":"DIR/vm/work","is_root_device":false,"is_read_only":false,"cache_type":"Writeback"}
        PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"fc0011aabb-1","guest_mac":"02:fc:0a:59:00:05"}
        PUT /entropy {}
        PUT /vsock {"guest_cid":3,"uds_path":"vsock"}
        PUT /balloon {"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":60,"free_page_reporting":true}
        PUT /serial {"serial_out_path":"console"}
        PUT /metrics {"metrics_path":"metrics"}
        PUT /actions {"action_type":"InstanceStart"}
    "#]]
    .assert_eq(&bench.requests());
    bench.await_console("the guest runs");
    assert_eq!(
        bench.driver.find(&bench.tag()).unwrap().as_ref(),
        Some(&running.identity)
    );
    assert!(
        bench.driver.is_ours(&running.identity, &bench.tag())
            && !bench.driver.is_ours(&running.identity, "fc-other-x-1")
    );
    // The VMM has its output, socket, console and connections open, and none of our descriptors.
    for fd in std::fs::read_dir(format!("/proc/{}/fd", running.identity.pid))
        .unwrap()
        .flatten()
    {
        let Ok(target) = std::fs::read_link(fd.path()) else {
            continue;
        };
        let (target, dir) = (
            target.display().to_string(),
            bench.dir.path().display().to_string(),
        );
        assert!(
            target == "/dev/null" || target.starts_with("socket:") || target.starts_with(&dir),
            "{target}"
        );
    }
    bench.driver.kill(&running.identity, soon()).unwrap();
    assert_eq!(bench.driver.find(&bench.tag()).unwrap(), None);
    // Files of the previous run do not prevent a start.
    bench
        .driver
        .kill(&bench.running().identity, soon())
        .unwrap();
}

#[test]
fn start_with_fault_at_any_request_leaves_nothing() {
    let never = Cancel::try_new().unwrap();
    let bench = Bench::new("");
    for (method, path) in REQUESTS {
        bench.script(&format!("{method} {path} die"));
        let e = bench.fails(&never);
        assert!(
            e.kind() == Kind::VmmFailed
                && e.to_string().contains("firecracker ended with signal 6"),
            "{path}: {e}"
        );
        for fault in ["hangup", "garbage"] {
            bench.script(&format!("{method} {path} {fault}"));
            let e = bench.fails(&never);
            assert!(
                e.kind() == Kind::VmmFailed && e.hint_text().is_none_or(|h| !h.is_empty()),
                "{path}: {e}"
            );
        }
        bench.script(&format!(
            "{method} {path} refuse Error manipulating the backing file: No such file or directory (os error 2)"
        ));
        let e = bench.fails(&never);
        assert!(
            e.kind() == Kind::VmmFailed
                && e.to_string().contains("backing file")
                && e.hint_text().is_some(),
            "{path}: {e}"
        );
        bench.script(&format!("{method} {path} slow 30"));
        bench
            .driver
            .kill(&bench.running().identity, soon())
            .unwrap();
    }
}

#[test]
fn hanging_start_is_cancelled_at_once() {
    for (method, path) in REQUESTS {
        let bench = Bench::new(&format!("{method} {path} hang"));
        let cancel = Cancel::try_new().unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                let deadline = soon();
                let asked = || {
                    std::fs::read_to_string(bench.dir.path().join("requests")).unwrap_or_default()
                };
                while !asked().contains(&format!("{method} {path} ")) {
                    assert!(Instant::now() < deadline, "it is not asked for {path}");
                    std::thread::yield_now();
                }
                cancel.cancel(CancelCause::VmStopped);
            });
            let e = bench.fails(&cancel);
            assert_eq!(e.kind(), Kind::Cancelled, "{path}: {e}");
        });
    }
}

#[test]
fn refusals_have_hints() {
    let never = Cancel::try_new().unwrap();
    let kind = |change: &dyn Fn(&Bench)| {
        let bench = Bench::new("");
        change(&bench);
        let e = bench.fails(&never);
        assert!(e.hint_text().is_some(), "{e}");
        (e.kind(), e.to_string())
    };
    let (no_elf, said) =
        kind(&|b| std::fs::write(b.dir.path().join("vmlinux"), "MZ, a bzImage").unwrap());
    assert!(
        no_elf == Kind::Unsupported && said.contains("Invalid Elf magic number"),
        "{said}"
    );
    let (no_disk, said) = kind(&|b| std::fs::remove_file(b.dir.path().join("vm/disk")).unwrap());
    assert!(
        no_disk == Kind::VmmFailed && said.contains("add disk root"),
        "{said}"
    );
    let (too_old, said) = kind(&|b| b.script("VERSION 1.13.1"));
    assert!(
        too_old == Kind::Unsupported && said.contains("1.13.1") && said.contains("1.14"),
        "{said}"
    );
    let (ends, said) = kind(&|b| b.script("EXIT the seccomp filter cannot be loaded"));
    assert!(
        ends == Kind::VmmFailed
            && said.contains("exit status 1: the seccomp filter cannot be loaded"),
        "{said}"
    );
    let (missing, said) =
        kind(&|b| std::fs::remove_file(b.dir.path().join("firecracker")).unwrap());
    assert_eq!(missing, Kind::CommandMissing, "{said}");
    let (not_executable, said) = kind(&|b| {
        let program = b.dir.path().join("firecracker");
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "x").unwrap();
    });
    assert!(
        not_executable == Kind::Unsupported && said.contains("mode 0644"),
        "{said}"
    );
    // Networks and disks that only QEMU supports.
    let bench = Bench::new("");
    let user_mode = VmmSpec {
        network: GuestNetwork::UserMode {
            isolated: false,
            ports: Vec::new(),
        },
        ..bench.spec()
    };
    let qcow2 = VmmSpec {
        disk_format: fcd::vmm::DiskFormat::Qcow2,
        ..bench.spec()
    };
    for spec in [user_mode, qcow2] {
        let e = bench.driver.start(&spec, &never, &mut |_| {}).unwrap_err();
        assert!(
            e.kind() == Kind::Unsupported && e.hint_text().is_some(),
            "{e}"
        );
        assert_eq!(bench.driver.list(&bench.prefix).unwrap(), []);
    }
}

#[test]
fn adopt_by_next_daemon_continues() {
    let mut bench = Bench::new("");
    let running = bench.running();
    bench.await_console("the guest runs");
    bench.driver = driver(bench.dir.path());
    assert_eq!(
        bench
            .driver
            .adopt(&bench.spec(), &running.identity)
            .unwrap(),
        running
    );
    bench.await_console("reconnected");
    // New console output reaches the log again.
    std::fs::write(bench.dir.path().join("vm/run/console"), "and says more\n").unwrap();
    bench.await_console("and says more");
    let other = VmmSpec {
        tag: format!("{}0123456789ab-2", bench.prefix),
        ..bench.spec()
    };
    assert_eq!(
        bench
            .driver
            .adopt(&other, &running.identity)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
    assert_eq!(
        bench
            .driver
            .adopt(&bench.spec(), &running.identity)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
}

#[test]
fn pause_and_resume_guest() {
    let bench = Bench::new("");
    let (running, dir, never) = (
        bench.running(),
        bench.dir.path().join("vm"),
        Cancel::try_new().unwrap(),
    );
    for is_paused in [true, true, false, false] {
        bench
            .driver
            .set_paused(&dir, &running.identity, is_paused, &never)
            .unwrap();
    }
    let asked = bench.requests();
    assert_eq!(asked.matches("PATCH /vm {\"state\":\"Paused\"}").count(), 2);
    // Only a paused guest is resumed. Its vsock accepts new streams again because the guest was
    // notified that the old ones have ended.
    let requests: Vec<_> = asked
        .lines()
        .skip_while(|l| !l.contains("Paused"))
        .filter(|l| !l.starts_with("GET"))
        .collect();
    expect![[r#"
        PATCH /vm {"state":"Paused"}
        PATCH /vm {"state":"Paused"}
        PUT /snapshot/create {"snapshot_type":"Full","snapshot_path":"/proc/none/none","mem_file_path":"/proc/none/none"}
        PATCH /vm {"state":"Resumed"}"#]]
    .assert_eq(&requests.join("\n"));
    bench.driver.kill(&running.identity, soon()).unwrap();
    let e = bench
        .driver
        .set_paused(&dir, &running.identity, true, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

/// Only 1.16 needs the workaround. Earlier versions do not hold data back, and 1.17 fixed it.
#[test]
fn vsock_is_reset_at_resume_only_in_versions_that_need_it() {
    for (version, resets) in [
        ("1.15.1", 0),
        ("1.16.0", 1),
        ("1.16.1", 1),
        ("1.17.0", 0),
        ("2.0.0", 0),
    ] {
        let bench = Bench::new(&format!("VERSION {version}"));
        let (running, never) = (bench.running(), Cancel::try_new().unwrap());
        for is_paused in [true, false] {
            bench
                .driver
                .set_paused(
                    &bench.dir.path().join("vm"),
                    &running.identity,
                    is_paused,
                    &never,
                )
                .unwrap();
        }
        assert_eq!(
            bench.requests().matches("PUT /snapshot/create").count(),
            resets,
            "{version}"
        );
        bench.driver.kill(&running.identity, soon()).unwrap();
    }
}

#[test]
fn rates_apply_at_start_and_while_running() {
    let bench = Bench::new("");
    let never = Cancel::try_new().unwrap();
    let spec = |rates| VmmSpec {
        rates,
        ..bench.spec()
    };
    let some = spec(RateLimits {
        disk_bytes_per_s: Some(2 << 20),
        disk_ops_per_s: Some(100),
        net_rx_bytes_per_s: Some(3 << 20),
        net_tx_bytes_per_s: None,
    });
    let running = bench.driver.start(&some, &never, &mut |_| {}).unwrap();
    let other = spec(RateLimits {
        disk_ops_per_s: Some(200),
        net_tx_bytes_per_s: Some(1 << 20),
        ..RateLimits::default()
    });
    bench
        .driver
        .set_rates(&other, &running.identity, &never)
        .unwrap();
    bench
        .driver
        .set_rates(&spec(RateLimits::default()), &running.identity, &never)
        .unwrap();
    let limits: Vec<_> = bench
        .requests()
        .lines()
        .filter(|l| l.contains("rate_limiter"))
        .map(str::to_owned)
        .collect();
    expect![[r#"
        PUT /drives/root {"drive_id":"root","path_on_host":"DIR/vm/disk","is_root_device":true,"is_read_only":false,"cache_type":"Writeback","rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000},"ops":{"size":100,"refill_time":1000}}}
        PUT /drives/work {"drive_id":"work","path_on_host":"DIR/vm/work","is_root_device":false,"is_read_only":false,"cache_type":"Writeback","rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000},"ops":{"size":100,"refill_time":1000}}}
        PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"fc0011aabb-1","guest_mac":"02:fc:0a:59:00:05","rx_rate_limiter":{"bandwidth":{"size":3145728,"refill_time":1000}}}
        PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":200,"refill_time":1000}}}
        PATCH /drives/work {"drive_id":"work","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":200,"refill_time":1000}}}
        PATCH /network-interfaces/eth0 {"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":{"bandwidth":{"size":2097152,"refill_time":2000}}}
        PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /drives/work {"drive_id":"work","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /network-interfaces/eth0 {"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}}}"#]].assert_eq(&limits.join("\n"));
    // A refusal carries its text and a hint, and so does a VMM that is gone.
    bench.script("PATCH /drives/work refuse The requested operation is not supported before starting the microVM.");
    let e = bench
        .driver
        .set_rates(&some, &running.identity, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::WrongState
            && e.to_string().contains("limit disk work")
            && e.hint_text().is_some(),
        "{e}"
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
    let e = bench
        .driver
        .set_rates(&some, &running.identity, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

#[test]
fn vsock_connects_to_listener_in_guest() {
    let bench = Bench::new("");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    let connect = |port| bench.driver.connect(&running.identity, port, &never);
    let mut stream = connect(7).unwrap();
    // It blocks where a socket is expected to.
    let sent = vec![7; 1 << 20];
    let mut writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).unwrap();
    });
    let mut echo = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut stream, &mut echo).unwrap();
    writer.join().unwrap();
    assert_eq!(echo, vec![7; 1 << 20]);
    let e = connect(9).unwrap_err();
    assert!(
        e.kind() == Kind::GuestUnavailable
            && e.to_string().contains("port 9")
            && e.hint_text().is_some(),
        "{e}"
    );
    // Nobody answers, so the caller gives up.
    let enough = Cancel::try_new().unwrap();
    enough.cancel(CancelCause::VmStopped);
    assert_eq!(
        bench
            .driver
            .connect(&running.identity, 8, &enough)
            .unwrap_err()
            .kind(),
        Kind::Cancelled
    );
    // A VM that an earlier fcd started, without this socket.
    std::fs::remove_file(bench.dir.path().join("vm/run/vsock")).unwrap();
    let e = connect(7).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.hint_text().is_some(),
        "{e}"
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
    assert_eq!(connect(7).unwrap_err().kind(), Kind::VmmFailed);
}

#[test]
fn ctrl_alt_del_shuts_guest_down() {
    let bench = Bench::new("KEYBOARD");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    assert!(
        bench
            .driver
            .press_ctrl_alt_del(&running.identity, &never)
            .unwrap()
    );
    assert!(
        bench
            .driver
            .wait_exit(&running.identity, soon(), &never)
            .unwrap()
    );
    assert!(
        bench
            .requests()
            .ends_with("PUT /actions {\"action_type\":\"SendCtrlAltDel\"}\n")
    );
    assert_eq!(
        bench
            .driver
            .press_ctrl_alt_del(&running.identity, &never)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
}

#[test]
fn balloon_takes_the_remaining_memory() {
    let bench = Bench::new("");
    let (running, spec, never) = (bench.running(), bench.spec(), Cancel::try_new().unwrap());
    let kept = || {
        bench
            .driver
            .balloon_mib(&spec, &running.identity, &never)
            .unwrap()
    };
    assert_eq!(kept(), 128);
    for keep_mib in [96, 128] {
        bench
            .driver
            .set_balloon(&spec, &running.identity, keep_mib, &never)
            .unwrap();
        assert_eq!(kept(), keep_mib);
    }
    bench.script("PATCH /balloon refuse Balloon update error: Balloon: Device not activated yet.");
    let e = bench
        .driver
        .set_balloon(&spec, &running.identity, 96, &never)
        .unwrap_err();
    assert!(e.kind() == Kind::Busy && e.hint_text().is_some(), "{e}");
    bench.script("");
    bench.driver.kill(&running.identity, soon()).unwrap();
    // An image whose initramfs has no balloon driver.
    let without = VmmSpec {
        has_balloon: false,
        ..bench.spec()
    };
    let running = bench.driver.start(&without, &never, &mut |_| {}).unwrap();
    let e = bench
        .driver
        .set_balloon(&without, &running.identity, 96, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.hint_text().is_some(),
        "{e}"
    );
}

#[test]
fn metrics_are_read_line_by_line() {
    let bench = Bench::new("");
    let (running, spec, never) = (bench.running(), bench.spec(), Cancel::try_new().unwrap());
    let flushes = || -> Vec<u64> {
        let all = bench
            .driver
            .metrics(&spec, &running.identity, &never)
            .unwrap();
        all.iter()
            .map(|line| line["flushes"].as_u64().unwrap())
            .collect()
    };
    assert_eq!((flushes(), flushes()), (vec![1], vec![2]));
    // A line that the VMM printed unasked, and garbage.
    let pipe = bench.dir.path().join("vm/run/metrics");
    std::fs::write(&pipe, "{\"flushes\":77}\n\u{1b}[2J\n").unwrap();
    assert_eq!(flushes(), [77, 3]);
    // The pipe is full. Reading makes room for the requested line.
    let line = format!("{{\"flushes\":78,\"x\":\"{}\"}}\n", "x".repeat(8000));
    let mut full = std::fs::File::options()
        .custom_flags(nix::libc::O_NONBLOCK)
        .write(true)
        .open(&pipe)
        .unwrap();
    while full.write_all(line.as_bytes()).is_ok() {}
    let all = flushes();
    assert!(
        all.len() > 5 && all[..all.len() - 1].iter().all(|n| *n == 78),
        "{all:?}"
    );
    assert_eq!(flushes(), [5]);
    // The next daemon continues to read.
    assert_eq!(
        driver(bench.dir.path())
            .metrics(&spec, &running.identity, &never)
            .unwrap()[0]["flushes"],
        6
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
    let e = bench
        .driver
        .metrics(&spec, &running.identity, &never)
        .unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

#[test]
fn watch_reports_death_and_silence() {
    let bench = Bench::new("");
    let running = bench.running();
    let (sender, reports) = std::sync::mpsc::channel();
    let (died, deaths) = std::sync::mpsc::channel();
    bench
        .driver
        .watch(
            &bench.spec().dir,
            &running.identity,
            Box::new(move |how| died.send(how).unwrap()),
        )
        .unwrap();
    let dir = bench.dir.path().join("vm");
    bench
        .driver
        .watch_guest(
            &dir,
            &running.identity,
            Box::new(move |what| sender.send(what).unwrap_or_default()),
        )
        .unwrap();
    let process = Process::open(&running.identity).unwrap().unwrap();
    process.signal(rustix::process::Signal::STOP).unwrap();
    // It may have answered once before it was stopped.
    let next = || {
        std::iter::repeat_with(|| reports.recv_timeout(SOON).unwrap())
            .find(|report| *report != GuestEvent::Answered)
            .unwrap()
    };
    for _ in 0..2 {
        assert_eq!(next(), GuestEvent::Unresponsive(true));
    }
    process.signal(rustix::process::Signal::CONT).unwrap();
    let heard = || (next() == GuestEvent::Unresponsive(false)).then_some(());
    assert!((0..3).any(|_| heard().is_some()), "that it answers again");
    process.signal(rustix::process::Signal::KILL).unwrap();
    assert_eq!(
        deaths.recv_timeout(SOON).unwrap(),
        fcd::vmm::End::Vmm(fcd::vmm::Exit::Signal(9))
    );
}

struct SavedFiles {
    memory: std::path::PathBuf,
    devices: std::path::PathBuf,
}

impl Bench {
    fn saved_files(&self) -> SavedFiles {
        let (memory, devices) = (
            self.dir.path().join("memory"),
            self.dir.path().join("devices"),
        );
        for path in [&memory, &devices] {
            std::fs::write(path, "").unwrap();
        }
        SavedFiles { memory, devices }
    }

    fn save(&self, running: &Running, files: &SavedFiles) -> fcd::error::Result<String> {
        let to = SaveTo {
            memory: &files.memory,
            devices: &files.devices,
        };
        self.driver.save(
            &self.spec(),
            &running.identity,
            to,
            &Cancel::try_new().unwrap(),
        )
    }

    /// The requested types, in order.
    fn snapshot_types(&self) -> Vec<String> {
        let requests = self.requests();
        let bodies = requests
            .lines()
            .filter_map(|line| line.strip_prefix("PUT /snapshot/create "));
        let of = |body: &str| {
            serde_json::from_str::<serde_json::Value>(body).unwrap()["snapshot_type"]
                .as_str()
                .map(str::to_owned)
        };
        bodies.filter_map(of).collect()
    }

    fn load(&self, files: &SavedFiles) -> fcd::error::Result<Running> {
        let saved = Saved {
            memory: files.memory.clone(),
            devices: files.devices.clone(),
            driver: self.driver.describe(),
        };
        let spec = VmmSpec {
            tag: format!("{}0123456789ab-2", self.prefix),
            saved: Some(saved),
            ..self.spec()
        };
        self.driver
            .start(&spec, &Cancel::try_new().unwrap(), &mut |_| {})
    }

    fn pause(&self, running: &Running) {
        let never = Cancel::try_new().unwrap();
        self.driver
            .set_paused(&self.dir.path().join("vm"), &running.identity, true, &never)
            .unwrap();
    }
}

#[test]
fn save_and_restore_guest() {
    let bench = Bench::new("");
    let (running, files) = (bench.running(), bench.saved_files());
    assert_eq!(
        bench.save(&running, &files).unwrap_err().kind(),
        Kind::Internal,
        "it runs"
    );
    bench.pause(&running);
    // A link that the VMM has put in place of the file is not followed.
    let decoy = bench.dir.path().join("decoy");
    std::fs::write(&decoy, "kept").unwrap();
    std::os::unix::fs::symlink(&decoy, bench.dir.path().join("vm/run/memory")).unwrap();
    assert_eq!(bench.save(&running, &files).unwrap(), "1.16.1");
    assert_eq!(std::fs::read_to_string(&decoy).unwrap(), "kept");
    for path in [&files.memory, &files.devices] {
        assert!(std::fs::metadata(path).unwrap().len() > 0);
    }
    assert_eq!(
        bench.snapshot_types(),
        ["Diff", "Diff"],
        "refused while it ran, then saved"
    );
    assert!(
        !bench.dir.path().join("vm/run/memory").exists()
            && !bench.dir.path().join("vm/run/devices").exists()
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
    std::fs::remove_file(bench.dir.path().join("requests")).unwrap();
    let again = bench.load(&files).unwrap();
    expect![[r#"
        GET / 
        PUT /serial {"serial_out_path":"console"}
        PUT /metrics {"metrics_path":"metrics"}
        PUT /snapshot/load {"snapshot_path":"devices","mem_backend":{"backend_type":"File","backend_path":"memory"},"network_overrides":[{"iface_id":"eth0","host_dev_name":"fc0011aabb-1"}],"resume_vm":true}
        PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /drives/work {"drive_id":"work","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /network-interfaces/eth0 {"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}}}
    "#]].assert_eq(&bench.requests());
    bench.await_console("the guest resumes");
    // The rest of the memory is in the file that it was restored from, so saving only touched pages
    // is not enough.
    bench.pause(&again);
    let spec = VmmSpec {
        tag: format!("{}0123456789ab-2", bench.prefix),
        ..bench.spec()
    };
    let again_files = SavedFiles {
        memory: bench.dir.path().join("memory2"),
        devices: bench.dir.path().join("devices2"),
    };
    for path in [&again_files.memory, &again_files.devices] {
        std::fs::write(path, "").unwrap();
    }
    let to = SaveTo {
        memory: &again_files.memory,
        devices: &again_files.devices,
    };
    bench
        .driver
        .save(&spec, &again.identity, to, &Cancel::try_new().unwrap())
        .unwrap();
    assert_eq!(bench.snapshot_types(), ["Full"]);
    bench.driver.kill(&again.identity, soon()).unwrap();
}

/// The real program also exits after a refused load.
#[test]
fn refused_load_reports_cause_and_leaves_nothing() {
    let bench = Bench::new("");
    let (running, files) = (bench.running(), bench.saved_files());
    bench.pause(&running);
    bench.save(&running, &files).unwrap();
    bench.driver.kill(&running.identity, soon()).unwrap();
    std::fs::write(&files.devices, "no such thing").unwrap();
    let e = bench.load(&files).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed
            && e.to_string()
                .contains("Failed to get snapshot state from file"),
        "{e}"
    );
    assert!(e.hint_text().is_some_and(|h| h.contains("snapshot")), "{e}");
    assert_eq!(bench.driver.list(&bench.prefix).unwrap(), []);
    // There was nothing either that could be loaded elsewhere.
    assert_eq!(
        bench
            .driver
            .can_load("qemu (tcg, microvm)", false)
            .unwrap_err()
            .kind(),
        Kind::Unsupported
    );
    bench
        .driver
        .can_load(&bench.driver.describe(), false)
        .unwrap();
}

#[test]
fn failing_save_ends() {
    for (fault, kind) in [
        ("die", Kind::VmmFailed),
        ("hangup", Kind::VmmFailed),
        ("garbage", Kind::VmmFailed),
        (
            "refuse No space left on device (os error 28)",
            Kind::DiskFull,
        ),
    ] {
        let bench = Bench::new(&format!("PUT /snapshot/create {fault}\n"));
        let (running, files) = (bench.running(), bench.saved_files());
        bench.pause(&running);
        let e = bench.save(&running, &files).unwrap_err();
        assert_eq!(e.kind(), kind, "{fault}: {e}");
        bench.driver.kill(&running.identity, soon()).unwrap();
    }
    let bench = Bench::new("PUT /snapshot/create hang\n");
    let (running, files) = (bench.running(), bench.saved_files());
    bench.pause(&running);
    let cancel = Cancel::try_new().unwrap();
    let canceller = cancel.clone();
    let log = bench.dir.path().join("requests");
    let waiting = std::thread::spawn(move || {
        while !std::fs::read_to_string(&log)
            .unwrap_or_default()
            .contains("/snapshot/create")
        {
            std::thread::yield_now();
        }
        canceller.cancel(CancelCause::VmStopped);
    });
    let to = SaveTo {
        memory: &files.memory,
        devices: &files.devices,
    };
    let e = bench
        .driver
        .save(&bench.spec(), &running.identity, to, &cancel)
        .unwrap_err();
    waiting.join().unwrap();
    assert!(
        e.kind() == Kind::Cancelled && e.to_string().contains("the VM was stopped"),
        "{e}"
    );
    bench.driver.kill(&running.identity, soon()).unwrap();
}
