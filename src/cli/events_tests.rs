use super::super::tests::{NOW_S, Start, check, fcctl, fcctl_from, file_with, vm};
use super::*;
use crate::api::Fault;
use crate::api::event::{Events, Lagged};
use crate::api::op::OpState;
use crate::api::vm::{VmState, WorkspaceState};
use crate::client::fake::{Fake, Request};
use crate::ids::OpId;
use expect_test::expect;
use serde_json::json;
use std::fs::File;
use std::io::{Read, Seek};

fn op() -> OpId {
    "0123456789ab".parse().unwrap()
}

fn event(seq: u64, name: &str, what: What) -> Event {
    let vm = vm(name, VmState::Running);
    Event {
        seq,
        at: NOW_S + seq,
        vm: Some(vm.id),
        name: Some(vm.name),
        owner_uid: 1000,
        what,
    }
}

fn state(from: VmState, to: VmState, reason: Option<&str>) -> What {
    State {
        from,
        to,
        reason: reason.map(str::to_owned),
        op: Some(op()),
        set: set(&json!({"state": to})),
    }
}
use What::*;

fn set(members: &serde_json::Value) -> Members {
    members.as_object().unwrap().clone()
}

fn events_note(seq: u64, whats: Vec<What>) -> Note {
    Note::Events(Events {
        seq,
        events: whats
            .into_iter()
            .map(|what| event(seq, "web", what))
            .collect(),
    })
}

fn op_ended(state: OpState, error: Option<Error>) -> What {
    OpEnded {
        op: op(),
        method: "vm.start".into(),
        state,
        error: error.map(Fault::from),
    }
}

