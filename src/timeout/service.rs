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
    protocol::{TimeRequest, TimeResponse},
    settings::{TimeoutState, Timeouts, drop_by, stalled, timed_out},
    timers::{CallTimers, NextWait},
    upload::{Upload, UploadStage},
};
use crate::{
    admission::Reusable,
    classify::Http,
    fault::LayerName,
    outcome::{LayerKind, Rejected, TimeoutPhase, WaitsFor},
    permit::SlotRef,
    respond::{AsError, Reject},
    time::{CallClock, Deadline, SharedTimer},
};

/// The service of a [`TimeoutLayer`](super::layer::TimeoutLayer).
pub struct Timeout<S, M = Http, R = AsError> {
    inner: S,
    state: Arc<TimeoutState>,
    slot: SlotRef<TimeoutState>,
    by: LayerKind,
    protocol: M,
    reject: R,
    fault: Option<Arc<LayerName>>,
}

impl<S, M, R> Timeout<S, M, R> {
    pub(super) fn new(
        inner: S,
        state: Arc<TimeoutState>,
        slot: SlotRef<TimeoutState>,
        by: LayerKind,
        (protocol, reject): (M, R),
        fault: Option<Arc<LayerName>>,
    ) -> Self {
        Self { inner, state, slot, by, protocol, reject, fault }
    }

    /// Returns a reference to the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, M: Clone, R: Clone> Clone for Timeout<S, M, R> {
    fn clone(&self) -> Self {
        let with = (self.protocol.clone(), self.reject.clone());
        let (state, fault) = (self.state.clone(), self.fault.clone());
        Self::new(self.inner.clone(), state, self.slot, self.by, with, fault)
    }
}

impl<S, M, R> fmt::Debug for Timeout<S, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeout").field("state", &*self.state).finish_non_exhaustive()
    }
}

impl<S, M, R, Req> Service<Req> for Timeout<S, M, R>
where
    M: TimeRequest<Req> + TimeResponse<S::Response>,
    S: Service<M::Request> + Reusable,
    R: Reject<Req, <M as TimeResponse<S::Response>>::Response, S::Error>,
{
    type Response = <M as TimeResponse<S::Response>>::Response;
    type Error = R::Error;
    type Future = TimeoutFuture<S::Future, Req, M, R>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), R::Error>> {
        CallClock::invalidate();
        self.inner.poll_ready(cx).map_err(R::error)
    }

    #[inline]
    fn call(&mut self, request: Req) -> Self::Future {
        self.begin(request, |request| M::settings(request))
    }
}

impl<S, M, R> Timeout<S, M, R> {
    /// Begins a call. `settings` returns the timeouts and the deadline of the request, and may change the request.
    #[inline]
    pub(crate) fn begin<Req>(
        &mut self,
        mut request: Req,
        settings: impl FnOnce(&mut Req) -> (Option<Timeouts>, Option<Deadline>),
    ) -> TimeoutFuture<S::Future, Req, M, R>
    where
        M: TimeRequest<Req> + TimeResponse<S::Response>,
        S: Service<M::Request> + Reusable,
        R: Reject<Req, <M as TimeResponse<S::Response>>::Response, S::Error>,
    {
        let (of_request, deadline) = settings(&mut request);
        let mut timeouts = self.state.timeouts();
        let mut fault = self.fault.clone();
        if let Some(of_request) = of_request {
            timeouts = of_request.or(timeouts);
            if let Err(error) = of_request.check() {
                fault = Some(self.state.call_fault(error));
            }
        }
        let (times, body_rate) = timeouts.into_parts();
        let mut timers = CallTimers::new(times, self.by, self.reject.form(&request), self.slot);
        if let Some(fault) = fault {
            self.state.count_misconfigured();
            let rejected = Rejected::misconfigured(self.by, self.state.name_or_empty(), fault);
            let rejected = self.reject.discard(request, rejected);
            return self.rejected(timers, rejected);
        }
        if deadline.is_some_and(|deadline| !timers.bound(deadline)) {
            let rejected = self.reject.discard(request, self.state.reject(self.by));
            return self.rejected(timers, rejected);
        }
        let mut request = M::convert(request);
        let upload = M::watch(&mut request, &mut timers, body_rate, R::RESPONDS);
        // The inner future is constructed in place, because it is large and a variable would add a copy.
        TimeoutFuture {
            state: TimedCall::Called {
                future: self.inner.call(request),
                timer: SharedTimer::new(),
            },
            waits_for: None,
            upload,
            call: Some((timers, self.reject.clone())),
            of: PhantomData,
        }
    }

    #[cold]
    fn rejected<F, Req>(
        &mut self,
        timers: CallTimers,
        rejected: Rejected,
    ) -> TimeoutFuture<F, Req, M, R>
    where
        S: Clone,
        R: Clone,
    {
        // This instance was polled ready and is not called, so it may hold a reservation. A clone replaces it.
        self.inner = self.inner.clone();
        TimeoutFuture {
            state: TimedCall::Rejected { rejected: Some(rejected) },
            waits_for: None,
            upload: None,
            call: Some((timers, self.reject.clone())),
            of: PhantomData,
        }
    }
}
pin_project! {
    /// The future of a call through a [`Timeout`]. When a timeout expires, it drops the inner future before it returns,
    /// which releases what inner layers hold for the call.
    pub struct TimeoutFuture<F, Req, M, R> {
        #[pin]
        state: TimedCall<F>,
        // The phase whose end the timer is set to, once it can no longer change. Until then each poll determines it.
        waits_for: Option<TimeoutPhase>,
        upload: Option<Arc<Upload>>,
        call: Option<(CallTimers, R)>,
        of: PhantomData<fn(Req, M)>,
    }
}

