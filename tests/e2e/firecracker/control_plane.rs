//! A test of the driver's operations with Firecracker on this host's KVM.

use super::{control_plane_spec, new_driver, vm_config};
use fcd::testing::api::vm::RateLimits;
use fcd::testing::error::Kind;
use fcd::testing::ids::Tag;
use fcd::testing::locks::Cancel;
use fcd::testing::vmm::{Driver, GuestNetwork, SaveTo, Saved, VmmSpec};
use nix::sched::{CloneFlags, unshare};
use std::path::Path;
use std::time::{Duration, Instant};

/// Runs the driver's state machine against the real program on this host's `/dev/kvm`. The guest
/// does not have to boot.
#[test]
#[ignore = "needs a Firecracker binary: scripts/test"]
fn control_plane_runs_on_kvm_of_this_host() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("NOT RUN, because /dev/kvm is missing: control_plane_runs_on_kvm_of_this_host");
        return;
    }
    // Building the image downloads packages, which is impossible in the namespace.
    let image = crate::host::image();
    // Firecracker creates a missing tap. In a namespace the tap disappears with the test.
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (vm, never) = (dir.path().join("vm"), Cancel::try_new().unwrap());
    std::fs::create_dir(&vm).unwrap();
    let spec = |kernel: &Path| control_plane_spec(dir.path(), kernel);
    let tag = spec(image).tag;
    let first = new_driver();
    // A kernel that cannot boot is refused with the reason and leaves nothing behind.
    let e = first
        .start(&spec(&image.join("initrd")), &never, &mut |_| {})
        .unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.to_string().contains("Invalid Elf magic number"),
        "{e}"
    );
    assert_eq!(first.processes().find(tag.as_str()).unwrap(), None);
    let spec = spec(&image.join("vmlinux"));
    let running = first.start(&spec, &never, &mut |_| {}).unwrap();
    // A second VMM cannot use the same tap.
    let second = VmmSpec {
        tag: Tag::new(tag.install(), tag.vm(), 2),
        dir: dir.path().join("other"),
        ..spec.clone()
    };
    std::fs::create_dir(&second.dir).unwrap();
    let e = first.start(&second, &never, &mut |_| {}).unwrap_err();
    assert!(
        e.kind() == Kind::Conflict && e.to_string().contains("(os error 16)"),
        "{e}"
    );
    let running_vm = first.vm(spec.running_as(&running.identity)).unwrap();
    for is_paused in [true, true, false, false, true] {
        if is_paused {
            running_vm.pause(&never).unwrap();
        } else {
            running_vm.resume(&never).unwrap();
        }
    }
    // Limits can be set while the guest runs and while it is paused. This guest never loads a
    // balloon driver.
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
        running_vm.set_rates(&with(rates), &never).unwrap();
        let config = vm_config(&vm.join("run/api.sock"));
        let size = |of: &serde_json::Value, bucket: &str| of[bucket]["size"].to_string();
        // The order of the drives is not defined.
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
    // Each metrics document covers the time since the previous one.
    for _ in 0..2 {
        let metrics = running_vm.metrics(&never).unwrap();
        let last = metrics.last().unwrap();
        assert!(
            last["utc_timestamp_ms"].as_u64().unwrap() > 0 && last["block_root"].is_object(),
            "{last}"
        );
    }
    // The socket exists, but no program in the guest listens.
    assert_eq!(
        running_vm.connect(5000, &never).unwrap_err().kind(),
        Kind::Timeout
    );
    running_vm.press_ctrl_alt_del(&never).unwrap();
    assert_eq!(running_vm.balloon_mib(&never).unwrap(), 128);
    let e = running_vm.set_balloon(128, &never).unwrap_err();
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
    running_vm.save(&spec, to, &never).unwrap();
    let saved = std::fs::metadata(&memory).unwrap();
    assert_eq!(saved.len(), spec.mem_mib << 20);
    // Only pages that the guest has touched are saved, and it has touched few so far.
    let allocated_mib = (std::os::unix::fs::MetadataExt::blocks(&saved) * 512) >> 20;
    println!("saved: {allocated_mib} of {} MiB", spec.mem_mib);
    assert!(allocated_mib < spec.mem_mib * 3 / 4, "{allocated_mib} MiB");
    drop(running_vm);
    drop(first);
    let next = new_driver();
    assert_eq!(next.adopt(&spec, &running.identity).unwrap(), running);
    let (died, deaths) = std::sync::mpsc::channel();
    next.processes()
        .watch(
            &spec.dir,
            &running.identity,
            Box::new(move |how| died.send(how).unwrap()),
        )
        .unwrap();
    next.processes()
        .kill(&running.identity, Instant::now() + Duration::from_secs(30))
        .unwrap();
    assert!(deaths.recv_timeout(Duration::from_secs(30)).is_ok());
    assert_eq!(next.processes().find(tag.as_str()).unwrap(), None);
    // The guest is restored with another tap. A damaged copy of the snapshot is refused and leaves
    // nothing behind.
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
        tag: Tag::new(tag.install(), tag.vm(), 3),
        network,
        saved: Some(saved),
        ..spec
    };
    let again = next.start(&spec, &never, &mut |_| {}).unwrap();
    next.processes()
        .kill(&again.identity, Instant::now() + Duration::from_secs(30))
        .unwrap();
    std::fs::write(&devices, "damaged").unwrap();
    let e = next.start(&spec, &never, &mut |_| {}).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("Load snapshot error"),
        "{e}"
    );
    assert_eq!(next.processes().find(spec.tag.as_str()).unwrap(), None);
}
