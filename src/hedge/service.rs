use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower_service::Service;

use super::layer::HedgeSettings;
use crate::{
    admission::Reusable,
    attempt::{
        AttemptFuture, BodyReplay, ClassifyAttempt, Core, FailureKind, Hedged, ReplayRequest,
        Withdrawal, is_good,
    },
    classify::Http,
    event::event,
    outcome::{DropCause, Outcome, WaitsFor, is_mark_requested},
    permit::{ShardedArc, ShardedRef},
};

/// The service of a [`HedgeLayer`](super::layer::HedgeLayer).
pub struct Hedge<S, M = Http> {
    inner: S,
    core: ShardedArc<Core<S, HedgeSettings>>,
    protocol: M,
    /// An inner layer measures calls: requests carry a mark of their progress.
    marks: bool,
}

impl<S, M> Hedge<S, M> {
    pub(crate) fn new(inner: S, core: Core<S, HedgeSettings>, protocol: M) -> Self {
        Self { inner, core: ShardedArc::new(core), protocol, marks: false }
    }

    /// Returns the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: Clone, M: Clone> Clone for Hedge<S, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            core: self.core.clone(),
            protocol: self.protocol.clone(),
            marks: self.marks,
        }
    }
}

impl<S, M> fmt::Debug for Hedge<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hedge").field("settings", &*self.core.settings).finish_non_exhaustive()
    }
}

impl<S, M, Req> Service<Req> for Hedge<S, M>
where
    S: Service<M::Request> + Reusable,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Response = M::Response;
    type Error = M::Error;
    type Future = HedgeFuture<S, Req, S::Future, M, M::Kept, M::Held>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        let (polled, marks) = is_mark_requested(|| self.inner.poll_ready(cx));
        // Keep an earlier request for marks: a layer in between that is already ready does not poll its inner service.
        self.marks |= marks;
        polled.map_err(M::error)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        if let Some(budget) = &self.core.budget {
            budget.begun();
        }
        let settings = &self.core.settings;
        let safe = settings.safe();
        let rules = settings.rules(&safe, self.core.misconfigured, self.marks);
        let is_grpc_call = M::is_grpc(&request);
        let mut kept = M::keep(&request, rules);
        let first = M::first(request, kept.as_mut(), rules);
        let hedgeable = kept.as_ref().is_some_and(|kept| M::repeatable(kept) != BodyReplay::No);
        // If the delay exceeds the range of the clock, no hedge attempt is sent.
        let began = settings.learns().then(Instant::now);
        let delay = if hedgeable { settings.delay() } else { None };
        let at = delay.and_then(|delay| began.unwrap_or_else(Instant::now).checked_add(delay));
        HedgeFuture {
            first: Some(AttemptFuture::new(self.inner.call(first))),
            hedges: Vec::new(),
            next: Next::due(at),
            sent: 0,
            has_dropped_sent: false,
            began,
            core: self.core.lease(),
            protocol: self.protocol.clone(),
            is_grpc_call,
            kept,
            _request: PhantomData,
        }
    }
}

pin_project! {
    /// The future of a [`Hedge`]'s call. Dropping it drops all attempts, and refunds the withdrawal of a hedge attempt
    /// that has not been sent.
    #[project = HedgeProj]
    pub struct HedgeFuture<S, Req, F, M, K, H> {
        // `None` after a bad response, while hedge attempts are in flight.
        #[pin]
        first: Option<AttemptFuture<F, H>>,
        // The hedge attempts in flight, in the order in which they were sent. They are boxed, so that a call without a
        // hedge attempt neither holds nor moves space for them.
        hedges: Vec<Pin<Box<AttemptFuture<F, H>>>>,
        #[pin]
        next: Next<S>,
        // The number of hedge attempts that were sent.
        sent: u32,
        // A bad response was dropped, and the upstream may have received its attempt.
        has_dropped_sent: bool,
        // `None` if the latency of the call is not recorded.
        began: Option<Instant>,
        core: ShardedRef<Core<S, HedgeSettings>>,
        protocol: M,
        is_grpc_call: bool,
        kept: Option<K>,
        _request: PhantomData<fn(Req)>,
    }
}

