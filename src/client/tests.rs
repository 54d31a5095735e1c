use super::failure::LOST;
use super::fake::{Fake, Request};
use super::*;
use crate::api::Empty;
use crate::api::daemon::{DebugLocks, Doctor};
use crate::api::exec::{ExecStart, ExecStartRequest};
use crate::api::op::Progress;
use crate::api::vm::{VmListBrief, VmListRequest, VmShow, VmStart};
use crate::error::Code;
use expect_test::{Expect, expect};
use serde_json::json;
use std::io::Write;
use std::os::fd::AsFd;

fn show(client: &mut Client) -> Result<crate::api::vm::VmReply> {
    client.call::<VmShow>(&crate::api::vm::VmRequest {
        vm: "web".to_owned(),
    })
}

/// Checks the error of a call to a daemon that answers with `answer`.
#[track_caller]
fn check(answer: impl Fn(Request) + Send + Sync + 'static, expected: Expect) {
    let fake = Fake::start(answer);
    let mut client = Client::connect(&fake.socket()).unwrap();
    let e = show(&mut client).unwrap_err();
    expected.assert_eq(&format!(
        "{} {} {}\n{e}\nhint: {:?}\n",
        e.exit_status(),
        e.kind(),
        e.unreachable,
        e.fault.hint
    ));
}

