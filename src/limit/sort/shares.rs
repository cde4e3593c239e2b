//! Shares of a limit, and who may borrow of them. Pure; kept under the limit's lock.

use std::time::Duration;

use tokio::time::Instant;

use crate::ConfigError;

/// 0 for calls without a share, else one more than the partition's number.
pub(in crate::limit) type Line = u8;

#[derive(Debug, Default)]
pub(in crate::limit) struct Shares(Vec<Share>);

#[derive(Debug, Default)]
struct Share {
    ratio: f64,
    inside: u32,
    refused: u64,
    /// So many were refused of late although they were within their share: it was lent.
    wanted: u32,
    last: Option<Instant>,
}

/// For so long places are kept for a partition that was refused within its share.
pub(in crate::limit) const KEPT: Duration = Duration::from_secs(1);
const MOST: usize = 64;

impl Share {
    fn own(&self, limit: u32) -> u32 {
        // A hair more, so that 0.7 of 10 is 7.
        (self.ratio * f64::from(limit) + 1e-6) as u32
    }

    fn is_within(&self, limit: u32) -> bool {
        self.inside < self.own(limit)
    }

    fn is_wanted(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) < KEPT)
    }

    fn kept(&self, limit: u32, now: Instant) -> u32 {
        if !self.is_wanted(now) {
            return 0;
        }
        self.wanted.min(self.own(limit).saturating_sub(self.inside))
    }
}

impl Shares {
    pub(in crate::limit) fn check(ratios: &[f64]) -> Result<(), ConfigError> {
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

    /// Those inside stay counted, also of a partition that has lost its share.
    pub(in crate::limit) fn set(&mut self, ratios: &[f64]) {
        let lines = self.0.len().max(ratios.len());
        self.0.resize_with(lines, Share::default);
        for (number, share) in self.0.iter_mut().enumerate() {
            share.ratio = ratios.get(number).copied().unwrap_or(0.0);
            share.last = None;
        }
    }

    pub(in crate::limit) fn line_of(&self, partition: Option<u8>) -> Line {
        match partition {
            Some(number) if usize::from(number) < self.0.len() => number + 1,
            _ => 0,
        }
    }

    pub(in crate::limit) fn lines(&self) -> usize {
        self.0.len() + 1
    }

    /// Share, inside and refused of each partition.
    pub(in crate::limit) fn each(&self, limit: u32) -> Vec<(u32, u32, u64)> {
        self.0.iter().map(|share| (share.own(limit), share.inside, share.refused)).collect()
    }

    fn of(&mut self, line: Line) -> Option<&mut Share> {
        self.0.get_mut(usize::from(line).checked_sub(1)?)
    }

    pub(in crate::limit) fn enter(&mut self, line: Line) {
        if let Some(share) = self.of(line) {
            share.inside += 1;
            share.wanted = share.wanted.saturating_sub(1);
        }
    }

    pub(in crate::limit) fn exit(&mut self, line: Line) {
        if let Some(share) = self.of(line) {
            share.inside = share.inside.saturating_sub(1);
        }
    }

    pub(in crate::limit) fn refuse(&mut self, line: Line, limit: u32, now: Instant) {
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

    /// Whether one more of this line may be inside, of so many that are: within its share always, beyond it
    /// with what nobody else is owed.
    pub(in crate::limit) fn may(&self, line: Line, limit: u32, inside: u32, now: Instant) -> bool {
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

    /// How full the line's share is, if there is still room in it: who has least goes first.
    pub(in crate::limit) fn fullness(&self, line: Line, limit: u32) -> Option<f64> {
        let share = self.0.get(usize::from(line).checked_sub(1)?)?;
        share.is_within(limit).then(|| f64::from(share.inside) / f64::from(share.own(limit)))
    }
}
