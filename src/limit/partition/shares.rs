//! The shares of the partitions, and the rules for borrowing. The module does no I/O and takes the time as an argument;
//! the lock of the limit protects it.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::ConfigError;

/// The index of a queue and of its share: 0 for the calls without a share, else the number of the partition plus 1.
pub(crate) type PartitionIndex = u8;

/// The shares of all partitions, by number.
#[derive(Debug, Default)]
pub(crate) struct Shares(Vec<Share>);

/// The share of a partition, and its calls.
#[derive(Debug, Default)]
struct Share {
    /// The share of the limit, 0 to 1.
    ratio: f64,
    /// The number of calls in flight.
    in_flight: u32,
    /// The number of calls that were rejected because no permit was free.
    rejected: u64,
    /// The number of calls that were rejected recently although the partition used less than its share, because the
    /// permits were borrowed. That many permits are reserved, for [`RESERVATION`] after the last of these rejections.
    reserved: u32,
    /// The time of the last of these rejections.
    reserved_at: Option<Instant>,
}

/// The time for which a permit stays reserved for a partition after a rejection within its share.
pub(crate) const RESERVATION: Duration = Duration::from_secs(1);
/// The maximum number of partitions.
const MAX_PARTITIONS: usize = 64;

impl Share {
    /// Returns the number of permits of the share.
    fn permits(&self, limit: u32) -> u32 {
        // The addition makes up for the rounding of floating-point numbers: 0.7 of 10 is 7.
        (self.ratio * f64::from(limit) + 1e-6) as u32
    }

    /// Returns whether the partition uses less than its share.
    fn is_within(&self, limit: u32) -> bool {
        self.in_flight < self.permits(limit)
    }

    /// Returns whether there was such a rejection within [`RESERVATION`].
    fn has_reservation(&self, now: Instant) -> bool {
        self.reserved_at.is_some_and(|at| now.saturating_duration_since(at) < RESERVATION)
    }

    /// Returns the number of permits that are reserved for the partition.
    fn reserved_permits(&self, limit: u32, now: Instant) -> u32 {
        if !self.has_reservation(now) {
            return 0;
        }
        self.reserved.min(self.permits(limit).saturating_sub(self.in_flight))
    }
}

impl Shares {
    /// Rejects invalid shares.
    pub(crate) fn check(ratios: &[f64]) -> Result<(), ConfigError> {
        let wrong = |remedy: &'static str| Err(ConfigError::new("partitions", ratios, remedy));
        if ratios.len() > MAX_PARTITIONS {
            return wrong("use at most 64");
        }
        if !ratios.iter().all(|ratio| *ratio > 0.0 && *ratio <= 1.0) {
            return wrong("use shares above 0, up to 1");
        }
        if ratios.iter().sum::<f64>() > 1.0 + 1e-9 {
            return wrong("use shares with a sum of 1 or less");
        }
        Ok(())
    }

    /// Sets the shares. Calls in flight stay counted, also those of a partition that has no share any more.
    pub(crate) fn set(&mut self, ratios: &[f64]) {
        let len = self.0.len().max(ratios.len());
        self.0.resize_with(len, Share::default);
        for (number, share) in self.0.iter_mut().enumerate() {
            share.ratio = ratios.get(number).copied().unwrap_or(0.0);
            share.reserved_at = None;
        }
    }

    pub(crate) fn ratios(&self) -> Vec<f64> {
        self.0.iter().map(|share| share.ratio).collect()
    }

    /// Returns the index of a partition.
    pub(crate) fn index_of(&self, partition: Option<u8>) -> PartitionIndex {
        match partition {
            Some(number) if usize::from(number) < self.0.len() => number + 1,
            _ => 0,
        }
    }

    /// Returns the number of indices.
    pub(crate) fn indices(&self) -> usize {
        self.0.len() + 1
    }

    /// Returns the share, the calls in flight and the rejections of each partition.
    pub(crate) fn snapshots(&self, limit: u32) -> Vec<(u32, u32, u64)> {
        self.0.iter().map(|share| (share.permits(limit), share.in_flight, share.rejected)).collect()
    }

    fn of(&mut self, index: PartitionIndex) -> Option<&mut Share> {
        self.0.get_mut(usize::from(index).checked_sub(1)?)
    }

    /// Counts an admitted call, which also uses up a reservation.
    pub(crate) fn record_admission(&mut self, index: PartitionIndex) {
        if let Some(share) = self.of(index) {
            share.in_flight += 1;
            share.reserved = share.reserved.saturating_sub(1);
        }
    }

    /// Counts the end of a call.
    pub(crate) fn record_release(&mut self, index: PartitionIndex) {
        if let Some(share) = self.of(index) {
            share.in_flight = share.in_flight.saturating_sub(1);
        }
    }

    /// Counts a rejected call. Within the share of its partition, it also reserves a permit.
    pub(crate) fn record_rejection(&mut self, index: PartitionIndex, limit: u32, now: Instant) {
        let Some(share) = self.of(index) else { return };
        share.rejected += 1;
        if share.is_within(limit) {
            if !share.has_reservation(now) {
                share.reserved = 0;
            }
            share.reserved = share.reserved.saturating_add(1).min(share.permits(limit));
            share.reserved_at = Some(now);
        }
    }

    /// Returns whether a call of this index may acquire a permit, with `in_flight` calls in flight in total. A
    /// partition that uses less than its share may acquire any free permit; other calls only those that are not
    /// reserved for other partitions.
    pub(crate) fn can_enter(
        &self,
        index: PartitionIndex,
        limit: u32,
        in_flight: u32,
        now: Instant,
    ) -> bool {
        if in_flight >= limit {
            return false;
        }
        let own = usize::from(index).checked_sub(1);
        if own.and_then(|own| self.0.get(own)).is_some_and(|share| share.is_within(limit)) {
            return true;
        }
        let others = self.0.iter().enumerate().filter(|(number, _)| Some(*number) != own);
        let reserved: u64 =
            others.map(|(_, share)| u64::from(share.reserved_permits(limit, now))).sum();
        u64::from(limit - in_flight) > reserved
    }

    /// Returns the used part of the share, 0 to 1, if the partition uses less than its share. The partition with the
    /// smallest part acquires the next permit.
    pub(crate) fn usage(&self, index: PartitionIndex, limit: u32) -> Option<f64> {
        let share = self.0.get(usize::from(index).checked_sub(1)?)?;
        share.is_within(limit).then(|| f64::from(share.in_flight) / f64::from(share.permits(limit)))
    }
}
