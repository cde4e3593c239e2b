//! The queue of callers that wait for a permit. The module does no I/O and takes the time as an argument; the lock of
//! the limit protects it.
//!
//! # Structure
//!
//! There is one queue for the calls without a share and one for each partition, indexed by [`PartitionIndex`]. A queue
//! is a `BTreeMap` from entry number to [`QueuedCall`]. Numbers increase with each entry and are never reused, so the
//! map is ordered by arrival: the first key has waited longest, the last key came last. Removal of any entry costs
//! O(log n), which matters because a waiting call can be dropped at any time, and because [`QueueOrder::Lifo`] and
//! priorities remove entries other than the oldest.
//!
//! With priorities, `ranks` contains each entry again, ordered by queue, priority and arrival, so that the entry to
//! displace is found in O(log n).
//!
//! # The state of an entry
//!
//! A queue entry is identified by its [`EntryId`]. A waiting call owns it until the call takes over the permit or calls
//! [`leave`](Queue::leave). The entry is in one of three states, which follow from where it is:
//!
//! - in its queue: it waits ([`Position::Queued`]).
//! - in `displaced`: a call of higher priority has displaced it ([`Position::Displaced`]).
//! - in neither: it has received a permit ([`Position::Granted`]). The permit is already counted as in flight, and the
//!   owner of the `EntryId` is responsible for it.
//!
//! The owner may observe the state late, or never if it is dropped first. So `leave` returns the state, and the limit
//! then corrects its counts: it removes a waiting caller, releases the permit that was received, or does nothing.
//!
//! # Invariants
//!
//! - `len` is the number of entries in all queues. While the lock is free it equals the waiting count in the word of
//!   the limit: each change updates both under one lock hold.
//! - `ranks` contains an entry exactly while its queue does, if priorities are on and were on when it joined.
//! - Wakers are returned to the caller and never woken, cloned or dropped here, because they are user code and the lock
//!   is held.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

use super::partition::{PartitionIndex, Priority, PriorityThreshold, Shares};
use crate::time::RecentLatency;
use crate::time::{WaitResult, WaitTimes};

/// A queue entry: the index of its queue and its number. Numbers increase with each entry and are never reused.
pub(super) type EntryId = (PartitionIndex, u64);

/// The maximum number of entries: the waiting count in the word of a limit has 31 bits.
pub(super) const MAX_QUEUE_LENGTH: u32 = (1 << 31) - 1;

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
    /// the oldest entry has left. 100 ms is suitable for callers that wait for seconds. The rule is the adaptive
    /// LIFO of the servers of Facebook (Maurer, "Fail at Scale", ACM Queue 2015).
    Adaptive(Duration),
}

/// A queue entry that waits.
#[derive(Debug)]
struct QueuedCall {
    waker: Option<Waker>,
    since: Instant,
    priority: Priority,
    /// Its wait has ended by a timeout and is recorded. Its owner removes the entry next.
    has_timed_out: bool,
}

/// The state of a queue entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Position {
    /// It is in the queue.
    Queued,
    /// It has received a permit.
    Granted,
    /// It has been removed for a call of higher priority.
    Displaced,
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
    /// The queues, by [`PartitionIndex`]: the calls without a share, then one queue for each partition.
    queues: Vec<BTreeMap<u64, QueuedCall>>,
    /// The number of entries in all queues.
    len: usize,
    /// The number of the next entry.
    next: u64,
    order: QueueOrder,
    /// The entries by queue, priority and arrival, the latest arrival first. Empty without priorities.
    ranks: BTreeSet<(PartitionIndex, Priority, Reverse<u64>)>,
    /// The numbers of displaced entries whose owner has not called [`leave`](Self::leave) yet.
    displaced: BTreeSet<u64>,
    pub(super) shares: Shares,
    pub(super) threshold: Option<PriorityThreshold>,
    pub(super) waits: RecentLatency,
    pub(super) wait_times: WaitTimes,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            queues: vec![BTreeMap::new()],
            len: 0,
            next: 0,
            order: QueueOrder::default(),
            ranks: BTreeSet::new(),
            displaced: BTreeSet::new(),
            shares: Shares::default(),
            threshold: None,
            waits: RecentLatency::default(),
            wait_times: WaitTimes::default(),
        }
    }
}

