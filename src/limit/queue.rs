//! Who waits for a turn, in order. Pure; kept under the limit's lock.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    sort::{Cutoff, Line, Priority, Shares},
    waits::Waits,
};

/// A place in the queue: its line, and its number. Numbers count as they come and are never used twice.
pub(super) type Place = (Line, u64);

/// Whose turn it is, of those who wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueOrder {
    /// Who came first: fair, and right as long as the queue is short.
    #[default]
    Fifo,
    /// Who came last. Under overload some are served in time and the others not at all, instead of all
    /// too late.
    Lifo,
    /// Who came first, until whoever stands at the head has stood for this long or longer; then who came
    /// last, until the head has gone. A time of 100 ms is a good one where callers wait for seconds: the
    /// target within an interval of CoDel (RFC 8289), as Facebook's servers have it (Maurer, "Fail at
    /// Scale", ACM Queue 2015).
    Adaptive(Duration),
}

#[derive(Debug)]
struct Waiter {
    waker: Option<Waker>,
    since: Instant,
    priority: Priority,
}

/// What has become of a place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Waits,
    Come,
    /// Given to a call that is worth more.
    Lost,
}

/// Whether a waker is registered for a queue entry.
pub(super) enum Registered {
    /// It is, or none is needed. The caller drops this waker without the lock.
    Done(Option<Waker>),
    /// The caller clones its waker without the lock and tries again.
    NeedsWaker,
}

/// Any waiter may leave at any time.
#[derive(Debug)]
pub(super) struct Queue {
    /// One for those without a share, and one for each partition.
    lines: Vec<BTreeMap<u64, Waiter>>,
    len: usize,
    next: u64,
    order: QueueOrder,
    /// Who waits, by worth and then by who came last; where priorities are told apart.
    ranks: BTreeSet<(Line, Priority, Reverse<u64>)>,
    /// Who has lost a place and has yet to hear of it.
    lost: BTreeSet<u64>,
    pub(super) shares: Shares,
    pub(super) cutoff: Option<Cutoff>,
    pub(super) waits: Waits,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            lines: vec![BTreeMap::new()],
            len: 0,
            next: 0,
            order: QueueOrder::default(),
            ranks: BTreeSet::new(),
            lost: BTreeSet::new(),
            shares: Shares::default(),
            cutoff: None,
            waits: Waits::default(),
        }
    }
}

impl Queue {
    pub(super) fn set_order(&mut self, order: QueueOrder) {
        self.order = order;
    }

    /// Sets the shares of the partitions. There are never fewer queues than before, so that no waiting caller loses its
    /// entry.
    pub(super) fn set_shares(&mut self, ratios: &[f64]) {
        self.shares.set(ratios);
        let lines = self.shares.lines().max(self.lines.len());
        self.lines.resize_with(lines, BTreeMap::new);
    }

    pub(super) fn join(&mut self, line: Line, priority: Priority, now: Instant) -> Place {
        let number = self.next;
        self.next += 1;
        self.len += 1;
        if self.cutoff.is_some() {
            self.ranks.insert((line, priority, Reverse(number)));
        }
        self.line(line).insert(number, Waiter { waker: None, since: now, priority });
        (line, number)
    }

    /// The place of whoever is worth least in this line, if that is less than this; and who is to be told.
    pub(super) fn displace(&mut self, line: Line, priority: Priority) -> Option<Option<Waker>> {
        let least = (line, Priority::new(0), Reverse(u64::MAX));
        let (found, worth, Reverse(number)) = *self.ranks.range(least..).next()?;
        if found != line || worth >= priority {
            return None;
        }
        let waiter = self.remove((line, number))?;
        self.lost.insert(number);
        Some(waiter.waker)
    }

    fn remove(&mut self, (line, number): Place) -> Option<Waiter> {
        let waiter = self.line(line).remove(&number)?;
        self.ranks.remove(&(line, waiter.priority, Reverse(number)));
        self.len -= 1;
        Some(waiter)
    }

