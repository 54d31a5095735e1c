//! Tests of changes to a running guest: the rates of its devices and the size of its memory.

use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::client::Failure;
use fcd::testing::error::Kind;

fn set(world: &World, change: impl FnOnce(&mut VmSetRequest)) -> Result<Vm, Failure> {
    let mut request = VmSetRequest {
        vm: "web".into(),
        ..Default::default()
    };
    change(&mut request);
    world.call::<VmSet>(&request).map(|r| r.vm)
}

fn disk(bytes: Option<u64>, ops: Option<u64>) -> RateLimits {
    RateLimits {
        disk_bytes_per_s: bytes,
        disk_ops_per_s: ops,
        ..RateLimits::default()
    }
}

fn balloon(world: &World, keep_mib: Option<u64>) -> Result<VmBalloonReply, Failure> {
    world.call::<VmBalloon>(&VmBalloonRequest {
        vm: "web".into(),
        keep_mib,
    })
}

const M: u64 = 1 << 20;

#[test]
fn rates_apply_at_next_start_or_now() {
    let world = World::new();
    let request = VmCreateRequest {
        name: Some("web".parse().unwrap()),
        disk_bytes_per_s: Some(50 * M),
        ..Default::default()
    };
    let vm = world.call::<VmCreate>(&request).unwrap().vm;
    assert_eq!(vm.rates(), disk(Some(50 * M), None));
    // A stopped VM changes immediately, with or without `now`.
    let now = set(&world, |r| (r.disk_ops_per_s, r.now) = (Some(100), true)).unwrap();
    assert_eq!(
        (now.rates(), now.pending.clone()),
        (disk(Some(50 * M), Some(100)), None)
    );
    world.place(&vm.id);
    world.start("web").unwrap();
    assert_eq!(world.vmm.last_spec(&vm.id).unwrap().rates, now.rates());
    // A running VM keeps its rates. A removed limit is removed at the next start.
    let later = set(&world, |r| {
        (r.disk_ops_per_s, r.disk_bytes_per_s) = (Some(0), Some(20 * M))
    })
    .unwrap();
    assert_eq!(later.rates(), now.rates());
    assert_eq!(later.pending.unwrap().rates, disk(Some(20 * M), Some(0)));
    assert_eq!(world.vmm.adjusted(&vm.id).unwrap().0, now.rates());
    // `now` replaces the pending change of one rate and keeps the other pending changes.
    let now = set(&world, |r| {
        (r.disk_bytes_per_s, r.now) = (Some(30 * M), true)
    })
    .unwrap();
    assert_eq!(now.rates(), disk(Some(30 * M), Some(100)));
    assert_eq!(now.pending.clone().unwrap().rates, disk(None, Some(0)));
    assert_eq!(world.vmm.adjusted(&vm.id).unwrap().0, now.rates());
    let now = set(&world, |r| (r.disk_bytes_per_s, r.now) = (Some(0), true)).unwrap();
    assert_eq!(world.vmm.adjusted(&vm.id).unwrap().0, disk(None, Some(100)));
    assert_eq!(now.rates(), disk(None, Some(100)));
    let now = world.run::<VmRestart>(stop("web")).unwrap().vm;
    assert_eq!((now.rates(), now.pending), (RateLimits::default(), None));
    assert_eq!(
        world.vmm.last_spec(&vm.id).unwrap().rates,
        RateLimits::default()
    );
}

