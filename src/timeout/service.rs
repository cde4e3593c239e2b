use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    protocol::{Begin, Follow},
    settings::{TimeoutState, Timeouts, drop_by, stalled, timed_out},
    timers::{Next, Watch},
    upload::{Sending, Stage},
};
use crate::{
    admission::Reusable,
    classify::Http,
    fault::LayerName,
    outcome::{LayerKind, Rejected, TimeoutPhase, WaitsFor},
    permit::Far,
    respond::{AsError, Reject},
    time::{CallClock, Deadline, SharedTimer},
};

/// The service of a [`TimeoutLayer`](super::layer::TimeoutLayer).
pub struct Timeout<S, M = Http, R = AsError> {
    inner: S,
    state: Arc<TimeoutState>,
    far: Far<TimeoutState>,
    by: LayerKind,
    protocol: M,
    reject: R,
    fault: Option<Arc<LayerName>>,
}

impl<S, M, R> Timeout<S, M, R> {
    pub(super) fn new(
        inner: S,
        state: Arc<TimeoutState>,
        far: Far<TimeoutState>,
        by: LayerKind,
        (protocol, reject): (M, R),
        fault: Option<Arc<LayerName>>,
    ) -> Self {
        Self { inner, state, far, by, protocol, reject, fault }
    }

    /// Returns a reference to the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S: Clone, M: Clone, R: Clone> Clone for Timeout<S, M, R> {
    fn clone(&self) -> Self {
        let with = (self.protocol.clone(), self.reject.clone());
        let (state, fault) = (self.state.clone(), self.fault.clone());
        Self::new(self.inner.clone(), state, self.far, self.by, with, fault)
    }
}

impl<S, M, R> fmt::Debug for Timeout<S, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeout").field("state", &*self.state).finish_non_exhaustive()
    }
}

impl<S, M, R, Req> Service<Req> for Timeout<S, M, R>
where
    M: Begin<Req> + Follow<S::Response>,
    S: Service<M::Request> + Reusable,
    R: Reject<Req, <M as Follow<S::Response>>::Response, S::Error>,
{
    type Response = <M as Follow<S::Response>>::Response;
    type Error = R::Error;
    type Future = TimeoutFuture<S::Future, Req, M, R>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), R::Error>> {
        CallClock::anew();
        self.inner.poll_ready(cx).map_err(R::error)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        self.begin(request, |request| M::said(request))
    }
}

impl<S, M, R> Timeout<S, M, R> {
    /// Begins a call. `said` returns the timeouts and the deadline of the request, and may change the request.
    #[inline]
    pub(crate) fn begin<Req>(
        &mut self,
        mut request: Req,
        said: impl FnOnce(&mut Req) -> (Option<Timeouts>, Option<Deadline>),
    ) -> TimeoutFuture<S::Future, Req, M, R>
    where
        M: Begin<Req> + Follow<S::Response>,
        S: Service<M::Request> + Reusable,
        R: Reject<Req, <M as Follow<S::Response>>::Response, S::Error>,
    {
        let (said, deadline) = said(&mut request);
        let mut timeouts = self.state.timeouts();
        let mut fault = self.fault.clone();
        if let Some(said) = said {
            timeouts = said.or(timeouts);
            if let Err(error) = said.check() {
                fault = Some(self.state.call_fault(error));
            }
        }
        let (times, body_rate) = timeouts.into_parts();
        let mut watch = Watch::new(times, self.by, self.reject.form(&request), self.far);
        if let Some(fault) = fault {
            let rejected = Rejected::misconfigured(self.by, fault);
            let rejected = self.reject.discard(request, rejected);
            return self.refused(watch, rejected);
        }
        if deadline.is_some_and(|deadline| !watch.bound(deadline)) {
            let rejected = self.reject.discard(request, self.state.refuse(self.by));
            return self.refused(watch, rejected);
        }
        let mut request = M::pass(request);
        let sending = M::watch(&mut request, &mut watch, body_rate, R::ANSWERS);
        // The inner future is constructed in place, because it is large and a variable would add a copy.
        TimeoutFuture {
            state: Stand::Called { future: self.inner.call(request), alarm: SharedTimer::new() },
            waits_for: None,
            sending,
            call: Some((watch, self.reject.clone())),
            of: PhantomData,
        }
    }

    #[cold]
    fn refused<F, Req>(&mut self, watch: Watch, rejected: Rejected) -> TimeoutFuture<F, Req, M, R>
    where
        S: Clone,
        R: Clone,
    {
        // This instance was polled ready and is not called, so it may hold a reservation. A clone replaces it.
        self.inner = self.inner.clone();
        TimeoutFuture {
            state: Stand::Refused { rejected: Some(rejected) },
            waits_for: None,
            sending: None,
            call: Some((watch, self.reject.clone())),
            of: PhantomData,
        }
    }
}
pin_project! {
    /// The future of a call through a [`Timeout`]. When a timeout expires, it drops the inner future before it returns,
    /// which releases what inner layers hold for the call.
    pub struct TimeoutFuture<F, Req, M, R> {
        #[pin]
        state: Stand<F>,
        // The phase whose end the alarm is set to, once it can no longer change. Until then each poll determines it
        // anew.
        waits_for: Option<TimeoutPhase>,
        sending: Option<Arc<Sending>>,
        call: Option<(Watch, R)>,
        of: PhantomData<fn(Req, M)>,
    }
}

