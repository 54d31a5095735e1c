//! Tests of idempotency keys: two calls with the same key and the same parameters are one
//! operation.

use crate::world::*;
use fcd::testing::api::call::Key;
use fcd::testing::api::frame::{Request, Response, Version};
use fcd::testing::api::op::OpStarted;
use fcd::testing::api::vm::*;
use fcd::testing::error::Kind;
use serde_json::value::RawValue;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

/// Makes one call with a key, as a script would. Returns the response.
pub fn call(world: &World, method: &str, params: &str, key: &str, more: bool) -> Response {
    send(world, method, params, Some(key), more)
}

/// Makes one call, with `key` if there is one. Returns the response.
pub fn send(world: &World, method: &str, params: &str, key: Option<&str>, more: bool) -> Response {
    let (id, params) = (
        RawValue::from_string("1".into()).unwrap(),
        RawValue::from_string(params.into()).unwrap(),
    );
    let request = Request {
        jsonrpc: Version::V2,
        id: &id,
        method: method.into(),
        params: Some(&params),
        more,
        key: key.map(Into::into),
    };
    let mut stream = UnixStream::connect(&world.config.socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    writeln!(stream, "{}", serde_json::to_string(&request).unwrap()).unwrap();
    for line in BufReader::new(stream).lines() {
        if let Some(fcd::testing::api::frame::Line::Response(response)) =
            fcd::testing::api::frame::Line::<Box<serde_json::value::RawValue>>::parse(
                line.unwrap().as_bytes(),
            )
            .unwrap()
        {
            return response;
        }
    }
    panic!("no answer");
}

#[track_caller]
pub fn vm(response: &Response) -> Vm {
    let result = response
        .result
        .as_ref()
        .unwrap_or_else(|| panic!("{response:?}"));
    serde_json::from_str::<VmReply>(result.get()).unwrap().vm
}

#[track_caller]
pub fn kind(response: &Response) -> String {
    response
        .error
        .as_ref()
        .and_then(|e| e.data.clone())
        .unwrap_or_else(|| panic!("{response:?}"))
        .kind
}

#[test]
fn key_shared_by_fifty_creates_makes_one_vm() {
    let mut world = World::new();
    let made: Vec<_> = std::thread::scope(|scope| {
        let one = || {
            vm(&call(
                &world,
                "vm.create",
                r#"{"rm":false,"vcpus":1}"#,
                "k",
                false,
            ))
            .id
        };
        let threads: Vec<_> = (0..50).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(made.iter().all(|id| *id == made[0]));
    assert_eq!(
        world
            .call::<VmList>(&VmListRequest {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .vms
            .len(),
        1
    );
    // The order of the members does not matter.
    assert_eq!(
        vm(&call(
            &world,
            "vm.create",
            r#"{"vcpus":1,"rm":false}"#,
            "k",
            false
        ))
        .id,
        made[0]
    );
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(
        vm(&call(
            &world,
            "vm.create",
            r#"{"vcpus":1,"rm":false}"#,
            "k",
            true
        ))
        .id,
        made[0]
    );
    // A different key creates another VM. The same key with a different method or parameter is a
    // conflict.
    assert_ne!(
        vm(&call(
            &world,
            "vm.create",
            r#"{"vcpus":1,"rm":false}"#,
            "other",
            false
        ))
        .id,
        made[0]
    );
    for (method, params) in [
        ("vm.create", r#"{"vcpus":2}"#),
        ("vm.start", r#"{"vm":"x"}"#),
    ] {
        assert_eq!(
            kind(&call(&world, method, params, "k", false)),
            Kind::IdempotencyConflict.name()
        );
    }
}

/// If the daemon ignored the key, a caller would retry the call and rely on a key that was never
/// recorded.
#[test]
fn key_on_call_without_key_support_is_refused() {
    let world = World::new();
    for row in fcd::testing::api::table::calls().filter(|row| row.key == Key::Unkeyed) {
        let response = call(&world, row.method, "{}", "k", true);
        assert_eq!(
            kind(&response),
            Kind::InvalidArgument.name(),
            "{}",
            row.method
        );
        let fault = response.error.and_then(|e| e.data).unwrap();
        assert_eq!(
            fault.message,
            format!("{} must be called without a key", row.method)
        );
    }
    // The key is refused even if it belongs to another call.
    vm(&call(
        &world,
        "vm.create",
        r#"{"name":"first"}"#,
        "k",
        false,
    ));
    let held = call(&world, "vm.create", r#"{"hold":true}"#, "k", true);
    assert_eq!(
        held.error.unwrap().message,
        "vm.create with hold must be called without a key"
    );
}

#[test]
fn key_begins_operation_once() {
    let world = World::new();
    let web = world.create("web");
    world.place(&web.id);
    let started = |r: &Response| {
        serde_json::from_str::<OpStarted>(r.result.as_ref().unwrap().get())
            .unwrap()
            .op
    };
    let first = started(&call(&world, "vm.start", r#"{"vm":"web"}"#, "up", false));
    world.await_state("web", VmState::Running);
    assert_eq!(
        started(&call(&world, "vm.start", r#"{"vm":"web"}"#, "up", false)),
        first
    );
    world.stop("web").unwrap();
    // The operation has ended, so the repeated call gets its result and starts nothing.
    assert_eq!(
        vm(&call(&world, "vm.start", r#"{"vm":"web"}"#, "up", true)).state,
        VmState::Running
    );
    assert_eq!(world.state("web"), VmState::Stopped);
    assert_eq!(world.vmm.starts(), 1);
}

#[test]
fn key_of_refused_call_is_free() {
    let world = World::new();
    let params = r#"{"vm":"web","vcpus":2}"#;
    assert_eq!(
        kind(&call(&world, "vm.set", params, "k", false)),
        Kind::VmNotFound.name()
    );
    world.create("web");
    assert_eq!(vm(&call(&world, "vm.set", params, "k", false)).vcpus, 2);
    world
        .call::<VmSet>(&VmSetRequest {
            vm: "web".into(),
            vcpus: Some(3),
            ..Default::default()
        })
        .unwrap();
    assert_eq!(
        vm(&call(&world, "vm.set", params, "k", false)).vcpus,
        2,
        "the repeated call gets the first reply"
    );
    assert_eq!(world.show("web").unwrap().vcpus, 3);
    // A stop of a stopped VM is answered immediately and does not use the key again.
    assert_eq!(
        vm(&call(&world, "vm.stop", r#"{"vm":"web"}"#, "down", true)).state,
        VmState::Created
    );
    assert_eq!(
        vm(&call(&world, "vm.stop", r#"{"vm":"web"}"#, "down", true)).state,
        VmState::Created
    );
    world
        .daemon()
        .core
        .store
        .faults()
        .fail(fcd::testing::store::faults::Fault::DiskFull, 1);
    assert_eq!(
        kind(&call(&world, "vm.create", "{}", "full", false)),
        Kind::DiskFull.name()
    );
    world.daemon().core.store.faults().heal();
    assert!(world.daemon().core.store.wait_writable(soon()));
    vm(&call(&world, "vm.create", "{}", "full", false));
}

#[test]
fn key_expires_after_a_day() {
    let mut world = World::new();
    let first = vm(&call(&world, "vm.create", "{}", "k", false)).id;
    world.edit_rows(|tx| {
        let row = fcd::testing::store::KeyRow {
            expires_at: 1,
            ..(**tx.key(nix::unistd::getuid().as_raw(), "k").unwrap()).clone()
        };
        tx.put_key(row).unwrap();
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_ne!(vm(&call(&world, "vm.create", "{}", "k", false)).id, first);
}
