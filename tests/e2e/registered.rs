//! Tests of images whose root file system is a user's file.

use crate::host::{Host, text};
use crate::runtime::busybox;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes an ext4 file system with busybox. The file is a bit longer than the file system.
fn root_file(host: &Host, dir: &Path) -> PathBuf {
    let (tree, file) = (dir.join("tree"), dir.join("root.ext4"));
    busybox(host, &tree.join("bin/busybox"));
    symlink("busybox", tree.join("bin/sh")).unwrap();
    fs::write(tree.join("mark"), "from a file\n").unwrap();
    let made = Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
        .args([&tree, &file])
        .arg("64M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{:?}", text(&made));
    let long = fs::File::options().append(true).open(&file).unwrap();
    long.set_len((64 << 20) + 100).unwrap();
    file
}

/// Creates a VM without a network and boots it.
fn boot(host: &Host, name: &str, image: &str) {
    let create = ["vm", "create", "--name", name, "--image", image];
    host.ok(&[&create[..], &["--net", "none", "--disk", "1G"]].concat());
    host.ok(&["start", name]);
}

#[test]
fn file_of_mke2fs_boots_until_it_changes() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let file = root_file(&host, dir.path());
    let path = file.to_str().unwrap();
    let before = fs::metadata(&file).unwrap();
    for (bad, says) in [
        (dir.path().to_str().unwrap(), "not a regular file"),
        ("/etc/passwd", "does not hold an ext4 file system"),
        ("/nonexistent", "/nonexistent"),
    ] {
        let (_, said) = host.fails(&["image", "register", "mine", "--rootfs", bad]);
        assert!(said.contains(says), "{said}");
    }
    host.ok(&["image", "register", "mine", "--rootfs", path]);
    assert!(host.ok(&["image", "ls"]).contains("in place"));

    boot(&host, "one", "mine");
    assert_eq!(host.sh("one", "cat /mark"), "from a file\n");
    host.sh("one", "echo changed >/mark");
    host.ok(&["stop", "one"]);
    host.ok(&["start", "one"]);
    assert_eq!(host.sh("one", "cat /mark"), "changed\n");
    host.ok(&["stop", "one"]);
    let after = fs::metadata(&file).unwrap();
    assert_eq!(
        (after.ctime(), after.ctime_nsec(), after.nlink()),
        (before.ctime(), before.ctime_nsec(), 1),
        "neither fcd nor a guest changes the file"
    );

    let writer = fs::File::options().write(true).open(&file).unwrap();
    writer.write_at(b"x", 64 << 20).unwrap();
    let (_, said) = host.fails(&["start", "one"]);
    assert!(
        said.contains("has changed since it was registered") && said.contains("image rm mine"),
        "{said}"
    );
    assert!(host.ok(&["image", "ls"]).contains("changed"));
    host.ok(&["rm", "one"]);
    host.ok(&["image", "rm", "mine"]);
    assert!(file.exists());
}
