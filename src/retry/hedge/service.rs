use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower_service::Service;

use super::{
    super::{
        account::Withdrawal,
        core::Core,
        exchange::{Repeat, Weigh},
        policy::Repeatable,
        weighed::{Weighed, is_good},
    },
    Hedged,
    layer::Settings,
};
use crate::{
    admission::Reusable,
    call::{DropCause, Http, Lease, Striped, WaitsFor, is_mark_requested},
    event,
};

/// The service of a [`HedgeLayer`](super::HedgeLayer).
pub struct Hedge<S, M = Http> {
    inner: S,
    core: Striped<Core<S, Settings>>,
    protocol: M,
    /// An inner layer measures calls: requests carry a mark of their progress.
    marks: bool,
}

impl<S, M> Hedge<S, M> {
    pub(super) fn new(inner: S, core: Core<S, Settings>, protocol: M) -> Self {
        Self { inner, core: Striped::new(core), protocol, marks: false }
    }

    /// The wrapped service.
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
    M: Repeat<Req> + Weigh<S::Response, S::Error>,
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
        let hedgeable = kept.as_ref().is_some_and(|kept| M::repeatable(kept) != Repeatable::No);
        // A time that no clock reaches is never.
        let began = settings.learns().then(Instant::now);
        let delay = if hedgeable { settings.delay() } else { None };
        let at = delay.and_then(|delay| began.unwrap_or_else(Instant::now).checked_add(delay));
        HedgeFuture {
            first: Some(Weighed::new(self.inner.call(first))),
            began,
            second: at.map_or(Second::Never, |at| Second::Due { at }),
            core: self.core.lease(),
            protocol: self.protocol.clone(),
            is_grpc_call,
            kept,
            _request: PhantomData,
        }
    }
}

pin_project! {
    /// The future of a [`Hedge`]'s call. Dropped, it drops both copies, and pays back a hedge that was not
    /// sent yet.
    pub struct HedgeFuture<S, Req, F, M, K, H> {
        // None: it gave a bad answer, and the hedge is under way.
        #[pin]
        first: Option<Weighed<F, H>>,
        #[pin]
        second: Second<S, F, H>,
        // None: nobody wants to know how long it takes.
        began: Option<Instant>,
        core: Lease<Core<S, Settings>>,
        protocol: M,
        is_grpc_call: bool,
        kept: Option<K>,
        _request: PhantomData<fn(Req)>,
    }
}

pin_project! {
    #[project = SecondProj]
    enum Second<S, F, H> {
        // The first copy has not been waited for yet: no timer.
        Due { at: Instant },
        Delayed { #[pin] delay: Sleep },
        Readying { service: S, withdrawal: Option<Withdrawal> },
        Sent { #[pin] hedge: Weighed<F, H> },
        // It gave a bad answer.
        Lost,
        Never,
        Answered,
    }
}

impl<S, F, H> Second<S, F, H> {
    /// None: there was no hedge.
    fn hedged(&self, won: bool) -> Option<Hedged> {
        matches!(self, Self::Sent { .. } | Self::Lost).then_some(Hedged { won })
    }
}

impl<S, M, Req> Future for HedgeFuture<S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request> + Clone,
    M: Repeat<Req> + Weigh<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let is_grpc_call = *this.is_grpc_call;
        // What the first attempt waits for, while it is in flight.
        let mut first_waits_for = None;
        // The first copy before the timer and before the hedge: what is there already is not hedged.
        if let Some(mut first) = this.first.as_mut().as_pin_mut() {
            WaitsFor::reset();
            let held = first.as_mut().poll_held(&*this.protocol, is_grpc_call, cx);
            first_waits_for = Some(WaitsFor::reported());
            if let Poll::Ready(weight) = held {
                first_waits_for = None;
                if is_good(weight) {
                    this.core.well(this.began.take());
                }
                // Better than whatever the other copy may bring.
                if is_good(weight) || !matches!(*this.second, Second::Sent { .. }) {
                    let held = first.take();
                    let hedged = this.second.hedged(false);
                    this.first.set(None);
                    DropCause::Superseded.during(|| this.second.set(Second::Answered));
                    *this.kept = None;
                    return Poll::Ready(M::pass(held, hedged));
                }
                event!(
                    DEBUG,
                    resilience.name = this.core.settings.name(),
                    outcome = ?weight.1,
                    "waiting for the hedge"
                );
                // With it goes what the hedge may be waiting for: a permit, a connection.
                this.first.set(None);
            }
        }
        loop {
            match this.second.as_mut().project() {
                SecondProj::Due { at } => {
                    let delay = sleep_until(*at);
                    this.second.set(Second::Delayed { delay });
                }
                SecondProj::Delayed { delay } => {
                    ready!(delay.poll(cx));
                    let second = prepare::<S, Req, M>(this.core, this.kept.as_ref());
                    this.second.set(second);
                }
                SecondProj::Readying { service, withdrawal } => {
                    let Poll::Ready(ready) = service.poll_ready(cx) else {
                        report_waits(first_waits_for, Some(WaitsFor::Client));
                        return Poll::Pending;
                    };
                    // The request is needed once more, or never.
                    let (Ok(()), Some(kept)) = (ready, this.kept.take()) else {
                        this.second.set(Second::Never);
                        continue;
                    };
                    if let Some(withdrawal) = withdrawal.take() {
                        withdrawal.spend();
                    }
                    this.core.settings.sent.fetch_add(1, Ordering::Relaxed);
                    event!(
                        DEBUG,
                        resilience.name = this.core.settings.name(),
                        delay_ms = this.core.settings.delay().map(|delay| delay.as_millis() as u64),
                        "hedging"
                    );
                    let hedge = Weighed::new(service.call(M::copy(&kept)));
                    this.second.set(Second::Sent { hedge });
                }
                SecondProj::Sent { mut hedge } => {
                    WaitsFor::reset();
                    let held = hedge.as_mut().poll_held(&*this.protocol, is_grpc_call, cx);
                    let Poll::Ready(weight) = held else {
                        report_waits(first_waits_for, Some(WaitsFor::reported()));
                        return Poll::Pending;
                    };
                    if !is_good(weight) && this.first.is_some() {
                        event!(
                            DEBUG,
                            resilience.name = this.core.settings.name(),
                            outcome = ?weight.1,
                            "the hedge failed"
                        );
                        this.second.set(Second::Lost);
                        continue;
                    }
                    if is_good(weight) {
                        this.core.well(this.began.take());
                    }
                    let held = hedge.take();
                    this.core.settings.won.fetch_add(1, Ordering::Relaxed);
                    DropCause::Superseded.during(|| this.first.set(None));
                    this.second.set(Second::Answered);
                    *this.kept = None;
                    return Poll::Ready(M::pass(held, Some(Hedged { won: true })));
                }
                SecondProj::Lost | SecondProj::Never => {
                    report_waits(first_waits_for, None);
                    return Poll::Pending;
                }
                SecondProj::Answered => unreachable!("polled after completion"),
            }
        }
    }
}

