//! Tests of the methods of making a root disk from an image, with real guests. The test host covers
//! device-mapper.

use crate::host::Host;
use std::os::unix::fs::MetadataExt;

/// A disk keeps its data when the VM stops and the disk grows.
fn keeps_its_data_and_grows(host: &Host, method: &str) {
    host.boot("a");
    assert_eq!(host.show("a", "disk_driver"), method);
    host.sh("a", "dd if=/dev/urandom of=/root/data bs=1M count=8 2>/dev/null; sha256sum /root/data > /root/sum");
    host.ok(&["stop", "a"]);
    host.ok(&["vm", "set", "a", "--disk", "9G"]);
    host.ok(&["start", "a"]);
    assert_eq!(
        host.sh("a", "sha256sum --quiet -c /root/sum && echo kept"),
        "kept\n"
    );
    let size: u64 = host
        .sh("a", "df --output=size -B1M / | tail -n 1")
        .trim()
        .parse()
        .unwrap();
    assert!(size > 8500, "the guest's file system has {size} MiB");
}

fn root_disk_check(host: &Host) -> (String, String) {
    // `doctor` fails if any check fails, so its status is ignored.
    let checks: serde_json::Value =
        serde_json::from_slice(&host.fcctl(&["--json", "doctor"]).stdout).unwrap();
    let check = checks["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["id"] == "root-disk")
        .unwrap();
    (
        check["severity"].as_str().unwrap().to_owned(),
        check["found"].as_str().unwrap().to_owned(),
    )
}

#[test]
fn shared_blocks_are_used_on_xfs() {
    let host = Host::on_xfs();
    assert_eq!(root_disk_check(&host).0, "ok");
    keeps_its_data_and_grows(&host, "reflink");
    let disk = host
        .state()
        .join("vms")
        .join(host.show("a", "id").as_str().unwrap())
        .join("disk");
    let image = host.state().join("images/default/rootfs.ext4");
    assert_ne!(
        std::fs::metadata(&disk).unwrap().ino(),
        std::fs::metadata(&image).unwrap().ino()
    );
    // Together, the disk and its image use less than one and a half times the image's space, plus
    // 128 MiB.
    let used = nix::sys::statvfs::statvfs(&host.state()).unwrap();
    let used = (used.blocks() - used.blocks_free()) * used.fragment_size();
    let image = std::fs::metadata(&image).unwrap().blocks() * 512;
    assert!(
        used < image * 3 / 2 + (128 << 20),
        "{used} bytes are used, the image takes {image}"
    );
}

#[test]
fn disk_is_copied_if_configured() {
    let host = Host::with_config("[disk]\ndriver = \"copy\"\n");
    keeps_its_data_and_grows(&host, "copy");
    let meta = std::fs::metadata(
        host.state()
            .join("vms")
            .join(host.show("a", "id").as_str().unwrap())
            .join("disk"),
    )
    .unwrap();
    assert!(
        meta.blocks() * 512 < meta.len() / 4,
        "holes are left out: {} of {} bytes",
        meta.blocks() * 512,
        meta.len()
    );
}

#[test]
fn unsupported_disk_method_is_refused_with_reason() {
    let host = Host::with_config("[disk]\ndriver = \"reflink\"\n");
    let (severity, message) = root_disk_check(&host);
    assert!(
        severity == "fail" && message.contains("cannot share blocks"),
        "{severity}: {message}"
    );
    host.ok(&["vm", "create", "--name", "a"]);
    let (status, said) = host.fails(&["start", "a"]);
    assert!(
        status == 1 && said.contains("cannot share blocks") && said.contains("[disk]"),
        "{status}: {said}"
    );
    host.ok(&["rm", "a"]);
}