#[test]
fn invalid_settings_change_nothing() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let before = world.census();
    let kind = |change: &dyn Fn(&mut VmSetRequest)| {
        let e = set(&world, change).unwrap_err();
        assert!(e.fault.hint.is_some(), "{e:?}");
        assert_eq!(world.census(), before);
        assert_eq!(
            world.vmm.adjusted(&vm.id).unwrap(),
            (RateLimits::default(), 1024)
        );
        e.fault.kind
    };
    let name = |kind: Kind| kind.name().to_owned();
    for bytes in [1, (64 << 10) - 1, (1 << 40) + 1, u64::MAX] {
        assert_eq!(
            kind(&|r| (r.disk_bytes_per_s, r.now) = (Some(bytes), true)),
            name(Kind::InvalidArgument),
            "{bytes}"
        );
        assert_eq!(
            kind(&|r| r.net_tx_bytes_per_s = Some(bytes)),
            name(Kind::InvalidArgument),
            "{bytes}"
        );
    }
    // This is one more than the highest rate that nft(8) accepts.
    assert_eq!(
        kind(&|r| r.net_rx_bytes_per_s = Some((16 << 30) + 1)),
        name(Kind::InvalidArgument)
    );
    for ops in [1, 9, u64::MAX] {
        assert_eq!(
            kind(&|r| r.disk_ops_per_s = Some(ops)),
            name(Kind::InvalidArgument),
            "{ops}"
        );
    }
    // In user mode nothing can limit the network.
    assert_eq!(
        kind(&|r| (r.net_rx_bytes_per_s, r.now) = (Some(M), true)),
        name(Kind::Unsupported)
    );
    assert_eq!(
        kind(&|r| r.net_tx_bytes_per_s = Some(M)),
        name(Kind::Unsupported)
    );
    let request = VmCreateRequest {
        net_rx_bytes_per_s: Some(M),
        ..Default::default()
    };
    assert!(
        world
            .call::<VmCreate>(&request)
            .unwrap_err()
            .is(Kind::Unsupported)
    );
    // Settings that only change at a start are refused with `now`, even together with rates.
    assert_eq!(
        kind(&|r| (r.vcpus, r.now) = (Some(2), true)),
        name(Kind::WrongState)
    );
    assert_eq!(
        kind(&|r| (r.disk_bytes_per_s, r.mem_mib, r.now) = (Some(M), Some(2048), true)),
        name(Kind::WrongState)
    );
    assert_eq!(kind(&|r| r.now = true), name(Kind::InvalidArgument));
}

#[test]
fn rates_refused_by_driver_are_rolled_back() {
    let world = World::new();
    let (vm, _) = world.running("web");
    set(&world, |r| {
        (r.disk_bytes_per_s, r.now) = (Some(10 * M), true)
    })
    .unwrap();
    set(&world, |r| {
        (r.disk_bytes_per_s, r.disk_ops_per_s) = (Some(40 * M), Some(500))
    })
    .unwrap();
    let before = world.show("web").unwrap();
    world.vmm.fail_next_change("no such device");
    let e = set(&world, |r| {
        (r.disk_bytes_per_s, r.now) = (Some(20 * M), true)
    })
    .unwrap_err();
    assert!(
        e.is(Kind::VmmFailed)
            && e.fault.message.contains("no such device")
            && e.fault.hint.is_some(),
        "{e:?}"
    );
    assert_eq!(world.show("web").unwrap(), before);
    assert_eq!(
        world.vmm.adjusted(&vm.id).unwrap().0,
        disk(Some(10 * M), None)
    );
    world.vmm.fail_next_change("no such device");
    let e = balloon(&world, Some(512)).unwrap_err();
    assert!(e.is(Kind::VmmFailed) && e.fault.hint.is_some(), "{e:?}");
    assert_eq!(world.show("web").unwrap(), before);
    assert_eq!(world.vmm.adjusted(&vm.id).unwrap().1, 1024);
}

/// Both calls are in the driver at the same time. Whichever returns last, the guest must have the
/// values of the row.
#[test]
fn concurrent_sets_last_one_wins() {
    for round in 0..10 {
        let world = World::new();
        let (vm, _) = world.running("web");
        world.vmm.hold_changes();
        let after = std::thread::scope(|s| {
            let first = s.spawn(|| {
                set(&world, |r| {
                    (r.disk_bytes_per_s, r.now) = (Some(10 * M), true)
                })
                .unwrap()
            });
            assert!(world.vmm.await_held_changes(1, soon()));
            let second = s.spawn(|| {
                set(&world, |r| {
                    (r.disk_bytes_per_s, r.now) = (Some(20 * M), true)
                })
                .unwrap()
            });
            assert!(world.vmm.await_held_changes(2, soon()));
            world.vmm.release_changes();
            first.join().unwrap();
            second.join().unwrap()
        });
        assert_eq!(after.rates(), disk(Some(20 * M), None), "round {round}");
        assert_eq!(
            world.vmm.adjusted(&vm.id).unwrap().0,
            after.rates(),
            "round {round}"
        );
    }
}

