//! Tests of the two programs as processes: exit statuses, refusals, leaks, and use from scripts.

use crate::host::{FCCTL, FCD, Host, text, vmm_processes};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs an `fcd` that should exit on its own.
fn fcd(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", "30", FCD, "--state-dir"])
        .arg(dir.join("state"))
        .arg("--socket")
        .arg(dir.join("other.sock"));
    command
        .args(args)
        .env("FCD_TEST_CLAIMS", dir.join("claims"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn refuses(out: &Output, status: i32, said: &str) {
    let stderr = text(out).1;
    assert_eq!(out.status.code(), Some(status), "{stderr}");
    assert!(stderr.contains(said), "{said:?} is not in: {stderr}");
}

#[test]
fn daemon_refuses_invalid_start() {
    let mut host = Host::start();
    refuses(
        &fcd(host.path(), &[]),
        75,
        &format!("process {}", host.pid()),
    );
    let mut command = Command::new("timeout");
    command
        .args(["30", FCD])
        .env("FCD_STATE_DIR", host.state())
        .env("FCD_SOCKET", host.path().join("other.sock"));
    refuses(
        &command.output().unwrap(),
        75,
        &format!("process {}", host.pid()),
    );
    assert_eq!(
        fs::metadata(host.socket()).unwrap().permissions().mode() & 0o7777,
        0o660
    );
    host.stop_daemon();
    assert!(
        !host.socket().exists(),
        "the daemon removes its socket when it stops"
    );

    let dir = host.path().to_owned();
    let config = dir.join("bad.toml");
    fs::write(&config, "[limits]\nboots_max = 2\n\nbots_max = 3\n").unwrap();
    refuses(
        &fcd(&dir, &["--config", config.to_str().unwrap()]),
        78,
        "line 4: unknown field `bots_max`",
    );
    let out = Command::new(FCD)
        .env("FCD_CONFIG", dir.join("none.toml"))
        .output()
        .unwrap();
    refuses(&out, 78, "none.toml");

    let db = host.state().join("fcd.db");
    let kept = fs::read(&db).unwrap();
    let newer = |version: i64| {
        let c = rusqlite::Connection::open(&db).unwrap();
        let old: i64 = c
            .query_row("PRAGMA user_version", [], |r| r.get(0))
            .unwrap();
        c.pragma_update(None, "user_version", version).unwrap();
        old
    };
    let old = newer(99);
    refuses(&fcd(&dir, &[]), 78, "newer");
    newer(old);
    fs::write(
        &db,
        [&kept[..4096], &[0xa5; 4096], &kept[8192.min(kept.len())..]].concat(),
    )
    .unwrap();
    refuses(&fcd(&dir, &[]), 78, "fcd.db");
    fs::write(&db, &kept).unwrap();

    // Symbolic links at these paths are not followed.
    let canary = dir.join("canary");
    let lock = host.state().join("lock");
    fs::remove_file(&lock).unwrap();
    symlink(&canary, &lock).unwrap();
    refuses(&fcd(&dir, &[]), 1, "lock");
    fs::remove_file(&lock).unwrap();
    symlink(&canary, dir.join("other.sock")).unwrap();
    refuses(&fcd(&dir, &[]), 1, "is not a socket of this user");
    fs::remove_file(dir.join("other.sock")).unwrap();
    fs::rename(&db, dir.join("fcd.db")).unwrap();
    symlink(dir.join("fcd.db"), &db).unwrap();
    assert_eq!(fcd(&dir, &[]).status.code(), Some(78));
    fs::remove_file(&db).unwrap();
    fs::rename(dir.join("fcd.db"), &db).unwrap();
    assert!(!canary.exists());
    host.relaunch();
    assert_eq!(host.ok(&["ps", "-aq"]), "");
}

/// Tests everything except the guest, as a script or another terminal sees it.
#[test]
fn scripts_get_stable_output_and_statuses() {
    let mut host = Host::start();
    host.ok(&["vm", "create", "--name", "box"]);
    let version = host.json(&["version"]);
    assert_eq!(version["fcctl"]["version"], version["fcd"]["version"]);
    for args in [
        &["ps", "-a"][..],
        &["vm", "show", "box"],
        &["image", "list"],
        &["op", "list", "--all"],
        &["doctor"],
        &["debug", "locks"],
        &["vm", "set", "box", "--memory", "512M"],
        &["logs", "box"],
        &["stop", "box", "box"],
    ] {
        assert!(!host.json(args).is_null(), "{args:?}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(host.ok(&["completions", shell]).contains("fcctl"));
    }
    let shown: Value =
        serde_json::from_str(&host.ok(&["rpc", "vm.show", r#"{"vm":"box"}"#])).unwrap();
    assert_eq!(
        (&shown["vm"]["name"], &shown["vm"]["mem_mib"]),
        (&json!("box"), &json!(512))
    );
    assert_eq!(host.fails(&["rpc", "vm.fly"]).0, 2);
    assert_eq!(host.fails(&["rpc", "vm.show", "{"]).0, 2);
    assert!(
        host.ok(&["debug", "locks"])
            .contains("lock-order violations: 0 so far")
    );

    let (status, said) = host.fails(&["--json", "vm", "show", "nope"]);
    let error: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(
        (
            status,
            &error["error"]["code"],
            &error["error"]["exit_status"]
        ),
        (3, &json!("not_found"), &json!(3))
    );
    let (status, said) = host.fails(&["--json", "vm", "fly"]);
    assert_eq!(
        (
            status,
            serde_json::from_str::<Value>(&said).unwrap()["error"]["exit_status"].clone()
        ),
        (2, json!(2))
    );

    let line = json!({"jsonrpc": "2.0", "id": 1, "method": "vm.list", "params": {"all": true}});
    let socat = format!(
        "printf '%s\\n' '{line}' | socat -t 5 - UNIX-CONNECT:'{}'",
        host.socket().display()
    );
    let out = Command::new("sh").args(["-c", &socat]).output().unwrap();
    let answer: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(answer["result"]["vms"][0]["name"], "box", "{answer}");

    let script = format!(
        "'{FCCTL}' --socket '{}' ps -a | head -n 0; echo ${{PIPESTATUS[0]}}",
        host.socket().display()
    );
    let out = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(text(&out), ("0\n".to_owned(), String::new()));
    wrong_descriptors(&host);
    a_daemon_that_is_away(&mut host);
}

/// Sends one request with descriptors and returns the reply.
fn call_with(host: &Host, method: &str, params: Value, fds: &[&OwnedFd]) -> Value {
    let stream = UnixStream::connect(host.socket()).unwrap();
    let line = format!(
        "{}\n",
        json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    );
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(line.as_bytes())],
        &control,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

/// A method accepts only pipes, only their right ends, and only as many as it takes.
fn wrong_descriptors(host: &Host) {
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    let socket = OwnedFd::from(UnixStream::pair().unwrap().0);
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let prepare = json!({"vm": "box", "guest_path": "/root/t"});
    let exec = json!({"vm": "box", "argv": ["true"], "env": [], "streams": ["stdout"]});
    let open = || {
        fs::read_dir(format!("/proc/{}/fd", host.pid()))
            .unwrap()
            .count()
    };
    let before = open();
    for (method, params, fds) in [
        ("workspace.prepare", &prepare, vec![&socket]),
        ("workspace.prepare", &prepare, vec![&file]),
        ("workspace.prepare", &prepare, vec![&null]),
        ("workspace.prepare", &prepare, vec![&write_end]),
        ("workspace.prepare", &prepare, vec![&read_end, &read_end]),
        ("exec.start", &exec, vec![&socket]),
        ("exec.start", &exec, vec![&read_end]),
        ("exec.start", &exec, vec![&write_end, &write_end]),
        ("vm.list", &json!({}), vec![&read_end]),
    ] {
        let answer = call_with(host, method, params.clone(), &fds);
        assert_eq!(
            answer["error"]["data"]["code"], "invalid_argument",
            "{method} {fds:?}: {answer}"
        );
    }
    crate::host::wait_for("the descriptors are closed", || {
        (open() <= before).then_some(())
    });
}

fn a_daemon_that_is_away(host: &mut Host) {
    host.stop_daemon();
    let (status, said) = host.fails(&["ps"]);
    assert!(status == 5 && said.contains("hint: "), "{status} {said}");
    assert_eq!(host.fails(&["exec", "box", "--", "true"]).0, 125);
    assert!(host.ok(&["version"]).contains("is not running"));
    // Without a daemon, `doctor` runs the checks of the fcd that is installed beside fcctl.
    let out = host
        .command(&["--json", "doctor"])
        .env("FCD_STATE_DIR", host.state())
        .output()
        .unwrap();
    let checks: Value = serde_json::from_slice(&out.stdout).unwrap();
    let ids: Vec<_> = checks["checks"]
        .as_array()
        .or(checks.as_array())
        .unwrap()
        .iter()
        .map(|c| c["id"].clone())
        .collect();
    assert!(ids.len() > 3 && ids.contains(&json!("daemon")), "{checks}");
    host.relaunch();
}

/// Returns a value from `/proc/PID/status`.
fn status_line(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(name)).unwrap();
    line.split_whitespace()
        .skip(1)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Returns the files behind the open descriptors of a process.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    entries
        .map(|e| {
            fs::read_link(e.path())
                .unwrap_or_default()
                .display()
                .to_string()
        })
        .collect()
}

/// True if a VMM may have this file open.
fn is_allowed(target: &str, dir: &str, image: &str) -> bool {
    let anonymous = [
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[timerfd]",
        "anon_inode:[signalfd]",
    ];
    let kinds = [
        "socket:[",
        "pipe:[",
        "/memfd:",
        "/dev/shm/",
        "/dev/zero",
        "/dev/urandom",
    ];
    target == "/dev/null"
        || target == "/dev/kvm"
        || anonymous.contains(&target)
        || kinds.iter().any(|k| target.starts_with(k))
        || target.starts_with(dir)
        || target.starts_with(image)
}

#[test]
fn vmm_is_confined() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run the tests as root"
    );
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "one"]);
    host.ok(&["vm", "create", "--name", "two", "--net", "none"]);
    let mut both = [host.spawn(&["start", "one"]), host.spawn(&["start", "two"])];
    both.iter_mut()
        .for_each(|start| assert_eq!(start.end().0, Some(0), "{}", start.stderr()));
    let pids = vmm_processes(&host.state());
    assert_eq!(pids.len(), 2);
    let uids: Vec<u32> = pids
        .iter()
        .map(|p| fs::metadata(format!("/proc/{p}/status")).unwrap().uid())
        .collect();
    assert_ne!(uids[0], uids[1]);
    let image = host.state().join("images");
    for vm in ["one", "two"] {
        let shown = host.json(&["vm", "show", vm]);
        let pid = u32::try_from(shown["pid"].as_u64().unwrap()).unwrap();
        let uid = status_line(pid, "Uid:");
        assert!(
            uid.split(' ')
                .all(|u| u.parse::<u32>().unwrap() >= 1_900_000_000),
            "{uid}"
        );
        assert_eq!(
            status_line(pid, "Gid:"),
            uid,
            "each VMM has a group of its own"
        );
        assert_eq!(
            (
                status_line(pid, "Groups:").as_str(),
                status_line(pid, "CapEff:").as_str()
            ),
            ("", "0000000000000000")
        );
        // A `Seccomp` of 2 means that a filter is active (proc(5)).
        assert_eq!(
            (
                status_line(pid, "Seccomp:").as_str(),
                status_line(pid, "NoNewPrivs:").as_str()
            ),
            ("2", "1")
        );
        let dir = host.state().join("vms").join(shown["id"].as_str().unwrap());
        let ours = descriptors(host.pid());
        for target in descriptors(pid) {
            assert!(
                is_allowed(&target, dir.to_str().unwrap(), image.to_str().unwrap()),
                "{vm}: {target}"
            );
            // The two ends of a socket have different numbers. If both processes have the same
            // number, the VMM inherited the descriptor.
            let is_shared = ["socket:[", "pipe:["].iter().any(|k| target.starts_with(k))
                && ours.contains(&target);
            assert!(!is_shared, "{vm} has the daemon's {target}");
        }
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        for variable in environment.split(|b| *b == 0).filter(|v| !v.is_empty()) {
            let name = String::from_utf8_lossy(variable)
                .split('=')
                .next()
                .unwrap()
                .to_owned();
            assert!(
                ["PATH", "LC_ALL", "LANG", "HOME", "TMPDIR"].contains(&name.as_str()),
                "{name}"
            );
        }
        // Only the daemon may read the VM's key.
        let key = fs::metadata(dir.join("key")).unwrap();
        assert_eq!((key.uid(), key.mode() & 0o7777), (0, 0o600));
    }
    only_a_vm_with_a_network_reaches_the_host(&host);
    operations(&host);
}

/// User-mode networking maps the host's loopback to 10.0.2.2. A VM created with `--net none` cannot
/// reach it, but commands can run in the VM.
fn only_a_vm_with_a_network_reaches_the_host(host: &Host) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        listener
            .incoming()
            .flatten()
            .for_each(|mut stream| drop(stream.write_all(b"the host\n")))
    });
    let script = format!(
        "timeout 5 bash -c 'exec 3<>/dev/tcp/10.0.2.2/{port} && head -n 1 <&3' || echo nobody"
    );
    assert_eq!(host.sh("one", &script), "the host\n");
    assert_eq!(host.sh("two", &script), "nobody\n");
    only_a_vm_with_a_network_has_ipv6(host);
}

