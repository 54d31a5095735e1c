//! Boots a disk whose init comes from an earlier version of fcd. `older/init` is the init of
//! version 1, as commit 93f32c0 had it.

use crate::host::{Host, text};
use crate::runtime::check_workspace;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;

const INIT: &str = "/usr/lib/fcd/init";

#[track_caller]
fn run(command: &mut Command) {
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{command:?}: {:?}", text(&ran));
}

/// Adds the image `older`, whose disk has the init of version 1, and which is described as that
/// version did it.
fn add_older_image(host: &Host) {
    let images = host.state().join("images");
    let (from, to) = (images.join("default"), images.join("older"));
    fs::create_dir(&to).unwrap();
    for file in ["vmlinux", "initrd"] {
        fs::hard_link(from.join(file), to.join(file)).unwrap();
    }
    let disk = to.join("rootfs.ext4");
    let copy = ["--sparse=always", "--no-preserve=mode"];
    run(Command::new("cp")
        .args(copy)
        .arg(from.join("rootfs.ext4"))
        .arg(&disk));
    let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/older/init");
    for request in [
        format!("rm {INIT}"),
        format!("write {} {INIT}", init.display()),
        format!("set_inode_field {INIT} mode 0100755"),
    ] {
        run(Command::new("debugfs")
            .args(["-w", "-R", &request])
            .arg(&disk));
    }
    let text = fs::read_to_string(from.join("image.json")).unwrap();
    let new: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut old = json!({ "name": "older", "guest_version": 1 });
    for member in [
        "format",
        "os",
        "kernel_version",
        "packages",
        "built_at",
        "files",
    ] {
        old[member] = new[member].clone();
    }
    fs::write(to.join("image.json"), old.to_string()).unwrap();
}

#[test]
fn disk_with_init_of_version_1_boots_and_works() {
    let host = Host::start();
    add_older_image(&host);
    let create = ["vm", "create", "--name", "box", "--image", "older"];
    host.ok(&[&create[..], &["--work-disk", "64M"]].concat());
    host.ok(&["start", "box"]);
    let seen = host.sh(
        "box",
        "head -n 2 /usr/lib/fcd/init | tail -n 1; cat /etc/hostname",
    );
    assert!(
        seen.contains("Sets the machine up") && seen.ends_with("\nbox\n"),
        "{seen}"
    );
    check_workspace(&host, "box");
    host.sh("box", "echo kept | tee /root/mark /work/mark");
    let (status, said) = host.fails(&["ssh", "--user", "nobody", "box", "--", "true"]);
    assert!(
        status != 0 && said.contains("its image lets only root log in"),
        "{said}"
    );
    for _ in 0..2 {
        host.ok(&["stop", "box"]);
        assert_eq!(host.show("box", "synced"), "yes");
        let console = host.ok(&["logs", "box"]);
        assert!(console.contains("fcd-init: disk is clean"), "{console}");
        host.ok(&["start", "box"]);
        assert_eq!(host.sh("box", "cat /root/mark /work/mark"), "kept\nkept\n");
    }
}
