use super::groups::{CONTROLLERS, device_of, io_limits, limit_io, limits_of};
use super::programs::{has_interpreter, is_roots, is_static};
use super::*;
use crate::config::VmmLimits;
use std::os::unix::fs::symlink;

fn spec(dir: &Path) -> VmmSpec {
    let path = |name: &str| dir.join(name);
    for name in ["k", "i", "r", "vm/d", "vm/s"] {
        std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
        std::fs::write(path(name), name).unwrap();
    }
    VmmSpec {
        vm: "0123456789ab".parse().unwrap(),
        tag: "fc-11223344-0123456789ab-3".parse().unwrap(),
        dir: path("vm"),
        kernel: path("k"),
        initrd: path("i"),
        boot_args: String::new(),
        disk: path("vm/d"),
        disk_format: crate::vmm::DiskFormat::Raw,
        seed: path("vm/s"),
        runtime_disk: Some(path("r")),
        work_disk: None,
        vcpus: 2,
        mem_mib: 512,
        credentials: Some(Credentials {
            uid: 1234,
            gid: 1234,
        }),
        network: crate::vmm::GuestNetwork::UserMode {
            isolated: false,
            ipv6: false,
            ports: Vec::new(),
        },
        rates: crate::api::vm::RateLimits::default(),
        has_balloon: true,
        console_bytes_max: 1 << 16,
        saved: None,
    }
}

#[test]
fn jail_is_recreated_and_removed_without_following_links() {
    let temp = tempfile::tempdir().unwrap();
    let (spec, vms) = (spec(temp.path()), temp.path());
    let programs = Programs {
        jailer: "/j".into(),
        firecracker: "/opt/firecracker".into(),
    };
    let outside = temp.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("kept"), "x").unwrap();
    for _ in 0..2 {
        drop(make(&spec, &programs).unwrap());
        let root = spec
            .dir
            .join("jail/firecracker")
            .join(spec.tag.as_str())
            .join("root");
        assert_eq!(std::fs::read_to_string(root.join("disk")).unwrap(), "vm/d");
        assert_eq!(std::fs::read_to_string(root.join("runtime")).unwrap(), "r");
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 5);
        symlink(&outside, root.join("link")).unwrap();
        assert_eq!(remains(vms, "11223344"), [spec.tag.as_str()]);
    }
    let later = VmmSpec {
        tag: "fc-11223344-0123456789ab-4".parse().unwrap(),
        ..spec.clone()
    };
    drop(make(&later, &programs).unwrap());
    clear(&spec.dir, &spec.tag).unwrap();
    assert_eq!(remains(vms, "11223344"), [later.tag.as_str()]);
    clear(&spec.dir, &later.tag).unwrap();
    clear(&spec.dir, &spec.tag).unwrap();
    assert!(!spec.dir.join(JAIL_DIR).exists());
    assert_eq!(remains(vms, "11223344"), [""; 0]);
    assert!(outside.join("kept").exists() && spec.disk.exists() && spec.kernel.exists());
}

/// If the tests run as root, a thread of this test mounts a file system in its own mount namespace.
#[test]
fn jail_on_nodev_or_noexec_file_system_is_rejected() {
    let dir = Path::new("/srv");
    require_flags(dir, mount::Flags::default()).unwrap();
    let e = require_flags(
        dir,
        mount::Flags {
            nodev: true,
            noexec: true,
        },
    )
    .unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("mounted nodev and noexec"), "{e}");
    assert!(
        e.hint_text()
            .is_some_and(|hint| hint.contains("remount,dev,exec ")),
        "{e}"
    );
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let at = temp.path().to_owned();
    let refused = crate::host::thread::spawn("mounts", move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let script = format!(
            "mount --make-rprivate / && mount -t tmpfs -o nodev test '{}'",
            at.display()
        );
        let mounted = crate::host::Command::new("sh").args(["-c", &script]);
        crate::host::command::run_any_status(
            &mounted,
            &crate::locks::Cancel::try_new().unwrap(),
            &mut |_| {},
        )
        .unwrap();
        let made = spec(&at);
        let programs = Programs {
            jailer: "/j".into(),
            firecracker: "/opt/firecracker".into(),
        };
        make(&made, &programs)
            .map(drop)
            .map_err(|e| (e.kind(), e.to_string()))
    });
    let (kind, text) = refused.unwrap().join().unwrap().unwrap_err();
    assert!(
        kind == Kind::Unsupported
            && text.contains(&format!("{} is mounted nodev", temp.path().display())),
        "{text}"
    );
}

