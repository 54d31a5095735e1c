//! Tests that users cannot see or change the VMs of other users.

use super::{create, user};
use crate::world::*;
use fcd::testing::api::vm::*;
use fcd::testing::api::workspace::{ExportKind, ExportRequest};
use fcd::testing::daemon::Caller;
use fcd::testing::error::Kind;

fn ops_seen(world: &World, caller: &Caller) -> Vec<fcd::testing::api::op::Op> {
    let request = fcd::testing::api::op::OpListRequest {
        all: true,
        ..Default::default()
    };
    let page = world.daemon().core.op_list(caller, &request).unwrap();
    assert_eq!(page.next, None);
    page.ops
        .iter()
        .map(|raw| serde_json::from_str(raw.get()).unwrap())
        .collect()
}

#[test]
fn vm_of_another_uid_is_not_found() {
    let world = World::new();
    let (vm, _) = world.running("web");
    let (daemon, them) = (world.daemon(), user(1000));
    assert!(
        daemon
            .views
            .list(
                &them,
                &VmListRequest {
                    all: true,
                    ..Default::default()
                }
            )
            .unwrap()
            .vms
            .is_empty()
    );
    let import = world.import("web");
    let op = ops_seen(&world, &root())[0].id.to_string();
    for text in ["web", vm.id.as_str(), &vm.id.as_str()[..4]] {
        let kinds = [
            daemon.views.show(&them, text).unwrap_err().kind(),
            daemon.lifecycle.start(&them, text).unwrap_err().kind(),
            daemon
                .lifecycle
                .stop(&them, &stop(text))
                .unwrap_err()
                .kind(),
            daemon.lifecycle.kill(&them, text).unwrap_err().kind(),
            daemon
                .lifecycle
                .delete(&them, &delete(text))
                .unwrap_err()
                .kind(),
            daemon
                .sessions
                .ssh_config(&them, &ssh_config(text))
                .unwrap_err()
                .kind(),
            daemon
                .controls
                .set(
                    &them,
                    &VmSetRequest {
                        vm: text.into(),
                        vcpus: Some(1),
                        ..Default::default()
                    },
                )
                .unwrap_err()
                .kind(),
            daemon
                .transfers
                .export(
                    &them,
                    ExportRequest {
                        vm: text.into(),
                        kind: ExportKind::Tree,
                        no_wait: true,
                    },
                    vec![pipe().1],
                )
                .map(|_| ())
                .unwrap_err()
                .kind(),
        ];
        // A pipe without a reader makes the call fail before the daemon looks at the VM, so the
        // error reveals nothing about it.
        assert!(
            kinds
                .iter()
                .all(|k| matches!(k, Kind::VmNotFound | Kind::Cancelled)),
            "{kinds:?}"
        );
    }
    assert!(ops_seen(&world, &them).is_empty());
    assert_eq!(
        daemon.core.op_find(&them, &op).unwrap_err().kind(),
        Kind::OperationNotFound
    );
    assert_eq!(
        daemon.core.op_cancel(&them, &op).unwrap_err().kind(),
        Kind::OperationNotFound
    );
    // A VM's owner sees the changes that root makes to it.
    let mine = daemon
        .creator
        .create(&them, &create(|r| r.name = Some("mine".parse().unwrap())))
        .unwrap();
    world.start("mine").unwrap();
    let seen = ops_seen(&world, &them);
    assert_eq!(
        seen.iter()
            .map(|op| (op.method.as_str(), &op.vm))
            .collect::<Vec<_>>(),
        [("vm.start", &Some(mine.id))]
    );
    assert_eq!(
        daemon.core.op_find(&them, seen[0].id.as_str()).unwrap().id,
        seen[0].id
    );
    let (pruned, _) = daemon.lifecycle.prune(&them).unwrap();
    assert!(pruned.deleted.is_empty());
    assert_eq!(world.state("web"), VmState::Running);
    import.call.hang_up();
    world.await_rest();
}
