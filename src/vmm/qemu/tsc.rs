//! Measures the frequency of this host's time stamp counter (TSC). Under emulation the guest reads
//! the host's counter. The `microvm` board has no timer against which the guest could measure the
//! counter's frequency, so the guest's kernel gets the frequency as an argument.

use crate::error::{Error, Result};
use crate::host::wait::{cancelled, sleep};
use crate::locks::Cancel;
use crate::sched::Instant;
use std::time::Duration;

/// How long to wait between two readings of both clocks. A reading is accurate to about 100 ns, so
/// the error is below 2 ppm.
const INTERVAL: Duration = Duration::from_millis(100);
/// The number of times that the clocks are read. The least disturbed reading counts.
const LOOKS: usize = 64;

/// True if the TSC has a constant rate in all power states (the kernel's flags of cpuid
/// 0x80000007).
pub(super) fn is_constant() -> bool {
    crate::locks::may_block("file access");
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| flags_are_constant(&text))
}

fn flags_are_constant(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find_map(|l| l.strip_prefix("flags"))
        .unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|want| flags.split_whitespace().any(|f| f == *want))
}

/// Returns the frequency in kHz, measured against CLOCK_MONOTONIC. Takes a tenth of a second.
/// Returns None on other architectures, or if no current CPU has the measured frequency.
pub(super) fn measure_khz(cancel: &Cancel) -> Result<Option<u64>> {
    let doing = "measure the time stamp counter";
    let Some((before, ticks_before)) = look() else {
        return Ok(None);
    };
    if !sleep(INTERVAL, cancel).map_err(|e| Error::io(doing, e))? {
        return Err(cancelled(doing, cancel));
    }
    let Some((after, ticks_after)) = look() else {
        return Ok(None);
    };
    Ok(khz(
        ticks_after.saturating_sub(ticks_before),
        after.duration_since(before),
    ))
}

fn khz(ticks: u64, time: Duration) -> Option<u64> {
    let khz = u64::try_from(u128::from(ticks) * 1_000_000 / time.as_nanos().max(1)).ok()?;
    // Reject a result that no current CPU has.
    (100_000..=20_000_000).contains(&khz).then_some(khz)
}

/// Reads both clocks at nearly the same time. Returns None on other architectures.
fn look() -> Option<(Instant, u64)> {
    let mut best: Option<(Duration, Instant, u64)> = None;
    for _ in 0..LOOKS {
        let before = Instant::now();
        let ticks = ticks()?;
        let spread = before.elapsed();
        if best.is_none_or(|(least, ..)| spread < least) {
            best = Some((spread, before + spread / 2, ticks));
        }
    }
    best.map(|(_, at, ticks)| (at, ticks))
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn ticks() -> Option<u64> {
    // SAFETY: rdtsc only reads a register. A process can disable it (PR_SET_TSC), but ours does
    // not.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_parsed() {
        assert!(flags_are_constant(
            "processor : 0\nflags\t\t: fpu constant_tsc nonstop_tsc\n"
        ));
        assert!(!flags_are_constant("flags : fpu constant_tsc\n"));
        assert!(!flags_are_constant(
            "flags : fpu not_constant_tsc nonstop_tsc\n"
        ));
        assert!(!flags_are_constant(""));
    }

    #[test]
    fn frequency_is_computed_and_checked() {
        assert_eq!(
            khz(259_611_100, Duration::from_millis(100)),
            Some(2_596_111)
        );
        assert_eq!(khz(0, Duration::from_millis(100)), None);
        assert_eq!(khz(u64::MAX, Duration::from_millis(1)), None);
    }

    #[test]
    fn measurements_agree_if_counter_is_constant() {
        let cancel = Cancel::try_new().unwrap();
        let (a, b) = (measure_khz(&cancel).unwrap(), measure_khz(&cancel).unwrap());
        if let (true, Some(a), Some(b)) = (is_constant(), a, b) {
            assert!(a.abs_diff(b) * 1000 < a, "{a} and {b} kHz");
        }
        cancel.cancel(crate::locks::CancelCause::Requested);
        assert!(measure_khz(&cancel).is_err());
    }
}
