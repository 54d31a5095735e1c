//! Counts the edges that an execution takes if the program was built with LLVM's `sancov-module`
//! pass and its `inline-8bit-counters`. This works with a stable compiler. `scripts/fuzz` passes
//! the flags.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// The start of the program's counters, which are in one section. This is null without the pass.
static START: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LEN: AtomicUsize = AtomicUsize::new(0);

/// The code that the pass generates calls this before `main` for every object file of the program,
/// always with the same section.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    START.store(start, Ordering::Relaxed);
    LEN.store(stop as usize - start as usize, Ordering::Relaxed);
}

#[allow(unsafe_code)]
fn counters() -> &'static mut [u8] {
    let start = START.load(Ordering::Relaxed);
    if start.is_null() {
        return &mut [];
    }
    // SAFETY: the section exists as long as the program. Targets run on this thread. No slice
    // outlives a function of this file, and none of these functions runs a target.
    unsafe { std::slice::from_raw_parts_mut(start, LEN.load(Ordering::Relaxed)) }
}

pub fn reset() {
    counters().fill(0);
}

/// The coverage so far: for each edge, a bit set of the orders of magnitude of its counts.
#[derive(Default)]
pub struct Coverage {
    seen: Vec<u8>,
}

impl Coverage {
    /// Returns true if the execution since [`reset`] reached an edge, or an order of magnitude, for
    /// the first time.
    pub fn add(&mut self) -> bool {
        let counters = counters();
        self.seen.resize(counters.len(), 0);
        let mut is_new = false;
        for (count, seen) in counters.iter().zip(&mut self.seen) {
            let magnitude = match count {
                0 => continue,
                1 => 1,
                2 => 2,
                3 => 4,
                4..8 => 8,
                8..16 => 16,
                16..32 => 32,
                32..128 => 64,
                128.. => 128,
            };
            is_new |= *seen & magnitude == 0;
            *seen |= magnitude;
        }
        is_new
    }

    /// Returns the number of edges taken so far, or `None` without the pass.
    pub fn edges(&self) -> Option<usize> {
        (!self.seen.is_empty()).then(|| self.seen.iter().filter(|seen| **seen > 0).count())
    }
}
