//! Tests of paged lists: each item appears exactly once and in order for any page size.

use crate::world::*;
use fcd::testing::api::op::{OpList, OpListRequest};
use fcd::testing::api::page::ListCall;
use fcd::testing::api::vm::{
    VmList, VmListBrief, VmListRequest, VmPause, VmStatsCall, VmStatsRequest,
};
use fcd::testing::client::{CALL_DEADLINE, Failure};
use fcd::testing::error::Kind;
use serde_json::Value;
use serde_json::value::RawValue;

/// Fetches all pages. Returns their items and the number of pages.
fn pages<C: ListCall<Request: Clone>>(
    world: &World,
    request: &C::Request,
) -> (Vec<C::Item>, usize) {
    let (mut all, mut pages, mut request) = (Vec::new(), 0, request.clone());
    loop {
        let (items, next) = C::into_page(world.call::<C>(&request).unwrap());
        all.extend(items);
        pages += 1;
        let Some(next) = next else {
            return (all, pages);
        };
        C::start_after(&mut request, next);
    }
}

#[test]
fn vms_in_pages_of_any_size_are_listed_once_in_order() {
    let world = World::new();
    let names: Vec<String> = (0..7).map(|n| format!("v{n}")).collect();
    names.iter().for_each(|name| drop(world.create(name)));
    let list = |limit| {
        let (vms, pages) = pages::<VmList>(
            &world,
            &VmListRequest {
                all: true,
                limit,
                ..Default::default()
            },
        );
        (
            vms.into_iter()
                .map(|vm| vm.name.to_string())
                .collect::<Vec<_>>(),
            pages,
        )
    };
    let (whole, one) = list(None);
    assert_eq!(one, 1);
    let mut sorted = whole.clone();
    sorted.sort();
    assert_eq!(sorted, names);
    for (limit, expected) in [(1, 7), (2, 4), (3, 3), (6, 2), (7, 1), (8, 1)] {
        assert_eq!(
            list(Some(limit)),
            (whole.clone(), expected),
            "limit {limit}"
        );
    }
    assert_eq!(
        world
            .client()
            .list::<VmList>(VmListRequest {
                all: true,
                ..Default::default()
            })
            .unwrap()
            .len(),
        7
    );
}

#[test]
fn changes_between_pages_skip_no_other_vm() {
    let world = World::new();
    (0..4).for_each(|n| drop(world.create(&format!("v{n}"))));
    let request = VmListRequest {
        all: true,
        limit: Some(2),
        ..Default::default()
    };
    let first = world.call::<VmList>(&request).unwrap();
    let second = world
        .call::<VmList>(&VmListRequest {
            after: first.next.clone(),
            ..request.clone()
        })
        .unwrap();
    // Deletes the VM that the cursor names before the second page is read.
    world.delete(first.vms[1].name.as_str()).unwrap();
    let again = world
        .call::<VmList>(&VmListRequest {
            after: first.next.clone(),
            ..request
        })
        .unwrap();
    assert_eq!(again.vms, second.vms);
}

#[test]
fn page_of_running_vms_is_full() {
    let world = World::new();
    ["v0", "v2", "v4"]
        .into_iter()
        .for_each(|name| drop(world.create(name)));
    ["v1", "v3"]
        .into_iter()
        .for_each(|name| drop(world.running(name)));
    let (running, count) = pages::<VmList>(
        &world,
        &VmListRequest {
            limit: Some(1),
            ..Default::default()
        },
    );
    let names: std::collections::BTreeSet<_> = running.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!((names, count), (["v1", "v3"].into(), 2));
    let (stats, _) = pages::<VmStatsCall>(
        &world,
        &VmStatsRequest {
            limit: Some(1),
            ..Default::default()
        },
    );
    assert!(stats.len() <= 2, "{stats:?}");
    world.stop("v1").unwrap();
    world.stop("v3").unwrap();
}

/// Calls `vm.list` with these parameters and returns the raw result.
fn list_raw(world: &World, params: &str) -> Result<Value, Failure> {
    let params = RawValue::from_string(params.to_owned()).unwrap();
    world
        .client()
        .call_raw("vm.list", &params, CALL_DEADLINE)
        .map(|answer| serde_json::from_str(answer.get()).unwrap())
}

