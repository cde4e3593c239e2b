//! Who waits for a turn, in order. Pure; kept under the limit's lock.

use std::{collections::BTreeMap, task::Waker};

/// A place in the queue. Places are numbered as they come and never used twice.
pub(super) type Place = u64;

/// First come, first served. Any waiter may leave at any time.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Place, Option<Waker>>,
    next: Place,
}

impl Queue {
    pub(super) fn join(&mut self) -> Place {
        let place = self.next;
        self.next += 1;
        self.waiting.insert(place, None);
        place
    }

    /// Whether this place still waits; if so, `waker` is who is told of its turn.
    pub(super) fn waits(&mut self, place: Place, waker: &Waker) -> bool {
        match self.waiting.get_mut(&place) {
            None => false,
            Some(Some(known)) if known.will_wake(waker) => true,
            Some(slot) => {
                *slot = Some(waker.clone());
                true
            }
        }
    }

    /// Gives the place up. False if its turn had come already.
    pub(super) fn leave(&mut self, place: Place) -> bool {
        self.waiting.remove(&place).is_some()
    }

    /// The next one's turn.
    pub(super) fn next(&mut self) -> Option<Option<Waker>> {
        self.waiting.pop_first().map(|(_, waker)| waker)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