/// Sends one event of each kind. Then the daemon shuts down.
fn one_of_everything(mut r: Request) {
    assert!(r.method == "events.watch" && r.more);
    let part = |more, vms| {
        Note::Snapshot(Snapshot {
            seq: 7,
            at: NOW_S,
            resync: false,
            more,
            vms,
        })
    };
    r.note(part(true, vec![vm("web", VmState::Running)]));
    r.note(part(
        false,
        vec![Vm {
            reason: Some("the VMM died".into()),
            ..vm("db", VmState::Failed)
        }],
    ));
    r.note(events_note(
        8,
        vec![Created {
            set: set(&json!({"state": "created"})),
        }],
    ));
    r.note(events_note(
        9,
        vec![state(VmState::Created, VmState::Starting, None)],
    ));
    // This event prints nothing, because users do not need process IDs.
    r.note(events_note(
        10,
        vec![Changed {
            set: set(&json!({"pid": 7})),
        }],
    ));
    r.note(events_note(
        11,
        vec![
            state(VmState::Starting, VmState::Running, None),
            op_ended(OpState::Ok, None),
        ],
    ));
    r.note(events_note(
        12,
        vec![state(
            VmState::Running,
            VmState::Failed,
            Some("the VMM died: \u{1b}[2J"),
        )],
    ));
    let pending = json!({"vcpus": 2, "mem_mib": 2048, "disk_bytes": null});
    r.note(events_note(
        13,
        vec![Changed {
            set: set(&json!({"pending": pending})),
        }],
    ));
    r.note(events_note(
        14,
        vec![Changed {
            set: set(&json!({"pending": null, "vcpus": 2, "mem_mib": 2048, "rm": true})),
        }],
    ));
    let workspace = WorkspaceInfo {
        guest_path: "/root/web".into(),
        workdir: "/root/web".into(),
        state: WorkspaceState::Incomplete,
        readonly: false,
        entries: 0,
        bytes: 0,
        prepared_at: NOW_S,
    };
    r.note(events_note(
        15,
        vec![Changed {
            set: set(&json!({"workspace": workspace})),
        }],
    ));
    r.note(events_note(
        16,
        vec![Changed {
            set: set(&json!({"workspace": null})),
        }],
    ));
    r.note(events_note(
        17,
        vec![
            Deleted { op: Some(op()) },
            op_ended(OpState::Failed, Some(Error::new(Kind::BootTimeout, "late"))),
        ],
    ));
    let image = Event {
        vm: None,
        name: None,
        ..event(18, "web", op_ended(OpState::Cancelled, None))
    };
    r.note(Note::Events(Events {
        seq: 18,
        events: vec![image],
    }));
    // This event is from a newer daemon.
    r.raw(r#"{"jsonrpc":"2.0","method":"events","params":{"seq":19,"events":[{"seq":19,"at":1,"vm":null,"name":null,"owner_uid":0,"event":"disk.full","free":1}]}}"#);
    r.fault(Error::new(
        Kind::ShuttingDown,
        "the daemon is shutting down",
    ));
}

#[test]
fn events_print_one_line_each() {
    check(
        &Fake::start(one_of_everything),
        &["events"],
        expect![[r#"
            > events.watch {}
            08:00:00  web  is running
            08:00:00  db  is failed (the VMM died)
            08:00:08  web  created
            08:00:09  web  created -> starting
            08:00:11  web  starting -> running
            08:00:11  web  vm.start ok
            08:00:12  web  running -> failed: the VMM died: \u{1b}[2J
            08:00:13  web  at next start: 2 vCPUs, 2 GiB of memory
            08:00:14  web  2 vCPUs, 2 GiB of memory, deleted when it stops
            08:00:15  web  workspace /root/web (incomplete)
            08:00:16  web  no workspace
            08:00:17  web  deleted
            08:00:17  web  vm.start failed: late
            08:00:18  -  vm.start cancelled
            ! fcctl: the daemon is shutting down
            ! hint: once fcd runs again: fcctl events --since 19
            status 4
        "#]],
    );
}

#[test]
fn events_json_prints_one_document_per_line() {
    let ran = fcctl(&Fake::start(one_of_everything), &["events", "--json"]);
    let lines: Vec<serde_json::Value> = ran
        .out
        .split_inclusive(|b| *b == b'\n')
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    let kinds: Vec<_> = lines
        .iter()
        .map(|l| format!("{} {}", l["seq"], l["event"].as_str().unwrap()))
        .collect();
    expect![[r#"
        [
            "7 snapshot",
            "7 snapshot",
            "8 vm.created",
            "9 vm.state",
            "10 vm.changed",
            "11 vm.state",
            "11 op.ended",
            "12 vm.state",
            "13 vm.changed",
            "14 vm.changed",
            "15 vm.changed",
            "16 vm.changed",
            "17 vm.deleted",
            "17 op.ended",
            "18 op.ended",
        ]
    "#]]
    .assert_eq(&format!("{kinds:#?}\n"));
    let text = String::from_utf8(ran.out).unwrap();
    expect![[r#"{"seq":9,"at":1800000009,"vm":"000000776562","name":"web","owner_uid":1000,"event":"vm.state","from":"created","to":"starting","reason":null,"op":"0123456789ab","set":{"state":"starting"}}"#]].assert_eq(text.lines().nth(3).unwrap());
    assert_eq!(
        (
            lines[0]["more"].as_bool(),
            lines[1]["vms"][0]["name"].as_str()
        ),
        (Some(true), Some("db"))
    );
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(
        (ran.status, error["error"]["hint"].as_str()),
        (4, Some("once fcd runs again: fcctl events --since 19"))
    );
}

#[test]
fn events_after_lag_resume_without_gap() {
    let lagging = || {
        Fake::start(|mut r: Request| match r.params["since"].as_u64() {
            Some(5) => {
                r.note(events_note(
                    6,
                    vec![Created {
                        set: Members::new(),
                    }],
                ));
                r.note(Note::Lagged(Lagged {
                    dropped: 9,
                    resume_seq: 6,
                }));
                r.result(json!({"resume_seq": 6}));
            }
            Some(6) => {
                r.note(Note::Snapshot(Snapshot {
                    seq: 90,
                    at: NOW_S,
                    resync: true,
                    more: false,
                    vms: vec![],
                }));
                r.hang_up();
            }
            other => panic!("{other:?}"),
        })
    };
    check(
        &lagging(),
        &["events", "--since", "5"],
        expect![[r#"
            > events.watch {"since":5}
            > events.watch {"since":6}
            08:00:06  web  created
            ! fcctl: 9 changes were dropped because they were not read in time; continuing after change 6
            ! fcctl: changes after 6 are no longer available; state after change 90:
            ! fcctl: events.watch: the daemon closed the connection without an answer
            ! hint: once fcd runs again: fcctl events --since 90
            status 5
        "#]],
    );
    let ran = fcctl(&lagging(), &["events", "--since", "5", "--json"]);
    expect![[r#"
        {"dropped":9,"event":"lagged","resume_seq":6}
        {"at":1800000000,"event":"snapshot","more":false,"resync":true,"seq":90,"vms":[]}
    "#]]
    .assert_eq(
        String::from_utf8(ran.out)
            .unwrap()
            .split_once('\n')
            .unwrap()
            .1,
    );
}

#[test]
fn events_reader_exits_while_idle_ends_quietly() {
    let fake = Fake::start(|mut r: Request| {
        r.note(events_note(
            6,
            vec![Created {
                set: Members::new(),
            }],
        ));
        // No further event arrives, so the idle client itself must notice that its reader has
        // exited.
        r.wait_for_hangup();
    });
    let (mut reader, writer) = std::io::pipe().unwrap();
    let read = crate::host::thread::spawn("reader", move || {
        let mut line = [0; 23];
        reader.read_exact(&mut line).unwrap();
        String::from_utf8(line.to_vec()).unwrap()
    });
    let start = Start {
        stdout: File::from(std::os::fd::OwnedFd::from(writer)),
        ..Start::default()
    };
    let ran = fcctl_from(&fake, start, &["events"]);
    assert_eq!((ran.status, ran.err.as_str()), (0, ""));
    assert_eq!(read.unwrap().join().unwrap(), "08:00:06  web  created\n");
}

#[test]
fn events_full_disk_fails() {
    let start = Start {
        stdout: File::options().write(true).open("/dev/full").unwrap(),
        ..Start::default()
    };
    let ran = fcctl_from(&Fake::start(one_of_everything), start, &["events"]);
    assert_eq!(ran.status, 1, "{}", ran.err);
    // A regular file has no reader that could exit.
    let mut file = file_with(b"");
    let start = Start {
        stdout: file.try_clone().unwrap(),
        ..Start::default()
    };
    assert_eq!(
        fcctl_from(&Fake::start(one_of_everything), start, &["events"]).status,
        4
    );
    file.rewind().unwrap();
    assert!(std::io::read_to_string(file).unwrap().contains("deleted"));
}
