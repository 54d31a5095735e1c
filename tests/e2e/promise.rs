//! Tests with real guests that no lifecycle operation waits for a slow operation, such as a stalled
//! import or a boot.

use crate::host::{Host, Spawned, vmm_processes, wait_for};
use serde_json::{Value, json};
use std::io::Write;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

/// Limit of the time from a stop or delete until the import's error and the VMM's end.
const SOON: Duration = Duration::from_secs(1);
/// Limit of the time for a reply of the daemon. On an idle machine it takes a few milliseconds, but
/// other tests and emulated guests run at the same time.
const AT_ONCE: Duration = Duration::from_millis(250);
/// Allowed difference between two stops of a guest on a busy machine, in addition to half of the
/// longer idle stop. A stop that waited for the import would take `transfer_idle_s`, which is a
/// minute. A stop that waited for the guest to accept the end of the import would take
/// `stop_timeout_s`.
const NOISE: Duration = Duration::from_secs(2);
const MIB: usize = 1 << 20;

/// Makes a call on a new connection. Returns the reply and the time that it took.
fn timed(host: &Host, method: &str, params: Value) -> (Value, Duration) {
    let begun = Instant::now();
    let answer = host.rpc(method, params);
    (answer, begun.elapsed())
}

#[track_caller]
fn answers_at_once(host: &Host, vm: &str) {
    for (method, params) in [
        ("vm.show", json!({"vm": vm})),
        ("vm.list", json!({"all": true})),
    ] {
        let (answer, took) = timed(host, method, params);
        assert!(answer["result"].is_object(), "{answer}");
        assert!(took < AT_ONCE, "{method} took {took:?}");
    }
}

