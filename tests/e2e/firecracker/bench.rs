//! Measures how long Firecracker takes to start a guest, with the driver and without it.

use super::{binary, control_plane_spec, new_driver};
use fcd::testing::locks::Cancel;
use fcd::testing::vmm::Driver;
use nix::sched::{CloneFlags, unshare};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 40;

/// Starts Firecracker without the driver and makes the driver's calls on its socket. Returns the
/// time from the process's start to the reply to InstanceStart.
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

/// Measures the time from create to the reply to InstanceStart on this host's `/dev/kvm`. The
/// driver and a bare client take turns.
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
            .processes()
            .kill(&running.identity, Instant::now() + Duration::from_secs(30))
            .unwrap();
    }
    for p in [50, 90] {
        let (bare, ours) = (percentile(&mut bare, p), percentile(&mut ours, p));
        let ratio = ours.as_secs_f64() / bare.as_secs_f64();
        println!("p{p}: bare {bare:.1?}, driver {ours:.1?}, {ratio:.2} times");
    }
}