/// True if guests with user-mode networking have IPv6, because this host has an IPv6 address other
/// than link-local ones.
pub fn has_ipv6() -> bool {
    let addresses = std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    let is_local = |l: &str| l.starts_with("fe80") || l.ends_with(" lo");
    !addresses.lines().all(is_local)
}

/// With IPv6, the host's loopback is at fec0::2.
fn only_a_vm_with_a_network_has_ipv6(host: &Host) {
    let addresses = |vm: &str| {
        host.sh(
            vm,
            "grep eth0 /proc/net/if_inet6 | grep -v ^fe80 | cut -c 1-32",
        )
    };
    assert_eq!(addresses("two"), "");
    if !has_ipv6() {
        assert_eq!(addresses("one"), "");
        return;
    }
    assert_eq!(addresses("one"), "fec00000000000000000000000000015\n");
    let listener = TcpListener::bind(("::1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        listener
            .incoming()
            .flatten()
            .for_each(|mut stream| drop(stream.write_all(b"the host\n")))
    });
    let script = format!(
        "timeout 5 bash -c 'exec 3<>/dev/tcp/fec0::2/{port} && head -n 1 <&3' || echo nobody"
    );
    assert_eq!(host.sh("one", &script), "the host\n");
    assert_eq!(host.sh("two", &script), "nobody\n");
}

