use super::super::tests::{check, fcctl};
use crate::client::fake::{Fake, Request};
use expect_test::expect;
use serde_json::json;

#[test]
fn debug_locks_lists_holders_and_waiters() {
    let fake = Fake::start(|r| {
        let party = |op: &str, us: u64| json!({"thread": "conn-1", "operation": op, "for_us": us});
        r.result(json!({"violations": 0, "checked": true, "locks": [
            {"set": "vm_locks", "key": "0123456789ab", "holder": party("vm.stop", 12), "waiters": [party("vm.delete", 4_200_000)]}]}));
    });
    check(
        &fake,
        &["debug", "locks"],
        expect![[r#"
        > debug.locks {}
        LOCK      KEY           WHO    OPERATION  FOR   THREAD
        vm_locks  0123456789ab  holds  vm.stop    12us  conn-1
        vm_locks  0123456789ab  waits  vm.delete  4s    conn-1
        lock-order violations: 0 so far
        status 0
    "#]],
    );
}

/// A daemon with the lock checker, and what it reports.
fn checked_locks(r: Request) {
    r.result(json!({
        "violations": 0, "checked": true, "locks": [], "log_lines_dropped": 3,
        "classes": [{"class": "vm_locks", "waits": [98, 0, 1, 1], "holds": [0, 0, 0, 100]},
            {"class": "create_vm", "waits": [], "holds": []}],
        "edges": [{"from": "vm_locks", "to": "store", "from_site": "src/a.rs:1:2", "to_site": "src/b.rs:3:4"}],
        "contention": [{"class": "store", "site": "src/b.rs:3:4", "count": 2},
            {"class": "vm_locks", "site": "src/a.rs:1:2", "count": 7}],
    }));
}

#[test]
fn debug_locks_stats_shows_bounds_and_places() {
    check(
        &Fake::start(checked_locks),
        &["debug", "locks", "--stats"],
        expect![[r#"
        > debug.locks {}
        LOCK      WHAT   COUNT  50%   99%   100%
        vm_locks  waits  100    <1us  <4us  <8us
        vm_locks  holds  100    <8us  <8us  <8us

        LOCK      WAITED  PLACE
        vm_locks  7       src/a.rs:1:2
        store     2       src/b.rs:3:4
        log lines dropped: 3
        status 0
    "#]],
    );
}

#[test]
fn lock_order_graph_marks_what_the_daemon_has_seen() {
    let graph = fcctl(
        &Fake::start(checked_locks),
        &["debug", "lock-order", "--dot"],
    );
    let graph = String::from_utf8(graph.out).unwrap();
    let seen = "Vm -> Store [style=bold, tooltip=\"src/a.rs:1:2 -> src/b.rs:3:4\"];";
    assert!(graph.contains(seen), "{graph}");
    assert!(
        graph.contains("Workspace -> Store [style=dotted];"),
        "{graph}"
    );
}

#[test]
fn lock_order_needs_no_daemon() {
    let fake = Fake::start(|r| r.result(json!({})));
    let table = fcctl(&fake, &["debug", "lock-order"]);
    let text = String::from_utf8(table.out).unwrap();
    assert!(
        text.contains("vm_locks") && text.lines().count() == crate::locks::Rank::ALL.len() + 1,
        "{text}"
    );
    let dot = String::from_utf8(fcctl(&fake, &["debug", "lock-order", "--dot"]).out).unwrap();
    assert!(
        dot.starts_with("digraph locks {") && dot.contains("Vm -> Store;"),
        "{dot}"
    );
    let json: serde_json::Value =
        serde_json::from_slice(&fcctl(&fake, &["--json", "debug", "lock-order"]).out).unwrap();
    assert_eq!(
        (&json[1]["taken"], &json[1]["under"]),
        (&json!("vm_locks"), &json!([]))
    );
    // Only `--dot` calls the daemon, for the observed edges. It ignores this daemon's empty reply.
    assert_eq!(fake.methods(), "debug.locks");
}
