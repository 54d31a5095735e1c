//! Tests of the driver's operations on a running guest.

use super::{Bench, SOON, driver, soon};
use expect_test::expect;
use fcd::testing::api::vm::RateLimits;
use fcd::testing::error::Kind;
use fcd::testing::host::process::Process;
use fcd::testing::locks::{Cancel, CancelCause};
use fcd::testing::vmm::{Driver, GuestEvent, Vm, VmmSpec};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

fn set_paused(vm: &dyn Vm, is_paused: bool) {
    let never = Cancel::try_new().unwrap();
    if is_paused {
        vm.pause(&never).unwrap();
    } else {
        vm.resume(&never).unwrap();
    }
}

#[test]
fn pause_and_resume_guest() {
    let bench = Bench::new("");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    for is_paused in [true, true, false, false] {
        set_paused(bench.vm(&running).as_ref(), is_paused);
    }
    let asked = bench.requests();
    assert_eq!(asked.matches("PATCH /vm {\"state\":\"Paused\"}").count(), 2);
    // Only a paused guest is resumed. The vsock accepts new streams again because the guest was
    // notified that the old streams ended.
    let requests: Vec<_> = asked
        .lines()
        .skip_while(|l| !l.contains("Paused"))
        .filter(|l| !l.starts_with("GET"))
        .collect();
    expect![[r#"
        PATCH /vm {"state":"Paused"}
        PATCH /vm {"state":"Paused"}
        PUT /snapshot/create {"snapshot_type":"Full","snapshot_path":"/proc/none/none","mem_file_path":"/proc/none/none"}
        PATCH /vm {"state":"Resumed"}"#]]
    .assert_eq(&requests.join("\n"));
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    let e = bench.vm(&running).pause(&never).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

/// Only version 1.16 needs the workaround. Earlier versions do not hold data back, and 1.17 fixed
/// the bug.
#[test]
fn vsock_is_reset_at_resume_only_in_versions_that_need_it() {
    for (version, resets) in [
        ("1.15.1", 0),
        ("1.16.0", 1),
        ("1.16.1", 1),
        ("1.17.0", 0),
        ("2.0.0", 0),
    ] {
        let bench = Bench::new(&format!("VERSION {version}"));
        let running = bench.running();
        for is_paused in [true, false] {
            set_paused(bench.vm(&running).as_ref(), is_paused);
        }
        assert_eq!(
            bench.requests().matches("PUT /snapshot/create").count(),
            resets,
            "{version}"
        );
        bench
            .driver
            .processes()
            .kill(&running.identity, soon())
            .unwrap();
    }
}

#[test]
fn rates_apply_at_start_and_while_running() {
    let bench = Bench::new("");
    let never = Cancel::try_new().unwrap();
    let spec = |rates| VmmSpec {
        rates,
        ..bench.spec()
    };
    let some = spec(RateLimits {
        disk_bytes_per_s: Some(2 << 20),
        disk_ops_per_s: Some(100),
        net_rx_bytes_per_s: Some(3 << 20),
        net_tx_bytes_per_s: None,
    });
    let running = bench.driver.start(&some, &never, &mut |_| {}).unwrap();
    let other = spec(RateLimits {
        disk_ops_per_s: Some(200),
        net_tx_bytes_per_s: Some(1 << 20),
        ..RateLimits::default()
    });
    bench.vm(&running).set_rates(&other, &never).unwrap();
    bench
        .vm(&running)
        .set_rates(&spec(RateLimits::default()), &never)
        .unwrap();
    let limits: Vec<_> = bench
        .requests()
        .lines()
        .filter(|l| l.contains("rate_limiter"))
        .map(str::to_owned)
        .collect();
    expect![[r#"
        PUT /drives/root {"drive_id":"root","path_on_host":"DIR/vm/disk","is_root_device":true,"is_read_only":false,"cache_type":"Writeback","rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000},"ops":{"size":100,"refill_time":1000}}}
        PUT /drives/work {"drive_id":"work","path_on_host":"DIR/vm/work","is_root_device":false,"is_read_only":false,"cache_type":"Writeback","rate_limiter":{"bandwidth":{"size":2097152,"refill_time":1000},"ops":{"size":100,"refill_time":1000}}}
        PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"fc0011aabb-1","guest_mac":"02:fc:0a:59:00:05","rx_rate_limiter":{"bandwidth":{"size":3145728,"refill_time":1000}}}
        PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":200,"refill_time":1000}}}
        PATCH /drives/work {"drive_id":"work","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":200,"refill_time":1000}}}
        PATCH /network-interfaces/eth0 {"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":{"bandwidth":{"size":2097152,"refill_time":2000}}}
        PATCH /drives/root {"drive_id":"root","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /drives/work {"drive_id":"work","rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":{"size":0,"refill_time":0}}}
        PATCH /network-interfaces/eth0 {"iface_id":"eth0","rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}},"tx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}}}"#]].assert_eq(&limits.join("\n"));
    // A refused request and a dead VMM both give an error with a text and a hint.
    bench.script("PATCH /drives/work refuse The requested operation is not supported before starting the microVM.");
    let e = bench.vm(&running).set_rates(&some, &never).unwrap_err();
    assert!(
        e.kind() == Kind::WrongState
            && e.to_string().contains("limit disk work")
            && e.hint_text().is_some(),
        "{e}"
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    let e = bench.vm(&running).set_rates(&some, &never).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

#[test]
fn vsock_connects_to_listener_in_guest() {
    let bench = Bench::new("");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    let connect = |port| bench.vm(&running).connect(port, &never);
    let mut stream = connect(7).unwrap();
    // The connection is blocking, as its user expects.
    let sent = vec![7; 1 << 20];
    let mut writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).unwrap();
    });
    let mut echo = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut stream, &mut echo).unwrap();
    writer.join().unwrap();
    assert_eq!(echo, vec![7; 1 << 20]);
    let e = connect(9).unwrap_err();
    assert!(
        e.kind() == Kind::GuestUnavailable
            && e.to_string().contains("port 9")
            && e.hint_text().is_some(),
        "{e}"
    );
    // The guest does not answer on port 8, so only the cancel token ends the call.
    let enough = Cancel::try_new().unwrap();
    enough.cancel(CancelCause::VmStopped);
    assert_eq!(
        bench.vm(&running).connect(8, &enough).unwrap_err().kind(),
        Kind::Cancelled
    );
    // A VM that an older fcd started does not have this socket.
    std::fs::remove_file(bench.dir.path().join("vm/run/vsock")).unwrap();
    let e = connect(7).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.hint_text().is_some(),
        "{e}"
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    assert_eq!(connect(7).unwrap_err().kind(), Kind::VmmFailed);
}

