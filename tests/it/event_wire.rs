//! Goldens of `events.watch` and its notes, in the format of `api`.

use crate::api::{call, fault, id, line, name, vm};
use expect_test::expect;
use fcd::testing::api::event::*;
use fcd::testing::api::frame::*;
use fcd::testing::api::op::OpState;
use fcd::testing::api::vm::{Vm, VmState};
use serde_json::json;

fn event(what: What) -> Event {
    Event {
        seq: 7,
        at: 1,
        vm: Some(id()),
        name: Some(name("web")),
        owner_uid: 1000,
        what,
    }
}

fn set(members: serde_json::Value) -> Members {
    members.as_object().unwrap().clone()
}

#[test]
fn events_watch_goldens() {
    call::<EventsWatch>(
        EventsWatchRequest { since: Some(7) },
        EventsWatchReply { resume_seq: 8 },
        expect![[r#"
            events.watch
            {"since":7}
            {"resume_seq":8}
        "#]],
    );
    let state = What::State {
        from: VmState::Starting,
        to: VmState::Failed,
        reason: Some("why".into()),
        op: Some(id()),
        set: set(json!({"state": "failed", "reason": "why"})),
    };
    let ended = What::OpEnded {
        op: id(),
        method: "vm.start".into(),
        state: OpState::Failed,
        error: Some(fault()),
    };
    let well = What::OpEnded {
        op: id(),
        method: "image.build".into(),
        state: OpState::Ok,
        error: None,
    };
    let whats = [
        What::Created {
            set: set(json!({"vcpus": 1})),
        },
        What::Changed {
            set: set(json!({"vcpus": 2})),
        },
        state,
        What::Deleted { op: None },
        ended,
    ];
    let mut events: Vec<_> = whats.into_iter().map(event).collect();
    events.push(Event {
        vm: None,
        name: None,
        ..event(well)
    });
    let vms = vec![Vm {
        workspace: None,
        pending: None,
        ..vm()
    }];
    let notes = [
        Note::Snapshot(Snapshot {
            seq: 7,
            at: 1,
            resync: true,
            more: false,
            vms,
        }),
        Note::Events(Events { seq: 7, events }),
        Note::Lagged(Lagged {
            dropped: 3,
            resume_seq: 9,
        }),
    ];
    let mut all = String::new();
    for note in notes {
        let text = line(&Notification {
            jsonrpc: Version::V2,
            note: note.clone(),
        });
        match Line::<Box<serde_json::value::RawValue>>::parse(text.as_bytes()).unwrap() {
            Some(Line::Note(back)) => assert_eq!(back, note),
            other => panic!("{other:?}"),
        }
        all += &text.replace("{\"seq\":7,\"at\"", "\n{\"seq\":7,\"at\"");
        all += "\n";
    }
    expect![[r#"
        {"jsonrpc":"2.0","method":"snapshot","params":
        {"seq":7,"at":1,"resync":true,"more":false,"vms":[{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}]}}
        {"jsonrpc":"2.0","method":"events","params":{"seq":7,"events":[
        {"seq":7,"at":1,"vm":"0123456789ab","name":"web","owner_uid":1000,"event":"vm.created","set":{"vcpus":1}},
        {"seq":7,"at":1,"vm":"0123456789ab","name":"web","owner_uid":1000,"event":"vm.changed","set":{"vcpus":2}},
        {"seq":7,"at":1,"vm":"0123456789ab","name":"web","owner_uid":1000,"event":"vm.state","from":"starting","to":"failed","reason":"why","op":"0123456789ab","set":{"reason":"why","state":"failed"}},
        {"seq":7,"at":1,"vm":"0123456789ab","name":"web","owner_uid":1000,"event":"vm.deleted","op":null},
        {"seq":7,"at":1,"vm":"0123456789ab","name":"web","owner_uid":1000,"event":"op.ended","op":"0123456789ab","method":"vm.start","state":"failed","error":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}},
        {"seq":7,"at":1,"vm":null,"name":null,"owner_uid":1000,"event":"op.ended","op":"0123456789ab","method":"image.build","state":"ok"}]}}
        {"jsonrpc":"2.0","method":"lagged","params":{"dropped":3,"resume_seq":9}}
    "#]].assert_eq(&all);
    // Clients must ignore an event that only a newer daemon sends.
    let newer =
        r#"{"seq":7,"at":1,"vm":null,"name":null,"owner_uid":0,"event":"disk.full","free":1}"#;
    assert_eq!(
        serde_json::from_str::<Event>(newer).unwrap().what,
        What::Unknown
    );
}
