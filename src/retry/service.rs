use std::{
    fmt,
    task::{Context, Poll},
};

use tower_service::Service;

use super::{
    future::{RetryFuture, RetryStage},
    settings::RetrySettings,
};
use crate::{
    admission::Reusable,
    attempt::{
        AttemptFuture, AttemptSpan, Attempts, ClassifyAttempt, Core, ReplayRequest, SavedCall,
    },
    classify::Http,
    outcome::{LayerKind, is_mark_requested},
    permit::ShardedArc,
    time::CallClock,
};

/// The service of a [`RetryLayer`](super::layer::RetryLayer).
pub struct Retry<S, M = Http> {
    inner: S,
    core: ShardedArc<Core<S, RetrySettings>>,
    protocol: M,
    /// An inner layer measures calls: requests carry a mark of their progress.
    marks: bool,
}

impl<S, M> Retry<S, M> {
    pub(super) fn new(inner: S, core: Core<S, RetrySettings>, protocol: M) -> Self {
        Self { inner, core: ShardedArc::new(core), protocol, marks: false }
    }

    /// Returns the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the wrapped service. It makes the first attempt of each call. Later attempts are made with clones of the
    /// service that the layer wrapped, which a change does not affect.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, M: Clone> Clone for Retry<S, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            core: self.core.clone(),
            protocol: self.protocol.clone(),
            marks: self.marks,
        }
    }
}

impl<S, M> fmt::Debug for Retry<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retry").field("settings", &*self.core.settings).finish_non_exhaustive()
    }
}

impl<S, M, Req> Service<Req> for Retry<S, M>
where
    S: Service<M::Request> + Reusable,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Response = M::Response;
    type Error = M::Error;
    type Future = RetryFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        let (polled, marks) = is_mark_requested(|| self.inner.poll_ready(cx));
        // Keep an earlier request for marks: a layer in between that is already ready does not poll its inner service.
        self.marks |= marks;
        polled.map_err(|error| M::readiness_error(error, Attempts::NONE))
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let rules = self.core.settings.save_rules(self.core.misconfigured, self.marks);
        let is_grpc = M::is_grpc(&request);
        let mut saved = M::save(&request, rules);
        if Self::Future::expires_by(saved.as_ref(), CallClock::now) {
            let call = SavedCall::new(self.protocol.clone(), is_grpc, saved);
            return self.expired(call);
        }
        if let Some(budget) = &self.core.budget {
            budget.deposit_for_call();
        }
        // Take the reference before the call, so that the future of the call is built in its final place and not moved.
        let core = self.core.lease();
        let span = AttemptSpan::first(LayerKind::Retry, || core.settings.name.as_str());
        let entered = span.enter();
        // Not through a variable, because a move of a request is expensive.
        let future = self.inner.call(M::first_attempt(request, saved.as_mut(), rules));
        drop(entered);
        RetryFuture {
            stage: RetryStage::Calling { attempt: AttemptFuture::new(future) },
            span,
            core,
            call: SavedCall::new(self.protocol.clone(), is_grpc, saved),
            state: None,
        }
    }
}

impl<S: Clone, M: Clone> Retry<S, M> {
    /// Returns the future of a call whose deadline has already passed. The polled instance is replaced, so that what it
    /// reserved in `poll_ready` is released.
    #[cold]
    fn expired<F, P, C>(&mut self, call: C) -> RetryFuture<S, F, P, C> {
        self.inner = self.inner.clone();
        RetryFuture {
            stage: RetryStage::Expired,
            span: AttemptSpan::none(),
            core: self.core.lease(),
            call,
            state: None,
        }
    }
}
