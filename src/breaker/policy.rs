//! How a circuit admits calls, and how callers wait for the verdict of its probes.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::{Instant, Sleep, sleep},
};

use super::{core::Circuit, state::Refusal};
use crate::{
    admission::{Admit, Policy},
    call::{LayerKind, Permit, Rejected, Shared},
};

impl<Req> Policy<Req> for Shared<Circuit> {
    type State = Circuit;
    type Wait = Verdict;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    #[inline]
    fn peek(&self) -> bool {
        self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req) -> Admit<Permit<Circuit>, Verdict> {
        admit(self)
    }

    fn is_stale(&self, permit: &Permit<Circuit>) -> bool {
        self.is_late(permit.token())
    }

    fn shut(&self) -> Option<&Arc<Notify>> {
        Some(self.changed())
    }

    fn holds_back(&self) -> bool {
        Circuit::holds_back(self)
    }

    fn reopens_at(&self) -> Option<Instant> {
        Instant::now().checked_add(self.state().1?)
    }
}

#[inline]
pub(super) fn admit(circuit: &Shared<Circuit>) -> Admit<Permit<Circuit>, Verdict> {
    match Circuit::admit(circuit) {
        Ok(permit) => Admit::Go(permit),
        Err(refusal) => match Verdict::wait_for(circuit, refusal) {
            Some(wait) => Admit::Wait(wait),
            None => Admit::No(circuit.refuse(refusal)),
        },
    }
}

pin_project! {
    /// A caller's wait for what the probes say. Dropped at any point, it gives its place back.
    pub struct Verdict {
        place: Place,
        // Boxed with the call that waits: it is never on the way of one that goes.
        told: Pin<Box<OwnedNotified>>,
        #[pin]
        longest: Sleep,
    }
}

struct Place(Shared<Circuit>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Verdict {
    /// A place among those who wait, if this is worth waiting for and there is one.
    fn wait_for(circuit: &Shared<Circuit>, refusal: Refusal) -> Option<Self> {
        let most = circuit.most_waiting.load(Ordering::Relaxed);
        if most == 0 || refusal != Refusal::Probing {
            return None;
        }
        circuit
            .waiting
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |now| (now < most).then(|| now + 1))
            .ok()?;
        let longest = Duration::from_millis(circuit.longest_wait_ms.load(Ordering::Relaxed));
        Some(Self {
            place: Place(circuit.clone()),
            told: Box::pin(circuit.changed().clone().notified_owned()),
            longest: sleep(longest),
        })
    }
}

impl Future for Verdict {
    type Output = Result<Permit<Circuit>, Rejected>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let circuit = &this.place.0;
        loop {
            let told = this.told.as_mut().poll(cx).is_ready();
            if told {
                this.told.set(circuit.changed().clone().notified_owned());
            }
            // Looked at only after the waker is in place: a change in between is not missed.
            match Circuit::admit(circuit) {
                Ok(permit) => return Poll::Ready(Ok(permit)),
                Err(Refusal::Probing) if told => {}
                Err(Refusal::Probing) => {
                    return this.longest.poll(cx).map(|()| Err(circuit.refuse(Refusal::Probing)));
                }
                Err(refusal) => return Poll::Ready(Err(circuit.refuse(refusal))),
            }
        }
    }
}
