//! Percentiles of recent latencies.
//!
//! Two histograms contain the latencies of the current and of the previous window of 30 s. A percentile is computed
//! over both, so it covers the last 30 to 60 s.
//!
//! A histogram is log-linear: each octave, from one power of two of nanoseconds to the next, has 128 buckets of equal
//! width. The upper bound of a bucket exceeds the latencies in it by less than 1/128, which is 0.8 %. The buckets of an
//! octave, 512 bytes, are allocated when the first latency of the octave is recorded.
//!
//! Each function takes the time as an argument. The state that contains a [`RecentLatency`] protects it by a lock.

use std::{mem, time::Duration};

use tokio::time::Instant;

use super::clock::nanos;

/// The latencies of the last one to two [windows](WINDOW).
#[derive(Debug, Default)]
pub(crate) struct RecentLatency {
    current: Histogram,
    previous: Histogram,
    /// The start of the current window.
    since: Option<Instant>,
}

/// The time for which a histogram collects latencies.
const WINDOW: Duration = Duration::from_secs(30);
/// The number of buckets of an octave, as a power of two.
const BUCKET_BITS: u32 = 7;
const BUCKETS: usize = 1 << BUCKET_BITS;

impl RecentLatency {
    /// Records a latency. Returns whether a new window has begun.
    pub(crate) fn record(&mut self, latency: Duration, now: Instant) -> bool {
        let has_begun = self.advance(now);
        self.current.record(latency);
        has_begun
    }

    /// Begins a new window if the current one is over.
    fn advance(&mut self, now: Instant) -> bool {
        let age = now.saturating_duration_since(*self.since.get_or_insert(now));
        if age < WINDOW {
            return false;
        }
        mem::swap(&mut self.current, &mut self.previous);
        self.current.clear();
        // Without a latency in a whole window, the previous window is empty.
        if age >= WINDOW * 2 {
            self.previous.clear();
        }
        self.since = Some(now);
        true
    }

    /// Returns the number of latencies.
    pub(crate) fn count(&self) -> u64 {
        self.current.count + self.previous.count
    }

    /// Returns the latency that this share of the latencies, 0 to 1, did not exceed. The result is too high by less
    /// than 1 %. `None` without latencies.
    pub(crate) fn percentile(&mut self, share: f64, now: Instant) -> Option<Duration> {
        self.advance(now);
        // The number of latencies that the result must cover: at least 1, so that a share of 0 returns the minimum.
        let mut rank = ((self.count() as f64 * share.clamp(0.0, 1.0)).ceil() as u64).max(1);
        for octave in 0..self.current.octaves.len().max(self.previous.octaves.len()) {
            let both = [self.current.octave(octave), self.previous.octave(octave)];
            let count: u64 = both.map(|(count, _)| count).into_iter().sum();
            if rank > count {
                rank -= count;
                continue;
            }
            for bucket in 0..BUCKETS {
                let counts = both.map(|(_, buckets)| buckets.get(bucket).copied().unwrap_or(0));
                let count: u64 = counts.into_iter().map(u64::from).sum();
                if rank <= count {
                    return Some(max_of(octave, bucket));
                }
                rank -= count;
            }
        }
        None
    }
}

#[derive(Debug, Default)]
struct Histogram {
    octaves: Vec<Octave>,
    /// The sum of all counts.
    count: u64,
}

#[derive(Debug, Default)]
struct Octave {
    /// The sum of the counts.
    count: u64,
    /// The counts of the buckets. Empty before the first latency of the octave.
    buckets: Vec<u32>,
}

impl Histogram {
    fn record(&mut self, latency: Duration) {
        let (octave, bucket) = bucket_of(latency);
        if self.octaves.len() <= octave {
            self.octaves.resize_with(octave + 1, Octave::default);
        }
        let octave = &mut self.octaves[octave];
        if octave.buckets.is_empty() {
            octave.buckets = vec![0; BUCKETS];
        }
        octave.buckets[bucket] = octave.buckets[bucket].saturating_add(1);
        octave.count += 1;
        self.count += 1;
    }

    /// Returns the sum of the counts of an octave, and the counts.
    fn octave(&self, octave: usize) -> (u64, &[u32]) {
        match self.octaves.get(octave) {
            Some(octave) => (octave.count, octave.buckets.as_slice()),
            None => (0, &[]),
        }
    }

    /// Sets all counts to zero. The memory stays allocated, because the next latencies are probably similar.
    fn clear(&mut self) {
        for octave in &mut self.octaves {
            octave.buckets.fill(0);
            octave.count = 0;
        }
        self.count = 0;
    }
}

