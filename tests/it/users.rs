//! Tests that local users are isolated from each other: one uid must not use up what the others
//! need.

use crate::world::*;
use fcd::testing::api::Empty;
use fcd::testing::api::call::{Access, FdPassing};
use fcd::testing::api::daemon::Doctor;
use fcd::testing::api::image::*;
use fcd::testing::api::op::{OpList, OpListRequest};
use fcd::testing::api::snapshot::*;
use fcd::testing::api::vm::*;
use fcd::testing::daemon::{Daemon, Seams};
use fcd::testing::error::Kind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Users other than root and the daemon's user.
const ALICE: u32 = 3001;
const BOB: u32 = 3002;

#[test]
fn doctor_of_other_user_is_run_once_for_many_calls() {
    const CALLS: u64 = 100;
    let world = World::new();
    world.open_to_everybody();
    as_uid(ALICE, || {
        (0..CALLS)
            .for_each(|_| assert!(!world.call::<Doctor>(&Empty {}).unwrap().checks.is_empty()))
    });
    let runs = world.vmm.checks_run();
    assert!(
        (1..CALLS / 4).contains(&runs),
        "{runs} runs for {CALLS} calls"
    );
    // Root gets a fresh report at each call.
    world.call::<Doctor>(&Empty {}).unwrap();
    assert_eq!(world.vmm.checks_run(), runs + 1);
}

/// Creates a VM as Alice, and makes this many calls on it that are refused.
fn refused_calls(world: &World, calls: usize) {
    as_uid(ALICE, || {
        world.create("of-alice");
        let mut client = world.client();
        let request = SnapshotCreateRequest {
            vm: "of-alice".into(),
            name: None,
        };
        for _ in 0..calls {
            assert!(
                client
                    .call::<SnapshotCreate>(&request)
                    .unwrap_err()
                    .is(Kind::WrongState)
            );
        }
    });
}

#[test]
fn refused_calls_leave_others_history_and_keys_alone() {
    let world = World::new();
    world.open_to_everybody();
    let bobs_call = || {
        as_uid(BOB, || {
            crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false)
        })
    };
    let made = crate::keys::vm(&bobs_call());
    let bobs_ops = || {
        as_uid(BOB, || {
            world
                .call::<OpList>(&OpListRequest {
                    all: true,
                    ..Default::default()
                })
                .unwrap()
                .ops
        })
    };
    let before = bobs_ops();
    assert_eq!(before.len(), 1);
    refused_calls(&world, 1300);
    assert_eq!(bobs_ops(), before, "Bob's history is unchanged");
    assert_eq!(
        crate::keys::vm(&bobs_call()),
        made,
        "Bob's key still has its reply"
    );
}

#[test]
fn refused_call_is_not_recorded() {
    let world = World::new();
    world.open_to_everybody();
    refused_calls(&world, 3);
    let ops = world.daemon().core.ops.list(&fcd::testing::ops::Filter {
        all: true,
        ..Default::default()
    });
    assert_eq!(ops, [], "refused calls are not recorded");
}

