//! Goldens of the lines that carry calls, replies and notes.

use super::{fault, id, line, progress, reply, request};
use expect_test::expect;
use fcd::testing::api::frame::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::*;
use std::fmt::Write;

#[test]
fn frame_goldens() {
    let mut all = String::new();
    let notes = [
        Note::Op { op: id() },
        Note::Progress(progress()),
        Note::Created(Box::new(reply().vm)),
        Note::Session { session: id() },
        Note::Ready(Ready {
            keep: vec!["a".into()],
        }),
        Note::Log(LogChunk {
            text: "hello\n".into(),
        }),
    ];
    for note in notes {
        let text = line(&Notification {
            jsonrpc: Version::V2,
            note: note.clone(),
        });
        match Line::<Box<serde_json::value::RawValue>>::parse(text.as_bytes()).unwrap() {
            Some(Line::Note(back)) => assert_eq!(back, note),
            other => panic!("{other:?}"),
        }
        writeln!(all, "{text}").unwrap();
    }
    let id = serde_json::value::RawValue::from_string("7".into()).unwrap();
    let params = serde_json::value::to_raw_value(&request()).unwrap();
    let request = Request {
        jsonrpc: Version::V2,
        id: &id,
        method: "vm.start".into(),
        params: Some(&params),
        more: true,
        key: Some("k".into()),
    };
    writeln!(all, "{}", serde_json::to_string(&request).unwrap()).unwrap();
    let error = RpcError {
        code: rpc_code::DOMAIN,
        message: "the queue is full".into(),
        data: Some(fault()),
    };
    writeln!(
        all,
        "{}",
        line(&Response::<()> {
            jsonrpc: Version::V2,
            id: id.clone(),
            result: None,
            error: Some(error)
        })
    )
    .unwrap();
    writeln!(
        all,
        "{}",
        line(&Response {
            jsonrpc: Version::V2,
            id,
            result: Some(params),
            error: None
        })
    )
    .unwrap();
    assert!(
        Line::<Box<serde_json::value::RawValue>>::parse(
            br#"{"jsonrpc":"2.0","method":"newer","params":{}}"#
        )
        .unwrap()
        .is_none()
    );
    expect![[r#"
        {"jsonrpc":"2.0","method":"op","params":{"op":"0123456789ab"}}
        {"jsonrpc":"2.0","method":"progress","params":{"stage":"copy","done":1,"total":2,"unit":"bytes","parts":[{"name":"3f1d2a4b5c6d","state":"downloading","done":1,"total":2}],"parts_total":2}}
        {"jsonrpc":"2.0","method":"created","params":{"id":"0123456789ab","name":"web","owner_uid":1000,"state":"running","reason":"why","image":"default","image_digest":"sha256:1","kernel":null,"init":"fcd","vcpus":1,"mem_mib":1024,"disk_bytes":4096,"work_disk_bytes":null,"disk_bytes_per_s":1048576,"disk_ops_per_s":null,"net_rx_bytes_per_s":null,"net_tx_bytes_per_s":null,"net":"nat","ports":[{"host_addr":"127.0.0.1","host_port":8080,"guest_port":80,"protocol":"tcp"}],"auto_ports":{"open":[],"refused":[{"guest_port":3000,"cause":"conflict","reason":"taken"}]},"pending":null,"rm":false,"restart":"always","created_at":1,"started_at":2,"op":"0123456789ab","pid":3,"ip":"10.89.0.2","ip6":"fdfc:1a2b:3c4d::2","ssh_addr":"127.0.0.1:22","driver":"qemu (tcg, microvm)","disk_driver":"qcow2","synced":"timeout","unresponsive":false,"paused":false,"balloon_mib":512,"workspace":null,"host_name":"build","dns":["1.1.1.1"],"commands":{"user":"dev","workdir":"/srv/app","env":["A"]},"labels":{"ci":"yes"}}}
        {"jsonrpc":"2.0","method":"session","params":{"session":"0123456789ab"}}
        {"jsonrpc":"2.0","method":"ready","params":{"keep":["a"]}}
        {"jsonrpc":"2.0","method":"log","params":{"text":"hello\n"}}
        {"jsonrpc":"2.0","id":7,"method":"vm.start","params":{"vm":"web"},"more":true,"key":"k"}
        {"jsonrpc":"2.0","id":7,"error":{"code":-32000,"message":"the queue is full","data":{"code":"busy","kind":"pool_full","message":"the queue is full","hint":"try again","retryable":true,"op":"0123456789ab"}}}
        {"jsonrpc":"2.0","id":7,"result":{"vm":"web"}}
    "#]].assert_eq(&all);
}
