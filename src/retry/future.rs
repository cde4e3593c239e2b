use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tower_service::Service;

use super::{
    overrides::AttemptContext,
    settings::RetrySettings,
    state::{EndedAttempt, RetryDelay, RetryState},
};
use crate::{
    attempt::{
        AttemptFuture, AttemptResponse, AttemptSpan, ClassifyAttempt, Core, FurtherAttempt,
        GiveUpReason, PolledHead, ReplayRequest, RetryAction, SavedCall, classify_by_request,
        earns_deposit, failed_status, is_good,
    },
    event::{event, ms},
    outcome::{
        DropCause, LayerKind, Outcome, Rejected, RejectedKind, TimeoutPhase, WaitsFor, grpc,
        report_rejection,
    },
    permit::ShardedRef,
    time::{Deadline, may_have_expired, poll_timer},
};

pin_project! {
    /// The future of a [`Retry`](super::service::Retry)'s call.
    ///
    /// `F` is the future of the wrapped service, `P` a response that has not been returned yet, and `C` the
    /// [saved request](crate::attempt::SavedCall).
    ///
    /// Dropping it drops the attempt in flight. If it is dropped during a delay, the withdrawal for the next attempt is
    /// refunded.
    pub struct RetryFuture<S, F, P, C> {
        #[pin]
        pub(super) stage: RetryStage<F, P>,
        // The span of the attempt in flight.
        pub(super) span: AttemptSpan,
        pub(super) core: ShardedRef<Core<S, RetrySettings>>,
        pub(super) call: C,
        // `None` until an attempt has failed.
        pub(super) state: Option<Box<RetryState<S>>>,
    }
}