impl Queue {
    pub(super) fn set_order(&mut self, order: QueueOrder) {
        self.order = order;
    }

    /// Returns a queue without entries and with the same settings.
    pub(super) fn fork(&self) -> Self {
        let mut fork = Self { order: self.order, ..Self::default() };
        fork.set_shares(&self.shares.ratios());
        fork.set_reject_by_priority(self.threshold.is_some());
        fork
    }

    /// Turns rejection by priority on or off.
    pub(super) fn set_reject_by_priority(&mut self, on: bool) {
        self.threshold = on.then(PriorityThreshold::new);
        if !on {
            self.ranks.clear();
        }
    }

    /// Sets the shares of the partitions. There are never fewer queues than before, so that no waiting caller loses its
    /// entry.
    pub(super) fn set_shares(&mut self, ratios: &[f64]) {
        self.shares.set(ratios);
        let indices = self.shares.indices().max(self.queues.len());
        self.queues.resize_with(indices, BTreeMap::new);
    }

    /// Adds an entry at the end of a queue.
    pub(super) fn join(
        &mut self,
        index: PartitionIndex,
        priority: Priority,
        now: Instant,
    ) -> EntryId {
        let number = self.next;
        self.next += 1;
        self.len += 1;
        if self.threshold.is_some() {
            self.ranks.insert((index, priority, Reverse(number)));
        }
        let call = QueuedCall { waker: None, since: now, priority, has_timed_out: false };
        self.queue(index).insert(number, call);
        (index, number)
    }

    /// Displaces the entry of the lowest priority in this queue, of several the latest, if its priority is lower than
    /// `priority`. Returns the waker of the displaced entry, if it has registered one; `None` if no entry is displaced.
    pub(super) fn displace(
        &mut self,
        index: PartitionIndex,
        priority: Priority,
        now: Instant,
    ) -> Option<Option<Waker>> {
        let first = (index, Priority::new(0), Reverse(u64::MAX));
        let (found, min_priority, Reverse(number)) = *self.ranks.range(first..).next()?;
        if found != index || min_priority >= priority {
            return None;
        }
        let call = self.remove((index, number))?;
        self.displaced.insert(number);
        self.record_end(&call, WaitResult::Rejected, now);
        Some(call.waker)
    }

    /// Removes an entry that waits.
    fn remove(&mut self, (index, number): EntryId) -> Option<QueuedCall> {
        let call = self.queue(index).remove(&number)?;
        self.ranks.remove(&(index, call.priority, Reverse(number)));
        self.len -= 1;
        Some(call)
    }

    /// Returns the queue of this index.
    fn queue(&mut self, index: PartitionIndex) -> &mut BTreeMap<u64, QueuedCall> {
        &mut self.queues[usize::from(index)]
    }

    /// Returns the state of this queue entry. If it waits and another waker than `current` is registered for it,
    /// registers `clone`, a clone of `current`, if there is one.
    pub(super) fn position(
        &mut self,
        (index, number): EntryId,
        current: &Waker,
        clone: Option<Waker>,
    ) -> (Position, Registered) {
        let Some(call) = self.queue(index).get_mut(&number) else {
            let is_displaced = self.displaced.contains(&number);
            return (
                if is_displaced { Position::Displaced } else { Position::Granted },
                Registered::Done(clone),
            );
        };
        let is_known = call.waker.as_ref().is_some_and(|known| known.will_wake(current));
        let registered = match clone {
            clone if is_known => Registered::Done(clone),
            Some(clone) => Registered::Done(call.waker.replace(clone)),
            None => Registered::NeedsWaker,
        };
        (Position::Queued, registered)
    }

