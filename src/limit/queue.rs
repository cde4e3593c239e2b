//! Who waits for a turn, in order. Pure; kept under the limit's lock.

use std::{collections::BTreeMap, task::Waker, time::Duration};

use tokio::time::Instant;

/// A place in the queue. Places are numbered as they come and never used twice.
pub(super) type Place = u64;

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
}

/// Any waiter may leave at any time.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Place, Waiter>,
    next: Place,
    order: QueueOrder,
}

impl Queue {
    pub(super) fn set_order(&mut self, order: QueueOrder) {
        self.order = order;
    }

    pub(super) fn join(&mut self, now: Instant) -> Place {
        let place = self.next;
        self.next += 1;
        self.waiting.insert(place, Waiter { waker: None, since: now });
        place
    }

    /// Whether this place still waits; if so, `waker` is who is told of its turn.
    pub(super) fn waits(&mut self, place: Place, waker: &Waker) -> bool {
        let Some(waiter) = self.waiting.get_mut(&place) else { return false };
        match &waiter.waker {
            Some(known) if known.will_wake(waker) => {}
            _ => waiter.waker = Some(waker.clone()),
        }
        true
    }

    /// Gives the place up. False if its turn had come already.
    pub(super) fn leave(&mut self, place: Place) -> bool {
        self.waiting.remove(&place).is_some()
    }

    /// The next one's turn. The time is asked for only where the order depends on it.
    pub(super) fn next(&mut self, now: impl FnOnce() -> Instant) -> Option<Option<Waker>> {
        let newest_first = match self.order {
            QueueOrder::Fifo => false,
            QueueOrder::Lifo => true,
            QueueOrder::Adaptive(longest) => self
                .waiting
                .first_key_value()
                .is_some_and(|(_, head)| now().saturating_duration_since(head.since) >= longest),
        };
        let turn = if newest_first { self.waiting.pop_last() } else { self.waiting.pop_first() };
        turn.map(|(_, waiter)| waiter.waker)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
