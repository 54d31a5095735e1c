//! Looks for the shortest list of requests with which a history still fails.

use crate::plan::{Name, Plan, REQUESTS};
use fcd::testing::sched::sim::Random;

/// How many variants of each list of requests are tried. A shorter list needs another schedule, and
/// another point of the fault, for the same failure.
const VARIANTS: usize = 40;

/// Returns a history with as few requests as possible for which `fails` returns true.
pub fn shrink(named: &Name, fails: &mut dyn FnMut(&Name) -> bool) -> Name {
    let mut random = Random::new(named.seed, 12);
    let mut best = Name {
        kept: named.kept & ((1u64 << REQUESTS) - 1),
        fault_at: Some(Plan::draw(named).fault.at),
        ..named.clone()
    };
    let mut size = REQUESTS / 2;
    while size > 0 {
        for at in (0..REQUESTS).step_by(size) {
            let cut = ((1u64 << size) - 1) << at;
            if best.kept & cut == 0 {
                continue;
            }
            let shorter = Name {
                kept: best.kept & !cut,
                ..best.clone()
            };
            let most = best.fault_at.unwrap_or(1);
            let others = (1..VARIANTS).map(|_| Name {
                schedule: random.below(1000),
                fault_at: Some(1 + random.below(most)),
                ..shorter.clone()
            });
            let variants: Vec<Name> = std::iter::once(shorter.clone()).chain(others).collect();
            if let Some(found) = variants.into_iter().find(|name| fails(name)) {
                best = found;
            }
        }
        size /= 2;
    }
    best
}
