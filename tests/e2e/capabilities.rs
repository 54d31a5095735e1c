//! Tests of optional capabilities in user mode: published ports, a work disk and host files.

use crate::auto_ports;
use crate::host::{Host, text, wait_for};
use crate::plain_ssh::PlainSsh;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the first seven bytes that a server sends, or `None` if the connection fails or closes
/// before they arrive. In user mode, connecting to a port that the guest does not serve succeeds,
/// but the connection is closed.
fn banner(at: &str) -> Option<String> {
    let mut stream = TcpStream::connect(at.parse::<SocketAddr>().unwrap()).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = [0; 7];
    stream.read_exact(&mut said).ok()?;
    Some(String::from_utf8_lossy(&said).into_owned())
}

/// True if this process uses no CPU time between two samples.
fn is_idle(pid: u64) -> bool {
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<u64> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|f| f.parse().unwrap())
            .collect();
        fields.iter().sum::<u64>()
    };
    let mut last = ticks();
    let mut looks = 0;
    while looks < 100 {
        std::thread::park_timeout(Duration::from_millis(500));
        let now = ticks();
        if now == last {
            return true;
        }
        last = now;
        looks += 1;
    }
    false
}

/// Adds ports to the running VM `a` and removes one. Returns the address of the other.
fn ports_change_while_running(host: &mut Host) -> String {
    let before = host.ok(&["port", "a"]);
    let added = host.ok(&["port", "add", "a", "22", "0.0.0.0::22"]);
    let at: Vec<String> = added
        .lines()
        .map(|line| line.strip_prefix("22/tcp -> ").unwrap().to_owned())
        .collect();
    let any = at[1].replace("0.0.0.0", "127.0.0.1");
    assert_eq!(banner(&at[0]).as_deref(), Some("SSH-2.0"));
    assert_eq!(banner(&any).as_deref(), Some("SSH-2.0"));
    // A port that a program on the host uses cannot be added, and the VM's ports stay as they are.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap();
    let wanted = format!("{}:22", taken.port());
    let (status, said) = host.fails(&["port", "add", "a", "23", &wanted]);
    assert!(
        status == 4 && said.contains(&taken.to_string()) && said.contains("ss -tanp"),
        "{status}: {said}"
    );
    assert_eq!(host.ok(&["port", "a"]), format!("{before}{added}"));
    // The VMM keeps the ports while the daemon is dead.
    host.kill_daemon();
    assert_eq!(banner(&at[0]).as_deref(), Some("SSH-2.0"));
    host.relaunch();
    let number = any.split(':').nth(1).unwrap();
    let removed = host.ok(&["port", "rm", "a", &format!("{number}:22")]);
    assert_eq!(removed, format!("removed 22/tcp -> {}\n", at[1]));
    assert!(TcpStream::connect(&any).is_err());
    assert_eq!(banner(&at[0]).as_deref(), Some("SSH-2.0"));
    // The change does not affect the port that fcd itself uses for SSH.
    assert_eq!(host.sh("a", "echo reached"), "reached\n");
    at[0].clone()
}

