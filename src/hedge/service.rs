use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower_service::Service;

use super::settings::{HedgeDeclineReason, HedgeSettings, LAYER};
use crate::{
    admission::Reusable,
    attempt::{
        AttemptFuture, AttemptSpan, BodyReplay, Classified, ClassifyAttempt, Core, FailureKind,
        FurtherAttempt, Hedged, ReplayRequest, SavedCall, Withdrawal, is_good,
    },
    classify::Http,
    event::{event, ms},
    outcome::{DropCause, LayerKind, Outcome, Reason, WaitsFor, is_mark_requested},
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

    /// Returns the wrapped service. It makes the first attempt of each call. Hedge attempts are made with clones of the
    /// service that the layer wrapped, which a change does not affect.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
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
    type Future = HedgeFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        let (polled, marks) = is_mark_requested(|| self.inner.poll_ready(cx));
        // Keep an earlier request for marks: a layer in between that is already ready does not poll its inner service.
        self.marks |= marks;
        polled.map_err(M::inner_error)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        if let Some(budget) = &self.core.budget {
            budget.deposit_for_call();
        }
        let settings = &self.core.settings;
        let safe_requests = settings.safe_requests();
        let rules = settings.save_rules(&safe_requests, self.core.misconfigured, self.marks);
        let is_grpc = M::is_grpc(&request);
        let mut saved = M::save(&request, rules);
        let first = M::first_attempt(request, saved.as_mut(), rules);
        let can_hedge = saved.as_ref().is_some_and(|saved| M::body_replay(saved) != BodyReplay::No);
        // If the delay exceeds the range of the clock, no hedge attempt is sent.
        let began = settings.records_latency().then(Instant::now);
        let delay = if can_hedge { settings.delay() } else { None };
        let span = if settings.is_off() {
            AttemptSpan::none()
        } else {
            AttemptSpan::first(LayerKind::Hedge, || settings.name())
        };
        let at = delay.and_then(|delay| began.unwrap_or_else(Instant::now).checked_add(delay));
        let entered = span.enter();
        let future = self.inner.call(first);
        drop(entered);
        HedgeFuture {
            first: Some(SpannedAttempt::new(future, span)),
            hedges: Vec::new(),
            next: NextHedge::due(at),
            sent: 0,
            has_dropped_sent: false,
            began,
            core: self.core.lease(),
            call: SavedCall::new(self.protocol.clone(), is_grpc, saved),
        }
    }
}

pin_project! {
    /// The future of a [`Hedge`]'s call. Dropping it drops all attempts, and refunds the withdrawal of a hedge attempt
    /// that has not been sent.
    ///
    /// `F` is the future of the wrapped service, `P` a response that has not been returned yet, and `C` the
    /// [saved request](crate::attempt::SavedCall).
    #[project = HedgeProj]
    pub struct HedgeFuture<S, F, P, C> {
        // `None` after a bad response, while hedge attempts are in flight.
        #[pin]
        first: Option<SpannedAttempt<F, P>>,
        // The hedge attempts in flight, in the order in which they were sent. They are boxed, so that a call without a
        // hedge attempt neither holds nor moves space for them.
        hedges: Vec<Pin<Box<SpannedAttempt<F, P>>>>,
        #[pin]
        next: NextHedge<S>,
        // The number of hedge attempts that were sent.
        sent: u32,
        // A bad response was dropped, and the upstream may have received its attempt.
        has_dropped_sent: bool,
        // `None` if the latency of the call is not recorded.
        began: Option<Instant>,
        core: ShardedRef<Core<S, HedgeSettings>>,
        call: C,
    }
}

pin_project! {
    /// An attempt with its span. The future is dropped before the span ends.
    struct SpannedAttempt<F, P> {
        #[pin]
        attempt: AttemptFuture<F, P>,
        span: AttemptSpan,
    }
}

impl<F, P> SpannedAttempt<F, P> {
    #[inline]
    fn new(future: F, span: AttemptSpan) -> Self {
        Self { attempt: AttemptFuture::new(future), span }
    }