#[test]
fn ctrl_alt_del_shuts_guest_down() {
    let bench = Bench::new("KEYBOARD");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    bench.vm(&running).press_ctrl_alt_del(&never).unwrap();
    assert!(
        bench
            .driver
            .processes()
            .wait_exit(&running.identity, soon(), &never)
            .unwrap()
    );
    assert!(
        bench
            .requests()
            .ends_with("PUT /actions {\"action_type\":\"SendCtrlAltDel\"}\n")
    );
    assert_eq!(
        bench
            .vm(&running)
            .press_ctrl_alt_del(&never)
            .unwrap_err()
            .kind(),
        Kind::VmmFailed
    );
}

#[test]
fn balloon_takes_the_remaining_memory() {
    let bench = Bench::new("");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    let kept = || bench.vm(&running).balloon_mib(&never).unwrap();
    assert_eq!(kept(), 128);
    for keep_mib in [96, 128] {
        bench.vm(&running).set_balloon(keep_mib, &never).unwrap();
        assert_eq!(kept(), keep_mib);
    }
    bench.script("PATCH /balloon refuse Balloon update error: Balloon: Device not activated yet.");
    let e = bench.vm(&running).set_balloon(96, &never).unwrap_err();
    assert!(e.kind() == Kind::Busy && e.hint_text().is_some(), "{e}");
    bench.script("");
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    // The initramfs of this image has no balloon driver.
    let without = VmmSpec {
        has_balloon: false,
        ..bench.spec()
    };
    let running = bench.driver.start(&without, &never, &mut |_| {}).unwrap();
    let e = bench.vm(&running).set_balloon(96, &never).unwrap_err();
    assert!(
        e.kind() == Kind::Unsupported && e.hint_text().is_some(),
        "{e}"
    );
}

