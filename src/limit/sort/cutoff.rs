//! Which priorities are shed. Pure; kept under the limit's lock.

use std::time::Duration;

use tokio::time::Instant;

use super::claim::{PRIORITIES, Priority};

/// A priority below which calls are refused, moved once a window so that those above it just find room.
///
/// The windows and the histogram are DAGOR's (Zhou et al., SoCC 2018). What it steers by is what the limit
/// let in, instead of steps: the calls worth most that would have come to as many.
pub(in crate::limit) struct Cutoff {
    arrived: Box<[u32; PRIORITIES]>,
    total: u32,
    entered: u32,
    /// Worth enough, and yet there was no room.
    crowded: u32,
    cut: u16,
    /// How much more is tried in a window in which nobody was crowded out.
    more: f64,
    since: Option<Instant>,
}

const WINDOW: Duration = Duration::from_secs(1);
const ENOUGH: u32 = 2000;
/// Too few calls to say anything: everybody may come.
const FEW: u32 = 20;
/// The share of those worth enough that may find no room by chance.
const BY_CHANCE: f64 = 0.05;
const MORE: f64 = 0.02;

impl Cutoff {
    pub(in crate::limit) fn new() -> Self {
        Self {
            arrived: Box::new([0; PRIORITIES]),
            total: 0,
            entered: 0,
            crowded: 0,
            cut: 0,
            more: MORE,
            since: None,
        }
    }

    /// A call has come: whether it is worth enough.
    pub(in crate::limit) fn hear(&mut self, priority: Priority, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if self.total >= ENOUGH || now.saturating_duration_since(since) >= WINDOW {
            self.turn();
            self.since = Some(now);
        }
        self.total += 1;
        self.arrived[usize::from(priority.number())] += 1;
        priority.number() >= self.cut
    }

    pub(in crate::limit) fn entered(&mut self) {
        self.entered += 1;
    }

    pub(in crate::limit) fn crowded(&mut self) {
        self.crowded += 1;
    }

    pub(in crate::limit) fn below(&self) -> Option<Priority> {
        (self.cut > 0).then_some(Priority::numbered(self.cut))
    }

    fn turn(&mut self) {
        let entered = f64::from(self.entered);
        self.cut = if self.total < FEW {
            0
        } else if f64::from(self.crowded) > BY_CHANCE * (entered + f64::from(self.crowded)) {
            self.more = MORE;
            self.worth(entered)
        } else {
            let more = self.more;
            self.more = (more * 2.0).min(1.0);
            self.worth(entered * (1.0 + more) + 1.0).min(self.cut)
        };
        if self.cut == 0 {
            self.more = MORE;
        }
        self.arrived.fill(0);
        (self.total, self.entered, self.crowded) = (0, 0, 0);
    }

    /// From where on so many would have come, or the first to be more.
    fn worth(&self, wanted: f64) -> u16 {
        let mut above = 0.0;
        for priority in (0..PRIORITIES).rev() {
            above += f64::from(self.arrived[priority]);
            if above > 0.0 && above >= wanted {
                return priority as u16;
            }
        }
        0
    }
}

impl std::fmt::Debug for Cutoff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cutoff").field("cut", &self.cut).finish_non_exhaustive()
    }
}