#[test]
fn operations_of_one_user_evict_only_their_own() {
    let mut world = World::with(|config| config.limits.operations_kept_per_uid = 20);
    world.open_to_everybody();
    let key = || crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false);
    let made = as_uid(BOB, || crate::keys::vm(&key()));
    as_uid(BOB, || {
        (0..3).for_each(|_| {
            drop(crate::keys::call(
                &world,
                "vm.create",
                "{}",
                &random_key(),
                false,
            ))
        })
    });
    // Keys keep the replies of Alice's own operations. Her operations without a key are kept up to
    // the limit.
    as_uid(ALICE, || {
        world.create("of-alice");
        for _ in 0..50 {
            world
                .run::<VmDelete>(VmDeleteRequest {
                    vm: "of-alice".into(),
                    force: true,
                    if_exists: false,
                })
                .unwrap();
            world.create("of-alice");
        }
    });
    let count = |world: &World, uid: u32| {
        let ops = world.daemon().core.ops.list(&fcd::testing::ops::Filter {
            owner: Some(uid),
            all: true,
            ..Default::default()
        });
        (
            ops.len(),
            world
                .daemon()
                .core
                .store
                .read(|s| s.ops().filter(|op| op.owner_uid == uid).count()),
        )
    };
    assert_eq!(
        (count(&world, ALICE), count(&world, BOB)),
        ((20, 20), (4, 4))
    );
    world.reopen();
    world.daemon().reconciler.reconcile();
    world.open_to_everybody();
    assert_eq!(
        (count(&world, ALICE), count(&world, BOB)),
        ((20, 20), (4, 4))
    );
    let key = || crate::keys::call(&world, "vm.create", r#"{"name":"of-bob"}"#, "k", false);
    assert_eq!(as_uid(BOB, || crate::keys::vm(&key())), made);
}

