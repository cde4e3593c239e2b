//! The decisions of the watched layers: changes of their states and settings, and summaries of repeated events.

use std::{
    borrow::Cow,
    collections::VecDeque,
    future::poll_fn,
    mem,
    sync::{Arc, Weak},
    task::{Context, Poll, Waker},
    time::SystemTime,
};

use crate::{
    report::{ReportChange, StateChange},
    sync::Mutex,
    user_code::catch_panic,
};

/// The maximum number of decisions that a registry keeps.
const MAX_DECISIONS: usize = 256;

/// A decision of a watched layer: a change of its state or its settings, the use of a control on the live page, or a
/// summary of calls, such as those that the layer has rejected.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Decision {
    /// The number of the decision in this registry. The first decision has the number 1.
    pub id: u64,
    /// The time of the decision. The time of a summary is that of the sample that contains it.
    pub at: SystemTime,
    /// The kind of the layer, such as `circuit_breaker`. Metrics with the label `layer` have the same value.
    pub layer: &'static str,
    /// The name of the layer. `None` for a part of the process.
    pub name: Option<Arc<str>>,
    /// The change or the summary in words, such as `circuit opened` or `calls rejected`. The log has an event with this
    /// message, except for the summaries `calls timed out`, `calls not retried` and `hedge attempts not sent`, for
    /// `circuits opened` and `circuits closed` of a keyed layer, and for changes of health checks that a reporter makes.
    pub event: &'static str,
    /// The reason in `snake_case`, as in metrics and events.
    pub reason: Option<Cow<'static, str>>,
    /// The values that led to the decision, as text.
    pub why: String,
    /// The number of calls of a summary. 1 for a change of a state.
    pub count: u64,
}

/// The last decisions of a registry, and the notification of new ones.
#[derive(Debug, Default)]
pub(super) struct DecisionLog {
    last: Mutex<VecDeque<Arc<Decision>>>,
    /// The receivers that wait. They hold no reference to the log.
    waiting: Mutex<Vec<Arc<ReceiverWaker>>>,
}

/// The waker of a receiver while it waits.
#[derive(Debug, Default)]
struct ReceiverWaker(Mutex<Option<Waker>>);

impl ReceiverWaker {
    /// Replaces the waker. A waker is user code: it is cloned, woken and dropped without a lock.
    fn set(&self, waker: Option<Waker>) {
        let before = mem::replace(&mut *self.0.lock(), waker);
        drop(before);
    }

    fn wake(&self) {
        let waker = self.0.lock().take();
        // A panic of the waker must neither reach the layer, which may be in a destructor, nor prevent that the receivers
        // after this one are woken, as it does with tokio's `Notify`.
        let _ = catch_panic(|| waker.map(Waker::wake));
    }
}

impl Drop for DecisionLog {
    fn drop(&mut self) {
        self.wake();
    }
}

impl DecisionLog {
    /// Adds a decision, and sets its number.
    pub(super) fn add(&self, mut decision: Decision) {
        {
            let mut last = self.last.lock();
            decision.id = last.back().map_or(0, |decision| decision.id) + 1;
            if last.len() == MAX_DECISIONS {
                last.pop_front();
            }
            last.push_back(Arc::new(decision));
        }
        self.wake();
    }

    /// Wakes the receivers that wait.
    fn wake(&self) {
        let waiting = mem::take(&mut *self.waiting.lock());
        waiting.iter().for_each(|receiver| receiver.wake());
    }

    /// Adds a receiver to wake. Removes the receivers that no longer exist.
    fn add_waiting(&self, receiver: &Arc<ReceiverWaker>) {
        let mut waiting = self.waiting.lock();
        if !waiting.iter().any(|other| Arc::ptr_eq(other, receiver)) {
            // A receiver that is dropped removes its waker first, so no user code is dropped here.
            waiting.retain(|other| Arc::strong_count(other) > 1);
            waiting.push(receiver.clone());
        }
    }

    /// Returns the number of the last decision, or 0.
    pub(super) fn last_id(&self) -> u64 {
        self.last.lock().back().map_or(0, |decision| decision.id)
    }

    /// Returns the first decision with a greater number than this one.
    fn after(&self, id: u64) -> Option<Arc<Decision>> {
        let last = self.last.lock();
        let first = last.front()?.id;
        let index = (id + 1).saturating_sub(first);
        last.get(usize::try_from(index).ok()?).cloned()
    }

    /// Returns the last decisions, newest first, and not more than `max`.
    pub(super) fn newest(&self, max: usize) -> Vec<Arc<Decision>> {
        self.last.lock().iter().rev().take(max).cloned().collect()
    }
}