pin_project! {
    /// The hedge attempt that is sent next.
    #[project = NextProj]
    enum Next<S> {
        // The attempts in flight have not been polled since this was set, so there is no timer yet.
        Due { at: Instant },
        Delayed { #[pin] delay: Sleep },
        Readying { service: S, withdrawal: Option<Withdrawal> },
        // No further hedge attempt is sent.
        Nothing,
        // The call has returned its response.
        Returned,
    }
}

impl<S> Next<S> {
    fn due(at: Option<Instant>) -> Self {
        at.map_or(Self::Nothing, |at| Self::Due { at })
    }
}

impl<S, M, Req> HedgeProj<'_, S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    /// Returns the response of an attempt, and drops the attempts that are still in flight.
    fn respond(
        &mut self,
        held: M::Held,
        outcome: Outcome,
        won: bool,
    ) -> Result<M::Response, M::Error> {
        DropCause::Superseded.during(|| {
            self.first.set(None);
            self.hedges.clear();
        });
        self.next.set(Next::Returned);
        *self.kept = None;
        let result = M::pass(held, (*self.sent > 0).then_some(Hedged { won, sent: *self.sent }));
        match *self.has_dropped_sent && !FailureKind::of(outcome).may_be_seen() {
            true => M::sent_before(result),
            false => result,
        }
    }
}

impl<S, M, Req> Future for HedgeFuture<S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let is_grpc_call = *this.is_grpc_call;
        let mut waits = Waits(None);
        // The attempts are polled before the timer, so that a call with an available response is not hedged.
        if let Some(mut first) = this.first.as_mut().as_pin_mut() {
            WaitsFor::reset();
            match first.as_mut().poll_held(&*this.protocol, is_grpc_call, cx) {
                Poll::Pending => waits.add(WaitsFor::reported()),
                Poll::Ready(weight) => {
                    if is_good(weight) {
                        this.core.well(this.began.take());
                    }
                    if is_good(weight) || this.hedges.is_empty() {
                        let held = first.take();
                        return Poll::Ready(this.respond(held, weight.1, false));
                    }
                    *this.has_dropped_sent |= FailureKind::of(weight.1).may_be_seen();
                    this.core.settings.report_bad(weight.1, this.hedges.len());
                    // This releases the permit and the connection, for which a hedge attempt may wait.
                    this.first.set(None);
                    this.next.set(Next::Nothing);
                }
            }
        }
        let mut polled = 0;
        loop {
            let is_only = this.first.is_none() && this.hedges.len() == 1;
            if let Some(hedge) = this.hedges.get_mut(polled) {
                WaitsFor::reset();
                let held = hedge.as_mut().poll_held(&*this.protocol, is_grpc_call, cx);
                let Poll::Ready(weight) = held else {
                    waits.add(WaitsFor::reported());
                    polled += 1;
                    continue;
                };
                if is_good(weight) {
                    this.core.well(this.began.take());
                }
                if is_good(weight) || is_only {
                    let held = hedge.as_mut().take();
                    this.core.settings.won.fetch_add(1, Ordering::Relaxed);
                    return Poll::Ready(this.respond(held, weight.1, true));
                }
                *this.has_dropped_sent |= FailureKind::of(weight.1).may_be_seen();
                drop(this.hedges.remove(polled));
                let in_flight = this.hedges.len() + usize::from(this.first.is_some());
                this.core.settings.report_bad(weight.1, in_flight);
                this.next.set(Next::Nothing);
                continue;
            }
            match this.next.as_mut().project() {
                NextProj::Due { at } => {
                    let delay = sleep_until(*at);
                    this.next.set(Next::Delayed { delay });
                }
                NextProj::Delayed { delay } => {
                    if delay.poll(cx).is_pending() {
                        break;
                    }
                    let next = prepare::<S, Req, M>(this.core, this.kept.as_ref());
                    this.next.set(next);
                }
                NextProj::Readying { service, withdrawal } => {
                    let Poll::Ready(ready) = service.poll_ready(cx) else {
                        waits.add(WaitsFor::Client);
                        break;
                    };
                    let (Ok(()), Some(kept)) = (ready, this.kept.as_ref()) else {
                        this.next.set(Next::Nothing);
                        continue;
                    };
                    if let Some(withdrawal) = withdrawal.take() {
                        withdrawal.spend();
                    }
                    let settings = &this.core.settings;
                    *this.sent += 1;
                    settings.sent.fetch_add(1, Ordering::Relaxed);
                    event!(
                        hedge,
                        DEBUG,
                        resilience.name = settings.name(),
                        hedge = *this.sent,
                        delay_ms = settings.delay().map(|delay| delay.as_millis() as u64),
                        "hedging"
                    );
                    let hedge = service.call(M::hedge_attempt(kept, *this.sent));
                    this.hedges.push(Box::pin(AttemptFuture::new(hedge)));
                    let further = *this.sent < settings.max_hedges();
                    let delay = if further { settings.delay() } else { None };
                    let at = delay.and_then(|delay| Instant::now().checked_add(delay));
                    if at.is_none() {
                        *this.kept = None;
                    }
                    this.next.set(Next::due(at));
                }
                NextProj::Nothing => break,
                NextProj::Returned => unreachable!("polled after completion"),
            }
        }
        waits.report();
        Poll::Pending
    }
}