/// A key keeps its reply until the key expires, no matter how many operations of the same user
/// follow.
#[test]
fn answer_of_key_outlives_retention() {
    let mut world = World::with(|config| config.limits.operations_kept_per_uid = 5);
    let key = |world: &World, more| {
        crate::keys::call(world, "vm.create", r#"{"name":"first"}"#, "k", more)
    };
    let made = crate::keys::vm(&key(&world, false));
    for n in 0..20 {
        world.create(&format!("vm{n}"));
        world.delete(&format!("vm{n}")).unwrap();
    }
    assert_eq!(crate::keys::vm(&key(&world, false)), made);
    world.reopen();
    world.daemon().reconciler.reconcile();
    assert_eq!(crate::keys::vm(&key(&world, true)), made);
    // Waiting calls get the recorded reply of their key too.
    let deleted = |world: &World| {
        let request = r#"{"vm":"first","force":true}"#;
        let response = crate::keys::call(world, "vm.delete", request, "gone", true);
        serde_json::from_str::<VmDeleteReply>(response.result.expect("no result").get()).unwrap()
    };
    let first = deleted(&world);
    for n in 0..20 {
        world.create(&format!("vm{n}"));
        world.delete(&format!("vm{n}")).unwrap();
    }
    assert_eq!(deleted(&world), first);
}

#[test]
fn user_with_too_many_keys_is_refused_first() {
    let mut world = World::new();
    let uid = nix::unistd::getuid().as_raw();
    let keys = fcd::testing::store::KEYS_PER_UID_MAX;
    world.edit_rows(|tx| {
        for n in 0..keys {
            let (key, params_hash, op) = (
                n.to_string(),
                String::new(),
                fcd::testing::ids::OpId::random(),
            );
            tx.put_key(fcd::testing::store::KeyRow {
                uid,
                key,
                params_hash,
                op,
                expires_at: u64::MAX,
            })
            .unwrap();
        }
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    let answer = crate::keys::call(&world, "vm.create", r#"{"name":"one"}"#, "new", false);
    assert_eq!(crate::keys::kind(&answer), Kind::OperationLimit.name());
    assert!(
        world.show("one").is_err(),
        "the refused call created nothing"
    );
}

/// Alice's transfers are stalled while Bob's complete.
#[test]
fn transfers_of_one_user_leave_workers_to_others() {
    let world = World::with(|config| {
        (
            config.limits.pool_workers,
            config.limits.pool_workers_per_uid_max,
        ) = (4, 0)
    });
    world.open_to_everybody();
    let names: Vec<_> = (0..5).map(|n| format!("alice{n}")).collect();
    let mut stalled = as_uid(ALICE, || {
        let run = |name: &String| {
            world.running(name);
            world.queue_import(name)
        };
        names.iter().map(run).collect::<Vec<_>>()
    });
    // One uid gets at most three of the four workers.
    stalled[..3].iter().for_each(|import| import.call.ready());
    as_uid(BOB, || {
        world.running("of-bob");
        world.import_all("of-bob");
    });
    // The last import may not have reached the queue yet.
    await_that("Alice's other imports wait", || {
        let counts = world.daemon().transfers.pool.counts();
        (counts.running, counts.queued) == (3, 2)
    });
    for Import { mut call, stream } in stalled.drain(..) {
        write_payload(stream, b"some payload");
        call.finish(SOON).unwrap_or_else(|e| panic!("import: {e}"));
    }
}

/// A client that sends one byte a minute never exceeds the idle limit, so a minimum rate ends its
/// transfer.
#[test]
fn transfer_below_minimum_rate_ends() {
    let world = World::with(|config| {
        (
            config.limits.transfer_bytes_per_s_min,
            config.limits.transfer_rate_window_s,
        ) = (1 << 40, 1);
    });
    world.running("web");
    let Import { mut call, stream } = world.import("web");
    let mut writer = fcd::testing::api::stream::ChunkWriter::new(stream);
    std::io::Write::write_all(&mut writer, &[7; 100_000]).unwrap();
    std::io::Write::flush(&mut writer).unwrap();
    let e = call.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::TransferIdle) && e.fault.message.contains("bytes moved in the last 1 s"),
        "{e:?}"
    );
    assert!(e.fault.hint.is_some());
}

fn build(world: &World, name: &str) -> Running<ImageReply> {
    let request = ImageBuildRequest {
        name: Some(name.parse().unwrap()),
        ..Default::default()
    };
    world.begin::<ImageBuild>(request, vec![])
}

fn held_builds() -> World {
    let world = World::new();
    world.open_to_everybody();
    world.builds.are_held.store(true, Ordering::SeqCst);
    world
}

#[test]
fn builds_of_one_user_are_limited_and_one_runs_at_a_time() {
    let world = held_builds();
    let first = as_uid(ALICE, || build(&world, "a"));
    await_that("the build runs", || {
        world.builds.running.load(Ordering::SeqCst) == 1
    });
    let mut others: Vec<_> = as_uid(ALICE, || {
        (1..64).map(|n| build(&world, &format!("a{n}"))).collect()
    });
    let refused = |call: &mut Running<ImageReply>| {
        call.finish_unless(|| world.builds.running.load(Ordering::SeqCst) > 1)
    };
    for call in &mut others {
        let e = refused(call)
            .expect("more than one build runs")
            .unwrap_err();
        assert!(e.is(Kind::Busy) && e.fault.hint.is_some(), "{e:?}");
    }
    // Builds of other users wait, and report that they wait. A hang-up removes a build from the
    // queue.
    let of_bob = as_uid(BOB, || build(&world, "b"));
    of_bob.stage("wait for another build");
    let mut of_root = build(&world, "r");
    of_root.stage("wait for 2 other builds");
    of_bob.hang_up();
    of_root.stage("wait for another build");
    assert_eq!(world.builds.running.load(Ordering::SeqCst), 1);
    // A caller that hangs up during a build frees its slot too.
    first.hang_up();
    of_root.stage("update package lists");
    world.builds.are_held.store(false, Ordering::SeqCst);
    assert!(of_root.finish(SOON).unwrap_err().is(Kind::CommandFailed));
    assert_eq!(world.builds.peak.load(Ordering::SeqCst), 1);
    // Every slot is free again after the hang-ups.
    let mut again = as_uid(ALICE, || build(&world, "again"));
    assert!(again.finish(SOON).unwrap_err().is(Kind::CommandFailed));
}

#[test]
fn images_of_one_user_are_limited() {
    let world = World::with(|config| config.limits.images_per_uid_max = 2);
    world.open_to_everybody();
    (0..2).for_each(|n| make_image_of(&world.config.state_dir, &format!("a{n}"), Some(ALICE)));
    let mut refused = as_uid(ALICE, || build(&world, "more"));
    let e = refused.finish(SOON).unwrap_err();
    assert!(
        e.is(Kind::Exhausted) && e.fault.hint.as_deref().unwrap().contains("image rm"),
        "{e:?}"
    );
    let delete = |name: &str| {
        world.call::<ImageDelete>(&ImageRequest {
            image: name.parse().unwrap(),
        })
    };
    as_uid(ALICE, || delete("a0").unwrap());
    for uid in [ALICE, BOB] {
        let mut call = as_uid(uid, || build(&world, "more"));
        assert!(
            call.finish(SOON).unwrap_err().is(Kind::CommandFailed),
            "the build was admitted, and then failed"
        );
    }
}

#[test]
fn image_is_deleted_by_its_builder_and_root_only() {
    let world = World::new();
    world.open_to_everybody();
    let make = |name: &str, uid| make_image_of(&world.config.state_dir, name, uid);
    let delete = |name: &str| {
        world.call::<ImageDelete>(&ImageRequest {
            image: name.parse().unwrap(),
        })
    };
    make("of-alice", Some(ALICE));
    make("of-bob", Some(BOB));
    make("of-host", None);
    as_uid(ALICE, || {
        for name in ["of-bob", "of-host", "default"] {
            assert!(delete(name).unwrap_err().is(Kind::Denied), "{name}");
        }
        assert!(delete("none").unwrap_err().is(Kind::ImageNotFound));
        delete("of-alice").unwrap();
        assert!(delete("of-alice").unwrap_err().is(Kind::ImageNotFound));
    });
    for name in ["of-bob", "of-host"] {
        delete(name).unwrap();
    }
    let left: Vec<_> = world
        .call::<ImageList>(&Default::default())
        .unwrap()
        .images
        .into_iter()
        .map(|i| i.name.to_string())
        .collect();
    assert_eq!(left, ["default"]);
}

#[test]
fn image_in_use_stays_until_last_vm_and_snapshot_are_gone() {
    let world = World::new();
    let delete = || {
        world.call::<ImageDelete>(&ImageRequest {
            image: "default".parse().unwrap(),
        })
    };
    world.running("web");
    let saved = world
        .run::<SnapshotCreate>(SnapshotCreateRequest {
            vm: "web".into(),
            name: None,
        })
        .unwrap()
        .snapshot;
    let e = delete().unwrap_err();
    assert!(
        e.is(Kind::Conflict) && e.fault.message.contains("by 1 VM"),
        "{e:?}"
    );
    world.delete("web").unwrap();
    let e = delete().unwrap_err();
    assert!(
        e.is(Kind::Conflict) && e.fault.message.contains("by 1 snapshot"),
        "{e:?}"
    );
    world
        .call::<SnapshotDelete>(&SnapshotRequest {
            snapshot: saved.id.to_string(),
        })
        .unwrap();
    delete().unwrap();
    let create = world.call::<VmCreate>(&VmCreateRequest::default());
    assert!(create.unwrap_err().is(Kind::ImageNotFound));
}

/// Either the VM is created and its image stays, or the image is deleted and the create is refused.
#[test]
fn concurrent_create_and_image_rm_keep_image_of_vm() {
    let world = World::new();
    for n in 0..40 {
        make_image(&world.config.state_dir, "raced");
        let request = VmCreateRequest {
            image: Some("raced".parse().unwrap()),
            ..VmCreateRequest::default()
        };
        let barrier = std::sync::Barrier::new(2);
        let (made, deleted) = std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                barrier.wait();
                world.call::<VmCreate>(&request)
            });
            barrier.wait();
            let deleted = world.call::<ImageDelete>(&ImageRequest {
                image: "raced".parse().unwrap(),
            });
            (made.join().unwrap(), deleted)
        });
        assert!(
            made.is_err() || deleted.is_err(),
            "round {n}: the VM has lost its image"
        );
        let Ok(made) = made else { continue };
        assert!(
            world.config.state_dir.join("images/raced/vmlinux").exists(),
            "run {n}"
        );
        world.delete(made.vm.name.as_str()).unwrap();
    }
}

