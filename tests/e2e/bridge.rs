//! Tests of VMs on the bridge. The host is a network namespace of the test's thread and its
//! children, and the outside is another one. Both disappear with the test.

use crate::auto_ports;
use crate::host::{self, Host, text, wait_for};
use crate::plain_ssh::PlainSsh;
use crate::tree::Site;
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

const OUTSIDE: &str = "192.0.2.1";
/// The host's address on the outside network.
const HOST: &str = "192.0.2.2";
const OUTSIDE_IPV6: &str = "2001:db8::1";
const HOST_IPV6: &str = "2001:db8::2";
const GATEWAY: &str = "10.89.0.1";
const PORT: u16 = 9000;

#[track_caller]
fn sh(line: &str) -> String {
    let out = Command::new("sh").args(["-ec", line]).output().unwrap();
    assert!(
        out.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn own_namespace() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

/// Moves this thread into a new network namespace, connected to a second one that is the outside. A
/// server in each namespace answers `who` with the name of its side.
pub fn enter_a_host_with_an_outside() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "network namespaces need root: run the tests as root"
    );
    // Building the image downloads packages, which is only possible in the original namespace.
    host::image();
    let outside = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        own_namespace()
    });
    let outside = outside.join().unwrap();
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
    // On Debian, udev creates `/dev/net/tun` with this mode (50-udev-default.rules). Without udev,
    // only root could open the device.
    sh(
        "mount --make-rprivate /; mkdir -p /dev/net; mount -t tmpfs fcd-test /dev/net; mknod -m 666 /dev/net/tun c 10 200",
    );
    let ns = format!("/proc/{}/fd/{}", std::process::id(), outside.as_raw_fd());
    sh(&format!(
        "ip link set lo up; ip link add up0 type veth peer name down0; ip link set down0 netns {ns}
         ip address add {HOST}/24 dev up0; ip link set up0 up; ip route add default via {OUTSIDE}
         ip address add {HOST_IPV6}/64 dev up0 nodad; ip -6 route add default via {OUTSIDE_IPV6}
         nsenter --net={ns} sh -ec 'ip link set lo up; ip address add {OUTSIDE}/24 dev down0; ip address add {OUTSIDE_IPV6}/64 dev down0 nodad; ip link set down0 up'"
    ));
    serve(None, "the host");
    serve(Some(outside), "the outside");
}

/// Starts a server that answers each caller with the name of this side and the caller's address
/// until the process ends. Returns once the server listens.
fn serve(there: Option<File>, who: &'static str) {
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if let Some(ns) = there {
            setns(ns, CloneFlags::CLONE_NEWNET).unwrap();
        }
        let listener = TcpListener::bind(("::", PORT)).unwrap();
        ready.send(()).unwrap();
        for mut stream in listener.incoming().flatten() {
            let peer = stream.peer_addr().unwrap().ip().to_canonical();
            let _ = writeln!(stream, "{who} sees {peer}");
        }
    });
    is_ready.recv().unwrap();
}

/// Returns the line that a guest receives from this address, or `None` if the guest cannot connect
/// or no line arrives within five seconds.
fn ask(host: &Host, vm: &str, address: &str, port: u16) -> Option<String> {
    let script = format!(
        "timeout 5 bash -c 'exec 3<>/dev/tcp/{address}/{port} && head -n 1 <&3' || echo no"
    );
    Some(host.sh(vm, &script).trim().to_owned()).filter(|said| said != "no")
}

/// Asks the outside over IPv6, and returns what the guest receives.
pub fn ask_outside_over_ipv6(host: &Host, vm: &str) -> Option<String> {
    ask(host, vm, OUTSIDE_IPV6, PORT)
}

/// Returns the line that a guest with IPv6 receives from the outside.
pub fn seen_outside_over_ipv6() -> Option<String> {
    Some(format!("the outside sees {HOST_IPV6}"))
}

