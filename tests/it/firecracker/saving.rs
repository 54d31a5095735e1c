//! Tests of saving and restoring a guest.

use super::{Bench, soon};
use expect_test::expect;
use fcd::testing::error::Kind;
use fcd::testing::locks::{Cancel, CancelCause};
use fcd::testing::vmm::{Driver, Running, SaveTo, Saved, VmmSpec};

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

    fn save(&self, running: &Running, files: &SavedFiles) -> fcd::testing::error::Result<String> {
        let to = SaveTo {
            memory: &files.memory,
            devices: &files.devices,
        };
        self.vm(running)
            .save(&self.spec(), to, &Cancel::try_new().unwrap())
    }

    /// Returns the types of the requested snapshots, in order.
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

    fn load(&self, files: &SavedFiles) -> fcd::testing::error::Result<Running> {
        let saved = Saved {
            memory: files.memory.clone(),
            devices: files.devices.clone(),
            driver: self.driver.describe(),
        };
        let spec = VmmSpec {
            tag: self.tag(2),
            saved: Some(saved),
            ..self.spec()
        };
        self.driver
            .start(&spec, &Cancel::try_new().unwrap(), &mut |_| {})
    }

    fn pause(&self, running: &Running) {
        let never = Cancel::try_new().unwrap();
        self.vm(running).pause(&never).unwrap();
    }
}

#[test]
fn save_and_restore_guest() {
    let bench = Bench::new("");
    let (running, files) = (bench.running(), bench.saved_files());
    assert_eq!(
        bench.save(&running, &files).unwrap_err().kind(),
        Kind::Internal,
        "a running guest cannot be saved"
    );
    bench.pause(&running);
    // The VMM has replaced the file with a symbolic link. The driver must not follow it.
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
        "the first request was refused because the guest ran, and the second succeeded"
    );
    assert!(
        !bench.dir.path().join("vm/run/memory").exists()
            && !bench.dir.path().join("vm/run/devices").exists()
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
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
    // The untouched pages exist only in the file that the VM was restored from, so saving only the
    // touched pages is not enough.
    bench.pause(&again);
    let spec = VmmSpec {
        tag: bench.tag(2),
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
        .vm(&again)
        .save(&spec, to, &Cancel::try_new().unwrap())
        .unwrap();
    assert_eq!(bench.snapshot_types(), ["Full"]);
    bench
        .driver
        .processes()
        .kill(&again.identity, soon())
        .unwrap();
}

/// Like the real program, the fake exits after it has refused to load a snapshot.
#[test]
fn refused_load_reports_cause_and_leaves_nothing() {
    let bench = Bench::new("");
    let (running, files) = (bench.running(), bench.saved_files());
    bench.pause(&running);
    bench.save(&running, &files).unwrap();
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    std::fs::write(&files.devices, "no such thing").unwrap();
    let e = bench.load(&files).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed
            && e.to_string()
                .contains("Failed to get snapshot state from file"),
        "{e}"
    );
    assert!(e.hint_text().is_some_and(|h| h.contains("snapshot")), "{e}");
    assert_eq!(bench.driver.processes().list(&bench.prefix).unwrap(), []);
    // The driver also refuses a snapshot that another driver made.
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
        bench
            .driver
            .processes()
            .kill(&running.identity, soon())
            .unwrap();
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
        .vm(&running)
        .save(&bench.spec(), to, &cancel)
        .unwrap_err();
    waiting.join().unwrap();
    assert!(
        e.kind() == Kind::Cancelled && e.to_string().contains("the VM was stopped"),
        "{e}"
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
}
