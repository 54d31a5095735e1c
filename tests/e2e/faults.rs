//! Tests of a host that lacks or loses a resource: errors have a kind, operations are undone, and
//! the daemon recovers automatically.

use crate::host::{Host, text, vmm_processes, wait_for, wait_for_or};
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The number of inodes of the small file system, which is more than a start needs.
const INODES: u64 = 400;
/// The memory that a limit leaves beyond what the daemon already uses. A guest needs more.
const LITTLE_BYTES: u64 = 384 << 20;
const IDLE: usize = 10_000;
const CALLS: usize = 200;
/// Limit of the memory that ten thousand callers may cost a daemon that accepts few of them.
const RSS_KIB_MAX: u64 = 128 << 10;

#[track_caller]
fn refused(out: &Output, status: i32, kinds: &[&str]) {
    let (stdout, stderr) = text(out);
    let error: Value = serde_json::from_str(&stderr)
        .unwrap_or_else(|_| panic!("{:?} {stdout}{stderr}", out.status));
    let kind = error["error"]["kind"].as_str().unwrap();
    assert!(
        out.status.code() == Some(status) && kinds.contains(&kind),
        "{:?} {stderr}",
        out.status
    );
    assert!(error["error"]["hint"].is_string(), "{stderr}");
}

fn begins_again(host: &Host, vm: &str) {
    let mut said = String::new();
    wait_for_or("a start succeeds again", &mut said, |said| {
        let out = host.fcctl(&["start", vm]);
        *said = text(&out).1;
        out.status.success().then_some(())
    });
    assert_eq!(host.sh(vm, "echo well"), "well\n");
    host.ok(&["rm", "-f", vm]);
}

#[test]
fn file_system_without_inodes_is_reported() {
    let host = Host::on_few_inodes(INODES);
    host.ok(&["vm", "create", "--name", "a"]);
    host.ok(&["vm", "create", "--name", "gone"]);
    let before = host.census();
    host.disk().fill_inodes();
    refused(&host.fcctl(&["--json", "start", "a"]), 1, &["disk_full"]);
    assert_eq!(host.census(), before);
    host.ok(&["rm", "gone"]);
    assert!(host.ok(&["ps", "-a"]).contains("failed"));
    host.disk().free_inodes();
    begins_again(&host, "a");
}

/// After the kernel finds an error on the file system, reads continue, no change is acknowledged,
/// and no acknowledged change is lost.
#[test]
fn read_only_state_directory_loses_nothing() {
    let mut host = Host::on_ext4();
    host.boot("a");
    host.ok(&["vm", "create", "--name", "b"]);
    host.disk().break_ext4();
    refused(
        &host.fcctl(&["--json", "vm", "create", "--name", "c"]),
        1,
        &["store_read_only", "host"],
    );
    refused(
        &host.fcctl(&["--json", "vm", "set", "b", "--vcpus", "2"]),
        1,
        &["store_read_only", "host"],
    );
    refused(
        &host.fcctl(&["--json", "start", "b"]),
        1,
        &["store_read_only", "host"],
    );
    let listed = host.ok(&["ps", "-a"]);
    assert!(
        listed.contains(" a ") || listed.contains("\na ") && !listed.contains("\nc "),
        "{listed}"
    );
    assert_eq!(host.show("b", "vcpus"), 1);
    let doctor = text(&host.fcctl(&["doctor"])).0;
    assert!(doctor.contains("the store is read-only"), "{doctor}");
    host.kill_daemon();
    for pid in vmm_processes(&host.state()) {
        crate::host::signal(pid, "KILL");
    }
    wait_for("no VMM uses the disk", || {
        vmm_processes(&host.state()).is_empty().then_some(())
    });
    host.disk().mend_ext4();
    host.relaunch();
    wait_for("the daemon notices the guest's end", || {
        (host.show("a", "state") == "failed").then_some(())
    });
    assert_eq!(host.show("b", "state"), "created");
    begins_again(&host, "a");
    begins_again(&host, "b");
}

#[test]
fn daemon_without_writable_directory_does_not_start() {
    let mut host = Host::on_small_disk(640);
    host.ok(&["vm", "create", "--name", "a"]);
    host.stop_daemon();
    host.disk().set_read_only(true);
    let mut fcd = Command::new("timeout");
    fcd.args(["30", crate::host::FCD, "--state-dir"])
        .arg(host.state())
        .arg("--socket")
        .arg(host.path().join("other.sock"));
    let out = fcd.stdin(Stdio::null()).output().unwrap();
    let said = text(&out).1;
    assert!(
        matches!(out.status.code(), Some(1 | 78)),
        "{:?} {said}",
        out.status
    );
    assert!(
        said.contains("Read-only file system") && said.contains(host.state().to_str().unwrap()),
        "{said}"
    );
    host.disk().set_read_only(false);
    host.relaunch();
    begins_again(&host, "a");
}

/// Sets a soft limit of the daemon with prlimit(1).
fn limit(host: &Host, name: &str, value: &str) {
    let status = Command::new("prlimit")
        .arg(format!("--pid={}", host.pid()))
        .arg(format!("--{name}={value}:"))
        .status();
    assert!(status.unwrap().success());
}

