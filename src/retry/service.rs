use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tower_service::Service;

use super::{
    attempts::Attempts,
    budget::Withdrawal,
    core::Core,
    exchange::{Numbered, Repeat, Weigh},
    policy::{Class, Facts, Stop, decide},
    rules::{Answer, FailureKind, PerKind, Seen},
    series::Series,
    span::Span,
    weighed::Weighed,
};
use crate::{
    admission::Reusable,
    call::{Deadline, Http, Outcome},
    event,
};

/// The service of a [`RetryLayer`](super::RetryLayer).
pub struct Retry<S, M = Http> {
    inner: S,
    core: Arc<Core<S>>,
    protocol: M,
}

impl<S, M> Retry<S, M> {
    pub(super) fn new(inner: S, core: Core<S>, protocol: M) -> Self {
        Self { inner, core: Arc::new(core), protocol }
    }

    /// The wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: Clone, M: Clone> Clone for Retry<S, M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), core: self.core.clone(), protocol: self.protocol.clone() }
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
    M: Repeat<Req> + Weigh<S::Response, S::Error>,
{
    type Response = M::Response;
    type Error = M::Error;
    type Future = ResponseFuture<S, Req, S::Future, M, M::Kept, M::Held>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        self.inner.poll_ready(cx).map_err(|error| M::broken(error, Attempts::NONE))
    }

    fn call(&mut self, request: Req) -> Self::Future {
        if let Some(budget) = &self.core.budget {
            budget.deposit();
        }
        let settings = &self.core.settings;
        let rules = settings.rules(self.core.misconfigured);
        let (first, kept) = self.protocol.split(request, rules);
        let span = Span::attempt(0);
        let future = span.within(|| self.inner.call(first));
        ResponseFuture {
            state: State::Calling { attempt: Weighed::new(future, settings.attempt_timeout()) },
            span,
            core: self.core.clone(),
            protocol: self.protocol.clone(),
            kept,
            service: None,
            withdrawal: None,
            record: Attempts::FIRST,
            transparent: 0,
            of_kind: [0; 8],
            deadline: None,
            series: None,
            _request: std::marker::PhantomData,
        }
    }
}

