//! `scripts/lock-code` compiles this file and compares the machine code of both functions. With the
//! checker off, fcd's lock must have the same instructions as parking_lot's.

#![allow(clippy::disallowed_types)] // `through_parking_lot` needs parking_lot's `Mutex`.

use std::hint::black_box;

#[inline(never)]
pub fn through_ours(counter: &fcd::testing::locks::Mutex<u64>) -> u64 {
    let mut guard = counter.lock();
    *guard += 1;
    *guard
}

#[inline(never)]
pub fn through_parking_lot(counter: &parking_lot::Mutex<u64>) -> u64 {
    let mut guard = counter.lock();
    *guard += 1;
    *guard
}

/// Returns names that only a build with the checker contains. Keyed sets are excluded because
/// `fcctl debug locks` names them in every build. Single words are excluded because they may be
/// part of another text.
fn ranks() -> impl Iterator<Item = &'static str> {
    fcd::testing::locks::rank::order()
        .into_iter()
        .map(|rule| rule.taken)
        .filter(|name| name.contains(' '))
}

fn main() {
    if std::env::args().nth(1).is_some_and(|a| a == "--ranks") {
        return ranks().for_each(|name| println!("{name}"));
    }
    let ours = fcd::testing::locks::Mutex::new(fcd::testing::locks::Rank::Store, 0);
    let theirs = parking_lot::Mutex::new(0);
    println!(
        "{} {}",
        through_ours(black_box(&ours)),
        through_parking_lot(black_box(&theirs))
    );
}
