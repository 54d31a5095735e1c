//! Paged lists: each item appears once, in order, whatever the page size.

use crate::world::*;
use fcd::api::op::{OpList, OpListRequest};
use fcd::api::page::ListCall;
use fcd::api::vm::{VmList, VmListRequest, VmStatsCall, VmStatsRequest};
use fcd::error::Kind;

/// Fetches all items and counts the pages.
fn pages<C: ListCall<Request: Clone>>(world: &World, request: &C::Request) -> (Vec<C::Item>, usize) {
    let (mut all, mut pages, mut request) = (Vec::new(), 0, request.clone());
    loop {
        let (items, next) = C::into_page(world.call::<C>(&request).unwrap());
        all.extend(items);
        pages += 1;
        let Some(next) = next else { return (all, pages) };
        C::start_after(&mut request, next);
    }
}

#[test]
fn vms_in_pages_of_any_size_are_listed_once_in_order() {
    let world = World::new();
    let names: Vec<String> = (0..7).map(|n| format!("v{n}")).collect();
    names.iter().for_each(|name| drop(world.create(name)));
    let list = |limit| {
        let (vms, pages) = pages::<VmList>(&world, &VmListRequest { all: true, limit, ..Default::default() });
        (vms.into_iter().map(|vm| vm.name.to_string()).collect::<Vec<_>>(), pages)
    };
    let (whole, one) = list(None);
    assert_eq!(one, 1);
    let mut sorted = whole.clone();
    sorted.sort();
    assert_eq!(sorted, names);
    for (limit, expected) in [(1, 7), (2, 4), (3, 3), (6, 2), (7, 1), (8, 1)] {
        assert_eq!(list(Some(limit)), (whole.clone(), expected), "limit {limit}");
    }
    assert_eq!(world.client().list::<VmList>(VmListRequest { all: true, ..Default::default() }).unwrap().len(), 7);
}

#[test]
fn vms_deleted_and_created_between_pages_cost_no_other_vm() {
    let world = World::new();
    (0..4).for_each(|n| drop(world.create(&format!("v{n}"))));
    let request = VmListRequest { all: true, limit: Some(2), ..Default::default() };
    let first = world.call::<VmList>(&request).unwrap();
    let second = world.call::<VmList>(&VmListRequest { after: first.next.clone(), ..request.clone() }).unwrap();
    // Delete the VM that the cursor names before the second page is read.
    world.delete(first.vms[1].name.as_str()).unwrap();
    let again = world.call::<VmList>(&VmListRequest { after: first.next.clone(), ..request }).unwrap();
    assert_eq!(again.vms, second.vms);
}

#[test]
fn page_of_running_vms_is_full() {
    let world = World::new();
    ["v0", "v2", "v4"].into_iter().for_each(|name| drop(world.create(name)));
    ["v1", "v3"].into_iter().for_each(|name| drop(world.running(name)));
    let (running, count) = pages::<VmList>(&world, &VmListRequest { limit: Some(1), ..Default::default() });
    let names: std::collections::BTreeSet<_> = running.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!((names, count), (["v1", "v3"].into(), 2));
    let (stats, _) = pages::<VmStatsCall>(&world, &VmStatsRequest { limit: Some(1), ..Default::default() });
    assert!(stats.len() <= 2, "{stats:?}");
    world.stop("v1").unwrap();
    world.stop("v3").unwrap();
}

#[test]
fn operations_are_paged() {
    let world = World::new();
    (0..3).for_each(|n| drop(world.running(&format!("v{n}"))));
    let request = OpListRequest { all: true, ..Default::default() };
    let (whole, _) = pages::<OpList>(&world, &request);
    let (paged, count) = pages::<OpList>(&world, &OpListRequest { limit: Some(1), ..request });
    assert_eq!((paged.len(), count), (whole.len(), whole.len()));
    assert_eq!(paged, whole);
    (0..3).for_each(|n| drop(world.stop(&format!("v{n}")).unwrap()));
}

#[test]
fn invalid_cursor_or_limit_is_refused() {
    let world = World::new();
    for after in ["", "x", "5", "-1-0123456789ab", "5-web"] {
        let e = world.call::<VmList>(&VmListRequest { after: Some(after.into()), ..Default::default() }).unwrap_err();
        assert!(e.is(Kind::InvalidArgument), "{after:?}: {e}");
    }
    let e = world.call::<VmList>(&VmListRequest { limit: Some(0), ..Default::default() }).unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e}");
    let e = world.call::<OpList>(&OpListRequest { after: Some("web".into()), ..Default::default() }).unwrap_err();
    assert!(e.is(Kind::InvalidArgument), "{e}");
}