/// Returns the octave and the bucket of a latency. Octave 0 contains the latencies below 128 ns, with 1 ns per bucket.
fn bucket_of(latency: Duration) -> (usize, usize) {
    let ns = nanos(latency);
    let octave = (u64::BITS - BUCKET_BITS).saturating_sub(ns.leading_zeros());
    (octave as usize, (ns >> octave.saturating_sub(1)) as usize % BUCKETS)
}

/// Returns the maximum latency of a bucket.
fn max_of(octave: usize, bucket: usize) -> Duration {
    let width = octave.saturating_sub(1);
    let first = if octave == 0 { bucket } else { BUCKETS + bucket } as u64;
    Duration::from_nanos(first << width | ((1 << width) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_within_one_percent(percentile: Duration, exact: Duration) -> bool {
        percentile >= exact && nanos(percentile) - nanos(exact) <= nanos(exact) / 128
    }

    #[test]
    fn buckets_are_ordered_and_narrower_than_one_percent() {
        let mut previous = (0, 0);
        for shift in 0..u64::BITS {
            for step in 0..BUCKETS as u64 {
                let latency =
                    Duration::from_nanos((1 << shift) + (u128::from(step) << shift >> 7) as u64);
                let bucket = bucket_of(latency);
                assert!(bucket >= previous, "{latency:?}");
                previous = bucket;
                assert!(is_within_one_percent(max_of(bucket.0, bucket.1), latency), "{latency:?}");
            }
        }
        assert_eq!(max_of(previous.0, previous.1), Duration::from_nanos(u64::MAX));
        assert_eq!(bucket_of(Duration::MAX), previous);
        assert_eq!(bucket_of(Duration::ZERO), (0, 0));
    }

    #[test]
    fn percentiles_are_within_one_percent_of_the_exact_ones() {
        let mut rng = fastrand::Rng::with_seed(7);
        let now = Instant::now();
        for _ in 0..500 {
            let mut recent = RecentLatency::default();
            let shift = rng.u32(..64);
            let max = rng.u64(1..=u64::MAX >> shift);
            let latency = |rng: &mut fastrand::Rng| Duration::from_nanos(rng.u64(..=max));
            let mut exact: Vec<_> = (0..rng.usize(1..300)).map(|_| latency(&mut rng)).collect();
            // A part of the latencies is in the previous window.
            let split = rng.usize(..=exact.len());
            exact[..split].iter().for_each(|latency| _ = recent.record(*latency, now));
            let later = now + WINDOW;
            exact[split..].iter().for_each(|latency| _ = recent.record(*latency, later));
            let later = if split == exact.len() { now } else { later };
            exact.sort_unstable();
            for share in [0.0, 0.5, 0.9, 0.99, 1.0, rng.f64()] {
                let rank = ((share * exact.len() as f64).ceil() as usize).max(1);
                let percentile = recent.percentile(share, later).expect("latencies");
                let exact = exact[rank - 1];
                assert!(
                    is_within_one_percent(percentile, exact),
                    "{share}: {percentile:?} {exact:?}"
                );
            }
        }
    }

    #[test]
    fn percentile_of_few_latencies_is_one_of_them() {
        let (mut recent, now) = (RecentLatency::default(), Instant::now());
        assert_eq!(recent.percentile(0.5, now), None);
        let ms = Duration::from_millis;
        recent.record(ms(100), now);
        recent.record(ms(200), now);
        for (share, exact) in
            [(0.0, 100), (0.5, 100), (0.51, 200), (0.99, 200), (7.0, 200), (f64::NAN, 100)]
        {
            let percentile = recent.percentile(share, now).unwrap();
            assert!(is_within_one_percent(percentile, ms(exact)), "{share}: {percentile:?}");
        }
    }

    #[test]
    fn latencies_expire_after_two_windows() {
        let (mut recent, began) = (RecentLatency::default(), Instant::now());
        let at = |secs| began + Duration::from_secs(secs);
        let ms = Duration::from_millis;
        (1..=100).for_each(|n| assert!(!recent.record(ms(n), began)));
        assert!(recent.record(ms(500), at(31)), "a new window");
        assert!(recent.percentile(0.5, at(31)).unwrap() < ms(60), "both windows count");
        assert_eq!(recent.count(), 101);
        assert!(recent.percentile(0.0, at(62)).unwrap() >= ms(500), "the first window has expired");
        assert_eq!(recent.percentile(1.0, at(200)), None);
        assert_eq!(recent.count(), 0);
    }
}
