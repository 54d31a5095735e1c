//! Tests of guests whose first process is the image's own init. systemd takes a minute or more to
//! start under emulation, so the module has a name that makes these tests start early.

use crate::host::registry::Registry;
use crate::host::{Host, cached_dir, wait_for};
use crate::pulled::{Layer, write_layout};
use crate::runtime::{busybox, check_workspace};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tar::EntryType;

const PACKAGES: &str = "systemd,systemd-sysv,dbus,kmod";

/// A service that takes a second to stop, and a configuration of networkd that would replace the
/// address of every interface.
const SETUP: &str = r#"
cat >/etc/systemd/system/slow.service <<'END'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >>/root/journal'
ExecStop=/bin/sh -c 'sleep 1; echo stopped >>/root/journal'
[Install]
WantedBy=multi-user.target
END
cat >/etc/systemd/network/10-all.network <<'END'
[Match]
Name=*
[Network]
Address=192.0.2.1/24
END
systemctl -q enable --now slow.service
systemctl -q enable systemd-networkd.service
"#;

/// Returns the layout directory of a Debian image with systemd, which is built once.
fn debian_layout() -> PathBuf {
    cached_dir("systemd-layout", PACKAGES, |dir| {
        let tar = dir.join("root.tar");
        let release = fs::read_to_string("/etc/os-release").unwrap();
        let suite = release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
            .expect("the distribution has a code name");
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--variant=minbase", "--include", PACKAGES]);
        for part in ["man", "doc", "info", "locale"] {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{part}/*"));
        }
        command.arg(suite).arg(&tar);
        let sources = [
            "/etc/apt/sources.list",
            "/etc/apt/sources.list.d/debian.sources",
        ];
        command.args(sources.into_iter().filter(|path| Path::new(path).exists()));
        assert!(command.status().unwrap().success(), "{command:?}");
        let layer = fs::read(&tar).unwrap();
        fs::remove_file(&tar).unwrap();
        write_layout(dir, &[layer], json!({}));
    })
}

/// Returns the one layer of a layout.
fn layer_of(layout: &Path) -> Vec<u8> {
    let blobs = fs::read_dir(layout.join("blobs/sha256")).unwrap();
    let blobs = blobs.map(|blob| blob.unwrap());
    let layer = blobs.max_by_key(|blob| blob.metadata().unwrap().len());
    fs::read(layer.unwrap().path()).unwrap()
}

/// Waits until systemd has started this unit, which takes 12 to 90 seconds under emulation.
#[track_caller]
fn wait_unit(host: &Host, unit: &str) {
    // The wait runs in the guest, because repeated connections would take most of the guest's time.
    let wait = format!("until systemctl is-active -q {unit} 2>/dev/null; do sleep 1; done");
    host.sh("deb", &format!("timeout 180 sh -c '{wait}'"));
}

#[test]
fn systemd_of_image_runs_as_first_process_and_shuts_down_in_order() {
    let layer = layer_of(&debian_layout());
    let host = Host::start();
    host.add_runtime();
    let image = Registry::start().publish("team/debian-systemd", &[layer]);
    host.ok(&["image", "pull", &image]);
    let shape = ["--image", &image, "--init", "image", "--net", "none"];
    host.ok(&[&["vm", "create", "--name", "deb"][..], &shape].concat());
    let since = Instant::now();
    host.ok(&["start", "deb"]);
    assert_eq!(host.show("deb", "init"), "image");
    assert_eq!(
        host.sh("deb", "cat /proc/1/comm /proc/self/cgroup /etc/hostname"),
        "systemd\n0::/fcd\ndeb\n"
    );
    check_workspace(&host, "deb");
    wait_unit(&host, "multi-user.target");
    eprintln!("systemd is up after {:?}", since.elapsed());
    host.sh("deb", SETUP);
    assert_eq!(
        host.sh("deb", "systemctl is-active slow.service"),
        "active\n"
    );

    let since = Instant::now();
    host.ok(&["stop", "deb"]);
    eprintln!("systemd is down after {:?}", since.elapsed());
    assert_eq!(host.show("deb", "synced"), "yes");
    let console = host.ok(&["logs", "deb"]);
    assert!(console.contains("reboot: Power down"), "{console}");
    assert!(!console.contains("has not powered off"), "{console}");

    // If networkd changed the interface, the wait would lose its connection and fail.
    host.ok(&["start", "deb"]);
    wait_unit(&host, "systemd-networkd.service");
    wait_unit(&host, "multi-user.target");
    assert_eq!(
        host.sh("deb", "cat /root/journal hello.txt"),
        "started\nstopped\nstarted\nchanged\n"
    );
    let addresses = host.sh("deb", "/.fcd/bin/busybox ip -4 -o address show dev eth0");
    assert!(addresses.contains("10.0.2.15/24"), "{addresses}");
    assert!(!addresses.contains("192.0.2.1"), "{addresses}");

    // The server of this connection is a child of the process that is killed, so it survives.
    let listener = "/.fcd/bin/busybox ps | sed -n 's/^ *\\([0-9]*\\) .*[[]listener[]].*/\\1/p'";
    host.sh("deb", &format!("kill $({listener})"));
    wait_for("sshd runs again", || {
        let out = host.fcctl(&["exec", "deb", "--", "true"]);
        out.status.success().then_some(())
    });

    host.ok(&["exec", "deb", "--", "systemctl", "poweroff"]);
    wait_for("the guest ends", || {
        (host.show("deb", "state") != "running").then_some(())
    });
    assert_eq!(host.show("deb", "state"), "stopped");
    assert_eq!(host.show("deb", "reason"), "the guest shut itself down");
}

/// Pulls an image with busybox and this init, and creates a VM with the same name.
fn create_with_init(host: &Host, name: &str, add_init: impl FnOnce(Layer) -> Layer) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    busybox(host, &program);
    let layer = Layer::new()
        .dir("bin")
        .entry(
            "bin/busybox",
            EntryType::Regular,
            0o755,
            &fs::read(&program).unwrap(),
        )
        .link("bin/sh", "busybox", EntryType::Symlink)
        .dir("sbin")
        .dir("etc");
    let layout = dir.path().join("layout");
    write_layout(&layout, &[add_init(layer).finish()], json!({}));
    let source = format!("oci:{}:1", layout.display());
    host.ok(&["image", "pull", &source, "--name", name]);
    let shape = ["--image", name, "--init", "image", "--net", "none"];
    host.ok(&[&["vm", "create", "--name", name][..], &shape].concat());
}

/// Stops the VM, whose data must be synced, and returns its console log.
fn stop(host: &Host, name: &str) -> String {
    host.ok(&["stop", name]);
    assert_eq!(host.show(name, "synced"), "yes");
    host.ok(&["logs", name])
}

#[test]
fn other_inits_of_images_are_powered_off() {
    let host = Host::start();
    host.add_runtime();
    create_with_init(&host, "busybox", |layer| {
        layer
            .link("sbin/init", "../bin/busybox", EntryType::Symlink)
            .file(
                "etc/inittab",
                "::shutdown:/bin/busybox echo in order >/dev/console\n",
            )
    });
    host.ok(&["start", "busybox"]);
    assert_eq!(host.sh("busybox", "cat /proc/1/comm"), "init\n");
    let said = stop(&host, "busybox");
    assert!(
        said.contains("in order") && said.contains("reboot: Power down"),
        "{said}"
    );

    let endless = b"#!/bin/sh\nwhile :; do /bin/busybox sleep 1; done\n";
    create_with_init(&host, "endless", |layer| {
        layer.entry("sbin/init", EntryType::Regular, 0o755, endless)
    });
    host.ok(&["start", "endless"]);
    assert_eq!(host.sh("endless", "cat /proc/1/comm"), "init\n");
    let said = stop(&host, "endless");
    assert!(said.contains("fcd-init: disk is clean"), "{said}");

    create_with_init(&host, "without", |layer| layer);
    let (status, said) = host.fails(&["start", "without"]);
    assert!(
        status == 1 && said.contains("the image has no init"),
        "{status} {said}"
    );
}