/// Checks that `full` has the members of `brief` with the same values. A member that `brief` omits
/// must be null or false in `full`.
#[track_caller]
fn assert_is_part(brief: &Value, full: &Value) {
    const MEMBERS: [&str; 12] = [
        "id",
        "name",
        "state",
        "reason",
        "image",
        "vcpus",
        "mem_mib",
        "disk_bytes",
        "created_at",
        "unresponsive",
        "paused",
        "workspace",
    ];
    let (mut brief, full) = (
        brief.as_object().unwrap().clone(),
        full.as_object().unwrap(),
    );
    if let Some(digest) = brief.remove("short_digest") {
        let whole = full["image_digest"].as_str().unwrap();
        assert!(whole.contains(digest.as_str().unwrap()), "{digest} {whole}");
    }
    assert!(
        brief
            .keys()
            .all(|member| MEMBERS.contains(&member.as_str())),
        "{brief:?}"
    );
    for member in MEMBERS {
        match brief.get(member) {
            Some(value) => assert_eq!(Some(value), full.get(member), "{member}"),
            None => assert!(
                matches!(full[member], Value::Null | Value::Bool(false)),
                "{member}: {full:?}"
            ),
        }
    }
}

#[test]
fn brief_list_matches_full_list() {
    let world = World::new();
    world.create("created");
    world.create("failed");
    world.vmm.fail_next_start("no such machine");
    world.start("failed").unwrap_err();
    ["paused", "running"]
        .into_iter()
        .for_each(|name| drop(world.running(name)));
    world.import_all("running");
    world.call::<VmPause>(&request("paused")).unwrap();
    for all in [true, false] {
        let full = list_raw(&world, &format!(r#"{{"all":{all}}}"#)).unwrap();
        let brief = list_raw(&world, &format!(r#"{{"all":{all},"brief":true}}"#)).unwrap();
        let (full, brief) = (
            full["vms"].as_array().unwrap(),
            brief["vms"].as_array().unwrap(),
        );
        assert_eq!((full.len(), brief.len()), if all { (4, 4) } else { (2, 2) });
        full.iter()
            .zip(brief)
            .for_each(|(full, brief)| assert_is_part(brief, full));
    }
    let brief = world
        .client()
        .list::<VmListBrief>(VmListRequest {
            all: true,
            brief: true,
            ..Default::default()
        })
        .unwrap();
    let of = |name: &str| brief.iter().find(|vm| vm.name.as_str() == name).unwrap();
    assert!(
        of("failed")
            .reason
            .as_ref()
            .unwrap()
            .contains("no such machine")
    );
    assert!(of("paused").paused && !of("running").paused);
    assert!(of("running").workspace.is_some() && of("paused").workspace.is_none());
}

#[test]
fn brief_list_is_paged() {
    let world = World::new();
    (0..5).for_each(|n| drop(world.create(&format!("v{n}"))));
    let request = VmListRequest {
        all: true,
        brief: true,
        limit: Some(2),
        ..Default::default()
    };
    let (brief, count) = pages::<VmListBrief>(&world, &request);
    let (full, _) = pages::<VmList>(
        &world,
        &VmListRequest {
            brief: false,
            ..request
        },
    );
    assert_eq!((brief.len(), count), (5, 3));
    assert!(
        full.iter()
            .zip(&brief)
            .all(|(full, brief)| full.id == *brief.id)
    );
}

#[test]
fn invalid_view_is_refused() {
    let world = World::new();
    for (params, reason) in [
        (r#"{"brief":1}"#, "expected a boolean"),
        (r#"{"brief":"yes"}"#, "expected a boolean"),
        (r#"{"brief":null}"#, "expected a boolean"),
        (r#"{"breif":true}"#, "unknown field `breif`"),
        (r#"{"brief":true,"brief":true}"#, "duplicate field `brief`"),
    ] {
        let e = list_raw(&world, params).unwrap_err();
        assert!(
            e.is(Kind::InvalidArgument) && e.fault.message.contains(reason),
            "{params}: {e}"
        );
        assert!(e.fault.hint.is_some(), "{params}: {e:?}");
    }
}

#[test]
fn operations_are_paged() {
    let world = World::new();
    (0..3).for_each(|n| drop(world.running(&format!("v{n}"))));
    let request = OpListRequest {
        all: true,
        ..Default::default()
    };
    let (whole, _) = pages::<OpList>(&world, &request);
    let (paged, count) = pages::<OpList>(
        &world,
        &OpListRequest {
            limit: Some(1),
            ..request
        },
    );
    assert_eq!((paged.len(), count), (whole.len(), whole.len()));
    assert_eq!(paged, whole);
    (0..3).for_each(|n| drop(world.stop(&format!("v{n}")).unwrap()));
}

#[test]
fn invalid_cursor_or_limit_is_refused() {
    let world = World::new();
    for after in ["", "x", "5", "-1-0123456789ab", "5-web"] {
        let e = world
            .call::<VmList>(&VmListRequest {
                after: Some(after.into()),
                ..Default::default()
            })
            .unwrap_err();
        assert!(e.is(Kind::InvalidArgument), "{after:?}: {e}");
    }
    let e = world
        .call::<VmList>(&VmListRequest {
            limit: Some(0),
            ..Default::default()
        })
        .unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e}");
    let e = world
        .call::<OpList>(&OpListRequest {
            after: Some("web".into()),
            ..Default::default()
        })
        .unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e}");
}
