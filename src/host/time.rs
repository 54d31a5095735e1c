//! The time of day. Waits and deadlines use [`std::time::Instant`] instead.

pub use crate::sched::since_epoch;

/// Returns the whole seconds since the epoch.
pub fn now_s() -> u64 {
    since_epoch().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn now_is_between_two_readings_of_the_clock() {
        let (before, now, after) = (since_epoch(), now_s(), since_epoch());
        assert!((before.as_secs()..=after.as_secs()).contains(&now));
    }
}