    /// Polls for the class and the outcome of the attempt inside of its span, and ends the span with the outcome.
    fn poll_outcome<M, Res, E>(
        self: Pin<&mut Self>,
        protocol: &M,
        is_grpc_call: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Classified>
    where
        F: Future<Output = Result<Res, E>>,
        M: ClassifyAttempt<Res, E, Pending = P>,
    {
        let this = self.project();
        let entered = this.span.enter();
        let polled = this.attempt.poll_outcome(protocol, is_grpc_call, cx);
        drop(entered);
        if let Poll::Ready((_, outcome)) = polled {
            this.span.end(outcome);
        }
        polled
    }

    fn take_pending(self: Pin<&mut Self>) -> P {
        self.project().attempt.take_pending()
    }

    /// Ends the span of an attempt that is dropped because another one has won.
    fn supersede(self: Pin<&mut Self>) {
        self.project().span.end(Outcome::cancelled().because(Reason::Superseded));
    }
}

pin_project! {
    /// The hedge attempt that is sent next.
    #[project = NextHedgeProj]
    enum NextHedge<S> {
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

impl<S> NextHedge<S> {
    fn due(at: Option<Instant>) -> Self {
        at.map_or(Self::Nothing, |at| Self::Due { at })
    }
}

impl<S, M, Req> HedgeProj<'_, S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    /// Returns the response of an attempt, and drops the attempts that are still in flight.
    fn respond(
        &mut self,
        pending: M::Pending,
        outcome: Outcome,
        won: bool,
    ) -> Result<M::Response, M::Error> {
        if let Some(first) = self.first.as_mut().as_pin_mut() {
            first.supersede();
        }
        self.hedges.iter_mut().for_each(|hedge| hedge.as_mut().supersede());
        DropCause::Superseded.during(|| {
            self.first.set(None);
            self.hedges.clear();
        });
        self.next.set(NextHedge::Returned);
        self.call.saved = None;
        if *self.sent > 0 {
            self.core.settings.notify_of_end(outcome, won, *self.sent);
        }
        let result =
            M::return_hedged(pending, (*self.sent > 0).then_some(Hedged { won, sent: *self.sent }));
        match *self.has_dropped_sent && !FailureKind::of(outcome).may_be_seen() {
            true => M::mark_sent_before(result),
            false => result,
        }
    }
}

impl<S, M, Req> Future for HedgeFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let mut wait = ReportedWait(None);
        // The attempts are polled before the timer, so that a call with an available response is not hedged.
        if let Some(mut first) = this.first.as_mut().as_pin_mut() {
            WaitsFor::reset();
            match first.as_mut().poll_outcome(&this.call.protocol, this.call.is_grpc, cx) {
                Poll::Pending => wait.add(WaitsFor::reported()),
                Poll::Ready(classified) => {
                    if is_good(classified) {
                        this.core.record_good(this.began.take());
                    }
                    if is_good(classified) || this.hedges.is_empty() {
                        let pending = first.take_pending();
                        return Poll::Ready(this.respond(pending, classified.1, false));
                    }
                    *this.has_dropped_sent |= FailureKind::of(classified.1).may_be_seen();
                    this.core.settings.report_failed(classified.1, this.hedges.len());
                    // This releases the permit and the connection, for which a hedge attempt may wait.
                    this.first.set(None);
                    this.next.set(NextHedge::Nothing);
                }
            }
        }
        let mut polled = 0;
        loop {
            let is_only = this.first.is_none() && this.hedges.len() == 1;
            if let Some(hedge) = this.hedges.get_mut(polled) {
                WaitsFor::reset();
                let polled_hedge =
                    hedge.as_mut().poll_outcome(&this.call.protocol, this.call.is_grpc, cx);
                let Poll::Ready(classified) = polled_hedge else {
                    wait.add(WaitsFor::reported());
                    polled += 1;
                    continue;
                };
                if is_good(classified) {
                    this.core.record_good(this.began.take());
                }
                if is_good(classified) || is_only {
                    let pending = hedge.as_mut().take_pending();
                    this.core.settings.won.fetch_add(1, Ordering::Relaxed);
                    return Poll::Ready(this.respond(pending, classified.1, true));
                }
                *this.has_dropped_sent |= FailureKind::of(classified.1).may_be_seen();
                drop(this.hedges.remove(polled));
                let in_flight = this.hedges.len() + usize::from(this.first.is_some());
                this.core.settings.report_failed(classified.1, in_flight);
                this.next.set(NextHedge::Nothing);
                continue;
            }
            match this.next.as_mut().project() {
                NextHedgeProj::Due { at } => {
                    let delay = sleep_until(*at);
                    this.next.set(NextHedge::Delayed { delay });
                }
                NextHedgeProj::Delayed { delay } => {
                    if delay.poll(cx).is_pending() {
                        break;
                    }
                    let next = prepare(this.core, this.call);
                    this.next.set(next);
                }
                NextHedgeProj::Readying { service, withdrawal } => {
                    let Poll::Ready(ready) = service.poll_ready(cx) else {
                        wait.add(WaitsFor::Client);
                        break;
                    };
                    let (Ok(()), Some(saved)) = (ready, this.call.saved.as_ref()) else {
                        this.next.set(NextHedge::Nothing);
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
                        LAYER,
                        settings.name(),
                        hedge = *this.sent,
                        delay_ms = settings.delay().map(ms),
                        "hedging",
                    );
                    let further =
                        FurtherAttempt { resend_count: *this.sent, delay: settings.delay() };
                    let span = AttemptSpan::further(LayerKind::Hedge, settings.name(), further);
                    let entered = span.enter();
                    let hedge = service.call(M::hedge_attempt(saved, *this.sent));
                    drop(entered);
                    this.hedges.push(Box::pin(SpannedAttempt::new(hedge, span)));
                    let further = *this.sent < settings.max_hedges();
                    let delay = if further { settings.delay() } else { None };
                    let at = delay.and_then(|delay| Instant::now().checked_add(delay));
                    if at.is_none() {
                        this.call.saved = None;
                    }
                    this.next.set(NextHedge::due(at));
                }
                NextHedgeProj::Nothing => break,
                NextHedgeProj::Returned => unreachable!("polled after completion"),
            }
        }
        wait.report();
        Poll::Pending
    }
}