fn operations(host: &Host) {
    let mut restart = host.spawn(&["vm", "restart", "one"]);
    let op = crate::host::wait_for("the operation of the restart", || {
        let ops = host.json(&["op", "list"]);
        ops.as_array()
            .unwrap()
            .iter()
            .find(|op| op["method"] == "vm.restart")
            .map(|op| op["id"].as_str().unwrap().to_owned())
    });
    assert_eq!(host.json(&["op", "show", &op])["state"], "running");
    let (status, _) = host.fails(&["op", "wait", "--timeout", "50ms", &op]);
    assert_eq!(status, 124);
    host.ok(&["op", "wait", &op]);
    assert_eq!(restart.end().0, Some(0), "{}", restart.stderr());
    assert_eq!(host.json(&["op", "show", &op])["state"], "ok");

    host.ok(&["stop", "--force", "one"]);
    let mut start = host.spawn(&["start", "one"]);
    let op = crate::host::wait_for("the operation of the start", || {
        let ops = host.json(&["op", "list"]);
        ops.as_array()
            .unwrap()
            .iter()
            .find(|op| op["method"] == "vm.start")
            .map(|op| op["id"].as_str().unwrap().to_owned())
    });
    host.ok(&["op", "cancel", &op]);
    assert_ne!(start.end().0, Some(0));
    let (status, said) = host.fails(&["op", "wait", &op]);
    assert!(
        status == 130 && said.contains("cancelled"),
        "{status} {said}"
    );
    assert_eq!(vmm_processes(&host.state()).len(), 1);
}