#[test]
fn metrics_are_read_line_by_line() {
    let bench = Bench::new("");
    let (running, never) = (bench.running(), Cancel::try_new().unwrap());
    let flushes = || -> Vec<u64> {
        let all = bench.vm(&running).metrics(&never).unwrap();
        all.iter()
            .map(|line| line["flushes"].as_u64().unwrap())
            .collect()
    };
    assert_eq!((flushes(), flushes()), (vec![1], vec![2]));
    // The driver also returns documents that it did not request, but skips garbage.
    let pipe = bench.dir.path().join("vm/run/metrics");
    std::fs::write(&pipe, "{\"flushes\":77}\n\u{1b}[2J\n").unwrap();
    assert_eq!(flushes(), [77, 3]);
    // The pipe is full. Reading it makes room for the requested line.
    let line = format!("{{\"flushes\":78,\"x\":\"{}\"}}\n", "x".repeat(8000));
    let mut full = std::fs::File::options()
        .custom_flags(nix::libc::O_NONBLOCK)
        .write(true)
        .open(&pipe)
        .unwrap();
    while full.write_all(line.as_bytes()).is_ok() {}
    let all = flushes();
    assert!(
        all.len() > 5 && all[..all.len() - 1].iter().all(|n| *n == 78),
        "{all:?}"
    );
    assert_eq!(flushes(), [5]);
    // The next daemon can read the metrics too.
    assert_eq!(
        driver(bench.dir.path())
            .vm(bench.spec().running_as(&running.identity))
            .unwrap()
            .metrics(&never)
            .unwrap()[0]["flushes"],
        6
    );
    bench
        .driver
        .processes()
        .kill(&running.identity, soon())
        .unwrap();
    let e = bench.vm(&running).metrics(&never).unwrap_err();
    assert!(
        e.kind() == Kind::VmmFailed && e.to_string().contains("has exited"),
        "{e}"
    );
}

#[test]
fn watch_reports_death_and_silence() {
    let bench = Bench::new("");
    let running = bench.running();
    let (sender, reports) = std::sync::mpsc::channel();
    let (died, deaths) = std::sync::mpsc::channel();
    bench
        .driver
        .processes()
        .watch(
            &bench.spec().dir,
            &running.identity,
            Box::new(move |how| died.send(how).unwrap()),
        )
        .unwrap();
    let dir = bench.dir.path().join("vm");
    bench
        .driver
        .watch_guest(
            &dir,
            &running.identity,
            Box::new(move |what| sender.send(what).unwrap_or_default()),
        )
        .unwrap();
    let process = Process::open(&running.identity).unwrap().unwrap();
    process.signal(rustix::process::Signal::STOP).unwrap();
    // The VMM may have answered once before it was stopped.
    let next = || {
        std::iter::repeat_with(|| reports.recv_timeout(SOON).unwrap())
            .find(|report| *report != GuestEvent::Answered)
            .unwrap()
    };
    for _ in 0..2 {
        assert_eq!(next(), GuestEvent::Unresponsive(true));
    }
    process.signal(rustix::process::Signal::CONT).unwrap();
    let heard = || (next() == GuestEvent::Unresponsive(false)).then_some(());
    assert!(
        (0..3).any(|_| heard().is_some()),
        "the driver does not report that the VMM answers again"
    );
    process.signal(rustix::process::Signal::KILL).unwrap();
    assert_eq!(
        deaths.recv_timeout(SOON).unwrap(),
        fcd::testing::vmm::End::Vmm(fcd::testing::vmm::Exit::Signal(9))
    );
}