/// The wait of a call with several attempts, as it is reported to the outer layers. A wait for the upstream takes
/// precedence over a wait for the caller or the transport. Both take precedence over a wait inside the client, so that
/// a hedge attempt in a queue does not hide a first attempt that hangs.
struct ReportedWait(Option<WaitsFor>);

impl ReportedWait {
    fn add(&mut self, waits_for: WaitsFor) {
        let rank = |waits_for: &WaitsFor| match waits_for {
            WaitsFor::Upstream => 0,
            WaitsFor::Client => 2,
            _ => 1,
        };
        self.0 = self.0.into_iter().chain([waits_for]).min_by_key(rank);
    }

    fn report(self) {
        if let Some(waits_for) = self.0 {
            waits_for.report();
        }
    }
}

impl HedgeSettings {
    /// Reports a failed response that is dropped because other attempts are in flight.
    fn report_failed(&self, outcome: Outcome, in_flight: usize) {
        event!(
            hedge,
            DEBUG,
            LAYER,
            self.name(),
            outcome = outcome.kind().as_str(),
            reason = outcome.reason().as_str(),
            code = outcome.code(),
            in_flight = in_flight,
            "waiting for another attempt",
        );
    }

    /// Emits the event of the end of a call for which hedge attempts were sent. `won`: the call returns the response of
    /// one of them.
    fn notify_of_end(&self, outcome: Outcome, won: bool, sent: u32) {
        macro_rules! emit {
            ($message:literal) => {
                event!(
                    hedge,
                    DEBUG,
                    LAYER,
                    self.name(),
                    sent = sent,
                    outcome = outcome.kind().as_str(),
                    reason = outcome.reason().as_str(),
                    code = outcome.code(),
                    $message,
                )
            };
        }
        if won { emit!("hedge won") } else { emit!("hedge lost") }
    }
}

impl<S> Core<S, HedgeSettings> {
    /// Records a good response: its latency, and the deposit in the budget.
    fn record_good(&self, began: Option<Instant>) {
        self.settings.record_latency(began);
        self.deposit_first();
    }
}

/// Prepares a hedge attempt after its delay. The budget is checked last, so that an attempt that cannot be sent makes
/// no withdrawal.
fn prepare<S, Req, M>(
    core: &Core<S, HedgeSettings>,
    call: &SavedCall<Req, M, M::Saved>,
) -> NextHedge<S>
where
    S: Clone,
    M: ReplayRequest<Req>,
{
    if !call.saved.as_ref().is_some_and(|saved| M::body_replay(saved) == BodyReplay::Yes) {
        core.settings.record_declined(HedgeDeclineReason::Body);
        return NextHedge::Nothing;
    }
    if call.deadline().is_some_and(|deadline| deadline.left().is_zero()) {
        core.settings.record_declined(HedgeDeclineReason::DeadlinePassed);
        return NextHedge::Nothing;
    }
    let withdrawal = core.budget.as_ref().map(|budget| budget.withdraw());
    if let Some(None) = withdrawal {
        core.settings.record_declined(HedgeDeclineReason::BudgetUsedUp);
        return NextHedge::Nothing;
    }
    NextHedge::Readying { service: core.service(), withdrawal: withdrawal.flatten() }
}

impl<S, F, P, C> fmt::Debug for HedgeFuture<S, F, P, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.next {
            NextHedge::Returned => "HedgeFuture(returned)",
            _ if self.sent > 0 => "HedgeFuture(hedged)",
            NextHedge::Due { .. } | NextHedge::Delayed { .. } => "HedgeFuture(waiting)",
            NextHedge::Readying { .. } => "HedgeFuture(readying)",
            NextHedge::Nothing => "HedgeFuture(unhedged)",
        })
    }
}
