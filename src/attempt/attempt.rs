use std::{
    future::Future,
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{
    protocol::ClassifyAttempt,
    verdict::{Classified, RetryAction},
};
use crate::{
    outcome::{Outcome, Reason, grpc},
    time::SharedTimer,
};

pin_project! {
    /// An attempt, until its response is classified.
    pub(crate) struct AttemptFuture<F, P> {
        #[pin]
        state: AttemptState<F, P>,
        #[pin]
        timer: SharedTimer,
    }
}

pin_project! {
    #[project = AttemptStateProj]
    enum AttemptState<F, P> {
        Calling { #[pin] future: F, has_timer: bool },
        // The response head is available. The first frame of a gRPC response may not be.
        Classifying { pending: Option<P>, has_timer: bool },
    }
}

/// The result of a poll for the response head of an attempt.
pub(crate) enum PolledHead<T> {
    /// The response head is available. The caller returns or [stores](AttemptFuture::store) the response.
    Available(T),
    /// The response is stored.
    Stored,
    /// The time for the response head has passed.
    TimedOut,
}

impl<F, P> AttemptFuture<F, P> {
    #[inline]
    pub(crate) fn new(future: F) -> Self {
        Self {
            state: AttemptState::Calling { future, has_timer: false },
            timer: SharedTimer::new(),
        }
    }

    /// Polls the attempt for its response head.
    ///
    /// `until` returns the instant at which the time for the head has passed. It is called only if the head is not
    /// available at the first poll. Otherwise the call needs no timer.
    #[inline]
    pub(crate) fn poll_head<T>(
        self: Pin<&mut Self>,
        until: impl FnOnce() -> Option<Instant>,
        cx: &mut Context<'_>,
    ) -> Poll<PolledHead<T>>
    where
        F: Future<Output = T>,
    {
        let mut this = self.project();
        let AttemptStateProj::Calling { mut future, has_timer } = this.state.project() else {
            return Poll::Ready(PolledHead::Stored);
        };
        // Poll the attempt before the timer: a response that is available takes precedence over a timeout.
        SharedTimer::observe_inner();
        if let Poll::Ready(result) = future.as_mut().poll(cx) {
            return Poll::Ready(PolledHead::Available(result));
        }
        if !mem::replace(has_timer, true) {
            if let Some(until) = until() {
                this.timer.as_mut().arm(until);
            }
        }
        this.timer.poll(&*future, cx).map(|()| PolledHead::TimedOut)
    }

    /// Stores a response with its class by its head, and drops the future of the attempt.
    pub(crate) fn store(self: Pin<&mut Self>, pending: P) {
        let mut this = self.project();
        this.timer.clear();
        this.state.set(AttemptState::Classifying { pending: Some(pending), has_timer: false });
    }

    /// Polls for the class and outcome of the stored response. If its body does not begin in time, the head decides.
    pub(crate) fn poll_classify<M, Res, E>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Classified>
    where
        M: ClassifyAttempt<Res, E, Pending = P>,
    {
        let mut this = self.project();
        let AttemptStateProj::Classifying { pending: Some(pending), has_timer } =
            this.state.project()
        else {
            unreachable!("the response is stored and not taken")
        };
        SharedTimer::observe_inner();
        if let Poll::Ready(classified) = M::poll_classify(pending, cx) {
            return Poll::Ready(classified);
        }
        if !mem::replace(has_timer, true) {
            if let Some(at) = Instant::now().checked_add(M::MAX_FIRST_FRAME_WAIT) {
                this.timer.as_mut().arm(at);
            }
        }
        ready!(this.timer.poll(pending, cx));
        Poll::Ready(M::classify_unread(pending))
    }

    /// Polls for the class and outcome of the attempt from its beginning, without a timeout for the response head.
    pub(crate) fn poll_outcome<M, Res, E>(
        mut self: Pin<&mut Self>,
        protocol: &M,
        is_grpc_call: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Classified>
    where
        F: Future<Output = Result<Res, E>>,
        M: ClassifyAttempt<Res, E, Pending = P>,
    {
        if let PolledHead::Available(result) = ready!(self.as_mut().poll_head(|| None, cx)) {
            let classified = protocol.classify(is_grpc_call, &result);
            self.as_mut().store(M::pending(result, classified));
        }
        self.poll_classify::<M, Res, E>(cx)
    }

    /// Returns the stored response. May be called once, when a response is stored.
    pub(crate) fn take_pending(self: Pin<&mut Self>) -> P {
        match self.project().state.project() {
            AttemptStateProj::Classifying { pending, .. } => pending.take(),
            AttemptStateProj::Calling { .. } => None,
        }
        .unwrap_or_else(|| unreachable!("taken once, after it is stored"))
    }
}

/// Returns whether this outcome makes a deposit in the retry budget. A gRPC status other than `OK` makes none (gRFC
/// A6).
#[inline]
pub(crate) fn earns_deposit(outcome: Outcome) -> bool {
    let is_grpc_error = outcome.reason() == Reason::GrpcStatus && outcome.code() != Some(grpc::OK);
    outcome.is_success() && !is_grpc_error
}

/// Returns whether the outcome is a success and the class is `Done`, so that the response is returned as it is.
#[inline]
pub(crate) fn is_good((class, outcome): Classified) -> bool {
    class == RetryAction::Done && outcome.is_success()
}