#[test]
fn faults_keep_code_kind_and_hint() {
    check(
        |r| r.fault(Error::new(Kind::VmNotFound, "no VM web").hint("fcctl ps -a")),
        expect![[r#"
            3 vm_not_found false
            no VM web
            hint: Some("fcctl ps -a")
        "#]],
    );
}

#[test]
fn kind_of_a_newer_daemon_is_kept() {
    check(
        |mut r| {
            r.raw(r#"{"jsonrpc":"2.0","id":2,"error":{"code":-32000,"message":"x","data":{"code":"busy","kind":"moon_full","message":"x","retryable":true,"extra":1}}}"#);
        },
        expect![[r#"
            4 moon_full false
            x
            hint: None
        "#]],
    );
}

#[test]
fn error_about_the_connection_has_no_id() {
    check(
        |mut r| {
            r.raw(r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32601,"message":"no method vm.show"}}"#)
        },
        expect![[r#"
            2 method_not_found false
            no method vm.show
            hint: None
        "#]],
    );
}

#[test]
fn daemon_that_closes_the_connection_is_unreachable() {
    check(
        Request::hang_up,
        expect![[r#"
            5 daemon_lost true
            vm.show: the daemon closed the connection without an answer
            hint: Some("see whether fcd runs: fcctl doctor")
        "#]],
    );
}

#[test]
fn answer_to_another_call_is_refused() {
    check(
        |mut r| r.raw(r#"{"jsonrpc":"2.0","id":77,"result":{}}"#),
        expect![[r#"
            1 internal false
            vm.show: the daemon answered another call (77)
            hint: None
        "#]],
    );
}

#[test]
fn overlong_line_is_refused() {
    check(
        |mut r| r.raw(&"x".repeat(crate::api::limits::FRAME_BYTES_MAX + 1)),
        expect![[r#"
            1 internal false
            vm.show: the daemon sent a line of more than 1048576 bytes
            hint: None
        "#]],
    );
}

#[test]
fn malformed_line_hints_at_versions() {
    check(
        |mut r| r.raw("hello"),
        expect![[r#"
            1 version_mismatch false
            read the answer to vm.show: expected value at line 1 column 1
            hint: Some("fcctl and fcd may have different versions: run fcctl version")
        "#]],
    );
}

#[track_caller]
fn refused(socket: &Path, expected: Expect) {
    let e = Client::connect(socket).err().expect("refused");
    let text = format!(
        "{} {}\n{e}\nhint: {}\n",
        e.exit_status(),
        e.kind(),
        e.fault.hint.clone().unwrap_or_default()
    );
    expected.assert_eq(&text.replace(socket.to_str().unwrap(), "SOCKET"));
}

#[test]
fn every_unreachable_daemon_has_its_hint() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("fcd.sock");
    refused(
        &socket,
        expect![[r#"
            5 daemon_absent
            no daemon at SOCKET: the socket does not exist
            hint: start the daemon (fcd), or name its socket (--socket S or FCD_SOCKET)
        "#]],
    );
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    refused(
        &socket,
        expect![[r#"
            5 daemon_absent
            no daemon at SOCKET: connection refused
            hint: start the daemon again: fcd
        "#]],
    );
    let long = dir.path().join("x".repeat(200));
    let e = Client::connect(&long).err().unwrap();
    assert_eq!((e.exit_status(), e.kind()), (5, LOST));
}

#[test]
fn different_versions_fail_or_warn() {
    let fake = Fake::with_version(VERSION_MAJOR + 1, 0, |_| unreachable!());
    let e = Client::connect(&fake.socket()).err().unwrap();
    assert_eq!((e.exit_status(), e.kind()), (5, "version_mismatch"));
    assert!(e.fault.hint.is_some());

    let fake = Fake::with_version(VERSION_MAJOR, VERSION_MINOR + 1, |_| unreachable!());
    let client = Client::connect(&fake.socket()).unwrap();
    assert!(
        client
            .warning()
            .unwrap()
            .contains(&format!("protocol {VERSION_MAJOR}.{}", VERSION_MINOR + 1))
    );

    let fake = Fake::start(|_| unreachable!());
    assert_eq!(Client::connect(&fake.socket()).unwrap().warning(), None);
}

#[test]
fn notes_arrive_in_order_and_unknown_ones_are_skipped() {
    let fake = Fake::start(|mut r| {
        assert!(r.more);
        r.raw(r#"{"jsonrpc":"2.0","method":"weather","params":{"sky":"blue"}}"#);
        r.note(Note::Progress(Progress {
            stage: "boot".to_owned(),
            ..Progress::default()
        }));
        r.note(Note::Progress(Progress {
            stage: "ssh".to_owned(),
            ..Progress::default()
        }));
        r.fault(Error::new(Kind::BootTimeout, "late"));
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let mut stages = vec![];
    let request = crate::api::vm::VmRequest {
        vm: "web".to_owned(),
    };
    let result = client.call_more::<VmStart>(&request, &[], &mut |note| {
        let Note::Progress(p) = note else {
            panic!("{note:?}")
        };
        stages.push(p.stage);
        Ok(())
    });
    assert_eq!(result.unwrap_err().fault.code, Code::Timeout);
    assert_eq!(stages, ["boot", "ssh"]);
}

#[test]
fn closure_error_hangs_up() {
    let (gone, seen) = crossbeam_channel::bounded(1);
    let fake = Fake::start(move |mut r| {
        r.note(Note::Progress(Progress::default()));
        r.wait_for_hangup();
        gone.send(()).unwrap();
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let request = crate::api::vm::VmRequest {
        vm: "web".to_owned(),
    };
    let e = client
        .call_more::<VmStart>(
            &request,
            &[],
            &mut |_| Err(Error::internal("enough").into()),
        )
        .unwrap_err();
    assert_eq!(e.to_string(), "enough");
    seen.recv_timeout(Duration::from_secs(10)).unwrap();
}

#[test]
fn another_thread_can_hang_up() {
    let (ready, go) = crossbeam_channel::bounded(1);
    let fake = Fake::start(move |mut r| {
        ready.send(()).unwrap();
        r.wait_for_hangup();
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let hangup = client.hangup().unwrap();
    let cutter = super::fake::spawn(move || {
        go.recv_timeout(Duration::from_secs(10)).unwrap();
        hangup.hang_up();
    });
    let e = client
        .call_more::<DebugLocks>(&Empty {}, &[], &mut |_| Ok(()))
        .unwrap_err();
    assert_eq!(e.kind(), LOST);
    cutter.join().unwrap();
}

#[test]
fn large_request_carries_descriptors() {
    let fake = Fake::start(|mut r| {
        assert_eq!(r.params["argv"][0].as_str().unwrap().len(), 500_000);
        let fd = r.fds.pop().unwrap();
        std::fs::File::from(fd)
            .write_all(b"through the pipe")
            .unwrap();
        r.result(json!({"exit": {"status": 7}}));
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let request = ExecStartRequest {
        vm: "web".to_owned(),
        argv: vec!["x".repeat(500_000)],
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams: vec![crate::api::exec::Stream::Stdout],
        no_wait_children: false,
    };
    let reply = client
        .call_more::<ExecStart>(&request, &[writer.as_fd()], &mut |_| Ok(()))
        .unwrap();
    drop(writer);
    assert_eq!(reply.exit.shell_status(), 7);
    assert_eq!(
        std::io::read_to_string(&mut reader).unwrap(),
        "through the pipe"
    );
    let too_long = ExecStartRequest {
        argv: vec!["x".repeat(1 << 20)],
        ..request
    };
    let e = client
        .call_more::<ExecStart>(&too_long, &[], &mut |_| Ok(()))
        .unwrap_err();
    assert_eq!((e.kind(), e.exit_status()), ("frame_too_large", 2));
    // The connection can still be used.
    assert!(
        client
            .call_raw(
                "fcd.info",
                &RawValue::from_string("{}".to_owned()).unwrap(),
                CALL_DEADLINE
            )
            .is_ok()
    );
}

#[test]
fn silent_daemon_times_out() {
    let fake = Fake::start(|mut r| r.wait_for_hangup());
    let mut client = Client::connect(&fake.socket()).unwrap();
    let params = RawValue::from_string("{}".to_owned()).unwrap();
    let e = client
        .call_raw(<Doctor as Call>::METHOD, &params, Duration::from_millis(50))
        .unwrap_err();
    assert_eq!((e.fault.code, e.exit_status()), (Code::Timeout, 124));
}

fn brief(name: &str) -> serde_json::Value {
    json!({"id": "0123456789ab", "name": name, "state": "running", "image": "default", "vcpus": 1, "mem_mib": 1, "created_at": 1})
}

#[test]
fn list_requests_the_next_page_before_the_previous_one_is_used() {
    const SOON: Duration = Duration::from_secs(10);
    let (requested, requests) = crossbeam_channel::unbounded();
    let fake = Fake::start(move |r| {
        let page: u64 = r.params["after"]
            .as_str()
            .map_or(0, |after| after.parse().unwrap());
        if page > 0 {
            requested.send(page).unwrap();
        }
        let next = (page < 2).then(|| (page + 1).to_string());
        r.result(json!({"vms": [brief(&format!("v{page}"))], "next": next}));
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let mut names = Vec::new();
    let mut on_page = |vms: Vec<crate::api::vm::VmBrief<'_>>| {
        names.extend(vms.into_iter().map(|vm| vm.name.to_string()));
        let next = names.len() as u64;
        if next < 3 {
            assert_eq!(
                requests.recv_timeout(SOON),
                Ok(next),
                "the page was not requested early"
            );
        }
    };
    client
        .list_pages::<VmListBrief>(VmListRequest::default(), &mut on_page)
        .unwrap();
    assert_eq!(names, ["v0", "v1", "v2"]);
    assert!(requests.is_empty());
}

#[test]
fn empty_page_that_is_not_the_last_is_an_error() {
    let fake = Fake::start(|r| r.result(json!({"vms": [], "next": "1"})));
    let mut client = Client::connect(&fake.socket()).unwrap();
    let e = client
        .list::<VmListBrief>(VmListRequest::default())
        .unwrap_err();
    assert!(
        e.is(Kind::Internal) && e.fault.message.contains("empty page"),
        "{e:?}"
    );
}

#[test]
fn lines_that_arrive_together_are_read_one_by_one() {
    let fake = Fake::start(|mut r| {
        let note = |stage: &str| {
            format!(r#"{{"jsonrpc":"2.0","method":"progress","params":{{"stage":"{stage}"}}}}"#)
        };
        r.raw(&format!(
            "{}\n{}\n{{\"jsonrpc\":\"2.0\",\"id\":2,\"result\":{{}}}}",
            note("one"),
            note("two")
        ));
    });
    let mut client = Client::connect(&fake.socket()).unwrap();
    let mut stages = Vec::new();
    let params = RawValue::from_string("{}".to_owned()).unwrap();
    let mut on_note = |note| {
        if let Note::Progress(progress) = note {
            stages.push(progress.stage);
        }
        Ok(())
    };
    let answer = client
        .call_raw_more("vm.start", &params, &mut on_note)
        .unwrap();
    assert_eq!((answer.get(), stages.len()), ("{}", 2));
}
