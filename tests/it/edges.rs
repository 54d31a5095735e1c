//! Checks that the suite observed every edge of the lock table. This is the last step of
//! `scripts/test`. It reads what all processes of the suite recorded.

use fcd::testing::locks::rank;
use std::collections::BTreeSet;

#[test]
#[ignore = "the last step of scripts/test: reads what every process of the suite wrote into FCD_LOCK_EDGES"]
fn every_declared_edge_was_observed() {
    let path = std::env::var("FCD_LOCK_EDGES").expect("FCD_LOCK_EDGES names the file");
    let seen = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let seen: BTreeSet<&str> = seen.lines().collect();
    let declared: BTreeSet<String> = rank::declared()
        .filter(|(_, to)| !to.is_always_allowed())
        .map(|(from, to)| format!("{from:?} {to:?}"))
        .collect();
    let unseen: Vec<_> = declared
        .iter()
        .filter(|edge| !seen.contains(edge.as_str()))
        .collect();
    assert!(
        !seen.is_empty() && unseen.is_empty(),
        "declared in src/locks/rank.rs and never seen: delete or test {unseen:?}"
    );
}
