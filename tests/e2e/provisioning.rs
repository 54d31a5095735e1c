//! Tests of images that are made from pulled images by scripts and commits.

use crate::host::{Host, text};
use crate::pulled::{Layer, small_image, write_layout};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::process::Command;
use tar::EntryType;

/// Pulls an image with busybox and no `/run`, under the name `small:1`.
fn pull_small(host: &Host, dir: &Path) {
    let layout = dir.join("layout");
    fs::create_dir(&layout).unwrap();
    small_image(host, &layout);
    let source = format!("oci:{}:1", layout.display());
    host.ok(&["image", "pull", &source, "--name", "small:1"]);
}

/// Returns the names in a directory of an image.
fn names_in(host: &Host, image: &str, dir: &str) -> Vec<String> {
    let disk = host.state().join("images").join(image).join("rootfs.ext4");
    let listed = Command::new("/sbin/debugfs")
        .args(["-R", &format!("ls -p {dir}")])
        .arg(disk)
        .output()
        .unwrap();
    let (out, err) = text(&listed);
    let names = out.lines().filter_map(|line| line.split('/').nth(5));
    let mut names: Vec<String> = names.map(str::to_owned).collect();
    names.sort();
    assert!(
        names.starts_with(&[".".to_owned(), "..".to_owned()]),
        "{out}{err}"
    );
    names.split_off(2)
}

#[test]
fn image_has_no_files_of_its_guest() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    pull_small(&host, dir.path());
    let shape = ["--name", "box", "--image", "small:1"];
    host.ok(&[&["vm", "create"][..], &shape].concat());
    host.ok(&["start", "box"]);
    let written = host.sh(
        "box",
        "cd /etc && echo mine >kept && ls && /.fcd/bin/cat hosts",
    );
    assert!(
        written.starts_with("hostname\nhosts\nkept\nresolv.conf\n"),
        "{written}"
    );
    host.ok(&["stop", "box"]);
    host.ok(&["image", "commit", "box", "copy"]);
    assert_eq!(names_in(&host, "copy", "/etc"), ["kept"]);

    // The image keeps the changes that the script made to /etc/hosts.
    let script = dir.path().join("setup");
    fs::write(&script, "#!/bin/sh\necho 127.0.0.2 mine >>/etc/hosts\n").unwrap();
    let script = script.to_str().unwrap();
    host.ok(&[
        "image", "build", "--script", script, "--from", "small:1", "made",
    ]);
    assert_eq!(names_in(&host, "made", "/etc"), ["hosts"]);
}

#[test]
fn script_sets_up_image_without_run_directory() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    pull_small(&host, dir.path());
    let script = dir.path().join("setup");
    let path = script.to_str().unwrap();
    let build = |name: &str, text: &str| {
        fs::write(&script, text).unwrap();
        host.fcctl(&[
            "image", "build", "--script", path, "--from", "small:1", name,
        ])
    };

    // The script has the environment of the image's commands.
    let built = build("mine", "#!/bin/sh\necho \"$GREETING $PATH\" >/srv/made\n");
    assert!(built.status.success(), "{}", text(&built).1);
    // A build with the same script and base only adds a name to the image. A build with another
    // script does not replace the image.
    let twin = build("twin", "#!/bin/sh\necho \"$GREETING $PATH\" >/srv/made\n");
    let (_, said) = text(&twin);
    assert!(
        said.contains("image mine was already built from this base and script"),
        "{said}"
    );
    assert!(host.ok(&["image", "ls"]).contains("twin"));
    let (_, said) = text(&build("mine", "#!/bin/sh\n"));
    assert!(said.contains("fcctl image rm mine"), "{said}");
    let check = "cat /srv/made && ls -l /srv/made | cut -c 1-10 && [ ! -e /run ] && ls -A /dev/shm";
    let show = [
        "run", "--rm", "--net", "none", "--image", "mine", "sh", "-c", check,
    ];
    assert_eq!(
        host.ok(&show),
        "hello /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/.fcd/bin\n-rw-r--r--\n"
    );

    let (_, said) = text(&build("other", "#!/usr/bin/python3 -u\n"));
    let wanted = "fcd: the script needs /usr/bin/python3, which the image does not have\n";
    assert!(said.contains(wanted), "{said}");
    // An image without a shell can use the shell of the guest runtime.
    let built = build("other", "#!/.fcd/bin/sh\ntrue\n");
    assert!(built.status.success(), "{}", text(&built).1);
}

#[test]
fn copy_belongs_to_user_of_image_whose_programs_do_not_work() {
    let host = Host::start();
    host.add_runtime();
    let dir = tempfile::tempdir().unwrap();
    let refuse = b"#!/.fcd/bin/sh\nexit 9\n";
    let mut layer = Layer::new().dir("bin");
    for name in ["chown", "cat", "chmod", "rm", "find"] {
        layer = layer.entry(&format!("bin/{name}"), EntryType::Regular, 0o755, refuse);
    }
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    let config = json!({"User": "1000", "Env": ["PATH=/bin"]});
    write_layout(&layout, &[layer.finish()], config);
    let source = format!("oci:{}:1", layout.display());

    let repo = tempfile::tempdir().unwrap();
    crate::first_light::repository(repo.path());
    let path = repo.path().to_str().unwrap();
    host.ok(&["image", "pull", &source, "--name", "odd:1"]);
    let check = "/.fcd/bin/busybox stat -c %u hello.txt .git/HEAD && echo more >>hello.txt";
    let ran = [
        "run", "--rm", "--image", "odd:1", path, "--", "sh", "-c", check,
    ];
    assert_eq!(host.ok(&ran), "1000\n1000\n");

    let script = dir.path().join("script");
    fs::write(&script, "#!/.fcd/bin/sh\n").unwrap();
    let script = script.to_str().unwrap();
    host.ok(&[
        "image", "build", "--script", script, "--from", "odd:1", "mine",
    ]);
}
