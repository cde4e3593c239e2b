use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tower_service::Service;

use super::{
    overrides::AttemptContext,
    settings::RetrySettings,
    span::Span,
    state::{Course, Kept, Wait},
};
use crate::{
    attempt::{
        AttemptFuture, AttemptResponse, ClassifyAttempt, Core, GiveUpReason, Head, ReplayRequest,
        RetryAction, classify_by_request, earns_deposit, failed_status, is_good,
    },
    outcome::{
        DropCause, LayerKind, Outcome, Rejected, RejectedKind, TimeoutPhase, WaitsFor, grpc,
    },
    permit::ShardedRef,
    time::{may_have_expired, poll_timer},
};

pin_project! {
    /// The future of a [`Retry`](super::service::Retry)'s call.
    ///
    /// Dropping it drops the attempt in flight. If it is dropped during a delay, the withdrawal for the next attempt is
    /// refunded.
    pub struct RetryFuture<S, Req, F, M, K, H> {
        #[pin]
        pub(super) state: RetryStage<F, H>,
        // The span of the attempt in flight.
        pub(super) span: Span,
        pub(super) core: ShardedRef<Core<S, RetrySettings>>,
        pub(super) protocol: M,
        pub(super) is_grpc_call: bool,
        pub(super) kept: Option<K>,
        // `None` until an attempt has failed.
        pub(super) course: Option<Box<Course<S>>>,
        pub(super) _request: PhantomData<fn(Req)>,
    }
}