/// Returns the numbers of VMs' taps and of taps that the rules know, for IPv4 or IPv6.
pub fn on_the_bridge() -> (usize, usize) {
    let taps = sh("ip -o link show master fcbr0 | wc -l")
        .trim()
        .parse()
        .unwrap();
    let elements = sh("nft list ruleset | grep -o '\"fc[0-9a-f]*-[0-9]*\" \\. ' | sort -u | wc -l")
        .trim()
        .parse()
        .unwrap();
    (taps, elements)
}

/// Returns the number of published ports.
pub fn published() -> usize {
    sh("nft list ruleset | grep -o 'comment \"fc-' | wc -l")
        .trim()
        .parse()
        .unwrap()
}

fn address(host: &Host, vm: &str) -> String {
    host.show(vm, "ssh_addr")
        .as_str()
        .unwrap()
        .strip_suffix(":22")
        .expect("ssh_addr ends with the guest's SSH port")
        .to_owned()
}

#[test]
fn guest_reaches_only_allowed_networks() {
    enter_a_host_with_an_outside();
    let mut host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    host.ok(&[
        "vm",
        "create",
        "--name",
        "a",
        "-p",
        "1022:22",
        "-p",
        "0.0.0.0:1023:22",
    ]);
    host.ok(&["start", "a"]);
    host.boot("b");
    host.ok(&["vm", "create", "--name", "cut-off", "--net", "none"]);
    host.ok(&["start", "cut-off"]);
    assert_eq!(on_the_bridge(), (3, 3));
    let (a, b) = (address(&host, "a"), address(&host, "b"));

    // The guest reaches the outside but not the host, although the host's server answers the host
    // itself.
    for at in [GATEWAY, HOST] {
        assert!(
            sh(&format!("bash -c 'head -n 1 </dev/tcp/{at}/{PORT}'")).starts_with("the host sees ")
        );
    }
    let seen_outside = || Some(format!("the outside sees {HOST}"));
    assert_eq!(ask(&host, "a", OUTSIDE, PORT), seen_outside());
    assert_eq!(
        ask(&host, "a", &b, 22),
        None,
        "the guest reached another guest"
    );
    assert_eq!(
        ask(&host, "a", GATEWAY, PORT),
        None,
        "the guest reached the host at the bridge's address"
    );
    assert_eq!(
        ask(&host, "a", HOST, PORT),
        None,
        "the guest reached the host at its outer address"
    );
    assert_eq!(ask(&host, "cut-off", OUTSIDE, PORT), None);
    assert_eq!(host.sh("cut-off", "hostname").trim(), "cut-off");
    assert_eq!(host.show("cut-off", "net"), "none");

    ipv6_is_like_ipv4(&host);

    // From outside, only published ports are reachable.
    let ssh_of_a = |at: &str| {
        let line = format!("timeout 60 bash -c 'head -n 1 </dev/tcp/{at}'");
        Command::new("sh")
            .args(["-c", &line])
            .output()
            .unwrap()
            .stdout
            .starts_with(b"SSH-2.0")
    };
    let here = || {
        ssh_of_a("127.0.0.1/1022")
            && ssh_of_a("127.0.0.1/1023")
            && ssh_of_a(&format!("{HOST}/1023"))
    };
    assert!(here() && !ssh_of_a(&format!("{HOST}/1022")));
    assert_eq!(published(), 2);
    assert_eq!(
        ask(&host, "b", GATEWAY, 1023),
        None,
        "a guest reached a published port of another guest"
    );

    // Ports of a running guest change, also if it was started without any.
    let ssh_of_b = || ssh_of_a("127.0.0.1/1025");
    assert_eq!(
        host.ok(&["port", "add", "b", "1024:22", "1025:22"]),
        "22/tcp -> 127.0.0.1:1024\n22/tcp -> 127.0.0.1:1025\n"
    );
    assert!(ssh_of_b() && ssh_of_a("127.0.0.1/1024") && published() == 4);
    let (status, said) = host.fails(&["port", "add", "b", "1026:22", &format!("{PORT}:22")]);
    assert!(status == 4 && said.contains("ss -tanp"), "{status}: {said}");
    host.ok(&["port", "rm", "b", "1024:22"]);
    assert!(ssh_of_b() && !ssh_of_a("127.0.0.1/1024") && published() == 3);
    let plain = PlainSsh::new(&host, &["b"]);
    assert_eq!(plain.run("ssh", &["b", "hostname"]), "b\n");
    auto_ports::forward_follows_listener(&host, "b");
    assert_eq!(published(), 3);

    // The statistics show how much the guest has sent and received, its CPU use and its memory.
    let stats = |what: &str| host.json(&["vm", "stats", "a"])[0][what].as_u64().unwrap();
    let (sent, cpu) = (stats("net_sent_bytes"), stats("cpu_ns"));
    assert!(sent > 0 && stats("net_received_bytes") > 0 && stats("memory_bytes") > 32 << 20);
    host.sh("a", "ping -c 1 -s 1400 10.89.0.1 > /dev/null || true; head -c 3000000 /dev/urandom | sha256sum > /dev/null");
    assert!(stats("net_sent_bytes") > sent && stats("cpu_ns") > cpu);
    let shown = host.ok(&["vm", "stats"]);
    assert!(shown.lines().count() == 4 && shown.contains('%'), "{shown}");

    // Packets above the rates are dropped, also after a restart of the daemon. Of five MiB, 1.25
    // pass at once, and the rest takes more than 3.5 seconds on any host.
    let rates = || {
        sh(
            "nft list table bridge fcd_$(nft list tables | sed -n 's/^table bridge fcd_//p') | grep -c 'limit rate over 1 mbytes/second burst' || true",
        )
    };
    let feed = |host: &Host| {
        let begun = Instant::now();
        let out = host.feed(
            &["exec", "b", "-i", "--", "sh", "-c", "cat > /dev/null"],
            &vec![7; 5 << 20],
        );
        assert!(out.status.success(), "{out:?}");
        begun.elapsed()
    };
    assert_eq!(rates(), "0\n");
    let said = host.ok(&[
        "vm",
        "set",
        "b",
        "--net-rx-bps",
        "1M",
        "--net-tx-bps",
        "1M",
        "--now",
    ]);
    assert_eq!(said, "b: receives 1 MiB/s, sends 1 MiB/s, applied now\n");
    assert_eq!(rates(), "2\n");
    let took = feed(&host);
    assert!(took > Duration::from_millis(3500), "{took:?}");
    host.kill_daemon();
    sh("nft flush ruleset");
    host.relaunch();
    wait_for("the rates are set again", || {
        (rates() == "2\n").then_some(())
    });
    wait_for("the VM is reconciled", || {
        host.fcctl(&["vm", "set", "b", "--net-rx-bps", "none", "--now"])
            .status
            .success()
            .then_some(())
    });
    assert_eq!(rates(), "1\n");
    host.ok(&["vm", "set", "b", "--net-tx-bps", "none", "--now"]);
    assert_eq!(rates(), "0\n");
    feed(&host);

    // Guests can resolve the names and addresses of VMs.
    let resolved = |vm: &str, name: &str| {
        host.sh(
            vm,
            &format!("getent ahostsv4 {name} | cut -d' ' -f1 | head -n 1"),
        )
    };
    assert_eq!(resolved("a", "b.vm").trim(), b);
    assert_eq!(resolved("b", "A.VM").trim(), a);
    assert_eq!(resolved("a", "nobody.vm").trim(), "");
    assert_eq!(
        host.sh("a", &format!("getent hosts {b} | tr -s ' '"))
            .trim(),
        format!("{b} b.vm")
    );

    // Copies a tree to the guest and back.
    {
        let site = Site::unborn(&host, "a", "tree");
        site.write("greeting", "hello\n");
        site.prepare();
        site.assert_same_tree();
        host.sh("a", "echo 'hello, bridge' >/root/tree/greeting");
        let (patch, _) = site.export(&[]);
        assert!(String::from_utf8_lossy(&patch).contains("+hello, bridge"));
    }

    // fcd restores its rules if something deletes them. Killing the daemon does not affect guests.
    host.kill_daemon();
    sh("nft flush ruleset");
    host.relaunch();
    wait_for("the rules are back", || {
        (on_the_bridge() == (3, 3)).then_some(())
    });
    assert_eq!(ask(&host, "a", OUTSIDE, PORT), seen_outside());
    assert_eq!(ask(&host, "a", &b, 22), None);
    ipv6_is_like_ipv4(&host);
    wait_for("the ports are back", || {
        (here() && ssh_of_b()).then_some(())
    });
    assert_eq!(address(&host, "a"), a);
    assert_eq!(
        host.json(&["doctor", "--leaks"]).as_array().map(Vec::len),
        Some(0)
    );

    // A stopped VM leaves no tap, rule or port behind, and its next start gets the same address.
    host.ok(&["stop", "a"]);
    assert_eq!(on_the_bridge(), (2, 2));
    assert!(!here());
    host.ok(&["start", "a"]);
    assert_eq!(address(&host, "a"), a);
    assert_eq!(ask(&host, "a", OUTSIDE, PORT), seen_outside());
    assert_eq!(ask_outside_over_ipv6(&host, "a"), seen_outside_over_ipv6());
    assert!(here());
    host.ok(&["rm", "-f", "a", "b", "cut-off"]);
    assert_eq!(published(), 0);
    assert_eq!(on_the_bridge(), (0, 0));
}