    fn line(&mut self, line: Line) -> &mut BTreeMap<u64, Waiter> {
        &mut self.lines[usize::from(line)]
    }

    /// Returns the state of this queue entry. If it waits and another waker than `current` is registered for it,
    /// registers `clone`, a clone of `current`, if there is one.
    pub(super) fn look(
        &mut self,
        (line, number): Place,
        current: &Waker,
        clone: Option<Waker>,
    ) -> (Turn, Registered) {
        let Some(waiter) = self.line(line).get_mut(&number) else {
            let lost = self.lost.contains(&number);
            return (if lost { Turn::Lost } else { Turn::Come }, Registered::Done(clone));
        };
        let is_known = waiter.waker.as_ref().is_some_and(|known| known.will_wake(current));
        let registered = match clone {
            clone if is_known => Registered::Done(clone),
            Some(clone) => Registered::Done(waiter.waker.replace(clone)),
            None => Registered::NeedsWaker,
        };
        (Turn::Waits, registered)
    }

    /// Gives the place up. What it was, and who would have been told.
    pub(super) fn leave(&mut self, place: Place) -> (Turn, Option<Waker>) {
        if let Some(waiter) = self.remove(place) {
            return (Turn::Waits, waiter.waker);
        }
        (if self.lost.remove(&place.1) { Turn::Lost } else { Turn::Come }, None)
    }

    /// The line whose turn it is, with so many inside: of those that are within their share the one that
    /// has the least of it, else whoever has waited longest of those that may borrow. None if nobody may.
    pub(super) fn turn(
        &self,
        limit: u32,
        inside: u32,
        now: impl FnOnce() -> Instant,
    ) -> Option<Line> {
        if self.len == 0 || inside >= limit {
            return None;
        }
        if self.lines.len() == 1 {
            return Some(0);
        }
        let waiting = (0..=u8::MAX).zip(&self.lines).filter(|(_, waiting)| !waiting.is_empty());
        let owners = waiting.clone().filter_map(|(line, _)| {
            self.shares.fullness(line, limit).map(|fullness| (fullness, line))
        });
        if let Some((_, line)) = owners.min_by(|a, b| a.0.total_cmp(&b.0)) {
            return Some(line);
        }
        let now = now();
        waiting
            .filter(|(line, _)| self.shares.may(*line, limit, inside, now))
            .min_by_key(|(_, waiting)| waiting.first_key_value().map(|(number, _)| *number))
            .map(|(line, _)| line)
    }

    /// The next of this line goes in.
    pub(super) fn next(&mut self, line: Line, now: Instant) -> Option<Waker> {
        let order = self.order;
        let waiting = &self.lines[usize::from(line)];
        let newest_first = match order {
            QueueOrder::Fifo => false,
            QueueOrder::Lifo => true,
            QueueOrder::Adaptive(longest) => waiting
                .first_key_value()
                .is_some_and(|(_, head)| now.saturating_duration_since(head.since) >= longest),
        };
        let turn = if newest_first { waiting.last_key_value() } else { waiting.first_key_value() };
        let number = turn.map(|(number, _)| *number);
        self.entered(line);
        let waiter = self.remove((line, number?))?;
        self.waits.add(now.saturating_duration_since(waiter.since), now);
        waiter.waker
    }

    /// A call of this line is in.
    pub(super) fn entered(&mut self, line: Line) {
        self.shares.enter(line);
        if let Some(cutoff) = &mut self.cutoff {
            cutoff.entered();
        }
    }

    /// Whoever has this place has waited for as long as he may.
    pub(super) fn gives_up(&mut self, (line, number): Place, now: Instant) {
        if let Some(waiter) = self.line(line).get(&number) {
            let waited = now.saturating_duration_since(waiter.since);
            self.waits.add(waited, now);
        }
    }

    /// A call of this line is not.
    pub(super) fn refused(&mut self, line: Line, limit: u32, now: Instant) {
        self.shares.refuse(line, limit, now);
        if let Some(cutoff) = &mut self.cutoff {
            cutoff.crowded();
        }
    }
}