pin_project! {
    #[project = RetryStageProj]
    pub(super) enum RetryStage<F, H> {
        // The deadline had passed before the call.
        Unbegun,
        Calling { #[pin] attempt: AttemptFuture<F, H> },
        // The discarded response is drained for a short time.
        Discarding { held: H, #[pin] longest: Sleep, wait: Wait },
        Waiting { #[pin] backoff: Sleep },
        // The service of the next attempt is not ready. `late` is the deadline, if there is one.
        Readying { #[pin] late: Option<Sleep> },
        // A timeout or the deadline has ended the attempt or the call.
        Over,
    }
}

impl<S, M, Req> Future for RetryFuture<S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut made = 0;
        loop {
            let this = self.as_mut().project();
            if let RetryStageProj::Calling { mut attempt } = this.state.project() {
                let until = || until::<S, Req, M>(this.core, this.kept.as_ref());
                let entered = this.span.enter();
                let late = match ready!(attempt.as_mut().poll_head(until, cx)) {
                    Head::Here(result) => {
                        let weight = this.protocol.weigh(*this.is_grpc_call, &result);
                        let plain = this.course.is_none() && !this.core.settings.says();
                        if let Some((_, outcome)) =
                            weight.filter(|&weight| plain && is_good(weight))
                        {
                            if earns_deposit(outcome) {
                                this.core.answered();
                            }
                            this.core.settings.deposit_transparent();
                            return Poll::Ready(M::give(result));
                        }
                        attempt.as_mut().hold(M::hold(result, weight));
                        false
                    }
                    Head::Held => false,
                    Head::Late => true,
                };
                let weight =
                    if late { None } else { Some(ready!(attempt.poll_weigh::<M, _, _>(cx))) };
                drop(entered);
                if let Some(end) = self.as_mut().ended(weight) {
                    return Poll::Ready(end);
                }
            } else if matches!(self.state, RetryStage::Unbegun) {
                return Poll::Ready(self.too_late());
            }
            let Poll::Ready(end) = self.as_mut().poll_between(cx) else {
                WaitsFor::Client.report();
                return Poll::Pending;
            };
            if let Some(end) = end {
                return Poll::Ready(end);
            }
            made += 1;
            if made == MOST_AT_ONCE {
                // Yields to the runtime, so that for example an outer timeout is polled.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }
}

/// The maximum number of attempts within one poll. Attempts that fail at once, with no delay between them, reach it.
const MOST_AT_ONCE: u32 = 16;

/// Returns whether the deadline of the call passes by the instant `then`.
#[inline]
pub(super) fn ends_by<S, Req, M>(kept: Option<&M::Kept>, then: impl FnOnce() -> Instant) -> bool
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    M::TAKES_ERRORS && kept.and_then(M::deadline).is_some_and(|deadline| deadline.at() <= then())
}

/// Returns whether a failed attempt only reports that the deadline has passed. The server or a timer of the client,
/// such as that of a tonic channel on `grpc-timeout`, may expire earlier than the timer of the retry. A rejection stays
/// as it is.
fn reports_deadline<S, Req, M>(held: &M::Held, kept: Option<&M::Kept>) -> bool
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    let Some(deadline) = kept.and_then(M::deadline).filter(|_| M::TAKES_ERRORS) else {
        return false;
    };
    let is_report = match M::answer(held) {
        Some(AttemptResponse::Error(error)) => Rejected::find(error).is_none(),
        Some(AttemptResponse::Head(_, headers, _)) => grpc::is_cancelled(headers),
        _ => false,
    };
    is_report && may_have_expired(deadline.at())
}

/// Returns the instant at which the response head is late: the earlier of the attempt timeout, which starts now, and
/// the deadline.
fn until<S, Req, M>(core: &Core<S, RetrySettings>, kept: Option<&M::Kept>) -> Option<Instant>
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    if !M::TAKES_ERRORS {
        return None;
    }
    let limit = core.settings.attempt_timeout();
    let limit = limit.and_then(|limit| Instant::now().checked_add(limit));
    let deadline = kept.and_then(M::deadline).map(|deadline| deadline.at());
    limit.into_iter().chain(deadline).min()
}

impl<S, M, Req> RetryFuture<S, Req, S::Future, M, M::Kept, M::Held>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    /// Handles the end of an attempt. `weight` is its class and outcome, or `None` if the response head is late.
    ///
    /// Returns the result of the call, or `None` if the response is discarded and a further attempt follows.
    fn ended(
        mut self: Pin<&mut Self>,
        weight: Option<(RetryAction, Outcome)>,
    ) -> Option<Result<M::Response, M::Error>> {
        let mut this = self.as_mut().project();
        let kept = this.kept.as_ref();
        let (held, (mut class, mut outcome)) = match (weight, this.state.as_mut().project()) {
            (Some(weight), RetryStageProj::Calling { attempt }) => {
                let held = attempt.take();
                if reports_deadline::<S, Req, M>(&held, kept) {
                    return Some(self.too_late());
                }
                (held, weight)
            }
            _ if ends_by::<S, Req, M>(kept, Instant::now) => {
                return Some(self.too_late());
            }
            _ => {
                // Marks the drop of the attempt as a timeout. Inner layers would otherwise record it as a hang-up.
                DropCause::TimedOut(this.core.settings.attempt_timeout())
                    .during(|| this.state.set(RetryStage::Over));
                let late = RejectedKind::TimedOut(TimeoutPhase::Head);
                M::failed(Rejected::by(LayerKind::Retry, late).into())?
            }
        };
        this.span.end(outcome);
        let settings = &this.core.settings;
        if outcome.has_response() {
            settings.deposit_transparent();
        }
        let first = this.course.is_none();
        let said = settings.says();
        let alone = |class, outcome: Outcome| {
            let alone = class == RetryAction::Final && first;
            if alone && earns_deposit(outcome) {
                this.core.answered();
            }
            alone
        };
        if !said && alone(class, outcome) {
            return Some(M::release(held, None));
        }
        let policy = settings.policy();
        class = policy.classify_rejection(class, outcome);
        // The server declares that it has not processed the request.
        let mut is_unprocessed = false;
        if let (Some(kept), Some(answer)) = (kept, M::answer(&held)) {
            (class, is_unprocessed) =
                classify_by_request(class, outcome, answer, first, |name: &str| {
                    M::header(kept, name)
                });
            if let (RetryAction::Retryable, true, AttemptResponse::Head(status, headers, _)) =
                (class, outcome.is_success(), answer)
            {
                outcome = failed_status(status, headers);
            }
        }
        let mut vouched = is_unprocessed;
        if said {
            if let (Some(kept), Some(answer)) = (kept, M::answer(&held)) {
                let attempt = this.course.as_ref().map_or(1, |course| course.made());
                let head = || M::head(kept);
                let mut seen = AttemptContext::new(&head, answer, outcome, attempt);
                let by_user;
                (class, by_user) = policy.say.judge(class, &mut seen);
                vouched |= by_user;
                outcome = seen.outcome;
            }
        }
        if alone(class, outcome) {
            return Some(M::release(held, None));
        }
        let course = this.course.get_or_insert_with(Box::default);
        let is_error = M::is_error(&held);
        let known = kept.map(|kept| Kept {
            safe: vouched || M::safe(kept, &policy.safe),
            is_unprocessed,
            is_error,
            body: M::repeatable(kept),
            deadline: M::deadline(kept),
            has_inner_attempts: M::has_inner_attempts(&held),
            is_sent_before: M::is_sent_before(&held),
        });
        let claim = || kept.is_some_and(M::claim);
        match course.next(this.core, &policy, (class, outcome, is_error), known, claim) {
            Ok(wait) => {
                this.state.set(RetryStage::Discarding {
                    held,
                    longest: sleep(wait.drain_time),
                    wait,
                });
                None
            }
            Err(stop) => Some(M::release(held, Some(course.end(settings, stop)))),
        }
    }

    /// Polls the steps between two attempts: the drain, the delay and the readiness of the service.
    ///
    /// Returns `None` when the next attempt is in flight, or the result of the call if it ends here.
    fn poll_between(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<M::Response, M::Error>>> {
        loop {
            let mut this = self.as_mut().project();
            let (Some(course), core) = (this.course.as_mut(), &**this.core) else {
                unreachable!("polled after completion")
            };
            match this.state.as_mut().project() {
                RetryStageProj::Calling { .. } => return Poll::Ready(None),
                RetryStageProj::Discarding { held, longest, wait } => {
                    let cap = wait.drain_cap;
                    if M::poll_discard(held, cap, cx).is_pending() {
                        ready!(poll_timer(longest, cx));
                    }
                    let left = wait.left();
                    // The change of the state drops the rest of the response before the delay, and thereby releases the
                    // permits that inner layers hold for it. A delay that is already over gets no timer, because a
                    // timer takes at least one tick of the runtime.
                    this.state.set(if left.is_zero() {
                        RetryStage::Readying { late: None }
                    } else {
                        RetryStage::Waiting { backoff: sleep(left) }
                    });
                }
                RetryStageProj::Waiting { backoff } => {
                    ready!(backoff.poll(cx));
                    this.state.set(RetryStage::Readying { late: None });
                }
                RetryStageProj::Readying { mut late } => {
                    let Poll::Ready(ready) = course.service(core).poll_ready(cx) else {
                        if late.is_none() && M::TAKES_ERRORS {
                            let deadline = this.kept.as_ref().and_then(M::deadline);
                            late.set(deadline.map(|deadline| sleep_until(deadline.at())));
                        }
                        let Some(late) = late.as_pin_mut() else { return Poll::Pending };
                        ready!(poll_timer(late, cx));
                        return Poll::Ready(Some(self.too_late()));
                    };
                    if let Err(error) = ready {
                        let record = course.end(&core.settings, GiveUpReason::NotReady);
                        return Poll::Ready(Some(Err(M::broken(error, record))));
                    }
                    if ends_by::<S, Req, M>(this.kept.as_ref(), Instant::now) {
                        return Poll::Ready(Some(self.too_late()));
                    }
                    let Some(kept) = this.kept else { unreachable!("saved for every retry") };
                    let attempt = course.begin();
                    core.settings.count_retry();
                    *this.span = Span::further(attempt.number - 1, course.waited());
                    let entered = this.span.enter();
                    let future = course.service(core).call(M::again(kept, attempt));
                    drop(entered);
                    this.state.set(RetryStage::Calling { attempt: AttemptFuture::new(future) });
                }
                RetryStageProj::Unbegun | RetryStageProj::Over => {
                    unreachable!("polled after completion")
                }
            }
        }
    }

    /// Ends the call because its deadline has passed. An attempt in flight is dropped.
    fn too_late(self: Pin<&mut Self>) -> Result<M::Response, M::Error> {
        let mut this = self.project();
        let course = this.course.get_or_insert_with(Box::default);
        let source = this.kept.as_ref().and_then(M::deadline).map(|deadline| deadline.source());
        let rejected = |kind| Rejected::by(LayerKind::Retry, kind);
        let rejected = match this.state.as_mut().project() {
            RetryStageProj::Calling { .. } => {
                let rejected = rejected(RejectedKind::TimedOut(TimeoutPhase::Deadline))
                    .with_deadline_source(source);
                this.span.end(course.cut_short(&rejected));
                rejected
            }
            RetryStageProj::Unbegun => {
                course.not_begun();
                rejected(RejectedKind::DeadlinePassed)
            }
            _ => rejected(RejectedKind::DeadlinePassed),
        };
        match source.and_then(DropCause::of_deadline) {
            Some(cause) => cause.during(|| this.state.set(RetryStage::Over)),
            None => this.state.set(RetryStage::Over),
        }
        let record = course.end(&this.core.settings, GiveUpReason::DeadlinePassed);
        let Some((held, _)) = M::failed(rejected.into()) else {
            unreachable!("only a protocol with TAKES_ERRORS has a deadline")
        };
        M::release(held, Some(record))
    }
}

impl<S, Req, F, M, K, H> fmt::Debug for RetryFuture<S, Req, F, M, K, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = self.course.as_ref().map_or(1, |course| course.made());
        f.debug_struct("RetryFuture").field("attempt", &attempt).finish_non_exhaustive()
    }
}