/// Checks what the guests of `guest_reaches_only_allowed_networks` reach over IPv6, and how they
/// are shown.
fn ipv6_is_like_ipv4(host: &Host) {
    let address = |vm: &str| host.show(vm, "ip6").as_str().map(str::to_owned);
    let (a, b) = (address("a").unwrap(), address("b").unwrap());
    assert_eq!(address("cut-off"), None);
    let gateway = format!("{}::1", a.rsplit_once("::").unwrap().0);
    let list = host.ok(&["ps"]);
    assert!(list.contains("IP6") && list.contains(&a), "{list}");
    // The host's server answers the host itself, and the host reaches its guests.
    for at in [&gateway, HOST_IPV6] {
        assert!(
            sh(&format!("bash -c 'head -n 1 </dev/tcp/{at}/{PORT}'")).starts_with("the host sees ")
        );
    }
    for at in [&a, &b] {
        assert!(
            sh(&format!("timeout 60 bash -c 'head -n 1 </dev/tcp/{at}/22'")).starts_with("SSH-2.0")
        );
    }
    assert_eq!(ask_outside_over_ipv6(host, "a"), seen_outside_over_ipv6());
    assert_eq!(ask_outside_over_ipv6(host, "cut-off"), None);
    for (at, port) in [(b.as_str(), 22), (&gateway, PORT), (HOST_IPV6, PORT)] {
        assert_eq!(ask(host, "a", at, port), None, "{at}");
    }
    let resolved = host.sh("a", "getent ahostsv6 b.vm | cut -d' ' -f1 | head -n 1");
    assert_eq!(resolved.trim(), b);
    let (doctor, _) = text(&host.fcctl(&["doctor"]));
    assert!(doctor.contains("guests have IPv6, masqueraded"), "{doctor}");
}