pin_project! {
    /// The future of a [`Retry`]'s call. Dropped while it waits, it pays its retry back.
    pub struct ResponseFuture<S, Req, F, M, K, H> {
        #[pin]
        state: State<F, H>,
        // The attempt that is under way.
        span: Span,
        core: Arc<Core<S>>,
        protocol: M,
        kept: Option<K>,
        // What later attempts are made with; none until there is one.
        service: Option<S>,
        withdrawal: Option<Withdrawal>,
        record: Attempts,
        transparent: u32,
        of_kind: PerKind<u32>,
        // The caller's, looked at when an attempt has failed.
        deadline: Option<Deadline>,
        // Its waits, once there is one.
        series: Option<Box<Series>>,
        _request: std::marker::PhantomData<fn(Req)>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F, H> {
        Calling { #[pin] attempt: Weighed<F, H> },
        // The answer is read away, for a short while.
        Discarding { held: H, #[pin] longest: Sleep, wait: Wait },
        Waiting { #[pin] backoff: Sleep },
        // Bounded by the deadline, if there is one.
        Readying { #[pin] late: Option<Sleep> },
    }
}

/// A wait, from when it was decided: reading the answer away is part of it.
struct Wait {
    since: Instant,
    time: Duration,
    /// How much of the answer may be read away.
    drain_cap: u64,
}

/// How long a discarded answer may take before its connection is given up.
const DRAIN_TIME: Duration = Duration::from_millis(50);

impl<S, M, Req> Future for ResponseFuture<S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request> + Clone,
    M: Repeat<Req> + Weigh<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let mut this = self.as_mut().project();
            match this.state.as_mut().project() {
                StateProj::Calling { mut attempt } => {
                    let weighed = this.span.within(|| attempt.as_mut().poll(&*this.protocol, cx));
                    let (class, outcome) = ready!(weighed);
                    *this.span = Span::none();
                    let held = attempt.take();
                    let wait = match self.as_mut().next(class, outcome, M::answer(&held)) {
                        Ok(wait) => wait,
                        Err(record) => return Poll::Ready(M::release(held, record)),
                    };
                    let longest = sleep(DRAIN_TIME);
                    let state = State::Discarding { held, longest, wait };
                    self.as_mut().project().state.set(state);
                }
                StateProj::Discarding { held, longest, wait } => {
                    let cap = wait.drain_cap;
                    if M::poll_discard(held, cap, cx).is_pending() {
                        ready!(longest.poll(cx));
                    }
                    let left = wait.time.saturating_sub(wait.since.elapsed());
                    // What is left of the answer is dropped here, before the wait: with it goes whatever
                    // a layer further in holds for it.
                    // A timer that is over already would still take a tick.
                    this.state.set(if left.is_zero() {
                        State::Readying { late: None }
                    } else {
                        State::Waiting { backoff: sleep(left) }
                    });
                }
                StateProj::Waiting { backoff } => {
                    ready!(backoff.poll(cx));
                    this.state.set(State::Readying { late: None });
                }
                StateProj::Readying { mut late } => {
                    let service = this.service.get_or_insert_with(|| this.core.service());
                    let Poll::Ready(ready) = service.poll_ready(cx) else {
                        let Some(Deadline(at)) = *this.deadline else { return Poll::Pending };
                        if late.is_none() {
                            late.set(Some(sleep_until(at)));
                        }
                        ready!(late.as_pin_mut().map_or(Poll::Ready(()), |late| late.poll(cx)));
                        this.record.stop = Stop::DeadlineTooNear;
                        this.core.settings.count_stop(Stop::DeadlineTooNear);
                        let Some(held) = M::timed_out("not ready before the deadline") else {
                            return Poll::Pending;
                        };
                        *this.withdrawal = None;
                        return Poll::Ready(M::release(held, Some(*this.record)));
                    };
                    if let Err(error) = ready {
                        this.record.stop = Stop::NotReady;
                        this.core.settings.count_stop(Stop::NotReady);
                        return Poll::Ready(Err(M::broken(error, *this.record)));
                    }
                    let Some(kept) = this.kept else { unreachable!("kept for every retry") };
                    if let Some(withdrawal) = this.withdrawal.take() {
                        withdrawal.spend();
                    }
                    // What a layer of ours refused was seen by nobody either.
                    let refused = this.of_kind[FailureKind::Rejected as usize];
                    let seen = this.record.made - *this.transparent - refused;
                    this.record.made += 1;
                    let attempt = Numbered { number: this.record.made, seen };
                    this.core.settings.count_retry();
                    *this.span = Span::attempt(attempt.number - 1);
                    let future = this.span.within(|| service.call(M::again(kept, attempt)));
                    let limit = this.core.settings.attempt_timeout();
                    this.state.set(State::Calling { attempt: Weighed::new(future, limit) });
                }
            }
        }
    }
}

impl<S, Req, F, M: Repeat<Req>, H> ResponseFuture<S, Req, F, M, M::Kept, H> {
    /// How long until the next attempt; or the record of why there is none, if there is something to tell.
    fn next(
        self: Pin<&mut Self>,
        mut class: Class,
        mut outcome: Outcome,
        answer: Option<Answer<'_>>,
    ) -> Result<Wait, Option<Attempts>> {
        let this = self.project();
        let settings = &this.core.settings;
        let first = this.record.made == 1;
        if class == Class::Final && first && !settings.says() {
            return Err(None);
        }
        let policy = settings.policy();
        let mut vouched = false;
        let head = this.kept.as_ref().and_then(M::head);
        if let (Some(request), Some(answer)) = (head.as_deref(), answer) {
            let mut seen = Seen { request, answer, outcome, attempt: this.record.made };
            (class, vouched) = policy.say.judge(class, &mut seen);
            outcome = seen.outcome;
        }
        if class == Class::Final && first {
            return Err(None);
        }
        let now = Instant::now();
        *this.deadline = head.as_ref().and_then(|head| Deadline::of(head.extensions()));
        let left = this.deadline.map(|Deadline(at)| at.saturating_duration_since(now));
        let decision = match this.kept {
            Some(kept) => decide(
                &Facts {
                    class,
                    outcome,
                    safe: vouched || M::safe(kept, &policy.safe),
                    body: M::repeatable(kept),
                    made: this.record.made,
                    transparent: *this.transparent,
                    of_kind: *this.of_kind,
                    left,
                },
                &policy,
                this.series,
            ),
            None if class == Class::Final => Err(Stop::Answered),
            None if this.core.misconfigured => Err(Stop::Misconfigured),
            // It said that it cannot be kept.
            None => Err(Stop::BodyGone),
        };
        // The budget last: what another rule refuses is never charged.
        let decision = decision.and_then(|again| {
            if let (Some(budget), Some(kind)) = (&this.core.budget, again.charge) {
                *this.withdrawal = Some(budget.withdraw_for(kind).ok_or(Stop::BudgetUsedUp)?);
            }
            if !this.kept.as_ref().is_some_and(M::claim) {
                *this.withdrawal = None;
                return Err(Stop::BodyGone);
            }
            Ok(again)
        });
        match decision {
            Ok(again) => {
                *this.transparent += u32::from(again.transparent);
                if !again.transparent {
                    this.of_kind[again.kind as usize] += 1;
                }
                this.record.waited = this.record.waited.saturating_add(again.wait);
                event!(
                    DEBUG,
                    attempt = this.record.made,
                    delay_ms = again.wait.as_millis() as u64,
                    reason = ?outcome,
                    "retrying"
                );
                Ok(Wait { since: now, time: again.wait, drain_cap: policy.drain_cap })
            }
            Err(stop) => {
                settings.count_stop(stop);
                this.record.stop = stop;
                event!(DEBUG, attempt = this.record.made, reason = %stop, outcome = ?outcome, "not retried");
                Err(Some(*this.record))
            }
        }
    }
}

impl<S, Req, F, M, K, H> fmt::Debug for ResponseFuture<S, Req, F, M, K, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("record", &self.record).finish_non_exhaustive()
    }
}