/// The state directory is below a closed directory, such as root's home. The daemon at its start,
/// `doctor` and the start of a VM all report this with a command that fixes it.
#[test]
fn state_directory_below_closed_one_is_reported() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run the tests as root"
    );
    let mut host = Host::start();
    let set = |mode| fs::set_permissions(host.path(), fs::Permissions::from_mode(mode)).unwrap();
    let place = host.path().display().to_string();
    let (named, fix) = (
        format!("may not enter {place},"),
        format!("chmod o+x {place}"),
    );
    host.ok(&["vm", "create", "--name", "box"]);
    set(0o700);
    let doctor = host.fcctl(&["doctor"]);
    let (said, _) = text(&doctor);
    assert!(
        said.contains("FAIL  state-dir") && said.contains(&named) && said.contains(&fix),
        "{said}"
    );
    let start = host.fcctl(&["start", "box"]);
    let (_, said) = text(&start);
    assert!(
        !start.status.success() && said.contains(&named) && said.contains(&fix),
        "{said}"
    );
    host.stop_daemon();
    let refused = Command::new(FCD)
        .arg("--state-dir")
        .arg(host.state())
        .env("FCD_CONFIG", "/dev/null")
        .env("FCD_SOCKET", host.socket())
        .output()
        .unwrap();
    let (_, said) = text(&refused);
    assert!(
        refused.status.code() == Some(78) && said.contains(&named) && said.contains(&fix),
        "{said}"
    );
    // The printed command fixes the problem.
    fs::set_permissions(&place, fs::Permissions::from_mode(0o711)).unwrap();
    host.relaunch();
    host.ok(&["start", "box"]);
}