/// The wait of a call with several attempts, as it is reported to the outer layers. A wait for the upstream takes
/// precedence over a wait for the caller or the transport. Both take precedence over a wait inside the client, so that
/// a hedge attempt in a queue does not hide a first attempt that hangs.
struct Waits(Option<WaitsFor>);

impl Waits {
    fn add(&mut self, what: WaitsFor) {
        let rank = |what: &WaitsFor| match what {
            WaitsFor::Upstream => 0,
            WaitsFor::Client => 2,
            _ => 1,
        };
        self.0 = self.0.into_iter().chain([what]).min_by_key(rank);
    }

    fn report(self) {
        if let Some(what) = self.0 {
            what.report();
        }
    }
}

impl HedgeSettings {
    /// Reports a bad response that is dropped because other attempts are in flight.
    fn report_bad(&self, _outcome: Outcome, _in_flight: usize) {
        event!(
            hedge,
            DEBUG,
            resilience.name = self.name(),
            outcome = ?_outcome,
            in_flight = _in_flight,
            "waiting for another attempt"
        );
    }
}

impl<S> Core<S, HedgeSettings> {
    /// Records a good response: its latency, and the deposit in the budget.
    fn well(&self, began: Option<Instant>) {
        self.settings.took(began);
        self.answered();
    }
}

/// Prepares a hedge attempt after its delay. The budget is checked last, so that an attempt that cannot be sent makes
/// no withdrawal.
fn prepare<S, Req, M>(core: &Core<S, HedgeSettings>, kept: Option<&M::Kept>) -> Next<S>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    if !kept.is_some_and(|kept| M::repeatable(kept) == BodyReplay::Yes) {
        event!(hedge, DEBUG, resilience.name = core.settings.name(), reason = "body", "not hedged");
        return Next::Nothing;
    }
    if kept.and_then(M::deadline).is_some_and(|deadline| deadline.left().is_zero()) {
        event!(
            hedge,
            DEBUG,
            resilience.name = core.settings.name(),
            reason = "deadline_passed",
            "not hedged"
        );
        return Next::Nothing;
    }
    let withdrawal = core.budget.as_ref().map(|budget| budget.withdraw());
    if let Some(None) = withdrawal {
        core.settings.denied.fetch_add(1, Ordering::Relaxed);
        event!(
            hedge,
            DEBUG,
            resilience.name = core.settings.name(),
            reason = "budget_used_up",
            "not hedged"
        );
        return Next::Nothing;
    }
    Next::Readying { service: core.service(), withdrawal: withdrawal.flatten() }
}

impl<S, Req, F, M, K, H> fmt::Debug for HedgeFuture<S, Req, F, M, K, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.next {
            Next::Returned => "HedgeFuture(returned)",
            _ if self.sent > 0 => "HedgeFuture(hedged)",
            Next::Due { .. } | Next::Delayed { .. } => "HedgeFuture(waiting)",
            Next::Readying { .. } => "HedgeFuture(readying)",
            Next::Nothing => "HedgeFuture(unhedged)",
        })
    }
}
