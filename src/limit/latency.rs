//! The waiting times of recent calls, for percentiles: two histograms of a fixed size. The module does no I/O and takes
//! the time as an argument; the lock of the limit protects it.

use std::{mem, time::Duration};

use tokio::time::Instant;

/// The waiting times of the last 30 to 60 s.
///
/// `now` collects for one [`AGE`]; then it becomes `before`, and the old `before` is cleared and reused. Percentiles
/// are computed over both.
#[derive(Debug, Default)]
pub(super) struct Waits {
    now: WaitCounts,
    before: WaitCounts,
    /// The start of `now`.
    since: Option<Instant>,
}

/// The time for which a histogram collects.
const AGE: Duration = Duration::from_secs(30);
/// The number of buckets: eight for each doubling of the time in microseconds, up to `u32::MAX` microseconds, which is
/// 71 minutes. A bucket is 1 µs wide, or an eighth of the power of two at which its doubling starts.
const SIZES: usize = 240;

#[derive(Debug, Default)]
struct WaitCounts {
    /// The buckets. They are allocated when the first call has waited.
    of: Option<Box<[u32; SIZES]>>,
    /// The sum of all buckets.
    all: u64,
}

impl Waits {
    pub(super) fn add(&mut self, wait: Duration, now: Instant) {
        self.age(now);
        let counts = self.now.of.get_or_insert_with(|| Box::new([0; SIZES]));
        let count = &mut counts[size(wait)];
        *count = count.saturating_add(1);
        self.now.all += 1;
    }

    fn age(&mut self, now: Instant) {
        let age = now.saturating_duration_since(*self.since.get_or_insert(now));
        if age >= AGE {
            mem::swap(&mut self.now, &mut self.before);
            self.now.clear();
            if age >= AGE * 2 {
                self.before.clear();
            }
            self.since = Some(now);
        }
    }

    /// Returns the time that this share of the waits did not exceed, too high by an eighth or less. `None` if no call
    /// waited.
    pub(super) fn percentile(&mut self, share: f64, now: Instant) -> Option<Duration> {
        self.age(now);
        let all = self.now.all + self.before.all;
        // The number of waits that the result must cover. It is at least 1, so that a share of 0 returns the minimum.
        let mut left = ((all as f64 * share.clamp(0.0, 1.0)).ceil() as u64).max(1);
        let both = |size: usize| self.now.get(size) + self.before.get(size);
        for size in 0..SIZES {
            match left.checked_sub(both(size)) {
                None | Some(0) => return Some(longest(size)),
                Some(rest) => left = rest,
            }
        }
        None
    }
}

impl WaitCounts {
    fn get(&self, size: usize) -> u64 {
        self.of.as_ref().map_or(0, |of| of[size].into())
    }

    fn clear(&mut self) {
        if let Some(of) = &mut self.of {
            of.fill(0);
        }
        self.all = 0;
    }
}

/// Returns the bucket of a waiting time.
fn size(wait: Duration) -> usize {
    let us = u32::try_from(wait.as_micros()).unwrap_or(u32::MAX);
    if us < 8 {
        return us as usize;
    }
    let doubling = us.ilog2();
    ((doubling - 2) * 8 + ((us >> (doubling - 3)) & 7)) as usize
}

/// Returns the maximum waiting time of a bucket.
fn longest(size: usize) -> Duration {
    let size = size as u64;
    Duration::from_micros(match size {
        0..8 => size,
        _ => ((8 + size % 8 + 1) << (size / 8 - 1)) - 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_waits_are_told_within_an_eighth() {
        let mut before = 0;
        for us in (0..5000).chain((5000..u64::from(u32::MAX)).step_by(1_234_567)) {
            let at = size(Duration::from_micros(us));
            assert!(at >= before && at < SIZES);
            before = at;
            let told = longest(at).as_micros() as u64;
            assert!(told >= us && told <= us + us / 8, "{us} is told as {told}");
        }
        assert_eq!(size(Duration::MAX), SIZES - 1);
    }

    #[test]
    fn limit_waits_of_long_ago_are_forgotten() {
        let (mut waits, began) = (Waits::default(), Instant::now());
        let at = |secs| began + Duration::from_secs(secs);
        let ms = Duration::from_millis;
        assert_eq!(waits.percentile(0.5, began), None);
        for n in 1..=100 {
            waits.add(ms(n), began);
        }
        for share in [0.5, 0.99, 1.0, 7.0] {
            let exact = 100.0 * f64::min(share, 1.0);
            let told = waits.percentile(share, at(1)).unwrap().as_secs_f64() * 1e3;
            assert!(told >= exact && told <= exact * 1.126, "{told} for {exact}");
        }
        assert!(waits.percentile(f64::NAN, at(1)).unwrap() <= Duration::from_micros(1126));
        waits.add(ms(500), at(31));
        assert!(waits.percentile(0.5, at(31)).unwrap() < ms(60), "both are told");
        assert!(waits.percentile(0.0, at(62)).unwrap() >= ms(500), "the older ones are gone");
        assert_eq!(waits.percentile(1.0, at(200)), None);
    }
}