/// Returns the soft limit of open files that the daemon has set for itself.
fn open_files_max(host: &Host) -> String {
    let limits = fs::read_to_string(format!("/proc/{}/limits", host.pid())).unwrap();
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"))
        .unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

fn open_files(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn status_kib(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
    line.trim_start_matches(':')
        .trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .unwrap()
}

/// Returns the CPU time of a process in clock ticks (proc(5), stat: utime and stime).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn daemon_without_descriptors_or_memory_recovers() {
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "a"]);
    let (at_rest, files_max) = (open_files(host.pid()), open_files_max(&host));
    // The descriptors suffice for the call but not for a boot. The memory suffices for the daemon
    // but not for a guest, whose VMM inherits the limit. With less memory, the allocator would
    // abort the daemon, as in every Rust program.
    let little = (status_kib(host.pid(), "VmSize") << 10) + LITTLE_BYTES;
    for (name, few) in [
        ("nofile", (at_rest + 3).to_string()),
        ("as", little.to_string()),
    ] {
        limit(&host, name, &few);
        let out = host.fcctl(&["--json", "start", "a"]);
        assert!(!out.status.success(), "{name}: {:?}", text(&out));
        limit(
            &host,
            name,
            if name == "as" {
                "unlimited"
            } else {
                &files_max
            },
        );
        wait_for("the start is undone", || {
            vmm_processes(&host.state()).is_empty().then_some(())
        });
        assert!(["created", "failed"].contains(&host.show("a", "state").as_str().unwrap()));
    }
    // If the daemon has no free descriptor, callers get an error immediately, and the daemon does
    // not spin.
    limit(&host, "nofile", &open_files(host.pid()).to_string());
    let answers: Vec<String> = (0..20)
        .map(|_| {
            let mut stream = UnixStream::connect(host.socket()).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            // The connection may already be closed because the call was refused.
            let _ = stream.write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"fcd.info\"}\n");
            let mut answer = [0; 4096];
            let len = stream.read(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..len]).into_owned()
        })
        .collect();
    assert!(
        answers.iter().all(|a| a.contains("\"jsonrpc\"")),
        "{answers:?}"
    );
    let (begun, ticks) = (Instant::now(), cpu_ticks(host.pid()));
    wait_for("a second has passed", || {
        (begun.elapsed() > Duration::from_secs(1)).then_some(())
    });
    let busy = cpu_ticks(host.pid()) - ticks;
    assert!(busy < 30, "{busy} clock ticks in a second: it spins");
    limit(&host, "nofile", &files_max);
    begins_again(&host, "a");
}

/// A hostile VMM can overwrite its own arguments. The daemon must still recognize and kill the VMM.
#[test]
fn vmm_with_changed_arguments_is_killed() {
    let mut host = Host::start();
    host.boot("a");
    let hide = |host: &Host| {
        let pid = host.show("a", "pid");
        // The stat file contains the addresses of the VMM's arguments in the VMM's memory
        // (proc(5)).
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .unwrap()
            .1
            .split_whitespace()
            .collect();
        let [start, end] = [45, 46].map(|n: usize| fields[n].parse::<u64>().unwrap());
        let memory = fs::File::options()
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &memory,
            &vec![0; usize::try_from(end - start).unwrap()],
            start,
        )
        .unwrap();
        assert!(
            !fs::read_to_string(format!("/proc/{pid}/cmdline"))
                .unwrap()
                .contains("fc-")
        );
        pid
    };
    let is_gone = |pid: &Value| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    let pid = hide(&host);
    host.ok(&["stop", "--force", "a"]);
    assert!(is_gone(&pid));
    host.ok(&["start", "a"]);
    let pid = hide(&host);
    host.kill_daemon();
    host.relaunch();
    wait_for("the VM can be deleted", || {
        host.fcctl(&["rm", "-f", "a"])
            .status
            .success()
            .then_some(())
    });
    assert!(is_gone(&pid));
}