/// Starts an import of a tar archive whose only file never ends. The caller writes its bytes to the
/// returned stdin.
fn endless_import(host: &Host, vm: &str) -> (Spawned, ChildStdin) {
    let args = [
        "workspace",
        "prepare",
        vm,
        "--guest-path",
        "/root/t",
        "--tar",
        "-",
    ];
    let mut import = Spawned::start(host.command(&args).stdin(Stdio::piped()));
    let mut stdin = import.child.stdin.take().unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("file").unwrap();
    header.set_size(8 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    stdin.write_all(header.as_bytes()).unwrap();
    (import, stdin)
}

/// Returns the number of bytes that the import has transferred, or 0 if no import is in progress.
fn gone_in(host: &Host) -> u64 {
    let ops = host.json(&["op", "list"]);
    let import = ops
        .as_array()
        .unwrap()
        .iter()
        .find(|op| op["method"] == "workspace.prepare");
    import
        .and_then(|op| op["progress"]["done"].as_u64())
        .unwrap_or(0)
}

/// Checks that the import failed soon after `since`, and that its error gives this cause and its
/// progress.
#[track_caller]
fn ended_because(import: &mut Spawned, cause: &str, since: Instant) {
    let (status, _) = import.end();
    let took = since.elapsed();
    let said = import.stderr();
    assert!(!matches!(status, Some(0) | None), "{status:?} {said}");
    assert!(said.contains(cause), "{said}");
    let bytes = said
        .split("after ")
        .nth(1)
        .and_then(|rest| rest.split(" bytes").next())
        .and_then(|n| n.parse::<u64>().ok());
    assert!(bytes.is_some_and(|n| n > 0), "{said}");
    assert!(took < SOON, "{took:?}: {said}");
}

#[test]
fn stalled_import_delays_nothing() {
    // There is only one worker. If a stalled import kept this worker, no other transfer could run.
    let host = Host::with_config("[limits]\npool_workers = 1\npool_queue = 3\n");
    host.boot("box");
    let before = idle_stop(&host);
    host.ok(&["start", "box"]);
    cut_off(&host);

    // The client stops writing.
    let (mut import, mut stdin) = endless_import(&host, "box");
    stdin.write_all(&vec![0; 2 * MIB]).unwrap();
    wait_for("the first bytes are in the guest", || {
        (gone_in(&host) > MIB as u64).then_some(())
    });
    // tar writes whole records, and the last one is never complete.
    host.sh(
        "box",
        "while [ $(stat -c %s /root/t/file) -lt 2000000 ]; do sleep 0.1; done",
    );
    answers_at_once(&host, "box");
    let mut waiting = behind_it(&host);
    let begun = Instant::now();
    let mut stop = host.spawn(&["stop", "box"]);
    ended_because(&mut import, "the VM was stopped", begun);
    assert_eq!(stop.end().0, Some(0), "{}", stop.stderr());
    let took = begun.elapsed();
    assert!(
        stop.stdout().contains("the guest's data was synced"),
        "{}",
        stop.stdout()
    );
    let silent = took;
    assert_eq!(host.show("box", "workspace")["state"], "incomplete");
    assert!(
        !matches!(waiting.end().0, Some(0)) && waiting.stderr().contains("the VM was stopped"),
        "{}",
        waiting.stderr()
    );
    drop(stdin);

    // The guest stops reading. The second import uses the worker that the first import has
    // released.
    host.ok(&["start", "box"]);
    let (mut import, feeder) = unread_import(&host);
    answers_at_once(&host, "box");
    let begun = Instant::now();
    let mut stop = host.spawn(&["stop", "box"]);
    ended_because(&mut import, "the VM was stopped", begun);
    assert_eq!(stop.end().0, Some(0), "{}", stop.stderr());
    let unread = begun.elapsed();
    assert!(
        stop.stdout().contains("the guest's data was synced"),
        "{}",
        stop.stdout()
    );
    feeder.join().unwrap();

    // A stop must not take much longer than on an idle VM, which is measured before and after.
    host.ok(&["start", "box"]);
    let after = idle_stop(&host);
    println!(
        "stop: idle {before:?} {after:?}, a client that does not write {silent:?}, a guest that does not read {unread:?}"
    );
    let most = before.max(after) * 3 / 2 + NOISE;
    assert!(
        silent < most && unread < most,
        "{silent:?} {unread:?}, idle {before:?} {after:?}"
    );

    host.ok(&["start", "box"]);
    let (mut import, feeder) = unread_import(&host);
    let begun = Instant::now();
    let mut delete = host.spawn(&["rm", "-f", "box"]);
    ended_because(&mut import, "the VM was deleted", begun);
    assert_eq!(delete.end().0, Some(0), "{}", delete.stderr());
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    assert_eq!(host.census(), Vec::<String>::new());
    feeder.join().unwrap();
}

/// Returns the time of a stop whose guest has as much to sync as after an import in the other
/// measurements.
fn idle_stop(host: &Host) -> Duration {
    host.sh("box", "head -c 2M /dev/zero > /root/zeros");
    let begun = Instant::now();
    host.ok(&["stop", "box"]);
    begun.elapsed()
}

/// Starts an import that stalls because no process in the guest reads it. Returns the import and
/// the thread that feeds it.
fn unread_import(host: &Host) -> (Spawned, std::thread::JoinHandle<()>) {
    let (import, stdin) = endless_import(host, "box");
    let feeder = feed(stdin);
    wait_for("bytes go into the guest", || {
        (gone_in(host) > 4 * MIB as u64).then_some(())
    });
    host.sh("box", "pkill -STOP -x tar");
    let mut last = 0;
    wait_for("no more bytes go in", || {
        let now = gone_in(host);
        let stands = now == last;
        last = now;
        std::thread::park_timeout(Duration::from_millis(300));
        stands.then_some(())
    });
    (import, feeder)
}

/// Neither a killed client nor a tar archive that is cut off between two blocks leaves a workspace
/// that looks complete.
fn cut_off(host: &Host) {
    let (mut import, mut stdin) = endless_import(host, "box");
    stdin.write_all(&vec![0; 2 * MIB]).unwrap();
    wait_for("the first bytes are in the guest", || {
        (gone_in(host) > MIB as u64).then_some(())
    });
    import.signal("KILL");
    import.end();
    wait_for("the import has ended", || {
        host.ok(&["op", "list", "-q"]).is_empty().then_some(())
    });
    assert_eq!(host.show("box", "workspace")["state"], "incomplete");
    let (status, said) = host.fails(&["workspace", "export", "box"]);
    assert!(status == 1 && said.contains("incomplete"), "{said}");

    let (mut import, mut stdin) = endless_import(host, "box");
    stdin.write_all(&[0; 512]).unwrap();
    drop(stdin);
    let status = import.end().0;
    assert!(
        status == Some(4) && import.stderr().contains("without an end-of-archive mark"),
        "{status:?} {}",
        import.stderr()
    );
    assert_eq!(host.show("box", "workspace")["state"], "incomplete");
}

/// Behind a stalled import, a call with `no_wait` fails immediately, a waiting call can be
/// cancelled, and a full queue is reported. Returns the stalled import.
fn behind_it(host: &Host) -> Spawned {
    let tree = tempfile::tempdir().unwrap();
    let prepare = [
        "workspace",
        "prepare",
        "box",
        tree.path().to_str().unwrap(),
        "--guest-path",
        "/root/t",
    ];
    let (status, said) = host.fails(&[&prepare[..], &["--no-wait"]].concat());
    assert!(
        status == 4 && said.contains("in progress") && said.contains("hint: "),
        "{status} {said}"
    );
    let mut queued: Vec<Spawned> = Vec::new();
    let full = loop {
        let waiting = host.ok(&["op", "list", "-q"]).lines().count();
        let mut next = host.spawn(&prepare);
        let ended = wait_for("the import waits or is refused", || {
            let ended = next.child.try_wait().unwrap();
            (ended.is_some() || host.ok(&["op", "list", "-q"]).lines().count() > waiting)
                .then_some(ended)
        });
        match ended {
            Some(status) => break (status.code(), next.stderr()),
            None => queued.push(next),
        }
        assert!(queued.len() <= 4, "the queue accepts more than its limit");
    };
    assert!(full.0 == Some(4) && full.1.contains("hint: "), "{full:?}");
    let last = queued.remove(0);
    for mut other in queued {
        other.signal("INT");
        let (status, took) = other.end();
        assert!(
            status == Some(130) && took < SOON,
            "{status:?} {took:?} {}",
            other.stderr()
        );
    }
    last
}

/// Starts a thread that writes zeros until the reader is gone.
fn feed(mut stdin: ChildStdin) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let zeros = vec![0; MIB];
        while stdin.write_all(&zeros).is_ok() {}
    })
}

