//! Tests in a test host: a VM of fcd that acts as a host and has features that this host's kernel
//! may lack. It has device-mapper and runs stock kernels in VMs (KVM nested in the emulated
//! processor). The built programs and tests are copied into it unchanged. These tests take longest,
//! so the module's name sorts first and they start first.

use crate::host::{FCCTL, FCD, Host, cached_image, image};
use std::path::{Path, PathBuf};
use std::process::Command;

const NAME: &str = "test-host";
const PACKAGES: [&str; 8] = [
    "dmsetup",
    "qemu-system-x86",
    "qemu-utils",
    "nftables",
    "iproute2",
    "lz4",
    "procps",
    "openssh-client",
];
/// The name of a test host that runs systemd, although not as its first process. Starting systemd
/// takes a minute or more under emulation.
const NAME_WITH_SYSTEMD: &str = "systemd-host";
const SYSTEMD: [&str; 3] = ["systemd", "systemd-resolved", "dbus"];
/// The directory of all files in the test host. VMMs with other uids can reach it.
pub const PLACE: &str = "/srv/f";
/// Limit of the time for a command in the test host. Emulation makes commands about twenty times
/// slower.
const DEADLINE_S: u32 = 600;

pub struct TestHost(Host);

impl TestHost {
    pub fn boot() -> Self {
        Self::boot_from(NAME, &[])
    }

    pub fn boot_from(image: &str, more: &[&str]) -> Self {
        let outer = Host::with_config("");
        outer.add_image(&cached_image(image, &[&PACKAGES[..], more].concat()));
        outer.ok(&[
            "vm", "create", "--name", NAME, "--image", image, "--memory", "3G",
        ]);
        outer.ok(&["start", NAME]);
        let host = Self(outer);
        host.0.sh(
            NAME,
            &format!("mkdir -p {PLACE}/bin {PLACE}/state/images && chmod 755 {PLACE}"),
        );
        host.sh("modprobe -a loop dm_snapshot kvm_amd tun && chmod 666 /dev/kvm");
        host
    }

    /// Runs a line of shell with fcd's programs in PATH and the daemon's socket in the environment.
    /// Returns its stdout.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let script = format!(
            "export PATH={PLACE}/bin:$PATH FCD_SOCKET={PLACE}/fcd.sock; cd {PLACE}; {line}"
        );
        self.0.ok(&[
            "exec",
            NAME,
            "--",
            "timeout",
            &DEADLINE_S.to_string(),
            "bash",
            "-ec",
            &script,
        ])
    }

    /// Pipes the output of a shell on this host to a shell in the test host.
    pub fn pipe(&self, from: &str, to: &str) {
        let socket = self.0.socket();
        let line = format!(
            "{from} | '{FCCTL}' --socket '{}' exec -i {NAME} -- sh -ec '{to}'",
            socket.display()
        );
        let status = Command::new("bash")
            .args(["-o", "pipefail", "-c", &line])
            .status()
            .unwrap();
        assert!(status.success(), "{line}");
    }

    pub fn bring_programs(&self) {
        let dir = tempfile::tempdir().unwrap();
        for (from, name) in [
            (Path::new(FCD), "fcd"),
            (Path::new(FCCTL), "fcctl"),
            (&integration_tests(), "it"),
        ] {
            let status = Command::new("strip")
                .arg("-o")
                .arg(dir.path().join(name))
                .arg(from)
                .status();
            assert!(status.unwrap().success(), "strip {}", from.display());
        }
        self.pipe(
            &format!("tar -C {} -c .", dir.path().display()),
            &format!("tar -C {PLACE}/bin -x"),
        );
    }

    pub fn bring_image(&self) {
        // The image is copied first because other tests link and unlink its file, which tar reports
        // as a change.
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("cp")
            .args(["-r", "-p", "--sparse=always"])
            .arg(image())
            .arg(dir.path())
            .status();
        assert!(status.unwrap().success(), "cp {}", image().display());
        let name = image().file_name().unwrap().to_str().unwrap();
        self.bring(&dir.path().join(name), "images");
    }

    /// Copies a directory to a registry of the daemon in the test host.
    pub fn bring(&self, dir: &Path, registry: &str) {
        let (parent, name) = (dir.parent().unwrap(), dir.file_name().unwrap());
        self.pipe(
            &format!(
                "tar -C {} -S -c {} | lz4 -1 -c",
                parent.display(),
                name.to_str().unwrap()
            ),
            &format!(
                "mkdir -p {PLACE}/state/{registry}; lz4 -dc | tar -C {PLACE}/state/{registry} -x -S"
            ),
        );
    }

    fn start_daemon(&self) {
        // The accelerator is not probed because a probe is slow under emulation and its result may
        // vary.
        self.start_daemon_with("[disk]\ndriver = \"dm-snapshot\"\n[qemu]\naccel = \"kvm\"\n");
    }

    /// Starts a daemon with this configuration.
    pub fn start_daemon_with(&self, config: &str) {
        self.sh(&format!(
            "cat > config.toml <<'END'
{config}END
             FCD_TEST_DIE_AT={PLACE}/die-at setsid fcd --config config.toml --state-dir state >> fcd.log 2>&1 < /dev/null &
             until fcctl rpc fcd.info > /dev/null 2>&1; do sleep 0.1; kill -0 $!; done"
        ));
    }

    /// Lists all device-mapper devices and loop devices.
    pub fn devices(&self) -> String {
        self.sh("dmsetup ls | grep -v '^No devices' || true; losetup --noheadings --list")
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let look = format!(
                "cd {PLACE}; tail -n 50 fcd.log state/vms/*/*.log; dmsetup status; df .; dmesg | tail -n 20"
            );
            let seen = self.0.fcctl(&["exec", NAME, "--", "sh", "-c", &look]);
            eprintln!(
                "--- in the test host\n{}",
                String::from_utf8_lossy(&seen.stdout)
            );
        }
    }
}

