//! The shares of the partitions, and the rules for borrowing. The module does no I/O and takes the time as an argument;
//! the lock of the limit protects it.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::ConfigError;

/// The index of a queue and of its share: 0 for the calls without a share, else the number of the partition plus 1.
pub(crate) type Line = u8;

/// The shares of all partitions, by number.
#[derive(Debug, Default)]
pub(crate) struct Shares(Vec<Share>);

/// The share of a partition, and its calls.
#[derive(Debug, Default)]
struct Share {
    /// The share of the limit, 0 to 1.
    ratio: f64,
    /// The number of calls in flight.
    inside: u32,
    /// The number of calls that were rejected because no permit was free.
    refused: u64,
    /// The number of calls that were rejected recently although the partition used less than its share, because the
    /// permits were borrowed. That many permits are reserved, for [`KEPT`] after the last of these rejections.
    wanted: u32,
    /// The time of the last of these rejections.
    last: Option<Instant>,
}

/// The time for which a permit stays reserved for a partition after a rejection within its share.
pub(crate) const KEPT: Duration = Duration::from_secs(1);
/// The maximum number of partitions.
const MOST: usize = 64;

impl Share {
    /// Returns the number of permits of the share.
    fn own(&self, limit: u32) -> u32 {
        // The addition makes up for the rounding of floating-point numbers: 0.7 of 10 is 7.
        (self.ratio * f64::from(limit) + 1e-6) as u32
    }

    /// Returns whether the partition uses less than its share.
    fn is_within(&self, limit: u32) -> bool {
        self.inside < self.own(limit)
    }

    /// Returns whether there was such a rejection within [`KEPT`].
    fn is_wanted(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) < KEPT)
    }

    /// Returns the number of permits that are reserved for the partition.
    fn kept(&self, limit: u32, now: Instant) -> u32 {
        if !self.is_wanted(now) {
            return 0;
        }
        self.wanted.min(self.own(limit).saturating_sub(self.inside))
    }
}

impl Shares {
    /// Rejects invalid shares.
    pub(crate) fn check(ratios: &[f64]) -> Result<(), ConfigError> {
        let wrong = |remedy: &'static str| Err(ConfigError::new("partitions", ratios, remedy));
        if ratios.len() > MOST {
            return wrong("use at most 64");
        }
        if !ratios.iter().all(|ratio| *ratio > 0.0 && *ratio <= 1.0) {
            return wrong("use shares above 0, up to 1");
        }
        if ratios.iter().sum::<f64>() > 1.0 + 1e-9 {
            return wrong("use shares that sum up to 1 at most");
        }
        Ok(())
    }

    /// Sets the shares. Calls in flight stay counted, also those of a partition that has no share any more.
    pub(crate) fn set(&mut self, ratios: &[f64]) {
        let lines = self.0.len().max(ratios.len());
        self.0.resize_with(lines, Share::default);
        for (number, share) in self.0.iter_mut().enumerate() {
            share.ratio = ratios.get(number).copied().unwrap_or(0.0);
            share.last = None;
        }
    }

    /// Returns the index of a partition.
    pub(crate) fn line_of(&self, partition: Option<u8>) -> Line {
        match partition {
            Some(number) if usize::from(number) < self.0.len() => number + 1,
            _ => 0,
        }
    }

    /// Returns the number of indices.
    pub(crate) fn lines(&self) -> usize {
        self.0.len() + 1
    }

    /// Returns the share, the calls in flight and the rejections of each partition.
    pub(crate) fn each(&self, limit: u32) -> Vec<(u32, u32, u64)> {
        self.0.iter().map(|share| (share.own(limit), share.inside, share.refused)).collect()
    }

    fn of(&mut self, line: Line) -> Option<&mut Share> {
        self.0.get_mut(usize::from(line).checked_sub(1)?)
    }

    /// Counts an admitted call, which also uses up a reservation.
    pub(crate) fn enter(&mut self, line: Line) {
        if let Some(share) = self.of(line) {
            share.inside += 1;
            share.wanted = share.wanted.saturating_sub(1);
        }
    }

    /// Counts the end of a call.
    pub(crate) fn exit(&mut self, line: Line) {
        if let Some(share) = self.of(line) {
            share.inside = share.inside.saturating_sub(1);
        }
    }

    /// Counts a rejected call. Within the share of its partition, it also reserves a permit.
    pub(crate) fn refuse(&mut self, line: Line, limit: u32, now: Instant) {
        let Some(share) = self.of(line) else { return };
        share.refused += 1;
        if share.is_within(limit) {
            if !share.is_wanted(now) {
                share.wanted = 0;
            }
            share.wanted = share.wanted.saturating_add(1).min(share.own(limit));
            share.last = Some(now);
        }
    }

    /// Returns whether a call of this index may acquire a permit, with `inside` calls in flight in total. A partition
    /// that uses less than its share may acquire any free permit; other calls only those that are not reserved for
    /// other partitions.
    pub(crate) fn may(&self, line: Line, limit: u32, inside: u32, now: Instant) -> bool {
        if inside >= limit {
            return false;
        }
        let own = usize::from(line).checked_sub(1);
        if own.and_then(|own| self.0.get(own)).is_some_and(|share| share.is_within(limit)) {
            return true;
        }
        let others = self.0.iter().enumerate().filter(|(number, _)| Some(*number) != own);
        let kept: u64 = others.map(|(_, share)| u64::from(share.kept(limit, now))).sum();
        u64::from(limit - inside) > kept
    }

    /// Returns the used part of the share, 0 to 1, if the partition uses less than its share. The partition with the
    /// smallest part acquires the next permit.
    pub(crate) fn fullness(&self, line: Line, limit: u32) -> Option<f64> {
        let share = self.0.get(usize::from(line).checked_sub(1)?)?;
        share.is_within(limit).then(|| f64::from(share.inside) / f64::from(share.own(limit)))
    }
}