#[test]
fn stored_pid_of_other_process_is_not_killed() {
    let mut host = Host::start();
    host.boot("a");
    let shown = host.json(&["vm", "show", "a"]);
    let vmm = vmm_processes(&host.state());
    let mut bystander = Command::new("sleep").arg("1000").spawn().unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", bystander.id())).unwrap();
    let started: u64 = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(19)
        .unwrap()
        .parse()
        .unwrap();
    let db = host.state().join("fcd.db");
    // The record has the bystander's pid, with and without its start time. The bystander's program
    // and arguments show that it is not a VMM of fcd.
    for own_start in [false, true] {
        host.kill_daemon();
        for pid in vmm_processes(&host.state()) {
            crate::host::signal(pid, "KILL");
        }
        wait_for("the VMM is gone", || {
            vmm_processes(&host.state()).is_empty().then_some(())
        });
        let c = rusqlite::Connection::open(&db).unwrap();
        // Changes that are not in the database file yet stay in the log, as they do after a crash.
        c.set_db_config(
            rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE,
            true,
        )
        .unwrap();
        let (id, body): (String, String) = c
            .query_row("SELECT id, body FROM vms", [], |r| {
                Ok((r.get(0)?, r.get(1)?))
            })
            .unwrap();
        let mut row: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(id, shown["id"].as_str().unwrap());
        row["identity"]["pid"] = bystander.id().into();
        if own_start {
            row["identity"]["start_time"] = started.into();
        }
        c.execute(
            "UPDATE vms SET body = ?1 WHERE id = ?2",
            [row.to_string(), id],
        )
        .unwrap();
        drop(c);
        host.relaunch();
        wait_for("the daemon notices the VMM's end", || {
            (host.show("a", "state") == "failed").then_some(())
        });
        host.ok(&["stop", "a"]);
        assert_eq!(
            bystander.try_wait().unwrap(),
            None,
            "own start: {own_start}"
        );
        host.ok(&["start", "a"]);
        assert_eq!(
            bystander.try_wait().unwrap(),
            None,
            "own start: {own_start}"
        );
    }
    host.ok(&["rm", "-f", "a"]);
    assert_eq!(bystander.try_wait().unwrap(), None);
    assert_eq!(vmm.len(), 1);
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

/// Somebody who can write to the directory places links at the paths that the daemon and the VMM
/// write.
#[test]
fn links_in_vm_directory_are_not_followed() {
    let host = Host::start();
    host.boot("a");
    host.ok(&["stop", "a"]);
    let dir = host
        .state()
        .join("vms")
        .join(host.show("a", "id").as_str().unwrap());
    let canary = host.path().join("canary");
    fs::write(&canary, "sings").unwrap();
    let is_well = |at: &str| {
        let meta = fs::metadata(&canary).unwrap();
        assert_eq!(
            (
                fs::read_to_string(&canary).unwrap().as_str(),
                meta.uid(),
                meta.nlink()
            ),
            ("sings", 0, 1),
            "{at}"
        );
        assert_eq!(meta.mode() & 0o777, 0o644 & meta.mode(), "{at}");
    };
    let before = fs::metadata(&canary).unwrap().mode();
    for name in [
        "console.log",
        "vmm.log",
        "seed",
        "run/qmp.sock",
        "run/control.sock",
        "run/console.sock",
        ".seed.new",
        ".disk.new",
    ] {
        let path = dir.join(name);
        let _ = fs::remove_file(&path);
        symlink(&canary, &path).unwrap();
        let out = host.fcctl(&["start", "a"]);
        is_well(name);
        if !out.status.success() {
            // The start is refused and names the link.
            assert!(
                text(&out)
                    .1
                    .contains(Path::new(name).file_name().unwrap().to_str().unwrap()),
                "{name}: {:?}",
                text(&out)
            );
            let _ = fs::remove_file(&path);
        }
        host.ok(&["stop", "--force", "a"]);
        let _ = fs::remove_file(&path);
    }
    host.ok(&["start", "a"]);
    assert_eq!(fs::metadata(&canary).unwrap().mode(), before);
}

/// More callers connect than the limits allow. The excess callers are refused immediately, the
/// others are served, and both cost little.
#[test]
fn idle_callers_above_limit_are_refused() {
    nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_NOFILE,
        2 * IDLE as u64,
        2 * IDLE as u64,
    )
    .unwrap();
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "a"]);
    let files = open_files(host.pid());
    let p50 = || {
        let mut took: Vec<Duration> = (0..CALLS)
            .map(|_| {
                let begun = Instant::now();
                assert_eq!(
                    host.rpc("vm.show", serde_json::json!({"vm": "a"}))["result"]["vm"]["name"],
                    "a"
                );
                begun.elapsed()
            })
            .collect();
        took.sort();
        took[CALLS / 2]
    };
    let alone = p50();
    // The callers connect as nobody, who cannot use the connections that are reserved for root.
    // Refused connections are closed.
    fs::set_permissions(host.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let connect = format!(
        "use IO::Socket::UNIX; my @s; for (1..{IDLE}) {{ my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or next; push @s, $s }} \
         print scalar(@s), \"\\n\"; close STDOUT; <STDIN>"
    );
    let mut idle = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "perl",
            "-e",
            &connect,
        ])
        .arg(host.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut connected = String::new();
    idle.stdout
        .take()
        .unwrap()
        .read_to_string(&mut connected)
        .unwrap();
    let beside = p50();
    let held = open_files(host.pid()) - files;
    let rss = status_kib(host.pid(), "VmRSS");
    println!(
        "{} connected, {held} held, {rss} KiB; a call takes {alone:?} alone, {beside:?} beside",
        connected.trim()
    );
    assert!(
        connected.trim().parse::<usize>().unwrap() > IDLE / 2,
        "{connected}"
    );
    assert!(
        held < 1200 && rss < RSS_KIB_MAX,
        "{held} descriptors more, {rss} KiB"
    );
    assert!(
        beside < alone * 10 + Duration::from_millis(10),
        "{alone:?} alone, {beside:?} beside them"
    );
    drop(idle.stdin.take());
    idle.wait().unwrap();
    wait_for("the connections are closed", || {
        (open_files(host.pid()) <= files + 2).then_some(())
    });
}