#[test]
fn interrupted_boot_leaves_no_tap() {
    enter_a_host_with_an_outside();
    let mut host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    host.ok(&["vm", "create", "--name", "a"]);
    let mut start = host.spawn(&["start", "a"]);
    wait_for("a tap on the bridge", || {
        (on_the_bridge() == (1, 1)).then_some(())
    });
    host.ok(&["rm", "-f", "a"]);
    start.end();
    assert_eq!(on_the_bridge(), (0, 0));

    host.ok(&["vm", "create", "--name", "b"]);
    let mut start = host.spawn(&["start", "b"]);
    wait_for("a tap on the bridge", || {
        (on_the_bridge() == (1, 1)).then_some(())
    });
    host.kill_daemon();
    start.end();
    assert_eq!(
        on_the_bridge(),
        (1, 1),
        "the tap is left until the next daemon starts"
    );
    host.relaunch();
    wait_for("the tap is gone", || {
        (on_the_bridge() == (0, 0)).then_some(())
    });
    wait_for("the start is undone", || {
        (host.show("b", "state") == "created").then_some(())
    });
    host.ok(&["start", "b"]);
    assert_eq!(host.sh("b", "echo up").trim(), "up");
}

/// Starts a second daemon on this host with its state in the directory `name`, beside the first
/// daemon's state directory.
fn start_beside(host: &Host, name: &str) -> std::process::Child {
    let at = |file: &str| host.path().join(format!("{name}{file}"));
    let config = "[network]\ndriver = \"bridge\"\nbridge = \"fcbr9\"\nsubnet = \"10.99.0.0/24\"\n[qemu]\nuid_base = 700000\nuid_count = 100\n";
    std::fs::write(at(".toml"), config).unwrap();
    let log = std::fs::File::create(at(".log")).unwrap();
    let daemon = Command::new(host::FCD)
        .args([
            "--config".as_ref(),
            at(".toml").as_os_str(),
            "--state-dir".as_ref(),
            at("").as_os_str(),
        ])
        .args(["--socket".as_ref(), at(".sock").as_os_str()])
        .env("FCD_TEST_CLAIMS", host.path().join("claims"))
        .stdin(std::process::Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    wait_for("the second daemon answers", || {
        host::fcctl_at(&at(".sock"), &["rpc", "fcd.info"])
            .output()
            .unwrap()
            .status
            .success()
            .then_some(())
    });
    daemon
}

#[test]
fn leaks_of_gone_installation_are_removed_and_live_one_is_kept() {
    enter_a_host_with_an_outside();
    let mut host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    host.boot("a");
    // The daemon sweeps when it starts, and then not again for a minute.
    host.kill_daemon();
    host.relaunch();
    let links = || sh("ip -o link show type bridge | cut -d: -f2; nft list tables");
    let ours = links();
    // The exit status is ignored because it only says whether there are leaks.
    let leaks = |args: &[&str]| {
        String::from_utf8(host.fcctl(&[&["doctor", "--leaks"], args].concat()).stdout).unwrap()
    };
    const NONE: &str = "fcd has left nothing behind on this host\n";
    let mut second = start_beside(&host, "second");
    let state = host.path().join("second");
    let both = links();
    assert!(both.contains("fcbr9") && both != ours, "{both}");
    assert_eq!(
        leaks(&[]),
        NONE,
        "the second daemon runs, so it has no leaks"
    );
    // The directory of a running daemon is moved away.
    std::fs::rename(&state, host.path().join("aside")).unwrap();
    assert_eq!(
        leaks(&[]),
        NONE,
        "the second daemon still runs, so it has no leaks"
    );
    second.kill().unwrap();
    second.wait().unwrap();
    std::fs::rename(host.path().join("aside"), &state).unwrap();
    assert_eq!(
        leaks(&[]),
        NONE,
        "the second daemon can be started again, so it has no leaks"
    );
    std::fs::remove_dir_all(&state).unwrap();
    let found = leaks(&[]);
    for part in ["fcbr9", "inet fcd_", "bridge fcd_", state.to_str().unwrap()] {
        assert!(found.contains(part), "{part} is not in {found}");
    }
    assert!(!found.contains("fcbr0"), "{found}");
    assert_eq!(links(), both, "listing the leaks changes nothing");
    leaks(&["--fix", "--yes"]);
    assert_eq!((links(), leaks(&[]).as_str()), (ours.clone(), NONE));
    // A starting daemon removes leaks automatically, even if another installation now uses the
    // directory.
    for _ in 0..2 {
        let mut second = start_beside(&host, "second");
        second.kill().unwrap();
        second.wait().unwrap();
        std::fs::remove_dir_all(&state).unwrap();
    }
    let mut third = start_beside(&host, "second");
    // The third daemon's bridge has the same name as the bridge that the deleted installations
    // left.
    assert_eq!(
        sh("nft list tables | grep -c fcd_").trim(),
        "4",
        "each of the two running daemons has two tables"
    );
    third.kill().unwrap();
    third.wait().unwrap();
    std::fs::remove_dir_all(&state).unwrap();
    leaks(&["--fix", "--yes"]);
    assert_eq!(links(), ours);
    assert_eq!(host.sh("a", "echo on").trim(), "on");
}
