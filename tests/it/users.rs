//! Local users against each other: what one uid can take from the others.

use crate::world::*;
use fcd::api::Empty;
use fcd::api::daemon::Doctor;
use fcd::api::op::{OpList, OpListRequest};
use fcd::api::snapshot::{SnapshotCreate, SnapshotCreateRequest};
use fcd::api::vm::*;
use fcd::error::Kind;

/// Users who are neither root nor the daemon's own.
const ALICE: u32 = 3001;
const BOB: u32 = 3002;

#[test]
fn doctor_of_other_user_is_run_once_for_many_calls() {
    const CALLS: u64 = 100;
    let world = World::new();
    world.open_to_everybody();
    as_uid(ALICE, || (0..CALLS).for_each(|_| assert!(!world.call::<Doctor>(&Empty {}).unwrap().checks.is_empty())));
    let runs = world.vmm.checks_run();
    assert!((1..CALLS / 4).contains(&runs), "{runs} runs for {CALLS} calls");
    // Root sees the host as it is at its call.
    world.call::<Doctor>(&Empty {}).unwrap();
    assert_eq!(world.vmm.checks_run(), runs + 1);
}

/// Alice asks for what is refused, more often than operations are kept.
fn refused_calls(world: &World, calls: usize) {
    as_uid(ALICE, || {
        world.create("of-alice");
        let mut client = world.client();
        let request = SnapshotCreateRequest { vm: "of-alice".into(), name: None };
        for _ in 0..calls {
            assert!(client.call::<SnapshotCreate>(&request).unwrap_err().is(Kind::WrongState));
        }
    });
}

#[test]
fn refused_calls_leave_others_history_and_keys_alone() {
    let world = World::new();
    world.open_to_everybody();
    let bobs_call = || as_uid(BOB, || crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false));
    let made = crate::keys::vm(&bobs_call());
    let bobs_ops = || as_uid(BOB, || world.call::<OpList>(&OpListRequest { all: true, ..Default::default() }).unwrap().ops);
    let before = bobs_ops();
    assert_eq!(before.len(), 1);
    refused_calls(&world, 1300);
    assert_eq!(bobs_ops(), before, "Bob's history");
    assert_eq!(crate::keys::vm(&bobs_call()), made, "the answer to Bob's key");
}

#[test]
fn refused_call_is_not_recorded() {
    let world = World::new();
    world.open_to_everybody();
    refused_calls(&world, 3);
    let ops = world.daemon().ops.list(&fcd::ops::Filter { all: true, ..Default::default() });
    assert_eq!(ops, [], "nothing was done");
}

#[test]
fn operations_of_one_user_push_out_only_their_own() {
    let mut world = World::with(|config| config.limits.operations_kept_per_uid = 20);
    world.open_to_everybody();
    let key = || crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false);
    let made = as_uid(BOB, || crate::keys::vm(&key()));
    as_uid(BOB, || (0..3).for_each(|_| drop(crate::keys::call(&world, "vm.create", "{}", &random_key(), false))));
    // Alice's own keys pin their answers; the operations that no key stands for are kept so many.
    as_uid(ALICE, || {
        world.create("of-alice");
        for _ in 0..50 {
            world.run::<VmDelete>(VmDeleteRequest { vm: "of-alice".into(), force: true, if_exists: false }).unwrap();
            world.create("of-alice");
        }
    });
    let count = |world: &World, uid: u32| {
        let ops = world.daemon().ops.list(&fcd::ops::Filter { owner: Some(uid), all: true, ..Default::default() });
        (ops.len(), world.daemon().store.read(|s| s.ops().filter(|op| op.owner_uid == uid).count()))
    };
    assert_eq!((count(&world, ALICE), count(&world, BOB)), ((20, 20), (4, 4)));
    world.reopen();
    world.daemon().reconcile();
    world.open_to_everybody();
    assert_eq!((count(&world, ALICE), count(&world, BOB)), ((20, 20), (4, 4)));
    let key = || crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false);
    assert_eq!(as_uid(BOB, || crate::keys::vm(&key())), made);
}