pin_project! {
    #[project = TimedCallProj]
    enum TimedCall<F> {
        Called { #[pin] future: F, #[pin] timer: SharedTimer },
        Rejected { rejected: Option<Rejected> },
    }
}

impl<F, Req, M, R, Res, E> Future for TimeoutFuture<F, Req, M, R>
where
    F: Future<Output = Result<Res, E>>,
    M: TimeResponse<Res>,
    R: Reject<Req, M::Response, E>,
{
    type Output = Result<M::Response, R::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            // From here on, timers that inner layers arm in this poll are recorded. If one of them is due no later,
            // this layer needs no timer of its own.
            SharedTimer::observe_inner();
            let phase = match this.state.as_mut().project() {
                TimedCallProj::Called { mut future, mut timer } => match future.as_mut().poll(cx) {
                    Poll::Ready(Ok(response)) => {
                        let mut result = Poll::Ready(Ok(M::wrap(response)));
                        record_head(this.upload.as_deref());
                        // The peer reports the deadline as `CANCELLED`. The clock is read only for such a response.
                        let is_late = matches!(
                            (&result, &*this.call),
                            (Poll::Ready(Ok(response)), Some((timers, _)))
                                if timers.has_deadline() && M::is_cancelled(response) && timers.ends_by_deadline()
                        );
                        if !is_late {
                            // The response is large, so it is changed in place.
                            if let (Poll::Ready(Ok(response)), Some((timers, _))) =
                                (&mut result, this.call.take())
                            {
                                M::time(response, timers, this.upload);
                            }
                            return result;
                        }
                        TimeoutPhase::Deadline
                    }
                    Poll::Ready(Err(error)) => {
                        match record_head(this.upload.as_deref()) {
                            // The error is a consequence of the request body, whatever the inner service returns.
                            Some(UploadStage::Stalled) => TimeoutPhase::Sending,
                            Some(UploadStage::TooSlow) => TimeoutPhase::BodyRate,
                            _ => {
                                let error = R::error(error);
                                let ends_by_deadline =
                                    |(timers, _): &(CallTimers, R)| timers.ends_by_deadline();
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
                                let Some((timers, _)) = this.call else {
                                    unreachable!("polled after completion")
                                };
                                match timers.wait(this.upload.as_ref(), cx) {
                                    NextWait::Forever => {
                                        report_wait(this.upload.as_deref());
                                        return Poll::Pending;
                                    }
                                    NextWait::Stalled(phase) => phase,
                                    NextWait::Until { at, phase, is_final } => {
                                        timer.as_mut().arm(at);
                                        *this.waits_for = is_final.then_some(phase);
                                        phase
                                    }
                                }
                            }
                        };
                        report_wait(this.upload.as_deref());
                        if !matches!(phase, TimeoutPhase::Sending | TimeoutPhase::BodyRate) {
                            ready!(timer.poll(&*future, cx));
                        }
                        phase
                    }
                },
                TimedCallProj::Rejected { rejected } => {
                    let (Some(rejected), Some((timers, reject))) =
                        (rejected.take(), this.call.take())
                    else {
                        unreachable!("polled after completion")
                    };
                    return Poll::Ready(reject.reject(timers.form, rejected));
                }
            };
            let Some((timers, _)) = this.call else { unreachable!("polled after completion") };
            let mut rejected = match phase {
                // The body has counted it.
                TimeoutPhase::Sending | TimeoutPhase::BodyRate => {
                    stalled(timers.slot, timers.by, phase)
                }
                phase => {
                    let limit = timers.timeouts.get(phase);
                    timed_out(timers.slot, timers.by, phase, timers.source(), limit)
                }
            };
            if this.upload.as_ref().is_some_and(|upload| upload.time_out()) {
                rejected = rejected.draining();
            }
            // The call ends here. Dropping the inner future releases what inner layers hold for it.
            let rejected = TimedCall::Rejected { rejected: Some(rejected) };
            drop_by(phase, timers.timeouts.get(phase), timers.source(), || {
                this.state.set(rejected)
            });
        }
    }
}

/// Reports to the outer layers what the request body waits for, unless an inner layer has reported another wait than
/// for the upstream. When the request has been sent, its body wakes the call, and the next poll reports again.
fn report_wait(upload: Option<&Upload>) {
    let waits_for = upload.map_or(WaitsFor::Upstream, Upload::waits_for);
    if WaitsFor::reported() == WaitsFor::Upstream {
        waits_for.report();
    }
}

/// Records that the response head or an error has arrived. Returns the stage of the request body after that.
#[inline]
fn record_head(upload: Option<&Upload>) -> Option<UploadStage> {
    let upload = upload?;
    upload.end(UploadStage::HeadFirst);
    Some(upload.stage())
}

impl<F, Req, M, R> fmt::Debug for TimeoutFuture<F, Req, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            TimedCall::Called { .. } => "TimeoutFuture(called)",
            TimedCall::Rejected { .. } => "TimeoutFuture(rejected)",
        })
    }
}
