//! Tests the Debian packages in a test host with systemd: they are installed, upgraded over a
//! daemon with a running VM, removed and purged. `scripts/test-package` builds the packages and
//! runs this test.

use crate::another_host::{START_SYSTEMD, TestHost};
use std::path::{Path, PathBuf};

/// Packages to add to the test host, because the Debian packages depend on them.
const DEPENDENCIES: [&str; 8] = [
    "systemd",
    "dbus",
    "mmdebstrap",
    "zstd",
    "git",
    "e2fsprogs",
    "debian-archive-keyring",
    "init-system-helpers",
];

/// Returns the package that `scripts/package REVISION` built.
fn package(name: &str, revision: u32) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/package");
    let version = env!("CARGO_PKG_VERSION");
    let path = dir.join(format!("{name}_{version}-{revision}_amd64.deb"));
    assert!(
        path.is_file(),
        "run scripts/test-package: {}",
        path.display()
    );
    path
}

#[test]
#[ignore = "minutes: scripts/test-package"]
fn package_is_installed_upgraded_and_purged() {
    let host = TestHost::boot_from("package-host", &DEPENDENCIES);
    host.sh("mkdir debs");
    for deb in [package("fcd", 1), package("fcd", 2), package("fcctl", 1)] {
        let name = deb.file_name().unwrap().to_str().unwrap();
        host.pipe(
            &format!("cat {}", deb.display()),
            &format!("cat > {}/debs/{name}", crate::another_host::PLACE),
        );
    }
    host.bring_image();
    host.sh(START_SYSTEMD);
    let systemd = |line: &str| {
        host.sh(&format!(
            "unset FCD_SOCKET; bash in-systemd bash -ec 'cd {}; {line}'",
            crate::another_host::PLACE
        ))
    };
    fcctl_alone_works(&systemd);
    systemd("dpkg -i debs/fcd_*-1_amd64.deb");
    assert_eq!(
        systemd("systemctl is-active fcd.socket fcd.service"),
        "active\nactive\n"
    );
    assert_eq!(
        systemd("systemctl is-enabled fcd.socket fcd.service"),
        "enabled\nenabled\n"
    );
    assert_eq!(
        systemd("stat -c %U:%G:%a /run/fcd/fcd.sock /var/lib/fcd"),
        "root:fcd:660\nroot:root:711\n"
    );
    assert_eq!(
        // dpkg does not unpack documents and man pages in images that fcd builds.
        systemd("dpkg -V fcd | grep -v \" /usr/share/\\(doc\\|man\\)/\" || true"),
        "",
        "every file is as in the package"
    );
    // The accelerator is not probed because a probe is slow under emulation.
    systemd(
        "printf \"[qemu]\\naccel = \\\"kvm\\\"\\n\" > /etc/fcd/config.toml
         systemctl stop fcd.socket fcd.service; rm -rf /var/lib/fcd/images; mv state/images /var/lib/fcd/",
    );
    // The first connection to the socket starts the daemon.
    systemd(
        "systemctl start fcd.socket; ! systemctl is-active -q fcd.service; fcctl rpc fcd.info > /dev/null",
    );
    assert_eq!(systemd("systemctl is-active fcd.service"), "active\n");
    systemd("fcctl vm create --name a; fcctl start a");
    let vmm = "fcctl --json vm show a | tr , \"\\n\" | grep -E \"^ *.pid.:\"";
    let before = systemd(vmm);
    let daemon = systemd("systemctl show -P MainPID fcd");
    systemd("dpkg -i debs/fcd_*-2_amd64.deb");
    assert_ne!(
        systemd("systemctl show -P MainPID fcd"),
        daemon,
        "the daemon was restarted"
    );
    assert_eq!(systemd(vmm), before, "the VM survives an upgrade");
    assert_eq!(systemd("fcctl exec a -- echo well"), "well\n");
    assert!(
        systemd("cat /etc/fcd/config.toml").contains("kvm"),
        "the configuration is kept"
    );
    systemd("dpkg -r fcd");
    systemd(
        "! pgrep -x qemu-system-x86 && ! pgrep -x fcd && [ ! -e /run/fcd/fcd.sock ] && [ -d /var/lib/fcd ]",
    );
    systemd("dpkg -P fcd");
    systemd(
        "[ ! -e /var/lib/fcd ] && [ ! -e /etc/fcd ] && [ ! -e /etc/systemd/system/multi-user.target.wants/fcd.service ]",
    );
}

/// The package with the static fcctl works without any other package.
fn fcctl_alone_works(systemd: &dyn Fn(&str) -> String) {
    systemd("dpkg -i debs/fcctl_*-1_amd64.deb");
    assert!(systemd("fcctl version").contains("fcd   is not running"));
    assert_eq!(systemd("dpkg-query -W -f \\${Depends} fcctl"), "");
    systemd("! ldd /usr/bin/fcctl; dpkg -P fcctl");
}
