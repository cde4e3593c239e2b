//! The queue of callers that wait for a permit. The module does no I/O and takes the time as an argument; the lock of
//! the limit protects it.
//!
//! # Structure
//!
//! There is one queue for the calls without a share and one for each partition, indexed by [`Line`]. A queue is a
//! `BTreeMap` from entry number to [`Waiter`]. Numbers increase with each entry and are never reused, so the map is
//! ordered by arrival: the first key has waited longest, the last key came last. Removal of any entry costs O(log n),
//! which matters because a waiting call can be dropped at any time, and because [`QueueOrder::Lifo`] and priorities
//! take entries from other places than the front.
//!
//! With priorities, `ranks` contains each entry again, ordered by queue, priority and arrival, so that the entry to
//! displace is found in O(log n).
//!
//! # The state of an entry
//!
//! A queue entry is identified by its [`Place`]. A waiting call owns it until the call takes over the permit or calls
//! [`leave`](Queue::leave). The entry is in one of three states, which follow from where it is:
//!
//! - in its queue: it waits ([`Turn::Waits`]).
//! - in `lost`: a call of higher priority has displaced it ([`Turn::Lost`]).
//! - in neither: it has received a permit ([`Turn::Come`]). The permit is already counted as in flight, and the owner
//!   of the `Place` is responsible for it.
//!
//! The owner may observe the state late, or never if it is dropped first. So `leave` returns the state, and the limit
//! then corrects its counts: it removes a waiting caller, releases the permit that was received, or does nothing.
//!
//! # Invariants
//!
//! - `len` is the number of entries in all queues. While the lock is free it equals the waiting count in the word of
//!   the limit: each change updates both under one lock hold.
//! - `ranks` contains an entry exactly while its queue does, if priorities were on when it joined.
//! - Wakers are returned to the caller and never woken, cloned or dropped here, because they are user code and the lock
//!   is held.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

use super::partition::{Cutoff, Line, Priority, Shares};
use crate::time::RecentLatency;

/// A queue entry: the index of its queue and its number. Numbers increase with each entry and are never reused.
pub(super) type Place = (Line, u64);

/// The order in which queued calls acquire permits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueOrder {
    /// First in, first out. Fair, and suitable as long as the queue is short.
    #[default]
    Fifo,
    /// Last in, first out. Under overload some calls are served in time and others not at all, whereas first in, first
    /// out serves all of them too late.
    Lifo,
    /// First in, first out, until the oldest entry has waited for this time or longer; then last in, first out, until
    /// the oldest entry has left. 100 ms is suitable for callers that wait for seconds. The rule is the target within
    /// an interval of CoDel (RFC 8289), as used in the servers of Facebook (Maurer, "Fail at Scale", ACM Queue 2015).
    Adaptive(Duration),
}

/// A queue entry that waits.
#[derive(Debug)]
struct Waiter {
    waker: Option<Waker>,
    since: Instant,
    priority: Priority,
}

/// The state of a queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It is in the queue.
    Waits,
    /// It has received a permit.
    Come,
    /// It has been removed for a call of higher priority.
    Lost,
}

/// Whether a waker is registered for a queue entry.
pub(super) enum Registered {
    /// A waker is registered, or none is needed. The caller drops this waker without the lock.
    Done(Option<Waker>),
    /// No suitable waker is registered. The caller clones its waker without the lock and tries again.
    NeedsWaker,
}

/// The queues of one limit. See the module for the invariants.
#[derive(Debug)]
pub(super) struct Queue {
    /// The queues, indexed by [`Line`]: the calls without a share, then one queue for each partition.
    lines: Vec<BTreeMap<u64, Waiter>>,
    /// The number of entries in all queues.
    len: usize,
    /// The number of the next entry.
    next: u64,
    order: QueueOrder,
    /// The entries by queue, priority and arrival, the latest arrival first. Empty without priorities.
    ranks: BTreeSet<(Line, Priority, Reverse<u64>)>,
    /// The numbers of displaced entries whose owner has not called [`leave`](Self::leave) yet.
    lost: BTreeSet<u64>,
    pub(super) shares: Shares,
    pub(super) cutoff: Option<Cutoff>,
    pub(super) waits: RecentLatency,
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
            waits: RecentLatency::default(),
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

    /// Adds an entry at the end of a queue.
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

    /// Displaces the entry of the lowest priority in this queue, of several the latest, if its priority is lower than
    /// `priority`. Returns the waker of the displaced entry, if it has registered one; `None` if no entry is displaced.
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

    /// Removes an entry that waits.
    fn remove(&mut self, (line, number): Place) -> Option<Waiter> {
        let waiter = self.line(line).remove(&number)?;
        self.ranks.remove(&(line, waiter.priority, Reverse(number)));
        self.len -= 1;
        Some(waiter)
    }

    /// Returns the queue of this index.
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

    /// Ends the ownership of an entry. Returns its last state, and the waker of an entry that waited.
    pub(super) fn leave(&mut self, place: Place) -> (Turn, Option<Waker>) {
        if let Some(waiter) = self.remove(place) {
            return (Turn::Waits, waiter.waker);
        }
        (if self.lost.remove(&place.1) { Turn::Lost } else { Turn::Come }, None)
    }

    /// Returns the queue that receives the next permit, if a permit is free and a queue may have it. `inside` is the
    /// number of calls in flight.
    ///
    /// Partitions that use less than their share come first, of several the one that uses the smallest part of it.
    /// Otherwise it is the queue with the oldest entry, of those that may borrow. `now` is called only if borrowing has
    /// to be decided.
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

    /// Removes the next entry of this queue, by the queue order, and counts it as admitted. Returns its waker. The
    /// caller has counted its permit as in flight already.
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
        self.waits.record(now.saturating_duration_since(waiter.since), now);
        waiter.waker
    }

    /// Counts an admitted call of this queue.
    pub(super) fn entered(&mut self, line: Line) {
        self.shares.enter(line);
        if let Some(cutoff) = &mut self.cutoff {
            cutoff.entered();
        }
    }

    /// Records the waiting time of an entry that is rejected because its maximum wait or its deadline has passed.
    pub(super) fn gives_up(&mut self, (line, number): Place, now: Instant) {
        if let Some(waiter) = self.line(line).get(&number) {
            let waited = now.saturating_duration_since(waiter.since);
            self.waits.record(waited, now);
        }
    }

    /// Counts a call of this queue that was rejected because no permit was free.
    pub(super) fn refused(&mut self, line: Line, limit: u32, now: Instant) {
        self.shares.refuse(line, limit, now);
        if let Some(cutoff) = &mut self.cutoff {
            cutoff.crowded();
        }
    }
}