fn random_key() -> String {
    fcd::testing::ids::OpId::random().to_string()
}

/// VMs keep the uids of an earlier, larger range. A daemon whose range does not contain them
/// refuses to start.
#[test]
fn uid_range_without_existing_vm_is_refused() {
    let mut world = World::with(|config| config.qemu.uid_count = 3);
    for name in ["one", "two"] {
        world.create(name);
    }
    world.shut();
    let mut config = world.config.clone();
    config.qemu.uid_count = 2;
    let seams = Seams {
        vmm: world.vmm.clone(),
        transport: Arc::new(world.guest.clone()),
        commands: Arc::new(FakeCommands(world.builds.clone())),
        installations: None,
    };
    let e = Daemon::open(config, seams)
        .err()
        .expect("the daemon must not open");
    assert!(
        e.kind() == Kind::InvalidConfig
            && e.to_string()
                .starts_with("qemu.uid_count = 2 is too small: VM two"),
        "{e}"
    );
    world.reopen();
    assert_eq!(world.show("two").unwrap().state, VmState::Created);
}

/// Returns parameters that name objects of root.
fn of_root(method: &str, op: &str) -> String {
    match method {
        "vm.balloon" => r#"{"vm":"web","keep_mib":512}"#.into(),
        "vm.rename" => r#"{"vm":"web","name":"other"}"#.into(),
        "vm.connect" => r#"{"vm":"web","port":1}"#.into(),
        "vm.port_add" | "vm.port_remove" => r#"{"vm":"web","ports":[{"guest_port":80}]}"#.into(),
        "exec.resize" => r#"{"session":"0123456789ab","size":{"rows":1,"cols":1}}"#.into(),
        "exec.signal" => r#"{"session":"0123456789ab","signal":"TERM"}"#.into(),
        "snapshot.show" | "snapshot.delete" | "snapshot.restore" => {
            r#"{"snapshot":"saved"}"#.into()
        }
        "image.delete" | "image.promote" => r#"{"image":"default"}"#.into(),
        "image.commit" => r#"{"vm":"web","image":"other"}"#.into(),
        _ if method.starts_with("op.") => format!(r#"{{"op":"{op}"}}"#),
        _ => r#"{"vm":"web"}"#.into(),
    }
}

#[test]
fn calls_check_access_as_in_table() {
    let world = World::new();
    world.open_to_everybody();
    let web = world.create("web");
    world.place(&web.id);
    world.start("web").unwrap();
    world
        .run::<SnapshotCreate>(SnapshotCreateRequest {
            vm: "web".into(),
            name: Some("saved".parse().unwrap()),
        })
        .unwrap();
    let op = world
        .call::<OpList>(&OpListRequest {
            all: true,
            ..Default::default()
        })
        .unwrap()
        .ops
        .remove(0)
        .id;
    let before = world.show("web").unwrap();
    for row in fcd::testing::api::table::calls() {
        let kind = |params: &str| {
            as_uid(ALICE, || {
                crate::keys::kind(&crate::keys::send(&world, row.method, params, None, true))
            })
        };
        match row.access {
            Access::Privileged => assert_eq!(kind("{}"), Kind::Denied.name(), "{}", row.method),
            // The unknown parameter is the only reason to refuse this call.
            Access::Anybody => assert_eq!(
                kind(r#"{"nothing":1}"#),
                Kind::InvalidArgument.name(),
                "{}",
                row.method
            ),
            // These calls check their descriptors before the owner.
            Access::Owner if row.fds == FdPassing::TakesFds => {}
            Access::Owner => {
                let kind = kind(&of_root(row.method, op.as_str()));
                assert!(
                    kind.ends_with("_not_found") || kind == Kind::Denied.name(),
                    "{}: {kind}",
                    row.method
                );
            }
        }
    }
    assert_eq!(world.show("web").unwrap(), before);
}
