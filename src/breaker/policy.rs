//! The admission policy of a circuit, and the wait of callers for the verdict of its probes.

use std::{
    fmt,
    future::Future,
    ops::Deref,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::{Instant, Sleep, sleep},
};

use super::{
    circuit::{Circuit, is_late, is_probe},
    state::{CircuitSettings, Rejection},
    trip::Trip,
};
use crate::{
    admission::{Admit, Policy, Terms},
    outcome::{LayerKind, Rejected, SentMark},
    permit::{Permit, ShardOrSlot, ShardedArc, ShardedRef, Slot, Token},
    time::{CallClock, has_passed},
};

/// The state that records the end of a call: the circuit, or its slot.
pub(super) type CircuitRef = ShardOrSlot<Circuit, Slot<Circuit>>;

// ===== The circuit of a layer =====

/// The circuit of a layer: its slot, and references to it whose counts are sharded by thread.
#[derive(Clone)]
pub(super) struct Breaker {
    slot: &'static Slot<Circuit>,
    circuit: ShardedArc<Circuit>,
}

impl Breaker {
    pub(super) fn new(trip: Trip, settings: CircuitSettings) -> Self {
        Self::of(Circuit::new(trip, settings, None))
    }

    /// Returns a breaker of its own with the rules and settings of this one.
    pub(super) fn fork(&self) -> Self {
        Self::of(Circuit::fork(self))
    }

    fn of(circuit: Circuit) -> Self {
        let circuit = ShardedArc::new(circuit);
        let slot = circuit.slot();
        slot.register(Arc::downgrade(circuit.state()));
        Self { slot, circuit }
    }

    pub(super) fn circuit(&self) -> &Arc<Circuit> {
        self.circuit.state()
    }
}

impl Deref for Breaker {
    type Target = Circuit;

    fn deref(&self) -> &Circuit {
        &self.circuit
    }
}

impl fmt::Debug for Breaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<Req> Policy<Req> for Breaker {
    type StateRef = CircuitRef;
    type Pass = Token;
    type Wait = VerdictWait;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    fn name(&self) -> &str {
        self.named()
    }

    #[inline]
    fn peek(&self) -> bool {
        self.slot.word().admits() || self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req, terms: impl Terms) -> Admit<Token, Self::Wait> {
        let deadline = terms.deadline().map(|deadline| deadline.at());
        match self.slot.word().admit() {
            Some(token) if !CallClock::is_past(deadline) => Admit::Pass(token),
            _ => admit(self, deadline, || terms.sent_mark(), || self.circuit.lease()),
        }
    }

    #[inline]
    fn attributes(&self) -> bool {
        self.slot.word().attributes()
    }

    #[inline]
    fn permit(&self, token: Token) -> Permit<CircuitRef> {
        // A call that holds the slot holds no counted reference. If its outcome changes the machine, the slot has to
        // look up the circuit under a lock. So only calls of circuits in which a success changes nothing hold the slot.
        let holds_slot = self.slot.word().ignores_success() && !is_probe(token);
        let circuit = if holds_slot {
            ShardOrSlot::Slot(self.slot)
        } else {
            ShardOrSlot::Shard(self.circuit.lease())
        };
        Permit::new(circuit, token)
    }

    fn count_misconfigured(&self) {
        Circuit::count_misconfigured(self);
    }

    fn is_stale(&self, permit: &Permit<CircuitRef>) -> bool {
        is_stale(permit)
    }

    fn reject_late(&self, _: &Req) -> Option<Rejected> {
        reject_late(self)
    }

    fn closed_signal(&self, _: Option<&Permit<CircuitRef>>) -> Option<Arc<Notify>> {
        Some(self.changed().clone())
    }

    fn uses_backpressure(&self) -> bool {
        self.has_backpressure()
    }

    fn changes_at(&self) -> Option<Instant> {
        changes_at(self)
    }
}

// ===== All circuits =====

/// Returns the time of the next change without a call. This includes the ends of the probes' timeouts,
/// which no call applies while there is no traffic.
fn changes_at(circuit: &Circuit) -> Option<Instant> {
    Instant::now().checked_add(circuit.time_to_change()?)
}

pub(super) fn is_stale(permit: &Permit<CircuitRef>) -> bool {
    permit.state().is_some_and(|state| match state {
        ShardOrSlot::Shard(circuit) => circuit.is_late(permit.token()),
        ShardOrSlot::Slot(slot) => is_late(slot.word(), permit.token()),
    })
}

