//! Tests of images whose root file system is a user's file.

use crate::host::{Host, text};
use crate::runtime::busybox;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of the largest file in the image.
const DATA_BYTES: usize = 24 << 20;

/// Makes an ext4 file system with busybox. The file is slightly longer than the file system.
pub fn root_file(host: &Host, dir: &Path) -> PathBuf {
    let (tree, file) = (dir.join("tree"), dir.join("root.ext4"));
    busybox(host, &tree.join("bin/busybox"));
    symlink("busybox", tree.join("bin/sh")).unwrap();
    fs::write(tree.join("mark"), "from a file\n").unwrap();
    fs::write(tree.join("data"), vec![7; DATA_BYTES]).unwrap();
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
pub fn boot(host: &Host, name: &str, image: &str) {
    let create = ["vm", "create", "--name", name, "--image", image];
    host.ok(&[&create[..], &["--net", "none", "--disk", "8G"]].concat());
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

/// Runs a program of the host, for example one that reads an archive. Returns its output.
fn run(program: &str, args: &[&str]) -> String {
    let ran = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}, which scripts/setup --test installs: {e}"));
    let (out, err) = text(&ran);
    assert!(ran.status.success(), "{program} {args:?}: {err}");
    out
}

#[test]
fn image_is_promoted_and_exported_in_both_formats() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let file = root_file(&host, dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let register = |name: &str, file: &Path| {
        let file = file.to_str().unwrap();
        host.ok(&["image", "register", name, "--rootfs", file]);
    };
    register("mine", &file);
    host.ok(&["image", "promote", "mine"]);
    let content = fs::read(&file).unwrap();
    fs::remove_file(&file).unwrap();

    // The exported file has the same bytes and holes as the original, and can be registered.
    let raw = path("raw.ext4");
    let export = |format: &str, to: &str| {
        host.ok(&["image", "export", "mine", "--format", format, "-o", to]);
    };
    export("raw", &raw);
    let exported = fs::read(&raw).unwrap();
    assert!(exported.starts_with(&content) && exported.len() % 4096 == 0);
    let used = fs::metadata(&raw).unwrap().blocks() * 512;
    assert!(used < (DATA_BYTES as u64) + (16 << 20), "{used}");
    let (_, said) = host.fails(&["image", "export", "mine", "-o", &raw]);
    assert!(said.contains("already exists"), "{said}");
    register("again", Path::new(&raw));

    // Other programs can read the archive, and fcd can pull it.
    let tar = path("mine.tar");
    export("oci", &tar);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        3,
        "no temporary file is left"
    );
    let inspected = run("skopeo", &["inspect", &format!("oci-archive:{tar}")]);
    assert!(inspected.contains("sha256:"), "{inspected}");
    let layout = path("layout");
    let from = format!("oci-archive:{tar}");
    let to = format!("oci:{layout}:1");
    run("skopeo", &["copy", "-q", "--insecure-policy", &from, &to]);
    let bundle = path("bundle");
    run(
        "umoci",
        &[
            "unpack",
            "--rootless",
            "--image",
            &format!("{layout}:1"),
            &bundle,
        ],
    );
    let unpacked = Path::new(&bundle).join("rootfs");
    assert_eq!(
        fs::read_to_string(unpacked.join("mark")).unwrap(),
        "from a file\n"
    );
    assert_eq!(
        fs::read_link(unpacked.join("bin/sh")).unwrap(),
        Path::new("busybox")
    );
    let piped = host.fcctl(&["image", "export", "mine", "-o", "-"]);
    assert!(
        piped.stdout == fs::read(&tar).unwrap(),
        "{:?}",
        text(&piped).1
    );
    host.ok(&["image", "pull", &from, "--name", "back"]);

    for (name, image) in [("one", "again"), ("two", "back")] {
        boot(&host, name, image);
        assert_eq!(host.sh(name, "cat /mark"), "from a file\n");
    }
}
