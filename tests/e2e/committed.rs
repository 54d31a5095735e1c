//! Tests of images that are made from a VM's disk.

use crate::host::{Host, text, wait_for};
use crate::pull_faults::{die_at_each_point, image_directories};
use crate::pulled::small_image;
use std::fs;

/// Creates a VM from a pulled image without a network, runs a script in it, and stops it.
fn change(host: &Host, vm: &str, script: &str) {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("layout");
    fs::create_dir(&layout).unwrap();
    small_image(host, &layout);
    let source = format!("oci:{}:1", layout.display());
    host.ok(&["image", "pull", &source, "--name", "small"]);
    boot(host, vm, "small");
    host.sh(vm, script);
    host.ok(&["stop", vm]);
}

fn boot(host: &Host, vm: &str, image: &str) {
    let create = ["vm", "create", "--name", vm, "--image", image];
    host.ok(&[&create[..], &["--net", "none", "--disk", "8G"]].concat());
    host.ok(&["start", vm]);
}

/// Returns the names of all images.
fn images(host: &Host) -> Vec<String> {
    let list = host.json(&["image", "list"]);
    let names = list.as_array().unwrap().iter();
    names
        .map(|image| image["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn commit_of_pulled_image_keeps_its_settings_and_not_its_logs() {
    let host = Host::start();
    host.add_runtime();
    change(
        &host,
        "box",
        "mkdir -p /var/log /etc; echo new >/mark; echo secret >/var/log/app;
         echo 0123456789abcdef0123456789abcdef >/etc/machine-id",
    );
    host.ok(&["image", "commit", "box", "made"]);
    assert_eq!(images(&host), ["default", "made", "small"]);
    let vms = host.json(&["ps", "-a"]);
    assert_eq!(vms.as_array().unwrap().len(), 1, "{vms}");

    // The image's own command, environment and directory are still those of the pulled image.
    let ran = host.fcctl(&["run", "--rm", "--image", "made", "--net", "none"]);
    let (out, err) = text(&ran);
    assert_eq!(ran.status.code(), Some(3), "{err}");
    assert!(out.ends_with("hello from /srv\n"), "{out}");

    boot(&host, "twin", "made");
    let seen = "cat /mark /data/linked; ls /var/log /data; wc -c </etc/machine-id";
    let seen = host.sh("twin", seen);
    assert!(seen.starts_with("new\nkept\n"), "{seen}");
    assert!(!seen.contains("app") && !seen.contains("gone"), "{seen}");
    // The VM itself is unchanged.
    host.ok(&["start", "box"]);
    assert_eq!(host.sh("box", "cat /var/log/app"), "secret\n");
    let ids = ["box", "twin"].map(|vm| host.sh(vm, "cat /etc/machine-id"));
    assert_ne!(ids[0], ids[1]);

    host.ok(&["rm", "-f", "box", "twin"]);
    host.ok(&["image", "rm", "small"]);
    host.ok(&["image", "rm", "made"]);
    assert_eq!(image_directories(&host), ["default"]);
}

#[test]
fn killed_commit_leaves_nothing_and_can_be_repeated() {
    let mut host = Host::start();
    host.add_runtime();
    change(&host, "box", "echo new >/mark");
    let request = r#"{"vm":"box","image":"raw"}"#;
    let is_made = |host: &Host| images(host).iter().any(|name| name == "raw");
    let points = die_at_each_point(&mut host, &["rpc", "-m", "image.commit", request], &is_made);
    assert!(points >= 2, "{points} points");

    // If fcctl or the daemon dies, the VM that cleans the copy is deleted, and so is the copy.
    for who in ["fcctl", "fcd"] {
        let mut commit = host.spawn(&["image", "commit", "box", "made"]);
        wait_for("the copy boots", || {
            let vms = host.json(&["ps", "-a"]);
            let mut others = vms.as_array()?.iter().filter(|vm| vm["name"] != "box");
            others.next().filter(|vm| vm["state"] == "starting")?;
            Some(())
        });
        match who {
            "fcctl" => commit.signal("KILL"),
            _ => host.kill_daemon(),
        }
        let (status, _) = commit.end();
        assert_ne!(status, Some(0), "{who}");
        if who == "fcd" {
            host.relaunch();
        }
        wait_for("nothing is left", || {
            let is_alone = host.json(&["ps", "-a"]).as_array()?.len() == 1;
            (is_alone && image_directories(&host).len() == 3).then_some(())
        });
        assert_eq!(images(&host), ["default", "raw", "small"], "{who}");
    }
    host.ok(&["image", "commit", "box", "made"]);
    assert_eq!(images(&host), ["default", "made", "raw", "small"]);
}
