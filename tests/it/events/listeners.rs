//! Tests with listeners that read slowly, that may see only their own VMs, or that send invalid
//! requests.

use super::{listen, read_line, set_vcpus, watch_from_snapshot};
use crate::world::*;
use fcd::testing::api::event::*;
use fcd::testing::api::frame::{Line, Note};
use fcd::testing::api::vm::*;
use fcd::testing::daemon::Caller;
use fcd::testing::error::Kind;
use fcd::testing::store::QUEUE_MAX;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;

#[test]
fn watch_shows_owner_own_vms_and_root_all() {
    let world = World::new();
    let create = |name: &str, uid| {
        let request = VmCreateRequest {
            name: Some(name.parse().unwrap()),
            ..Default::default()
        };
        world
            .daemon()
            .creator
            .create(
                &Caller {
                    uid,
                    gid: uid,
                    pid: 0,
                },
                &request,
            )
            .unwrap()
    };
    let mine = create("mine", 1000);
    let listeners = [1000, 2000, 0].map(|uid| listen(&world, uid));
    create("theirs", 2000);
    world.place(&mine.id);
    // Root acts on another user's VM, and the owner sees the result.
    world.start("mine").unwrap();
    for name in ["mine", "theirs"] {
        set_vcpus(&world, name, 4);
        world.run::<VmKill>(request("mine")).unwrap();
        world.start("mine").unwrap();
    }
    create("common", 0);
    set_vcpus(&world, "common", 5);
    set_vcpus(&world, "theirs", 6);
    world.stop("mine").unwrap();
    set_vcpus(&world, "mine", 6);
    let [mine, theirs, root] = listeners;
    let mine = mine.lines_until("mine", 6);
    assert!(
        mine.iter().all(|l| l.starts_with("mine "))
            && mine.contains(&"mine vm.start Ok".to_owned()),
        "{mine:?}"
    );
    let theirs = theirs.lines_until("theirs", 6);
    assert_eq!(
        theirs,
        [
            "theirs created",
            "theirs changed vcpus",
            "theirs changed vcpus"
        ]
    );
    let root = root.lines_until("common", 5);
    assert!(
        theirs[..2].iter().all(|l| root.contains(l))
            && root.contains(&"mine vm.kill Ok".to_owned()),
        "{root:?}"
    );
}

/// A client that reads lines only when the test asks for them.
struct Plain(BufReader<UnixStream>);

impl Plain {
    fn watch(world: &World, params: &str) -> Self {
        let stream = UnixStream::connect(&world.config.socket).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut plain = Self(BufReader::new(stream));
        plain.ask(params, true);
        plain
    }

    fn ask(&mut self, params: &str, more: bool) {
        let call = format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"events.watch","params":{params},"more":{more}}}"#
        );
        writeln!(self.0.get_mut(), "{call}").unwrap();
    }

    fn next(&mut self) -> Line {
        read_line(&mut self.0).expect("the daemon has hung up")
    }
}

#[test]
fn watch_slow_reader_delays_nobody_and_loses_nothing() {
    const CHANGES: u32 = 3000;
    let world = World::new();
    world.create("web");
    let mut slow = Plain::watch(&world, "{}");
    let Line::Note(Note::Snapshot(_)) = slow.next() else {
        panic!("the first line is not a snapshot")
    };
    let (mut fast, call) = watch_from_snapshot(&world);
    let id = world.show("web").unwrap().id;
    for n in 1..=CHANGES {
        let change = world
            .daemon()
            .core
            .store
            .change(|tx| tx.update_vm_unlocked(&id, |r| r.shape.mem_mib = u64::from(n)));
        change.unwrap().1.detach();
        if n % 250 == 0 {
            // One listener reads nothing. The other receives every event, and calls are still
            // answered.
            fast.follow(&call, "web", "mem_mib", n);
            assert_eq!(world.show("web").unwrap().mem_mib, u64::from(n));
        }
    }
    assert_eq!(fast.lines.len(), CHANGES as usize);
    let (mut heard, mut lags) = (Vec::new(), 0);
    while heard.len() < CHANGES as usize {
        match slow.next() {
            Line::Note(Note::Events(told)) => match &told.events[0].what {
                What::Changed { set } => heard.push(set["mem_mib"].as_u64().unwrap()),
                other => panic!("{other:?}"),
            },
            Line::Note(Note::Lagged(lagged)) => {
                lags += 1;
                assert_eq!(lagged.dropped, u64::from(CHANGES) - heard.len() as u64);
                let Line::Response(response) = slow.next() else {
                    panic!("a lag does not end the call")
                };
                let reply: EventsWatchReply =
                    serde_json::from_str(response.result.unwrap().get()).unwrap();
                assert_eq!(reply.resume_seq, lagged.resume_seq);
                slow.ask(&format!(r#"{{"since":{}}}"#, lagged.resume_seq), true);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        heard,
        (1..=u64::from(CHANGES)).collect::<Vec<_>>(),
        "each change arrives once and in order"
    );
    assert!(lags == 1 && CHANGES as usize > QUEUE_MAX, "{lags}");
}

#[test]
fn watch_on_half_closed_connection_continues() {
    let world = World::new();
    let mut plain = Plain::watch(&world, "{}");
    plain
        .0
        .get_mut()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    let Line::Note(Note::Snapshot(_)) = plain.next() else {
        panic!("no snapshot")
    };
    world.create("web");
    let Line::Note(Note::Events(told)) = plain.next() else {
        panic!("no events")
    };
    assert_eq!(told.events[0].name.as_ref().unwrap().as_str(), "web");
}

#[test]
fn watch_with_invalid_parameters_keeps_connection_open() {
    let world = World::new();
    let mut plain = Plain::watch(&world, r#"{"sinse":1}"#);
    for _ in 0..2 {
        let Line::Response(response) = plain.next() else {
            panic!("no answer")
        };
        assert_eq!(
            response.error.unwrap().data.unwrap().kind,
            Kind::InvalidArgument.name()
        );
        plain.ask("{}", false);
    }
}
