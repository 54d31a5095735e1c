//! Token buckets: a single bucket, and one bucket for each client. This module does no I/O.

use crate::sched::Instant;
use std::collections::HashMap;
use std::net::IpAddr;

/// The maximum number of buckets. Full buckets can be dropped.
const CLIENTS_MAX: usize = 4096;

/// A bucket that refills at `per_s` tokens per second, up to `burst`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    per_s: f64,
    burst: f64,
    tokens: f64,
    since: Instant,
}

impl Bucket {
    /// Returns a full bucket.
    pub(super) fn new(per_s: u32, burst: u32, now: Instant) -> Self {
        Self {
            per_s: per_s.into(),
            burst: burst.into(),
            tokens: burst.into(),
            since: now,
        }
    }

    fn tokens_at(&self, now: Instant) -> f64 {
        let elapsed = now.saturating_duration_since(self.since).as_secs_f64();
        (self.tokens + elapsed * self.per_s).min(self.burst)
    }

    /// Takes a token. Returns false if there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let has = self.tokens_at(now);
        let taken = has >= 1.0;
        (self.tokens, self.since) = (if taken { has - 1.0 } else { has }, now);
        taken
    }
}

pub(super) struct Limiter {
    per_s: u32,
    burst: u32,
    buckets: HashMap<IpAddr, Bucket>,
}

impl Limiter {
    pub(super) fn new(per_s: u32, burst: u32) -> Self {
        Self {
            per_s,
            burst,
            buckets: HashMap::new(),
        }
    }

    /// Takes a token from the bucket of `client`. Returns false if that bucket is empty, or if
    /// there are too many clients.
    pub(super) fn admit(&mut self, client: IpAddr, now: Instant) -> bool {
        if !self.buckets.contains_key(&client) && self.buckets.len() >= CLIENTS_MAX {
            self.buckets
                .retain(|_, bucket| bucket.tokens_at(now) < bucket.burst);
            if self.buckets.len() >= CLIENTS_MAX {
                return false;
            }
        }
        let (per_s, burst) = (self.per_s, self.burst);
        self.buckets
            .entry(client)
            .or_insert_with(|| Bucket::new(per_s, burst, now))
            .take(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn limit_of_one_client_does_not_affect_others() {
        let (mut limiter, now) = (Limiter::new(10, 20), Instant::now());
        let (loud, quiet) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        assert_eq!((0..1000).filter(|_| limiter.admit(loud, now)).count(), 20);
        assert!(limiter.admit(quiet, now));
        let later = now + Duration::from_secs(1);
        assert_eq!((0..1000).filter(|_| limiter.admit(loud, later)).count(), 10);
    }

    #[test]
    fn number_of_buckets_is_bounded() {
        let (mut limiter, now) = (Limiter::new(1, 2), Instant::now());
        let client = |n: usize| IpAddr::from(u32::try_from(n).unwrap().to_be_bytes());
        for n in 0..2 * CLIENTS_MAX {
            limiter.admit(client(n), now);
        }
        assert_eq!(limiter.buckets.len(), CLIENTS_MAX);
        // Clients whose buckets are full again are forgotten, which makes room for new clients.
        assert!(limiter.admit(client(3 * CLIENTS_MAX), now + Duration::from_secs(10)));
        assert_eq!(limiter.buckets.len(), 1);
    }
}
