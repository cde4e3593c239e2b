use std::{
    fmt,
    marker::PhantomData,
    task::{Context, Poll},
};

use tower_service::Service;

use super::{
    future::{RetryFuture, RetryStage, ends_by},
    settings::RetrySettings,
    span::Span,
};
use crate::{
    admission::Reusable,
    attempt::{AttemptFuture, Attempts, ClassifyAttempt, Core, ReplayRequest},
    classify::Http,
    outcome::is_mark_requested,
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
    type Future = RetryFuture<S, Req, S::Future, M, M::Kept, M::Held>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        let (polled, marks) = is_mark_requested(|| self.inner.poll_ready(cx));
        // Keep an earlier request for marks: a layer in between that is already ready does not poll its inner service.
        self.marks |= marks;
        polled.map_err(|error| M::broken(error, Attempts::NONE))
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        let rules = self.core.settings.rules(self.core.misconfigured, self.marks);
        let is_grpc_call = M::is_grpc(&request);
        let mut kept = M::keep(&request, rules);
        if ends_by::<S, Req, M>(kept.as_ref(), CallClock::now) {
            return self.unbegun(kept);
        }
        if let Some(budget) = &self.core.budget {
            budget.begun();
        }
        // Lease before the call, so that the future of the call is built in its final place and not moved.
        let core = self.core.lease();
        let span = Span::first();
        let entered = span.enter();
        // Not through a variable, because a move of a request is expensive.
        let future = self.inner.call(M::first(request, kept.as_mut(), rules));
        drop(entered);
        RetryFuture {
            state: RetryStage::Calling { attempt: AttemptFuture::new(future) },
            span,
            core,
            protocol: self.protocol.clone(),
            is_grpc_call,
            kept,
            course: None,
            _request: PhantomData,
        }
    }
}

impl<S: Clone, M: Clone> Retry<S, M> {
    /// Returns the future of a call whose deadline has already passed. The polled instance is replaced, so that what it
    /// reserved in `poll_ready` is released.
    #[cold]
    fn unbegun<Req, F, K, H>(&mut self, kept: Option<K>) -> RetryFuture<S, Req, F, M, K, H> {
        self.inner = self.inner.clone();
        RetryFuture {
            state: RetryStage::Unbegun,
            span: Span::none(),
            core: self.core.lease(),
            protocol: self.protocol.clone(),
            is_grpc_call: false,
            kept,
            course: None,
            _request: PhantomData,
        }
    }
}