/// Returns the path of the integration tests' binary.
fn integration_tests() -> PathBuf {
    let args = [
        "test",
        "--locked",
        "--features",
        "fakes",
        "--test",
        "it",
        "--no-run",
        "--message-format=json",
        "--quiet",
    ];
    let out = Command::new(env!("CARGO"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let messages = out
        .stdout
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok());
    let mut of_it = messages
        .filter(|m| m["target"]["name"] == "it")
        .filter_map(|m| m["executable"].as_str().map(PathBuf::from));
    of_it.next_back().expect("cargo names the binary")
}

#[test]
fn snapshot_root_disks_work_in_test_host() {
    let host = TestHost::boot();
    host.bring_programs();
    fake_vmms(&host, "crash::crash_at_any_point_of_operation_recovers");
    host.bring_image();
    host.start_daemon();
    data_is_kept_and_the_disk_grows(&host);
    a_daemon_that_is_killed_finds_its_guest(&host);
    guest_is_paused_before_host_disk_is_full(&host);
    removal_waits_for_device_in_use(&host);
    assert_eq!(
        host.sh("fcctl doctor --leaks"),
        "fcd has left nothing behind on this host\n"
    );
}

/// Runs this integration test with root disks on real devices.
fn fake_vmms(host: &TestHost, test: &str) {
    let ran = host.sh(&format!(
        "FCD_TEST_DM_SNAPSHOT=1 it --include-ignored --nocapture --exact {test}"
    ));
    assert!(ran.contains("1 passed"), "{ran}");
    let figures = &ran[ran.find("Figures").expect("the test prints its figures")..];
    println!(
        "in the test host, {test}: {}",
        figures.lines().next().unwrap()
    );
    assert_eq!(host.devices(), "", "left over");
}

#[test]
#[ignore = "minutes: scripts/test --long"]
fn crash_points_of_two_operations_in_test_host() {
    let host = TestHost::boot();
    host.bring_programs();
    fake_vmms(
        &host,
        "crash::crash_at_any_point_of_second_operation_recovers",
    );
    fake_vmms(&host, "crash::failure_of_any_effect_is_undone");
}

fn data_is_kept_and_the_disk_grows(host: &TestHost) {
    host.sh("fcctl vm create --name a && fcctl start a");
    let shown = host.sh("fcctl vm show a");
    assert!(
        shown.contains("(dm-snapshot)") && shown.contains("qemu (kvm, q35)"),
        "{shown}"
    );
    assert!(host.sh("dmsetup table").contains(" snapshot "));
    host.sh("fcctl exec a -- sh -c 'echo kept > /root/kept; dd if=/dev/urandom of=/root/big bs=1M count=8; sha256sum /root/big > /root/sum'");
    host.sh("fcctl stop a");
    assert_eq!(host.devices(), "", "a stopped VM has no devices");
    host.sh("fcctl vm set a --disk 9G && fcctl start a");
    assert!(
        host.sh("dmsetup table").contains(" zero"),
        "the disk continues with zeros after the end of the image"
    );
    assert_eq!(
        host.sh("fcctl exec a -- sh -ec 'cat /root/kept; sha256sum --quiet -c /root/sum'"),
        "kept\n"
    );
    let size = host.sh("fcctl exec a -- df --output=size -B1M / | tail -n 1");
    assert!(
        size.trim().parse::<u32>().unwrap() > 8500,
        "the guest has grown its own file system: {size}"
    );
}

fn a_daemon_that_is_killed_finds_its_guest(host: &TestHost) {
    host.sh("pkill -KILL -x fcd; until ! pgrep -x fcd; do sleep 0.1; done");
    host.start_daemon();
    assert_eq!(host.sh("fcctl exec a -- cat /root/kept"), "kept\n");
}

/// Room for a guest's next writes is allocated ahead. Without room the guest is paused and loses
/// nothing.
fn guest_is_paused_before_host_disk_is_full(host: &TestHost) {
    // The daemon runs as root in the test host, so it can use the space reserved for root.
    host.sh(
        "free=$(stat -f -c %f .); fallocate -l $(((free - 8192) * $(stat -f -c %S .))) fill; df .",
    );
    host.sh("fcctl exec a -- sh -c 'dd if=/dev/urandom of=/root/more bs=1M count=60; sync' & \
             until fcctl vm show a | grep -q 'disk is full'; do sleep 0.2; done; kill %1 || true; rm fill");
    host.sh("until ! fcctl vm show a | grep -q 'disk is full'; do sleep 0.2; done");
    assert_eq!(
        host.sh("fcctl exec a -- sh -ec 'cat /root/kept; sha256sum --quiet -c /root/sum'"),
        "kept\n"
    );
    assert!(!host.sh("dmsetup status").contains("Invalid"));
}

/// The daemon removes a device that another process has open.
fn removal_waits_for_device_in_use(host: &TestHost) {
    host.sh("exec 9< $(echo state/vms/*/disk)
             fcctl rm -f a 9<&- & until ! pgrep -x qemu-system-x86 > /dev/null; do sleep 0.1; done
             dmsetup ls | grep -q fc-; exec 9<&-; wait $!");
    assert_eq!(host.devices(), "");
    assert_eq!(host.sh("fcctl ps -aq"), "");
}

/// A script that starts systemd in new process, mount and control group namespaces, and writes the
/// script `in-systemd`, which runs a command in them.
pub const START_SYSTEMD: &str = r#"
    mkdir /sys/fs/cgroup/services
    cat > systemd.sh <<'END'
        echo $$ > /sys/fs/cgroup/services/cgroup.procs
        exec unshare --cgroup --pid --fork --mount --mount-proc --kill-child env -i container=fcd PATH=/usr/sbin:/usr/bin \
            sh -ec 'mount --make-rprivate /; umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
                    mount -t tmpfs tmpfs /run; mkdir /run/lock; exec /lib/systemd/systemd --unit=basic.target --show-status=no'
END
    setsid bash systemd.sh > systemd.log 2>&1 < /dev/null &
    until pid=$(pgrep -x systemd) && nsenter -t $pid -a systemctl is-system-running 2>/dev/null | grep -qE 'running|degraded'
    do sleep 0.5; done
    echo "nsenter -t $pid -a \"\$@\"" > in-systemd"#;

/// Checks that, on a host with systemd-resolved, only queries for `.vm` go to the bridge.
fn names_by_resolved(host: &TestHost, systemd: &dyn Fn(&str) -> String) {
    host.sh(
        "chmod 666 /dev/net/tun; printf '[network]\\ndriver = \"bridge\"\\n[qemu]\\naccel = \"kvm\"\\n' > /etc/fcd/config.toml",
    );
    systemd(
        "systemctl start systemd-resolved; systemctl reset-failed fcd; systemctl start fcd
             until fcctl rpc fcd.info > /dev/null 2>&1; do sleep 0.2; done
             fcctl rm -f a; fcctl vm create --name named; fcctl start named",
    );
    let link =
        systemd("resolvectl domain fcbr0; resolvectl dns fcbr0; resolvectl default-route fcbr0");
    assert!(
        link.contains("~vm") && link.contains("10.89.0.1") && link.contains("no"),
        "{link}"
    );
    let found = systemd("resolvectl query --legend=no named.vm");
    let address = systemd(
        "fcctl --json vm show named | tr , \"\\n\" | grep -oE \"10[.]89[.]0[.][0-9]+\" | head -n 1",
    );
    assert!(found.contains(address.trim()), "{found} is {address}");
    systemd("fcctl rm -f named");
}

/// A stop, a restart, an upgrade or a crash of the systemd unit does not affect VMs.
#[test]
#[ignore = "minutes: scripts/test --long"]
fn vms_outlive_systemd_unit() {
    let host = TestHost::boot_from(NAME_WITH_SYSTEMD, &SYSTEMD);
    host.bring_programs();
    host.bring_image();
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fcd.service");
    host.pipe(
        &format!("cat {unit}"),
        "cat > /etc/systemd/system/fcd.service",
    );
    host.sh(
        "cp bin/fcd bin/fcctl /usr/local/bin; mkdir -p /etc/fcd; mv state/images /var/lib/fcd/
             printf '[qemu]\\naccel = \"kvm\"\\n' > /etc/fcd/config.toml",
    );
    host.sh(START_SYSTEMD);
    let systemd = |line: &str| {
        host.sh(&format!(
            "unset FCD_SOCKET; bash in-systemd bash -ec '{line}'"
        ))
    };
    let answers = "until fcctl rpc fcd.info > /dev/null 2>&1; do sleep 0.2; done";
    systemd(&format!(
        "systemctl start fcd; {answers}; fcctl vm create --name a; fcctl start a"
    ));
    let vmm = "fcctl --json vm show a | tr , \"\\n\" | grep -E \"^ *.pid.:\"";
    let before = systemd(vmm);
    let is_same = |what: &str| {
        assert_eq!(
            systemd(&format!("{answers}; {vmm}")),
            before,
            "after {what}"
        );
        assert_eq!(
            systemd("fcctl exec a -- echo well"),
            "well\n",
            "after {what}"
        );
    };
    systemd("systemctl restart fcd");
    is_same("a restart");
    systemd(
        "systemctl stop fcd; ! systemctl is-active -q fcd; pgrep -f qemu-system-x86 > /dev/null; systemctl start fcd",
    );
    is_same("a stop and a start");
    systemd(
        "before=$(systemctl show -P MainPID fcd); kill -KILL $before
             until now=$(systemctl show -P MainPID fcd) && [ $now != 0 ] && [ $now != $before ]; do sleep 0.2; done",
    );
    is_same("a crash, after which systemd starts it again");
    // systemd does not retry a daemon whose configuration is invalid.
    systemd(
        "systemctl stop fcd; echo nonsense > /etc/fcd/config.toml; systemctl start fcd || true
             until systemctl is-failed -q fcd; do sleep 0.2; done; systemctl show -P NRestarts fcd | grep -qx 0",
    );
    names_by_resolved(&host, &systemd);
    println!(
        "systemd in the test host: {}",
        systemd("systemctl --version | head -n 1")
    );
}