pub(super) fn reject_late(circuit: &Circuit) -> Option<Rejected> {
    (!circuit.is_shadow()).then(|| circuit.reject_late())
}

/// Admits a call by the machine. `reference` returns the reference that a waiting caller holds.
#[inline]
pub(super) fn admit(
    circuit: &Circuit,
    deadline: Option<Instant>,
    sent_mark: impl Fn() -> Option<SentMark>,
    reference: impl FnOnce() -> ShardedRef<Circuit>,
) -> Admit<Token, VerdictWait> {
    // A call whose deadline has passed has no caller that waits for it, and must not use a probe slot.
    if CallClock::is_past(deadline) && !circuit.is_shadow() {
        return Admit::Reject(circuit.reject_late());
    }
    match circuit.admit(&sent_mark) {
        Ok(token) => Admit::Pass(token),
        Err(Rejection::Probing) => wait_or_reject(reference(), deadline, sent_mark()),
        Err(rejection) => Admit::Reject(circuit.reject(rejection)),
    }
}

#[cold]
fn wait_or_reject(
    circuit: ShardedRef<Circuit>,
    deadline: Option<Instant>,
    sent_mark: Option<SentMark>,
) -> Admit<Token, VerdictWait> {
    match circuit.join_queue() {
        Some(max_wait) => {
            Admit::Queue(Box::pin(VerdictWait::new(circuit, max_wait, deadline, sent_mark)))
        }
        None => Admit::Reject(circuit.reject(Rejection::Probing)),
    }
}

pin_project! {
    /// A caller's wait for the verdict of the half-open probes. Dropping it at any point frees its position.
    pub(crate) struct VerdictWait {
        entry: VerdictQueueEntry,
        // Boxed: only calls that wait make this allocation.
        changed: Pin<Box<OwnedNotified>>,
        // The end of the wait, by its maximum or by the deadline.
        end: Instant,
        deadline: Option<Instant>,
        sent_mark: Option<SentMark>,
        #[pin]
        timer: Sleep,
    }
}

struct VerdictQueueEntry(ShardedRef<Circuit>);

impl Drop for VerdictQueueEntry {
    fn drop(&mut self) {
        self.0.leave_queue();
    }
}

impl VerdictWait {
    /// Begins to wait. Requires that the caller has joined the queue.
    fn new(
        circuit: ShardedRef<Circuit>,
        max_wait: Duration,
        deadline: Option<Instant>,
        sent_mark: Option<SentMark>,
    ) -> Self {
        let changed = Box::pin(circuit.changed().clone().notified_owned());
        let timer = sleep(max_wait);
        let end = timer.deadline();
        let end = deadline.map_or(end, |deadline| deadline.min(end));
        Self { entry: VerdictQueueEntry(circuit), changed, end, deadline, sent_mark, timer }
    }
}

impl Future for VerdictWait {
    type Output = Result<Permit<CircuitRef>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let circuit = &this.entry.0;
        loop {
            let has_changed = this.changed.as_mut().poll(cx).is_ready();
            if has_changed {
                this.changed.set(circuit.changed().clone().notified_owned());
            }
            if has_passed(*this.deadline) {
                return Poll::Ready(Err(circuit.reject_late()));
            }
            // Checked after the waker is registered, so that no change in between is missed.
            match circuit.admit(|| this.sent_mark.clone()) {
                Ok(token) => return Poll::Ready(Ok(counted_permit(circuit.clone(), token))),
                Err(Rejection::Probing) if has_changed => continue,
                Err(Rejection::Probing) => {}
                Err(rejection) => return Poll::Ready(Err(circuit.reject(rejection))),
            }
            let next = changes_at(circuit).map_or(*this.end, |at| at.min(*this.end));
            if this.timer.deadline() != next {
                this.timer.as_mut().reset(next);
            }
            ready!(this.timer.as_mut().poll(cx));
            if Instant::now() >= *this.end && !has_passed(*this.deadline) {
                return Poll::Ready(Err(circuit.reject(Rejection::Probing)));
            }
        }
    }
}

/// Returns a permit that keeps the circuit in use, so that it is not evicted.
pub(super) fn counted_permit(circuit: ShardedRef<Circuit>, token: Token) -> Permit<CircuitRef> {
    Permit::new(ShardOrSlot::Shard(circuit), token)
}