#[test]
fn guest_has_ports_work_disk_and_host_files() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("ca.crt");
    std::fs::write(&file, "one\n").unwrap();
    let sync =
        format!("[[sync]]\nfrom = {file:?}\nto = \"/root/.config/tool/ca.crt\"\nmode = \"0640\"\n");
    let mut host = Host::with_config(&sync);
    host.ok(&[
        "vm",
        "create",
        "--name",
        "a",
        "-p",
        "22",
        "-p",
        "0.0.0.0::7000/udp",
        "--work-disk",
        "2G",
    ]);
    let ports = host.ok(&["vm", "ports", "a"]);
    let mut lines = ports.lines();
    let ssh = lines
        .next()
        .unwrap()
        .strip_prefix("22/tcp -> ")
        .unwrap()
        .to_owned();
    assert!(
        ssh.starts_with("127.0.0.1:") && !ssh.ends_with(":0"),
        "{ports}"
    );
    assert!(
        lines.next().unwrap().starts_with("7000/udp -> 0.0.0.0:"),
        "{ports}"
    );

    // If a program on the host uses the port, the error names the port. The VM starts once the port
    // is free.
    let listener = TcpListener::bind(&ssh).unwrap();
    let (status, said) = host.fails(&["start", "a"]);
    assert!(
        status == 4 && said.contains(&ssh) && said.contains("ss -tanp"),
        "{status}: {said}"
    );
    drop(listener);
    host.ok(&["start", "a"]);
    assert_eq!(banner(&ssh).as_deref(), Some("SSH-2.0"));

    let plain = PlainSsh::new(&host, &["a"]);
    assert_eq!(plain.run("ssh", &["a", "hostname; pwd"]), "a\n/root\n");
    plain.check_copies("a");
    let added = ports_change_while_running(&mut host);
    auto_ports::forward_follows_listener(&host, "a");

    // The work disk belongs to this guest, has the requested size, and keeps its files when the VM
    // stops.
    let size: u64 = host
        .sh("a", "df --output=size -BM /work | tail -n 1 | tr -d ' M'")
        .trim()
        .parse()
        .unwrap();
    assert!((1800..=2048).contains(&size), "{size} MiB");
    assert_eq!(
        host.sh(
            "a",
            "stat -c %U:%a /work; ls /work; stat -c %U:%a:%s /root/.config/tool/ca.crt"
        ),
        "root:755\nlost+found\nroot:640:4\n"
    );
    host.sh(
        "a",
        "echo kept > /work/file; cat /sys/block/vd?/serial > /work/disks",
    );
    assert_eq!(host.sh("a", "cat /work/disks"), "rootseedwork");
    // After pause and resume, the guest's process continues.
    host.sh(
        "a",
        "nohup sh -c 'while :; do echo tick; usleep 100000 2>/dev/null || sleep 0.1; done' > /root/ticks 2>&1 & echo begun",
    );
    assert_eq!(host.ok(&["vm", "pause", "a"]), "a: running (paused)\n");
    let (status, said) = host.fails(&["exec", "a", "--", "true"]);
    assert!(
        status == 125 && said.contains("is paused") && said.contains("vm resume a"),
        "{status}: {said}"
    );
    let pid = host.show("a", "pid").as_u64().unwrap();
    assert!(is_idle(pid), "a paused guest takes CPU time");
    assert_eq!(host.ok(&["vm", "resume", "a"]), "a: running\n");
    let ticks = || {
        host.sh("a", "wc -l < /root/ticks")
            .trim()
            .parse::<u64>()
            .unwrap()
    };
    let before = ticks();
    wait_for("the guest continues", || (ticks() > before).then_some(()));
    host.ok(&["vm", "pause", "a"]);

    // A second VM cannot get a port of the first VM.
    let (status, said) = host.fails(&[
        "vm",
        "create",
        "--name",
        "b",
        "-p",
        &format!("{}:22", &ssh["127.0.0.1:".len()..]),
    ]);
    assert!(
        status == 4 && said.contains("another VM"),
        "{status}: {said}"
    );

    std::fs::write(&file, "another\n").unwrap();
    host.ok(&["stop", "a"]);
    let console = host.ok(&["logs", "a"]);
    assert!(
        console.contains("disk is clean") && !console.contains("still in use"),
        "{console}"
    );
    assert!(TcpStream::connect(&ssh).is_err());
    host.ok(&["start", "a"]);
    // After the restart, fcd uses another port for SSH. The added port is still open.
    assert_eq!(plain.run("ssh", &["a", "hostname"]), "a\n");
    assert_eq!(banner(&added).as_deref(), Some("SSH-2.0"));
    assert_eq!(
        host.sh("a", "cat /work/file /root/.config/tool/ca.crt"),
        "kept\nanother\n"
    );
    assert_eq!(banner(&ssh).as_deref(), Some("SSH-2.0"));

    // If a synced file is missing, the start fails and names it, and `doctor` reports it.
    host.ok(&["stop", "a"]);
    std::fs::remove_file(&file).unwrap();
    let (status, said) = host.fails(&["start", "a"]);
    assert!(
        status == 1 && said.contains(file.to_str().unwrap()),
        "{status}: {said}"
    );
    let (doctor, _) = text(&host.fcctl(&["doctor"]));
    assert!(doctor.contains(file.to_str().unwrap()), "{doctor}");
    host.ok(&["rm", "-f", "a"]);
    assert_eq!(
        host.json(&["doctor", "--leaks"]).as_array().map(Vec::len),
        Some(0)
    );
}
