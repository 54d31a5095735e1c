//! Rates, as buckets of tokens: one for each asker, and single ones. Pure.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Instant;

/// Buckets that are kept; a full one is as good as none.
const ASKERS_MAX: usize = 4096;

/// Tokens that come back at a rate, up to a number.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    per_s: f64,
    burst: f64,
    tokens: f64,
    since: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(per_s: u32, burst: u32, now: Instant) -> Self {
        Self { per_s: per_s.into(), burst: burst.into(), tokens: burst.into(), since: now }
    }

    fn tokens_at(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.since).as_secs_f64();
        (self.tokens + elapsed * self.per_s).min(self.burst)
    }

    /// Takes a token if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let has = self.tokens_at(now);
        let taken = has >= 1.0;
        (self.tokens, self.since) = (if taken { has - 1.0 } else { has }, now);
        taken
    }
}

pub struct Limiter {
    per_s: u32,
    burst: u32,
    buckets: HashMap<IpAddr, Bucket>,
}

impl Limiter {
    pub fn new(per_s: u32, burst: u32) -> Self {
        Self { per_s, burst, buckets: HashMap::new() }
    }

    /// Whether `asker` may ask one more thing now.
    pub fn admit(&mut self, asker: IpAddr, now: Instant) -> bool {
        if !self.buckets.contains_key(&asker) && self.buckets.len() >= ASKERS_MAX {
            self.buckets.retain(|_, bucket| bucket.tokens_at(now) < bucket.burst);
            if self.buckets.len() >= ASKERS_MAX {
                return false;
            }
        }
        let (per_s, burst) = (self.per_s, self.burst);
        self.buckets.entry(asker).or_insert_with(|| Bucket::new(per_s, burst, now)).take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_asker_does_not_take_the_place_of_another() {
        let (mut limiter, now) = (Limiter::new(10, 20), Instant::now());
        let (loud, quiet) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        assert_eq!((0..1000).filter(|_| limiter.admit(loud, now)).count(), 20);
        assert!(limiter.admit(quiet, now));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limiter.admit(loud, later)).count(), 10);
    }

    #[test]
    fn a_bounded_number_of_askers_is_remembered() {
        let (mut limiter, now) = (Limiter::new(1, 2), Instant::now());
        let asker = |n: usize| IpAddr::from(u32::try_from(n).unwrap().to_be_bytes());
        for n in 0..2 * ASKERS_MAX {
            limiter.admit(asker(n), now);
        }
        assert_eq!(limiter.buckets.len(), ASKERS_MAX);
        // Once they are full again they make room.
        assert!(limiter.admit(asker(3 * ASKERS_MAX), now + Duration::from_secs(10)));
        assert_eq!(limiter.buckets.len(), 1);
    }
}
