//! How a circuit admits calls, and how callers wait for the verdict of its probes.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::{Instant, Sleep, sleep},
};

use super::{core::Circuit, state::Refusal};
use crate::{
    admission::{Admit, Policy},
    call::{LayerKind, Permit, Rejected, Shared, Token, has_passed},
};

impl<Req> Policy<Req> for Shared<Circuit> {
    type State = Circuit;
    type Pass = Token;
    type Wait = Verdict;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    #[inline]
    fn peek(&self) -> bool {
        self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req, deadline: impl FnOnce() -> Option<Instant>) -> Admit<Token, Verdict> {
        admit(self, deadline())
    }

    #[inline]
    fn permit(&self, token: Token) -> Permit<Circuit> {
        Shared::permit(self, token)
    }

    fn is_stale(&self, permit: &Permit<Circuit>) -> bool {
        is_stale(permit)
    }

    fn shut(&self, _: Option<&Permit<Circuit>>) -> Option<Arc<Notify>> {
        Some(self.changed().clone())
    }

    fn holds_back(&self) -> bool {
        Circuit::holds_back(self)
    }

    fn changes_at(&self) -> Option<Instant> {
        changes_at(self)
    }
}

/// Also the end of a probe's lease: where no call comes, nobody else would notice.
fn changes_at(circuit: &Circuit) -> Option<Instant> {
    Instant::now().checked_add(circuit.lasts()?)
}

pub(super) fn is_stale(permit: &Permit<Circuit>) -> bool {
    permit.state().is_some_and(|circuit| circuit.is_late(permit.token()))
}

#[inline]
pub(super) fn admit(circuit: &Shared<Circuit>, deadline: Option<Instant>) -> Admit<Token, Verdict> {
    // Nobody waits for it any more: no call, and above all no probe.
    if has_passed(deadline) && !circuit.is_shadow() {
        return Admit::No(circuit.refuse_late());
    }
    match circuit.enter() {
        Ok(token) => Admit::Go(token),
        Err(refusal) => refused(circuit, refusal, deadline),
    }
}

#[inline(never)]
fn refused(
    circuit: &Shared<Circuit>,
    refusal: Refusal,
    deadline: Option<Instant>,
) -> Admit<Token, Verdict> {
    match refusal {
        Refusal::Probing => probing(circuit, deadline),
        refusal => Admit::No(circuit.refuse(refusal)),
    }
}

#[cold]
fn probing(circuit: &Shared<Circuit>, deadline: Option<Instant>) -> Admit<Token, Verdict> {
    match Verdict::begin(circuit, deadline) {
        Some(wait) => Admit::Wait(Box::pin(wait)),
        None => Admit::No(circuit.refuse(Refusal::Probing)),
    }
}

pin_project! {
    /// A caller's wait for what the probes say. Dropped at any point, it gives its place back.
    pub struct Verdict {
        place: Place,
        // Boxed with the call that waits: it is never on the way of one that goes.
        told: Pin<Box<OwnedNotified>>,
        longest: Instant,
        deadline: Option<Instant>,
        #[pin]
        by_time: Sleep,
    }
}

struct Place(Shared<Circuit>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.wait_no_more();
    }
}

impl Verdict {
    /// A place among those who wait, if there is one.
    fn begin(circuit: &Shared<Circuit>, deadline: Option<Instant>) -> Option<Self> {
        let longest = circuit.wait()?;
        let place = Place(circuit.clone());
        let told = Box::pin(circuit.changed().clone().notified_owned());
        let by_time = sleep(longest);
        let longest = by_time.deadline();
        let longest = deadline.map_or(longest, |deadline| deadline.min(longest));
        Some(Self { place, told, longest, deadline, by_time })
    }
}

impl Future for Verdict {
    type Output = Result<Permit<Circuit>, Rejected>;

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
            // Looked at only after the waker is in place: a change in between is not missed.
            match circuit.enter() {
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
