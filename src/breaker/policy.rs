//! The admission policy of a circuit, and the wait of callers for the verdict of its probes.

use std::{
    fmt,
    future::Future,
    ops::Deref,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::{Instant, Sleep, sleep},
};

use super::{
    circuit::{Circuit, is_late, is_probe},
    state::{CircuitSettings, Refusal},
    trip::Trip,
};
use crate::{
    admission::{Admit, Policy, Terms},
    outcome::{LayerKind, Rejected, SentMark},
    permit::{Permit, ShardOrSlot, ShardedArc, Slot, Token},
    time::{CallClock, has_passed},
};

/// The state that records the end of a call: the circuit, or its slot.
pub(super) type CircuitRef = ShardOrSlot<Circuit, Slot<Circuit>>;

/// A reference to a circuit from which permits are made.
pub trait Calls: Deref<Target = Circuit> + Clone + Send + Sync + 'static {
    /// Returns the permit of a call that the circuit has admitted.
    fn permit(&self, token: Token) -> Permit<CircuitRef>;
}

// ===== The circuit of a layer =====

/// The circuit of a layer: its slot, and references to it whose counts are sharded by thread.
#[derive(Clone)]
pub struct Breaker {
    slot: &'static Slot<Circuit>,
    circuit: ShardedArc<Circuit>,
}

impl Breaker {
    pub(super) fn new(trip: Trip, settings: CircuitSettings) -> Self {
        let circuit = ShardedArc::new(Circuit::new(trip, settings, false));
        let slot = circuit.slot();
        slot.register(Arc::downgrade(circuit.state()));
        Self { slot, circuit }
    }

    pub(super) fn circuit(&self) -> &Arc<Circuit> {
        self.circuit.state()
    }
}