#[test]
fn concurrent_refused_sets_match_row() {
    let world = World::new();
    let (vm, _) = world.running("web");
    std::thread::scope(|s| {
        for n in 0..6 {
            let world = &world;
            s.spawn(move || {
                for i in 1..=15 {
                    if (n + i) % 5 == 0 {
                        world.vmm.fail_next_change("not now");
                    }
                    let value = Some(n * M + i * 4096 + (64 << 10));
                    let done = match n % 3 {
                        0 => set(world, |r| (r.disk_bytes_per_s, r.now) = (value, true)).map(drop),
                        1 => set(world, |r| (r.disk_ops_per_s, r.now) = (value, true)).map(drop),
                        _ => balloon(world, Some(128 + n + i)).map(drop),
                    };
                    if let Err(e) = done {
                        assert!(e.is(Kind::VmmFailed), "{e:?}");
                    }
                }
            });
        }
    });
    // Failures may still be pending. These calls use them up, so that later calls succeed.
    for _ in 0..100 {
        if set(&world, |r| (r.disk_ops_per_s, r.now) = (Some(77), true)).is_ok()
            && balloon(&world, Some(300)).is_ok()
        {
            break;
        }
    }
    let row = world.show("web").unwrap();
    assert_eq!(
        (row.rates().disk_ops_per_s, row.balloon_mib),
        (Some(77), Some(300))
    );
    assert_eq!(world.vmm.adjusted(&vm.id).unwrap(), (row.rates(), 300));
}

#[test]
fn rates_after_crash_before_driver_are_applied() {
    let mut world = World::new();
    let (vm, _) = world.running("web");
    set(&world, |r| (r.disk_ops_per_s, r.now) = (Some(100), true)).unwrap();
    balloon(&world, Some(512)).unwrap();
    world.edit_rows(|tx| {
        tx.update_vm_unlocked(&vm.id, |r| {
            r.shape.rates = disk(Some(M), None);
            r.balloon_mib = None;
        })
        .unwrap()
    });
    world.reopen();
    assert_eq!(
        world.vmm.adjusted(&vm.id).unwrap(),
        (disk(None, Some(100)), 512)
    );
    world.daemon().reconciler.reconcile();
    assert_eq!(
        world.vmm.adjusted(&vm.id).unwrap(),
        (disk(Some(M), None), 1024)
    );
}

#[test]
fn balloon_lasts_until_next_start() {
    let world = World::new();
    let vm = world.create("web");
    for keep_mib in [None, Some(512)] {
        let e = balloon(&world, keep_mib).unwrap_err();
        assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    }
    world.place(&vm.id);
    world.start("web").unwrap();
    let reply = balloon(&world, None).unwrap();
    assert_eq!((reply.kept_mib, reply.vm.balloon_mib), (1024, None));
    let reply = balloon(&world, Some(512)).unwrap();
    assert_eq!(
        (reply.kept_mib, reply.vm.balloon_mib, reply.vm.mem_mib),
        (512, Some(512), 1024)
    );
    for mib in [0, 127, 1025, u64::MAX] {
        let e = balloon(&world, Some(mib)).unwrap_err();
        assert!(
            e.is(Kind::InvalidArgument) && e.fault.hint.is_some(),
            "{e:?}"
        );
    }
    assert_eq!(balloon(&world, None).unwrap().kept_mib, 512);
    // After the next start, the guest has its full memory again.
    assert_eq!(
        world.run::<VmRestart>(stop("web")).unwrap().vm.balloon_mib,
        None
    );
    assert_eq!(balloon(&world, None).unwrap().kept_mib, 1024);
}

#[test]
fn metrics_are_of_running_vmm() {
    let world = World::new();
    let vm = world.create("web");
    let e = world.call::<VmMetrics>(&request("web")).unwrap_err();
    assert!(e.is(Kind::WrongState) && e.fault.hint.is_some(), "{e:?}");
    world.place(&vm.id);
    world.start("web").unwrap();
    balloon(&world, Some(512)).unwrap();
    let reply = world.call::<VmMetrics>(&request("web")).unwrap();
    assert_eq!(
        (reply.vm, reply.metrics),
        (vm.id, vec![serde_json::json!({"keep_mib": 512})])
    );
}

#[test]
fn balloon_without_guest_driver_is_refused() {
    let world = World::new();
    let path = world.config.state_dir.join("images/default/image.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"guest_version\":4", "\"guest_version\":1"),
    )
    .unwrap();
    let (vm, _) = world.running("web");
    assert!(!world.vmm.last_spec(&vm.id).unwrap().has_balloon);
    // Rebuilding the image does not help a guest that already runs.
    std::fs::write(&path, text).unwrap();
    let e = balloon(&world, Some(512)).unwrap_err();
    assert!(
        e.is(Kind::Unsupported)
            && e.fault
                .hint
                .as_deref()
                .is_some_and(|h| h.contains("image build")),
        "{e:?}"
    );
    assert_eq!(world.show("web").unwrap().balloon_mib, None);
    world.run::<VmRestart>(stop("web")).unwrap();
    balloon(&world, Some(512)).unwrap();
}
