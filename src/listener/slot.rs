use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::Waker,
    time::Duration,
};

use tokio::time::Instant;

use crate::{
    sync::Mutex,
    time::{Clock, Nanos, nanos},
};

/// The slot that a connection occupies in a [`LimitedListener`](super::LimitedListener).
///
/// It records since when the connection is idle, so that a full listener can close the connection that has been idle
/// for the longest time. [`Lifecycle::serve`](crate::lifecycle::Lifecycle::serve) maintains it. If your own
/// [`Listener`](crate::lifecycle::Listener) wraps the capped one, return the slot of the wrapped connection.
#[derive(Clone)]
pub struct ConnectionSlot(Arc<SlotState>);

struct SlotState {
    clock: Clock,
    /// The time at which the connection became idle, as nanoseconds of `clock`, or [`BUSY`].
    idle_since: AtomicU64,
    /// The listener needs the slot for a new connection. Set before `waker` is taken. The task registers its waker
    /// before it reads the flag. The lock of `waker` orders both, so `Relaxed` accesses are sufficient: either the task
    /// reads the flag or the listener finds the waker.
    is_reclaimed: AtomicBool,
    /// Wakes the task of the connection, so that it reads `is_reclaimed`.
    waker: Mutex<Option<Waker>>,
}

/// The value of `idle_since` of a connection that is not idle.
const BUSY: Nanos = Nanos::MAX;

impl ConnectionSlot {
    /// Marks the connection as idle since this instant.
    pub(crate) fn set_idle(&self, since: Instant) {
        self.0.idle_since.store(self.0.clock.at(since), Relaxed);
    }

    /// Registers the waker of the connection's task. Call it before [`is_reclaimed`](Self::is_reclaimed).
    pub(crate) fn wake_on_reclaim(&self, waker: &Waker) {
        let registered = || self.0.waker.lock();
        if registered().as_ref().is_some_and(|registered| registered.will_wake(waker)) {
            return;
        }
        // A waker is user code: it is cloned and dropped without the lock. Only the task of the connection registers.
        let waker = waker.clone();
        let replaced = registered().replace(waker);
        drop(replaced);
    }

    /// Marks the connection as not idle: it has a call, or belongs to a protocol that this crate does not interpret.
    pub(crate) fn set_busy(&self) {
        self.0.idle_since.store(BUSY, Relaxed);
    }

    /// Returns whether the connection is to close because its slot is needed.
    pub(crate) fn is_reclaimed(&self) -> bool {
        self.0.is_reclaimed.load(Relaxed)
    }

    /// Makes the task of the connection close it.
    fn reclaim(&self) {
        self.0.is_reclaimed.store(true, Relaxed);
        let waker = self.0.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl fmt::Debug for ConnectionSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionSlot")
            .field("is_idle", &(self.0.idle_since.load(Relaxed) != BUSY))
            .field("is_reclaimed", &self.is_reclaimed())
            .finish()
    }
}

/// The minimum idle time of a connection that is closed for another one: the time that a new client has for its first
/// request.
const MIN_IDLE: Duration = Duration::from_secs(1);
/// The maximum number of slots that one reclaim examines. A longer list is sampled, so that the work per accept is
/// bounded.
const MAX_EXAMINED: usize = 64;
/// The growth of the list, as a factor since the last removal, after which dropped slots are removed from it.
const GROWTH: usize = 2;

/// The slots of one listener. Only its accept loop uses the list, so the list needs no lock.
#[derive(Debug)]
pub(crate) struct ConnectionSlots {
    clock: Clock,
    slots: Vec<Weak<SlotState>>,
    /// The length of the list at which dropped slots are removed.
    remove_at: usize,
}

impl ConnectionSlots {
    pub(crate) fn new() -> Self {
        Self { clock: Clock::new(), slots: Vec::new(), remove_at: MAX_EXAMINED }
    }

    /// Returns a slot for a new connection. The connection is idle until the client has sent its first head.
    pub(crate) fn occupy(&mut self) -> ConnectionSlot {
        if self.slots.len() >= self.remove_at {
            self.slots.retain(|slot| slot.strong_count() > 0);
            self.remove_at = self.slots.len().saturating_mul(GROWTH).max(MAX_EXAMINED);
        }
        let slot = ConnectionSlot(Arc::new(SlotState {
            clock: self.clock,
            idle_since: AtomicU64::new(self.clock.now()),
            is_reclaimed: AtomicBool::new(false),
            waker: Mutex::new(None),
        }));
        self.slots.push(Arc::downgrade(&slot.0));
        slot
    }

    /// Reclaims the slot of the longest idle connection of a sample. Returns `false` if no connection of the sample has
    /// been idle for one second.
    pub(crate) fn reclaim(&mut self) -> bool {
        let now = self.clock.now();
        let count = self.slots.len();
        let first = if count > MAX_EXAMINED { fastrand::usize(..count) } else { 0 };
        let sample = self.slots.iter().cycle().skip(first).take(count.min(MAX_EXAMINED));
        let idle = sample.filter_map(Weak::upgrade).filter_map(|state| {
            let since = state.idle_since.load(Relaxed);
            // The sum saturates, so that `BUSY` is later than any time.
            let is_idle = since.saturating_add(nanos(MIN_IDLE)) <= now;
            let is_candidate = is_idle && !state.is_reclaimed.load(Relaxed);
            is_candidate.then_some((since, ConnectionSlot(state)))
        });
        match idle.min_by_key(|(since, _)| *since) {
            Some((_, slot)) => {
                slot.reclaim();
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connection_idle_for_most_time_is_reclaimed_and_busy_ones_are_not() {
        let mut slots = ConnectionSlots::new();
        let (busy, idle) = (slots.occupy(), slots.occupy());
        busy.set_busy();
        advance(MIN_IDLE / 2).await;
        let newer = slots.occupy();
        assert!(!slots.reclaim(), "not before one second");
        advance(MIN_IDLE / 2).await;
        assert!(slots.reclaim() && idle.is_reclaimed());
        assert!(!slots.reclaim(), "a slot is reclaimed only once");
        advance(MIN_IDLE / 2).await;
        assert!(slots.reclaim() && newer.is_reclaimed() && !busy.is_reclaimed());
        advance(100 * MIN_IDLE).await;
        assert!(!slots.reclaim());
    }

    #[tokio::test(start_paused = true)]
    async fn slots_of_closed_connections_are_forgotten() {
        let mut slots = ConnectionSlots::new();
        let kept: Vec<_> = (0..100).map(|_| slots.occupy()).collect();
        for _ in 0..10_000 {
            slots.occupy();
        }
        assert!(slots.slots.len() <= GROWTH * (kept.len() + MAX_EXAMINED), "{}", slots.slots.len());
        advance(2 * MIN_IDLE).await;
        assert!((0..1000).any(|_| slots.reclaim()), "a sample finds idle connections");
    }
}