pin_project! {
    #[project = RetryStageProj]
    pub(super) enum RetryStage<F, P> {
        // The deadline had passed before the call.
        Expired,
        Calling { #[pin] attempt: AttemptFuture<F, P> },
        // The discarded response is drained for a short time.
        Draining { pending: P, #[pin] timeout: Sleep, delay: RetryDelay },
        Delaying { #[pin] delay: Sleep },
        // The service of the next attempt is not ready. The timer is that of the deadline, if there is one.
        Readying { #[pin] deadline: Option<Sleep> },
        // A timeout or the deadline has ended the attempt or the call.
        Ended,
    }
}

/// The maximum number of attempts within one poll. Attempts that fail at once, with no delay between them, reach it.
const MAX_ATTEMPTS_PER_POLL: u32 = 16;

impl<S, M, Req> Future for RetryFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    type Output = Result<M::Response, M::Error>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut attempts = 0;
        loop {
            let this = self.as_mut().project();
            if let RetryStageProj::Calling { mut attempt } = this.stage.project() {
                let until = || Self::max_head_time(&this.core.settings, this.call);
                let entered = this.span.enter();
                let is_timed_out = match ready!(attempt.as_mut().poll_head(until, cx)) {
                    PolledHead::Available(result) => {
                        let classified = this.call.protocol.classify(this.call.is_grpc, &result);
                        let is_plain = this.state.is_none() && !this.core.settings.has_overrides();
                        if let Some((_, outcome)) =
                            classified.filter(|&classified| is_plain && is_good(classified))
                        {
                            if earns_deposit(outcome) {
                                this.core.deposit_first();
                            }
                            this.core.settings.deposit_transparent();
                            drop(entered);
                            this.span.end(outcome);
                            return Poll::Ready(M::return_first(result));
                        }
                        attempt.as_mut().store(M::pending(result, classified));
                        false
                    }
                    PolledHead::Stored => false,
                    PolledHead::TimedOut => true,
                };
                let classified = match is_timed_out {
                    true => None,
                    false => Some(ready!(attempt.poll_classify::<M, _, _>(cx))),
                };
                drop(entered);
                if let Some(end) = self.as_mut().end_attempt(classified) {
                    return Poll::Ready(end);
                }
            } else if matches!(self.stage, RetryStage::Expired) {
                return Poll::Ready(self.end_at_deadline());
            }
            let Poll::Ready(end) = self.as_mut().poll_between(cx) else {
                WaitsFor::Client.report();
                return Poll::Pending;
            };
            if let Some(end) = end {
                return Poll::Ready(end);
            }
            attempts += 1;
            if attempts == MAX_ATTEMPTS_PER_POLL {
                // Yields to the runtime, so that for example an outer timeout is polled.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }
}

/// The deadline and the timeouts of a call.
impl<S, M, Req> RetryFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>
where
    S: Service<M::Request>,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    /// Returns the deadline of the call. `None` if the protocol has no error for it.
    #[inline]
    fn deadline(saved: Option<&M::Saved>) -> Option<Deadline> {
        if M::ACCEPTS_ERRORS { saved.and_then(M::deadline) } else { None }
    }

    /// Returns whether the deadline of the call passes by the instant `then`.
    #[inline]
    pub(super) fn expires_by(saved: Option<&M::Saved>, then: impl FnOnce() -> Instant) -> bool {
        Self::deadline(saved).is_some_and(|deadline| deadline.at() <= then())
    }

    /// Returns the instant at which the time for the response head has passed: the earlier of the attempt timeout,
    /// which starts now, and the deadline.
    fn max_head_time(
        settings: &RetrySettings,
        call: &SavedCall<Req, M, M::Saved>,
    ) -> Option<Instant> {
        if !M::ACCEPTS_ERRORS {
            return None;
        }
        let timeout = settings.attempt_timeout();
        let timeout = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let deadline = call.deadline().map(|deadline| deadline.at());
        timeout.into_iter().chain(deadline).min()
    }

    /// Returns whether a failed attempt only reports that the deadline has passed. The server or a timer of the client,
    /// such as that of a tonic channel on `grpc-timeout`, may expire earlier than the timer of the retry. A rejection
    /// stays as it is.
    fn reports_deadline(pending: &M::Pending, call: &SavedCall<Req, M, M::Saved>) -> bool {
        let Some(deadline) = Self::deadline(call.saved.as_ref()) else { return false };
        let is_report = match M::response(pending) {
            Some(AttemptResponse::Error(error)) => Rejected::find(error).is_none(),
            Some(AttemptResponse::Head(_, headers, _)) => grpc::is_cancelled(headers),
            None => false,
        };
        is_report && may_have_expired(deadline.at())
    }
}

impl<S, M, Req> RetryFuture<S, S::Future, M::Pending, SavedCall<Req, M, M::Saved>>
where
    S: Service<M::Request> + Clone,
    M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
{
    /// Handles the end of an attempt. `classified` is its class and outcome, or `None` if the time for the
    /// response head has passed.
    ///
    /// Returns the result of the call, or `None` if the response is discarded and a further attempt follows.
    fn end_attempt(
        mut self: Pin<&mut Self>,
        classified: Option<(RetryAction, Outcome)>,
    ) -> Option<Result<M::Response, M::Error>> {
        let mut this = self.as_mut().project();
        let saved = this.call.saved.as_ref();
        let (pending, (mut class, mut outcome)) = match (classified, this.stage.as_mut().project())
        {
            (Some(classified), RetryStageProj::Calling { attempt }) => {
                let pending = attempt.take_pending();
                if Self::reports_deadline(&pending, this.call) {
                    return Some(self.end_at_deadline());
                }
                (pending, classified)
            }
            _ if Self::expires_by(this.call.saved.as_ref(), Instant::now) => {
                return Some(self.end_at_deadline());
            }
            _ => {
                // Marks the drop of the attempt as a timeout. Inner layers would otherwise record it as a hang-up.
                let limit = this.core.settings.attempt_timeout();
                report_timeout(&this.core.settings, TimeoutPhase::Head, limit);
                DropCause::TimedOut(limit).during(|| this.stage.set(RetryStage::Ended));
                let timed_out = RejectedKind::TimedOut(TimeoutPhase::Head);
                M::pending_error(Rejected::by(LayerKind::Retry, timed_out).into())?
            }
        };
        this.span.end(outcome);
        let settings = &this.core.settings;
        if outcome.has_response() {
            settings.deposit_transparent();
        }
        let is_first = this.state.is_none();
        let has_overrides = settings.has_overrides();
        let ends_first = |class, outcome: Outcome| {
            let ends_first = class == RetryAction::Done && is_first;
            if ends_first && earns_deposit(outcome) {
                this.core.deposit_first();
            }
            ends_first
        };
        if !has_overrides && ends_first(class, outcome) {
            settings.record_end_of_first(M::is_error(&pending));
            return Some(M::return_recorded(pending, None));
        }
        let policy = settings.policy();
        class = policy.classify_rejection(class, outcome);
        // The server declares that it has not processed the request.
        let mut is_unprocessed = false;
        if let (Some(saved), Some(response)) = (saved, M::response(&pending)) {
            (class, is_unprocessed) =
                classify_by_request(class, outcome, response, is_first, |name: &str| {
                    M::header(saved, name)
                });
            if let (RetryAction::Retry, true, AttemptResponse::Head(status, headers, _)) =
                (class, outcome.is_success(), response)
            {
                outcome = failed_status(status, headers);
            }
        }
        let mut is_declared_safe = is_unprocessed;
        if has_overrides {
            if let (Some(saved), Some(response)) = (saved, M::response(&pending)) {
                let attempt = this.state.as_ref().map_or(1, |state| state.made());
                let head = || M::head(saved);
                let mut context = AttemptContext::new(&head, response, outcome, attempt);
                let by_user;
                (class, by_user) = policy.overrides.apply(class, &mut context);
                is_declared_safe |= by_user;
                outcome = context.outcome;
            }
        }
        if ends_first(class, outcome) {
            settings.record_end_of_first(M::is_error(&pending));
            return Some(M::return_recorded(pending, None));
        }
        let state = this.state.get_or_insert_with(Box::default);
        let is_error = M::is_error(&pending);
        let ended = saved.map(|saved| EndedAttempt {
            is_safe: is_declared_safe || M::is_safe(saved, &policy.safe_requests),
            is_unprocessed,
            is_error,
            body: M::body_replay(saved),
            deadline: M::deadline(saved),
            has_inner_attempts: M::has_inner_attempts(&pending),
            is_sent_before: M::is_sent_before(&pending),
        });
        let take_over = || saved.is_some_and(M::take_over);
        match state.plan_retry(this.core, &policy, (class, outcome, is_error), ended, take_over) {
            Ok(delay) => {
                this.stage.set(RetryStage::Draining {
                    pending,
                    timeout: sleep(delay.max_drain_time),
                    delay,
                });
                None
            }
            Err(stop) => Some(M::return_recorded(pending, Some(state.give_up(settings, stop)))),
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
            let (Some(state), core) = (this.state.as_mut(), &**this.core) else {
                unreachable!("polled after completion")
            };
            match this.stage.as_mut().project() {
                RetryStageProj::Calling { .. } => return Poll::Ready(None),
                RetryStageProj::Draining { pending, timeout, delay } => {
                    let cap = delay.max_drain_bytes;
                    if M::poll_discard(pending, cap, cx).is_pending() {
                        ready!(poll_timer(timeout, cx));
                    }
                    let left = delay.left();
                    // The change of the state drops the rest of the response before the delay, and thereby releases the
                    // permits that inner layers hold for it. A delay that is already over gets no timer, because a
                    // timer takes at least one tick of the runtime.
                    this.stage.set(if left.is_zero() {
                        RetryStage::Readying { deadline: None }
                    } else {
                        RetryStage::Delaying { delay: sleep(left) }
                    });
                }
                RetryStageProj::Delaying { delay } => {
                    ready!(delay.poll(cx));
                    this.stage.set(RetryStage::Readying { deadline: None });
                }
                RetryStageProj::Readying { mut deadline } => {
                    let Poll::Ready(ready) = state.service(core).poll_ready(cx) else {
                        if deadline.is_none() {
                            let at = Self::deadline(this.call.saved.as_ref())
                                .map(|deadline| deadline.at());
                            deadline.set(at.map(sleep_until));
                        }
                        let Some(deadline) = deadline.as_pin_mut() else { return Poll::Pending };
                        ready!(poll_timer(deadline, cx));
                        return Poll::Ready(Some(self.end_at_deadline()));
                    };
                    if let Err(error) = ready {
                        let record = state.give_up(&core.settings, GiveUpReason::NotReady);
                        return Poll::Ready(Some(Err(M::readiness_error(error, record))));
                    }
                    if Self::expires_by(this.call.saved.as_ref(), Instant::now) {
                        return Poll::Ready(Some(self.end_at_deadline()));
                    }
                    let Some(saved) = &this.call.saved else {
                        unreachable!("saved for every retry")
                    };
                    let attempt = state.begin_attempt(&core.settings);
                    let further = FurtherAttempt {
                        resend_count: attempt.number - 1,
                        delay: Some(state.delay()),
                    };
                    let name = core.settings.name.as_str();
                    *this.span = AttemptSpan::further(LayerKind::Retry, name, further);
                    let entered = this.span.enter();
                    let future = state.service(core).call(M::replay(saved, attempt));
                    drop(entered);
                    this.stage.set(RetryStage::Calling { attempt: AttemptFuture::new(future) });
                }
                RetryStageProj::Expired | RetryStageProj::Ended => {
                    unreachable!("polled after completion")
                }
            }
        }
    }

    /// Ends the call because its deadline has passed. An attempt in flight is dropped.
    fn end_at_deadline(self: Pin<&mut Self>) -> Result<M::Response, M::Error> {
        let mut this = self.project();
        let state = this.state.get_or_insert_with(Box::default);
        let source = this.call.deadline().map(|deadline| deadline.source());
        let rejected = |kind| Rejected::by(LayerKind::Retry, kind);
        let rejected = match this.stage.as_mut().project() {
            RetryStageProj::Calling { .. } => {
                let rejected = rejected(RejectedKind::TimedOut(TimeoutPhase::Deadline))
                    .with_deadline_source(source);
                report_timeout(&this.core.settings, TimeoutPhase::Deadline, None);
                this.span.end(state.record_rejected(&rejected));
                rejected
            }
            RetryStageProj::Expired => {
                state.record_no_attempt();
                let (layer, name) = (LayerKind::Retry, this.core.settings.name.as_str());
                report_rejection(layer, name, RejectedKind::DeadlinePassed, None, false);
                rejected(RejectedKind::DeadlinePassed)
            }
            _ => rejected(RejectedKind::DeadlinePassed),
        };
        match source.and_then(DropCause::of_deadline) {
            Some(cause) => cause.during(|| this.stage.set(RetryStage::Ended)),
            None => this.stage.set(RetryStage::Ended),
        }
        let record = state.give_up(&this.core.settings, GiveUpReason::DeadlinePassed);
        let Some((pending, _)) = M::pending_error(rejected.into()) else {
            unreachable!("only a protocol that accepts errors has a deadline")
        };
        M::return_recorded(pending, Some(record))
    }
}

/// Emits the event of an attempt that the attempt timeout or the deadline ends.
fn report_timeout(settings: &RetrySettings, phase: TimeoutPhase, after: Option<Duration>) {
    event!(
        retry,
        DEBUG,
        LayerKind::Retry.as_str(),
        settings.name.as_str(),
        phase = phase.as_str(),
        after_ms = after.map(ms),
        "timed out",
    );
}

impl<S, F, P, C> fmt::Debug for RetryFuture<S, F, P, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let attempt = self.state.as_ref().map_or(1, |state| state.made());
        f.debug_struct("RetryFuture").field("attempt", &attempt).finish_non_exhaustive()
    }
}