/// Reports the state changes of one layer to a registry.
#[derive(Clone, Debug)]
pub(super) struct DecisionReporter {
    pub(super) log: Weak<DecisionLog>,
    pub(super) layer: &'static str,
    pub(super) name: Option<Arc<str>>,
}

impl ReportChange for DecisionReporter {
    fn report(&self, change: &StateChange) {
        let Some(log) = self.log.upgrade() else { return };
        let StateChange { event, reason, why } = change.clone();
        log.add(self.decision(event, reason.map(Cow::Borrowed), why, 1));
    }

    fn is_alive(&self) -> bool {
        self.log.strong_count() > 0
    }
}

impl DecisionReporter {
    /// Returns a decision of this layer without a number.
    pub(super) fn decision(
        &self,
        event: &'static str,
        reason: Option<Cow<'static, str>>,
        why: String,
        count: u64,
    ) -> Decision {
        let (layer, name) = (self.layer, self.name.clone());
        Decision { id: 0, at: SystemTime::now(), layer, name, event, reason, why, count }
    }
}

/// Receives the decisions of a registry. Made by [`Registry::decisions`](super::registry::Registry::decisions).
///
/// The registry keeps the last 256 decisions. A receiver that is slower misses the older ones, and
/// [`missed`](Self::missed) counts them. A receiver does not keep the registry alive.
#[derive(Debug)]
pub struct Decisions {
    log: Weak<DecisionLog>,
    /// The number of the last decision that was received.
    received: u64,
    missed: u64,
    waker: Arc<ReceiverWaker>,
}

impl Decisions {
    /// Returns a receiver of the decisions after the one with this number.
    pub(super) fn after(log: &Arc<DecisionLog>, id: u64) -> Self {
        let received = id.min(log.last_id());
        Self { log: Arc::downgrade(log), received, missed: 0, waker: Arc::default() }
    }

    /// Waits for the next decision. Returns `None` when the registry no longer exists.
    ///
    /// Dropping the future loses no decision.
    pub async fn next(&mut self) -> Option<Decision> {
        /// Removes the waker when the receiver no longer waits.
        struct Waiting<'a>(&'a mut Decisions);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.waker.set(None);
            }
        }
        let waiting = Waiting(self);
        poll_fn(|cx| waiting.0.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Decision>> {
        let Some(log) = self.log.upgrade() else { return Poll::Ready(None) };
        let next = log.after(self.received).or_else(|| {
            self.waker.set(Some(cx.waker().clone()));
            log.add_waiting(&self.waker);
            // The log is read again after the waker was added, so that a decision in between is not missed.
            log.after(self.received)
        });
        // If this is the last reference to the log, its drop wakes this receiver.
        drop(log);
        let Some(decision) = next else { return Poll::Pending };
        self.missed += decision.id - self.received - 1;
        self.received = decision.id;
        Poll::Ready(Some((*decision).clone()))
    }

    /// Returns the number of decisions that this receiver has missed because it was slower than the layers.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }
}

impl Drop for Decisions {
    fn drop(&mut self) {
        // A future of `next` that was leaked has not removed its waker.
        self.waker.set(None);
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    fn decision(why: &str) -> Decision {
        let reporter = DecisionReporter { log: Weak::new(), layer: "stack", name: None };
        reporter.decision("settings changed", None, why.to_owned(), 1)
    }

    #[tokio::test(start_paused = true)]
    async fn slow_receiver_gets_the_last_decisions_and_counts_the_missed_ones() {
        let log = Arc::new(DecisionLog::default());
        let mut decisions = Decisions::after(&log, 0);
        for n in 1..=300 {
            log.add(decision(&n.to_string()));
        }
        let next = decisions.next().await.expect("the log exists");
        assert_eq!((next.id, &*next.why, decisions.missed()), (45, "45", 44));
        for id in 46..=300 {
            assert_eq!(decisions.next().await.map(|decision| decision.id), Some(id));
        }
        assert_eq!(decisions.missed(), 44);
        drop(log);
        assert_eq!(decisions.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn receiver_waits_and_ends_with_the_log() {
        let log = Arc::new(DecisionLog::default());
        log.add(decision("before"));
        let mut decisions = Decisions::after(&log, log.last_id());
        let waiting = tokio::spawn(async move { (decisions.next().await, decisions.next().await) });
        tokio::task::yield_now().await;
        log.add(decision("after"));
        tokio::task::yield_now().await;
        drop(log);
        let (first, second) = waiting.await.expect("no panic");
        assert_eq!((first.map(|decision| decision.why), second), (Some("after".to_owned()), None));
    }

    #[test]
    fn receiver_after_an_unknown_number_starts_at_the_next_decision() {
        let log = Arc::new(DecisionLog::default());
        log.add(decision("one"));
        let decisions = Decisions::after(&log, 1000);
        assert_eq!(decisions.received, 1);
    }
}
