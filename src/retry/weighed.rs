use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{exchange::Weigh, policy::Class};
use crate::call::{Alarm, Outcome, Reason, grpc};

pin_project! {
    /// One attempt, until its response is classified.
    pub(super) struct Weighed<F, H> {
        #[pin]
        state: State<F, H>,
        #[pin]
        alarm: Alarm,
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

/// How far an attempt has come.
pub(super) enum Head<T> {
    /// Its head is here: to be given out, or [held](Weighed::hold).
    Here(T),
    /// It was held before.
    Held,
    /// It did not come in time.
    Late,
}

impl<F, H> Weighed<F, H> {
    #[inline]
    pub(super) fn new(future: F) -> Self {
        Self { state: State::Calling { future, waited_for: false }, alarm: Alarm::new() }
    }

    /// Up to the head. When that has to be here is asked `until`, once it has to be waited for.
    #[inline]
    pub(super) fn poll_head<T>(
        self: Pin<&mut Self>,
        until: impl FnOnce() -> Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Head<T>>
    where
        F: Future<Output = T>,
    {
        let mut this = self.project();
        let StateProj::Calling { mut future, waited_for } = this.state.project() else {
            return Poll::Ready(Head::Held);
        };
        // The answer before the timer: one that is here is not too late.
        Alarm::listen();
        if let Poll::Ready(result) = future.as_mut().poll(cx) {
            return Poll::Ready(Head::Here(result));
        }
        if !mem::replace(waited_for, true) {
            if let Some(until) = until() {
                this.alarm.as_mut().set(until);
            }
        }
        this.alarm.poll(&*future, cx).map(|()| Head::Late)
    }

    /// Holds an answer, with what is known of it by its head. What made it is gone with that.
    pub(super) fn hold(self: Pin<&mut Self>, held: H) {
        let mut this = self.project();
        this.alarm.clear();
        this.state.set(State::Weighing { held: Some(held), impatient: false });
    }

    /// What the answer is that is held.
    pub(super) fn poll_weigh<M, Res, E>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<(Class, Outcome)>
    where
        M: Weigh<Res, E, Held = H>,
    {
        let mut this = self.project();
        let StateProj::Weighing { held: Some(held), impatient } = this.state.project() else {
            unreachable!("held, and not taken")
        };
        Alarm::listen();
        if let Poll::Ready(weight) = M::poll_weigh(held, cx) {
            return Poll::Ready(weight);
        }
        if !mem::replace(impatient, true) {
            if let Some(at) = Instant::now().checked_add(M::PATIENCE) {
                this.alarm.as_mut().set(at);
            }
        }
        ready!(this.alarm.poll(held, cx));
        Poll::Ready(M::undecided(held))
    }

    /// The same from the beginning, for as long as it takes.
    pub(super) fn poll_held<M, Res, E>(
        mut self: Pin<&mut Self>,
        protocol: &M,
        is_grpc_call: bool,
        cx: &mut Context<'_>,
    ) -> Poll<(Class, Outcome)>
    where
        F: Future<Output = Result<Res, E>>,
        M: Weigh<Res, E, Held = H>,
    {
        if let Head::Here(result) = ready!(self.as_mut().poll_head(|| None, cx)) {
            let weight = protocol.weigh(is_grpc_call, &result);
            self.as_mut().hold(M::hold(result, weight));
        }
        self.poll_weigh::<M, Res, E>(cx)
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

/// Returns whether this outcome makes a deposit in the retry budget. A gRPC status other than `OK` makes none (gRFC
/// A6).
#[inline]
pub(super) fn earns_deposit(outcome: Outcome) -> bool {
    let is_grpc_error = outcome.reason() == Reason::GrpcStatus && outcome.code() != Some(grpc::OK);
    outcome.is_success() && !is_grpc_error
}

/// Neither a failure, nor throttled, nor refused.
#[inline]
pub(super) fn is_good((class, outcome): (Class, Outcome)) -> bool {
    class == Class::Final && outcome.is_success()
}