pin_project! {
    #[project = StandProj]
    enum Stand<F> {
        Called { #[pin] future: F, #[pin] alarm: SharedTimer },
        Refused { rejected: Option<Rejected> },
    }
}

impl<F, Req, M, R, Res, E> Future for TimeoutFuture<F, Req, M, R>
where
    F: Future<Output = Result<Res, E>>,
    M: Follow<Res>,
    R: Reject<Req, M::Response, E>,
{
    type Output = Result<M::Response, R::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            // From here on, alarms that inner layers set in this poll are recorded. If one of them is due no later,
            // this layer needs no timer of its own.
            SharedTimer::listen();
            let phase = match this.state.as_mut().project() {
                StandProj::Called { mut future, mut alarm } => match future.as_mut().poll(cx) {
                    Poll::Ready(Ok(response)) => {
                        let mut answer = Poll::Ready(Ok(M::wrap(response)));
                        answered(this.sending.as_deref());
                        // The peer reports the deadline as `CANCELLED`. The clock is read only for such a response.
                        let is_late = matches!(
                            (&answer, &*this.call),
                            (Poll::Ready(Ok(response)), Some((watch, _)))
                                if watch.has_deadline() && M::is_cancelled(response) && watch.ends_by_deadline()
                        );
                        if !is_late {
                            // The response is large, so it is changed in place.
                            if let (Poll::Ready(Ok(response)), Some((watch, _))) =
                                (&mut answer, this.call.take())
                            {
                                M::time(response, watch, this.sending);
                            }
                            return answer;
                        }
                        TimeoutPhase::Deadline
                    }
                    Poll::Ready(Err(error)) => {
                        match answered(this.sending.as_deref()) {
                            // The error is a consequence of the request body, whatever the inner service returns.
                            Some(Stage::Stalled) => TimeoutPhase::Sending,
                            Some(Stage::TooSlow) => TimeoutPhase::BodyRate,
                            _ => {
                                let error = R::error(error);
                                let ends_by_deadline =
                                    |(watch, _): &(Watch, R)| watch.ends_by_deadline();
                                // The client or an inner retry may end the call by the same deadline earlier. A
                                // rejection that is an error stays as it is.
                                let is_late = !R::is_rejection(&error)
                                    && this.call.as_ref().is_some_and(ends_by_deadline);
                                if !is_late {
                                    return Poll::Ready(Err(error));
                                }
                                TimeoutPhase::Deadline
                            }
                        }
                    }
                    Poll::Pending => {
                        let phase = match *this.waits_for {
                            Some(phase) => phase,
                            None => {
                                let Some((watch, _)) = this.call else {
                                    unreachable!("polled after completion")
                                };
                                match watch.wait(this.sending.as_ref(), cx) {
                                    Next::Forever => {
                                        report_wait(this.sending.as_deref());
                                        return Poll::Pending;
                                    }
                                    Next::Stalled(phase) => phase,
                                    Next::Until { at, phase, is_final } => {
                                        alarm.as_mut().set(at);
                                        *this.waits_for = is_final.then_some(phase);
                                        phase
                                    }
                                }
                            }
                        };
                        report_wait(this.sending.as_deref());
                        if !matches!(phase, TimeoutPhase::Sending | TimeoutPhase::BodyRate) {
                            ready!(alarm.poll(&*future, cx));
                        }
                        phase
                    }
                },
                StandProj::Refused { rejected } => {
                    let (Some(rejected), Some((watch, reject))) =
                        (rejected.take(), this.call.take())
                    else {
                        unreachable!("polled after completion")
                    };
                    return Poll::Ready(reject.refuse(watch.form, rejected));
                }
            };
            let Some((watch, _)) = this.call else { unreachable!("polled after completion") };
            let mut rejected = match phase {
                // The body has counted it.
                TimeoutPhase::Sending | TimeoutPhase::BodyRate => {
                    stalled(watch.far, watch.by, phase)
                }
                phase => timed_out(watch.far, watch.by, phase, watch.source()),
            };
            if this.sending.as_ref().is_some_and(|sending| sending.time_out()) {
                rejected = rejected.draining();
            }
            // The call ends here. Dropping the inner future releases what inner layers hold for it.
            let rejected = Stand::Refused { rejected: Some(rejected) };
            drop_by(phase, watch.timeouts.get(phase), watch.source(), || this.state.set(rejected));
        }
    }
}

/// Reports to the outer layers what the request body waits for, unless an inner layer has reported another wait than
/// for the upstream. When the request has been sent, its body wakes the call, and the next poll reports again.
fn report_wait(sending: Option<&Sending>) {
    let waits_for = sending.map_or(WaitsFor::Upstream, Sending::waits_for);
    if WaitsFor::reported() == WaitsFor::Upstream {
        waits_for.report();
    }
}

/// Records that the response head or an error has arrived. Returns the stage of the request body after that.
#[inline]
fn answered(sending: Option<&Sending>) -> Option<Stage> {
    let sending = sending?;
    sending.end(Stage::Answered);
    Some(sending.stage())
}

impl<F, Req, M, R> fmt::Debug for TimeoutFuture<F, Req, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            Stand::Called { .. } => "ResponseFuture(called)",
            Stand::Refused { .. } => "ResponseFuture(refused)",
        })
    }
}