/// Reports to the outer layers what the attempts in flight wait for. A wait for the upstream takes precedence over a
/// wait for the caller or the transport. Both take precedence over a wait inside the client, so that a hedge attempt in
/// a queue does not hide a first attempt that hangs.
fn report_waits(first: Option<WaitsFor>, hedge: Option<WaitsFor>) {
    let rank = |what: &WaitsFor| match what {
        WaitsFor::Upstream => 0,
        WaitsFor::Client => 2,
        _ => 1,
    };
    if let Some(what) = first.into_iter().chain(hedge).min_by_key(rank) {
        what.report();
    }
}

impl<S> Core<S, Settings> {
    /// A good answer.
    fn well(&self, began: Option<Instant>) {
        self.settings.took(began);
        self.answered();
    }
}

/// The delay is over. The body first and the budget last: what cannot be sent is not charged.
fn prepare<S, Req, M>(
    core: &Core<S, Settings>,
    kept: Option<&M::Kept>,
) -> Second<S, S::Future, M::Held>
where
    S: Service<M::Request> + Clone,
    M: Repeat<Req> + Weigh<S::Response, S::Error>,
{
    if !kept.is_some_and(|kept| M::repeatable(kept) == Repeatable::Yes) {
        event!(DEBUG, resilience.name = core.settings.name(), reason = "body", "not hedged");
        return Second::Never;
    }
    if kept.and_then(M::deadline).is_some_and(|deadline| deadline.left().is_zero()) {
        event!(
            DEBUG,
            resilience.name = core.settings.name(),
            reason = "deadline_passed",
            "not hedged"
        );
        return Second::Never;
    }
    let withdrawal = core.budget.as_ref().map(|budget| budget.withdraw());
    if let Some(None) = withdrawal {
        core.settings.denied.fetch_add(1, Ordering::Relaxed);
        event!(
            DEBUG,
            resilience.name = core.settings.name(),
            reason = "budget_used_up",
            "not hedged"
        );
        return Second::Never;
    }
    Second::Readying { service: core.service(), withdrawal: withdrawal.flatten() }
}

impl<S, Req, F, M, K, H> fmt::Debug for HedgeFuture<S, Req, F, M, K, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.second {
            Second::Due { .. } | Second::Delayed { .. } => "HedgeFuture(waiting)",
            Second::Readying { .. } => "HedgeFuture(readying)",
            Second::Sent { .. } => "HedgeFuture(hedged)",
            Second::Lost | Second::Never => "HedgeFuture(unhedged)",
            Second::Answered => "HedgeFuture(answered)",
        })
    }
}
