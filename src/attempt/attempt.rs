use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{protocol::ClassifyAttempt, verdict::RetryAction};
use crate::{
    outcome::{Outcome, Reason, grpc},
    time::SharedTimer,
};

pin_project! {
    /// An attempt, until its response is classified.
    pub(crate) struct AttemptFuture<F, H> {
        #[pin]
        state: AttemptState<F, H>,
        #[pin]
        alarm: SharedTimer,
    }
}

pin_project! {
    #[project = AttemptStateProj]
    enum AttemptState<F, H> {
        Calling { #[pin] future: F, waited_for: bool },
        // The response head is available. The first frame of a gRPC response may still be pending.
        Weighing { held: Option<H>, impatient: bool },
    }
}

/// The progress of an attempt.
pub(crate) enum Head<T> {
    /// The response head is available. It is returned to the caller, or [held](AttemptFuture::hold).
    Here(T),
    /// The response is already held.
    Held,
    /// The response head is late.
    Late,
}

impl<F, H> AttemptFuture<F, H> {
    #[inline]
    pub(crate) fn new(future: F) -> Self {
        Self {
            state: AttemptState::Calling { future, waited_for: false },
            alarm: SharedTimer::new(),
        }
    }

    /// Polls the attempt for its response head.
    ///
    /// `until` returns the instant at which the head is late. It is called only if the head is not available at the
    /// first poll. Otherwise the call needs no timer.
    #[inline]
    pub(crate) fn poll_head<T>(
        self: Pin<&mut Self>,
        until: impl FnOnce() -> Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<Head<T>>
    where
        F: Future<Output = T>,
    {
        let mut this = self.project();
        let AttemptStateProj::Calling { mut future, waited_for } = this.state.project() else {
            return Poll::Ready(Head::Held);
        };
        // Poll the attempt before the timer: a response that is available takes precedence over a timeout.
        SharedTimer::observe_inner();
        if let Poll::Ready(result) = future.as_mut().poll(cx) {
            return Poll::Ready(Head::Here(result));
        }
        if !mem::replace(waited_for, true) {
            if let Some(until) = until() {
                this.alarm.as_mut().arm(until);
            }
        }
        this.alarm.poll(&*future, cx).map(|()| Head::Late)
    }

    /// Holds a response with its class by its head, and drops the future of the attempt.
    pub(crate) fn hold(self: Pin<&mut Self>, held: H) {
        let mut this = self.project();
        this.alarm.clear();
        this.state.set(AttemptState::Weighing { held: Some(held), impatient: false });
    }

    /// Polls for the class and outcome of the held response. If its body does not begin in time, the head decides.
    pub(crate) fn poll_weigh<M, Res, E>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<(RetryAction, Outcome)>
    where
        M: ClassifyAttempt<Res, E, Held = H>,
    {
        let mut this = self.project();
        let AttemptStateProj::Weighing { held: Some(held), impatient } = this.state.project()
        else {
            unreachable!("the response is held and not taken")
        };
        SharedTimer::observe_inner();
        if let Poll::Ready(weight) = M::poll_weigh(held, cx) {
            return Poll::Ready(weight);
        }
        if !mem::replace(impatient, true) {
            if let Some(at) = Instant::now().checked_add(M::PATIENCE) {
                this.alarm.as_mut().arm(at);
            }
        }
        ready!(this.alarm.poll(held, cx));
        Poll::Ready(M::undecided(held))
    }

    /// Polls for the class and outcome of the attempt from its beginning, without a timeout for the response head.
    pub(crate) fn poll_held<M, Res, E>(
        mut self: Pin<&mut Self>,
        protocol: &M,
        is_grpc_call: bool,
        cx: &mut Context<'_>,
    ) -> Poll<(RetryAction, Outcome)>
    where
        F: Future<Output = Result<Res, E>>,
        M: ClassifyAttempt<Res, E, Held = H>,
    {
        if let Head::Here(result) = ready!(self.as_mut().poll_head(|| None, cx)) {
            let weight = protocol.weigh(is_grpc_call, &result);
            self.as_mut().hold(M::hold(result, weight));
        }
        self.poll_weigh::<M, Res, E>(cx)
    }

    /// Returns the held response. May be called once, when the response is held.
    pub(crate) fn take(self: Pin<&mut Self>) -> H {
        match self.project().state.project() {
            AttemptStateProj::Weighing { held, .. } => held.take(),
            AttemptStateProj::Calling { .. } => None,
        }
        .unwrap_or_else(|| unreachable!("taken once, after it is held"))
    }
}

/// Returns whether this outcome makes a deposit in the retry budget. A gRPC status other than `OK` makes none (gRFC
/// A6).
#[inline]
pub(crate) fn earns_deposit(outcome: Outcome) -> bool {
    let is_grpc_error = outcome.reason() == Reason::GrpcStatus && outcome.code() != Some(grpc::OK);
    outcome.is_success() && !is_grpc_error
}

/// Returns whether the outcome is a success and the class is `Final`, so that the response is returned as it is.
#[inline]
pub(crate) fn is_good((class, outcome): (RetryAction, Outcome)) -> bool {
    class == RetryAction::Final && outcome.is_success()
}