/// A key's answer lives as long as its key, however many operations of the same user follow.
#[test]
fn answer_of_key_outlives_retention() {
    let mut world = World::with(|config| config.limits.operations_kept_per_uid = 5);
    let key = |world: &World, more| crate::keys::call(world, "vm.create", r#"{"name":"first"}"#, "k", more);
    let made = crate::keys::vm(&key(&world, false));
    for n in 0..20 {
        world.create(&format!("vm{n}"));
        world.delete(&format!("vm{n}")).unwrap();
    }
    assert_eq!(crate::keys::vm(&key(&world, false)), made);
    world.reopen();
    world.daemon().reconcile();
    assert_eq!(crate::keys::vm(&key(&world, true)), made);
    // An operation that the caller waits for is answered, too.
    let deleted = |world: &World| {
        let request = r#"{"vm":"first","force":true}"#;
        let response = crate::keys::call(world, "vm.delete", request, "gone", true);
        serde_json::from_str::<VmDeleteReply>(response.result.expect("a result").get()).unwrap()
    };
    let first = deleted(&world);
    for n in 0..20 {
        world.create(&format!("vm{n}"));
        world.delete(&format!("vm{n}")).unwrap();
    }
    assert_eq!(deleted(&world), first);
}

#[test]
fn user_with_too_many_keys_is_refused_before_anything_begins() {
    let mut world = World::new();
    let uid = nix::unistd::getuid().as_raw();
    let keys = fcd::store::KEYS_PER_UID_MAX;
    world.edit_rows(|tx| {
        for n in 0..keys {
            let (key, params_hash, op) = (n.to_string(), String::new(), fcd::ids::OpId::random());
            tx.put_key(fcd::store::KeyRow { uid, key, params_hash, op, expires_at: u64::MAX }).unwrap();
        }
    });
    world.reopen();
    world.daemon().reconcile();
    let answer = crate::keys::call(&world, "vm.create", r#"{"name":"one"}"#, "new", false);
    assert_eq!(crate::keys::kind(&answer), Kind::OperationLimit.name());
    assert!(world.show("one").is_err(), "nothing was made");
}

/// Alice's transfers stall; Bob's are done meanwhile.
#[test]
fn transfers_of_one_user_leave_workers_to_others() {
    let world = World::with(|config| (config.limits.pool_workers, config.limits.pool_workers_per_uid_max) = (4, 0));
    world.open_to_everybody();
    let names: Vec<_> = (0..5).map(|n| format!("alice{n}")).collect();
    let mut stalled = as_uid(ALICE, || {
        let run = |name: &String| {
            world.running(name);
            world.queue_import(name)
        };
        names.iter().map(run).collect::<Vec<_>>()
    });
    // Three of four workers are what one uid gets.
    stalled[..3].iter().for_each(|import| import.call.ready());
    as_uid(BOB, || {
        world.running("of-bob");
        world.import_all("of-bob");
    });
    let counts = world.daemon().pool.counts();
    assert_eq!((counts.running, counts.queued), (3, 2));
    for Import { mut call, stream } in stalled.drain(..) {
        write_payload(stream, b"some payload");
        call.finish(SOON).unwrap_or_else(|e| panic!("import: {e}"));
    }
}

/// The idle limit alone is satisfied by one byte a minute.
#[test]
fn transfer_below_minimum_rate_ends() {
    let world = World::with(|config| {
        (config.limits.transfer_bytes_per_s_min, config.limits.transfer_rate_window_s) = (1 << 40, 1);
    });
    world.running("web");
    let Import { mut call, stream } = world.import("web");
    let mut writer = fcd::api::stream::ChunkWriter::new(stream);
    std::io::Write::write_all(&mut writer, &[7; 100_000]).unwrap();
    std::io::Write::flush(&mut writer).unwrap();
    let e = call.finish(SOON).unwrap_err();
    assert!(e.is(Kind::TransferIdle) && e.fault.message.contains("bytes moved in the last 1 s"), "{e:?}");
    assert!(e.fault.hint.is_some());
}

fn random_key() -> String {
    fcd::ids::OpId::random().to_string()
}