    /// Ends the ownership of an entry. Returns its last state, and the waker of an entry that waited. `now` is called
    /// only for an entry whose caller has abandoned its wait.
    pub(super) fn leave(
        &mut self,
        entry: EntryId,
        now: impl FnOnce() -> Instant,
    ) -> (Position, Option<Waker>) {
        if let Some(call) = self.remove(entry) {
            if !call.has_timed_out {
                self.record_end(&call, WaitResult::Abandoned, now());
            }
            return (Position::Queued, call.waker);
        }
        (
            if self.displaced.remove(&entry.1) { Position::Displaced } else { Position::Granted },
            None,
        )
    }

    /// Returns the queue that receives the next permit, if a permit is free and a queue may have it. `in_flight` is
    /// the number of calls in flight.
    ///
    /// Partitions that use less than their share come first, of several the one that uses the smallest part of it.
    /// Otherwise it is the queue with the oldest entry, of those that may borrow. `now` is called only if borrowing has
    /// to be decided.
    pub(super) fn next_index(
        &self,
        limit: u32,
        in_flight: u32,
        now: impl FnOnce() -> Instant,
    ) -> Option<PartitionIndex> {
        if self.len == 0 || in_flight >= limit {
            return None;
        }
        if self.queues.len() == 1 {
            return Some(0);
        }
        let waiting = (0..=u8::MAX).zip(&self.queues).filter(|(_, waiting)| !waiting.is_empty());
        let owners = waiting
            .clone()
            .filter_map(|(index, _)| self.shares.usage(index, limit).map(|usage| (usage, index)));
        if let Some((_, index)) = owners.min_by(|a, b| a.0.total_cmp(&b.0)) {
            return Some(index);
        }
        let now = now();
        waiting
            .filter(|(index, _)| self.shares.can_enter(*index, limit, in_flight, now))
            .min_by_key(|(_, waiting)| waiting.first_key_value().map(|(number, _)| *number))
            .map(|(index, _)| index)
    }

    /// Removes the next entry of this queue, by the queue order, and counts it as admitted. Returns its waker. The
    /// caller has counted its permit as in flight already.
    pub(super) fn grant(&mut self, index: PartitionIndex, now: Instant) -> Option<Waker> {
        let order = self.order;
        let waiting = &self.queues[usize::from(index)];
        let newest_first = match order {
            QueueOrder::Fifo => false,
            QueueOrder::Lifo => true,
            QueueOrder::Adaptive(max) => waiting
                .first_key_value()
                .is_some_and(|(_, head)| now.saturating_duration_since(head.since) >= max),
        };
        let first = if newest_first { waiting.last_key_value() } else { waiting.first_key_value() };
        let number = first.map(|(number, _)| *number);
        self.record_admission(index);
        let call = self.remove((index, number?))?;
        self.waits.record(now.saturating_duration_since(call.since), now);
        self.record_end(&call, WaitResult::Admitted, now);
        call.waker
    }

    /// Counts an admitted call of this queue.
    pub(super) fn record_admission(&mut self, index: PartitionIndex) {
        self.shares.record_admission(index);
        if let Some(threshold) = &mut self.threshold {
            threshold.record_admission();
        }
    }

    /// Records the waiting time of an entry that is rejected because its maximum wait or its deadline has passed.
    /// Returns whether the entry was waiting.
    pub(super) fn record_wait(&mut self, (index, number): EntryId, now: Instant) -> bool {
        let Some(call) = self.queue(index).get_mut(&number) else { return false };
        call.has_timed_out = true;
        let waited = now.saturating_duration_since(call.since);
        self.waits.record(waited, now);
        self.wait_times.record(WaitResult::Rejected, waited);
        true
    }

    /// Records the end of a wait for the metrics, unless it has been recorded at its timeout.
    fn record_end(&self, call: &QueuedCall, result: WaitResult, now: Instant) {
        if !call.has_timed_out {
            self.wait_times.record(result, now.saturating_duration_since(call.since));
        }
    }

    /// Counts a call of this queue that was rejected because no permit was free.
    pub(super) fn record_rejection(&mut self, index: PartitionIndex, limit: u32, now: Instant) {
        self.shares.record_rejection(index, limit, now);
        if let Some(threshold) = &mut self.threshold {
            threshold.record_no_room();
        }
    }
}