impl Calls for Breaker {
    #[inline]
    fn permit(&self, token: Token) -> Permit<CircuitRef> {
        // A call that holds the slot holds no counted reference. If its outcome changes the machine, the slot has to look
        // up the circuit under a lock. So only calls of circuits in which a success changes nothing hold the slot.
        let holds_slot = self.slot.word().ignores_success() && !is_probe(token);
        let anchor = if holds_slot {
            ShardOrSlot::Slot(self.slot)
        } else {
            ShardOrSlot::Shard(self.circuit.lease())
        };
        Permit::new(anchor, token)
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
    type Wait = VerdictWait<Self>;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    #[inline]
    fn peek(&self) -> bool {
        self.slot.word().admits() || self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req, terms: impl Terms) -> Admit<Token, Self::Wait> {
        let deadline = terms.deadline().map(|deadline| deadline.at());
        match self.slot.word().admit() {
            Some(token) if !CallClock::is_past(deadline) => Admit::Pass(token),
            _ => admit(self, deadline, || terms.sent_mark()),
        }
    }

    #[inline]
    fn attributes(&self) -> bool {
        self.slot.word().attributes()
    }

    #[inline]
    fn permit(&self, token: Token) -> Permit<CircuitRef> {
        Calls::permit(self, token)
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
        Circuit::uses_backpressure(self)
    }

    fn changes_at(&self) -> Option<Instant> {
        changes_at(self)
    }
}

// ===== All circuits =====

/// Returns the time of the next change without a call. This includes the ends of probes, which a circuit without
/// traffic would not notice otherwise.
fn changes_at(circuit: &Circuit) -> Option<Instant> {
    Instant::now().checked_add(circuit.lasts()?)
}

pub(super) fn is_stale(permit: &Permit<CircuitRef>) -> bool {
    permit.state().is_some_and(|state| match state {
        ShardOrSlot::Shard(circuit) => circuit.is_late(permit.token()),
        ShardOrSlot::Slot(slot) => is_late(slot.word(), permit.token()),
    })
}

pub(super) fn reject_late(circuit: &Circuit) -> Option<Rejected> {
    (!circuit.is_shadow()).then(|| circuit.refuse_late())
}

#[inline]
pub(super) fn admit<C: Calls>(
    circuit: &C,
    deadline: Option<Instant>,
    sent_mark: impl Fn() -> Option<SentMark>,
) -> Admit<Token, VerdictWait<C>> {
    // A call whose deadline has passed has no caller that waits for it, and must not use a probe slot.
    if CallClock::is_past(deadline) && !circuit.is_shadow() {
        return Admit::Reject(circuit.refuse_late());
    }
    match circuit.enter(&sent_mark) {
        Ok(token) => Admit::Pass(token),
        Err(refusal) => refused(circuit, refusal, deadline, sent_mark),
    }
}

#[inline(never)]
fn refused<C: Calls>(
    circuit: &C,
    refusal: Refusal,
    deadline: Option<Instant>,
    sent_mark: impl FnOnce() -> Option<SentMark>,
) -> Admit<Token, VerdictWait<C>> {
    match refusal {
        Refusal::Probing => probing(circuit, deadline, sent_mark()),
        refusal => Admit::Reject(circuit.refuse(refusal)),
    }
}

#[cold]
fn probing<C: Calls>(
    circuit: &C,
    deadline: Option<Instant>,
    sent_mark: Option<SentMark>,
) -> Admit<Token, VerdictWait<C>> {
    match VerdictWait::begin(circuit, deadline, sent_mark) {
        Some(wait) => Admit::Queue(Box::pin(wait)),
        None => Admit::Reject(circuit.refuse(Refusal::Probing)),
    }
}

pin_project! {
    /// A caller's wait for the verdict of the half-open probes. Dropping it at any point frees its position.
    pub struct VerdictWait<C: Calls> {
        place: Place<C>,
        // Boxed, because only calls that wait pay for it.
        told: Pin<Box<OwnedNotified>>,
        longest: Instant,
        deadline: Option<Instant>,
        sent_mark: Option<SentMark>,
        #[pin]
        by_time: Sleep,
    }
}

struct Place<C: Calls>(C);

impl<C: Calls> Drop for Place<C> {
    fn drop(&mut self) {
        self.0.wait_no_more();
    }
}

impl<C: Calls> VerdictWait<C> {
    /// Begins to wait. `None` if the maximum number of callers waits already.
    fn begin(circuit: &C, deadline: Option<Instant>, sent_mark: Option<SentMark>) -> Option<Self> {
        let longest = circuit.wait()?;
        let place = Place(circuit.clone());
        let told = Box::pin(circuit.changed().clone().notified_owned());
        let by_time = sleep(longest);
        let longest = by_time.deadline();
        let longest = deadline.map_or(longest, |deadline| deadline.min(longest));
        Some(Self { place, told, longest, deadline, sent_mark, by_time })
    }
}

impl<C: Calls> Future for VerdictWait<C> {
    type Output = Result<Permit<CircuitRef>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let circuit = &this.place.0;
        loop {
            let told = this.told.as_mut().poll(cx).is_ready();
            if told {
                this.told.set(circuit.changed().clone().notified_owned());
            }
            if has_passed(*this.deadline) {
                return Poll::Ready(Err(circuit.refuse_late()));
            }
            // Checked after the waker is registered, so that no change in between is missed.
            match circuit.enter(|| this.sent_mark.clone()) {
                Ok(token) => return Poll::Ready(Ok(circuit.permit(token))),
                Err(Refusal::Probing) if told => continue,
                Err(Refusal::Probing) => {}
                Err(refusal) => return Poll::Ready(Err(circuit.refuse(refusal))),
            }
            let next = changes_at(circuit).map_or(*this.longest, |at| at.min(*this.longest));
            if this.by_time.deadline() != next {
                this.by_time.as_mut().reset(next);
            }
            ready!(this.by_time.as_mut().poll(cx));
            if Instant::now() >= *this.longest && !has_passed(*this.deadline) {
                return Poll::Ready(Err(circuit.refuse(Refusal::Probing)));
            }
        }
    }
}
