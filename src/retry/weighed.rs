use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::{exchange::Weigh, policy::Class};
use crate::call::Outcome;

pin_project! {
    /// One attempt, up to where it is known what its answer is worth.
    pub(super) struct Weighed<F, H> {
        #[pin]
        state: State<F, H>,
        // None before the first wait.
        #[pin]
        timer: Option<Sleep>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, H> {
        Calling { #[pin] future: F, waited_for: bool },
        // The head is here; a gRPC answer's first frame may have to be waited for.
        Weighing { held: Option<H>, impatient: bool },
    }
}

/// What an attempt has come to.
pub(super) enum Weight<T> {
    /// A good answer: nothing more of it has to be looked at.
    Given(T),
    /// An answer to be [taken](Weighed::take).
    Held(Class, Outcome),
    /// There is none in time.
    Late,
}

impl<F, H> Weighed<F, H> {
    #[inline]
    pub(super) fn new(future: F) -> Self {
        Self { state: State::Calling { future, waited_for: false }, timer: None }
    }

    /// What the answer is.
    pub(super) fn poll_held<M, Res, E>(
        self: Pin<&mut Self>,
        protocol: &M,
        cx: &mut Context<'_>,
    ) -> Poll<(Class, Outcome)>
    where
        F: Future<Output = Result<Res, E>>,
        M: Weigh<Res, E, Held = H>,
    {
        match ready!(self.poll(protocol, || false, || None, cx)) {
            Weight::Held(class, outcome) => Poll::Ready((class, outcome)),
            Weight::Given(_) | Weight::Late => unreachable!("neither was asked for"),
        }
    }

    /// What the answer is. Of a good one `give` is asked whether to give it out as it comes; when its head has to
    /// be here is asked `until`, once it has to be waited for.
    #[inline]
    pub(super) fn poll<M, Res, E>(
        self: Pin<&mut Self>,
        protocol: &M,
        give: impl FnOnce() -> bool,
        until: impl FnOnce() -> Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Weight<Result<M::Response, M::Error>>>
    where
        F: Future<Output = Result<Res, E>>,
        M: Weigh<Res, E, Held = H>,
    {
        let mut this = self.project();
        if let StateProj::Calling { future, waited_for } = this.state.as_mut().project() {
            // The answer before the timer: one that is here is not too late.
            let Poll::Ready(result) = future.poll(cx) else {
                if !mem::replace(waited_for, true) {
                    this.timer.set(until().map(sleep_until));
                }
                let Some(over) = this.timer.as_pin_mut() else { return Poll::Pending };
                ready!(over.poll(cx));
                return Poll::Ready(Weight::Late);
            };
            let weight = protocol.weigh(&result);
            if weight.is_some_and(is_good) && give() {
                return Poll::Ready(Weight::Given(M::give(result)));
            }
            this.timer.set(None);
            let held = Some(M::hold(result, weight));
            this.state.set(State::Weighing { held, impatient: false });
        }
        let StateProj::Weighing { held, impatient } = this.state.project() else {
            unreachable!("called, and weighed")
        };
        let Some(held) = held else { unreachable!("polled after completion") };
        if let Poll::Ready((class, outcome)) = M::poll_weigh(held, cx) {
            return Poll::Ready(Weight::Held(class, outcome));
        }
        if !mem::replace(impatient, true) {
            this.timer.set(Some(sleep(M::PATIENCE)));
        }
        ready!(this.timer.as_pin_mut().map_or(Poll::Ready(()), |over| over.poll(cx)));
        // A stream that has begun slowly: the caller's.
        Poll::Ready(Weight::Held(Class::Final, Outcome::success()))
    }

    /// The answer. Only asked when it is held, and once.
    pub(super) fn take(self: Pin<&mut Self>) -> H {
        match self.project().state.project() {
            StateProj::Weighing { held, .. } => held.take(),
            StateProj::Calling { .. } => None,
        }
        .unwrap_or_else(|| unreachable!("taken once, when it is here"))
    }
}

/// Neither a failure, nor throttled, nor refused.
#[inline]
pub(super) fn is_good((class, outcome): (Class, Outcome)) -> bool {
    class == Class::Final && outcome.is_success()
}