#[test]
fn missing_controller_is_error_unless_best_effort() {
    let temp = tempfile::tempdir().unwrap();
    let spec = spec(temp.path());
    let all = limits_of(
        VmmLimits::Required,
        &spec,
        &["cpuset", "cpu", "io", "memory", "pids"],
    )
    .unwrap();
    assert_eq!(
        all,
        [
            "cpu.max=300000 100000",
            "memory.max=805306368",
            "pids.max=18"
        ]
    );
    let e = limits_of(VmmLimits::Required, &spec, &["cpu", "pids"]).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported
            && e.to_string().contains("memory")
            && e.hint_text().is_some(),
        "{e}"
    );
    assert_eq!(
        limits_of(VmmLimits::BestEffort, &spec, &["pids"]).unwrap(),
        ["pids.max=18"]
    );
    assert_eq!(
        limits_of(VmmLimits::BestEffort, &spec, &[]).unwrap(),
        [""; 0]
    );
}

#[test]
fn disk_rates_become_limits_of_host_devices() {
    let temp = tempfile::tempdir().unwrap();
    let rate = |disk_bytes_per_s, disk_ops_per_s| crate::api::vm::RateLimits {
        disk_bytes_per_s,
        disk_ops_per_s,
        ..Default::default()
    };
    let spec = VmmSpec {
        work_disk: Some(temp.path().join("vm/s")),
        ..spec(temp.path())
    };
    let device_of_all = |_: &Path| Ok("8:0".to_owned());
    for (rates, line) in [
        (
            rate(Some(5 << 20), Some(100)),
            "rbps=20971520 wbps=20971520 riops=400 wiops=400",
        ),
        (
            rate(Some(1 << 20), None),
            "rbps=8388608 wbps=8388608 riops=max wiops=max",
        ),
        (
            rate(Some(u64::MAX), None),
            "rbps=18446744073709551615 wbps=18446744073709551615 riops=max wiops=max",
        ),
        (rate(None, None), "rbps=max wbps=max riops=max wiops=max"),
    ] {
        let spec = VmmSpec {
            rates,
            ..spec.clone()
        };
        assert_eq!(
            io_limits(&spec, device_of_all).unwrap(),
            [format!("8:0 {line}")]
        );
        // This succeeds because the control group does not exist.
        limit_io(VmmLimits::Required, &spec).unwrap();
    }
    let one = VmmSpec {
        rates: rate(None, Some(50)),
        work_disk: None,
        ..spec.clone()
    };
    assert_eq!(
        io_limits(&one, device_of_all).unwrap(),
        ["8:0 rbps=max wbps=max riops=100 wiops=100"]
    );
    let two = VmmSpec {
        work_disk: spec.work_disk.clone(),
        ..one.clone()
    };
    let each = |path: &Path| {
        Ok(if path == two.disk {
            "253:0".to_owned()
        } else {
            "8:0".to_owned()
        })
    };
    assert_eq!(
        io_limits(&two, each).unwrap(),
        ["253:0", "8:0"].map(|d| format!("{d} rbps=max wbps=max riops=100 wiops=100"))
    );
    // Only a disk rate needs the io controller.
    assert_eq!(
        limits_of(VmmLimits::Required, &spec, &CONTROLLERS)
            .unwrap()
            .len(),
        3
    );
    let e = limits_of(VmmLimits::Required, &one, &CONTROLLERS).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported
            && e.to_string().ends_with("no io")
            && e.hint_text().is_some(),
        "{e}"
    );
    assert_eq!(
        limits_of(VmmLimits::BestEffort, &one, &CONTROLLERS)
            .unwrap()
            .len(),
        3
    );
    assert_eq!(
        limits_of(VmmLimits::Required, &one, &["io", "cpu", "memory", "pids"])
            .unwrap()
            .len(),
        3,
        "io limits are set separately"
    );
    // A tmpfs has no device.
    let e = device_of(Path::new("/dev/shm")).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.hint_text().is_some(),
        "{e}"
    );
}

#[test]
fn dynamic_or_writable_program_is_not_jailed() {
    let temp = tempfile::tempdir().unwrap();
    assert!(has_interpreter(Path::new("/bin/sh")).unwrap());
    let text = temp.path().join("text");
    std::fs::write(&text, "#!/bin/sh\n").unwrap();
    assert!(has_interpreter(&text).is_err());
    assert_eq!(
        is_static(Path::new("/bin/sh")).unwrap_err().kind(),
        Kind::Unsupported
    );
    if nix::unistd::geteuid().is_root() {
        let set = |mode| {
            std::fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(mode))
                .unwrap()
        };
        set(0o755);
        is_roots(&text).unwrap();
        set(0o775);
        assert_eq!(is_roots(&text).unwrap_err().kind(), Kind::Unsupported);
    }
}