/// Starts a VM. Returns when its VMM runs and its guest does not respond yet.
fn booting(host: &Host, vm: &str) -> Spawned {
    let start = host.spawn(&["start", vm]);
    wait_for("the VMM runs", || {
        let shown = host.json(&["vm", "show", vm]);
        (shown["state"] == "starting" && shown["pid"].is_u64()).then_some(())
    });
    start
}

#[test]
fn booting_vm_is_stopped_and_deleted_immediately() {
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "box"]);
    for (method, params) in [
        ("vm.stop", json!({"vm": "box"})),
        ("vm.kill", json!({"vm": "box"})),
        ("vm.delete", json!({"vm": "box"})),
    ] {
        let mut start = booting(&host, "box");
        answers_at_once(&host, "box");
        let (answer, took) = timed(&host, method, params);
        let begun = Instant::now();
        assert!(
            answer["result"]["op"].is_string() && took < AT_ONCE,
            "{method}: {took:?} {answer}"
        );
        wait_for("the VMM is gone", || {
            vmm_processes(&host.state()).is_empty().then_some(())
        });
        assert!(begun.elapsed() < SOON, "{method}: {:?}", begun.elapsed());
        let status = start.end().0;
        assert!(
            status != Some(0) && start.stderr().contains("cancelled"),
            "{status:?} {}",
            start.stderr()
        );
        if method != "vm.delete" {
            host.ok(&["vm", "wait", "box", "--timeout", "10s"]);
        }
    }
    wait_for("nothing left", || host.census().is_empty().then_some(()));
    assert_eq!(host.ok(&["ps", "-aq"]), "");
}

#[test]
fn concurrent_calls_end_in_valid_state_with_real_guest() {
    let host = Host::start();
    host.ok(&["vm", "create", "--name", "box"]);
    let mut start = booting(&host, "box");
    let mut stops = [host.spawn(&["stop", "box"]), host.spawn(&["stop", "box"])];
    for stop in &mut stops {
        assert_eq!(stop.end().0, Some(0), "{}", stop.stderr());
    }
    assert_ne!(start.end().0, Some(0));
    assert_eq!(
        (
            host.show("box", "state"),
            vmm_processes(&host.state()).len()
        ),
        (json!("stopped"), 0)
    );

    let mut pair = [host.spawn(&["start", "box"]), host.spawn(&["stop", "box"])];
    let statuses = pair.each_mut().map(|p| p.end().0);
    let state = host.show("box", "state");
    let expected = usize::from(state == "running");
    assert!(
        state == "running" || state == "stopped",
        "{statuses:?} {state}"
    );
    assert_eq!(
        vmm_processes(&host.state()).len(),
        expected,
        "{statuses:?} {state}"
    );

    host.ok(&["stop", "--force", "box"]);
    let mut pair = [
        host.spawn(&["vm", "delete", "--force", "box"]),
        host.spawn(&["start", "box"]),
    ];
    assert_eq!(pair[0].end().0, Some(0), "{}", pair[0].stderr());
    assert_ne!(pair[1].end().0, Some(0));
    assert_eq!(host.ok(&["ps", "-aq"]), "");
    assert_eq!(host.census(), Vec::<String>::new());
}
