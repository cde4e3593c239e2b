use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep_until};
use tower_service::Service;

use super::{Admit, Policy, Terms, closed::ClosedWatch};
use crate::outcome::HealthCall;
use crate::{
    classify::Protocol,
    outcome::{CallerDeadline, Rejected, SentMark, WaitsFor},
    permit::{Permit, StateRef},
    respond::{Reject, ResponseFormat},
    time::{Deadline, poll_timer},
};

pin_project! {
    /// The future of an admission layer's call.
    ///
    /// Dropping it at any point releases the permit, or leaves the queue.
    pub(crate) struct AdmissionFuture<S, Req, F, C, P, M, R>
    where
        P: Policy<Req>,
    {
        #[pin]
        state: CallState<S, Req, F, C, P, M>,
        // The form of the response to a rejected call.
        form: Option<ResponseFormat>,
        reject: Option<R>,
    }

    impl<S, Req, F, C, P: Policy<Req>, M, R> PinnedDrop for AdmissionFuture<S, Req, F, C, P, M, R> {
        fn drop(this: Pin<&mut Self>) {
            // The clock is set before the inner future is dropped, because the drop of the request body changes the
            // mark.
            if let CallStateProj::Called { permit, mark, .. } = this.project().state.project() {
                if permit.state().is_some() {
                    set_clock(permit, mark);
                } else if let Some(mark) = mark.take() {
                    // The measuring permit reads the mark after that drop.
                    mark.freeze();
                }
            }
        }
    }
}

pin_project! {
    #[project = CallStateProj]
    pub(super) enum CallState<S, Req, F, C, P, M>
    where
        P: Policy<Req>,
    {
        // Declared before the permit, so that the inner future is dropped before the permit is released.
        Called {
            #[pin]
            future: F,
            permit: Permit<P::StateRef>,
            call: Option<C>,
            // Sets the permit's clock at the end of the call.
            mark: Option<SentMark>,
        },
        Queued { queued: Pin<Box<QueuedCall<S, Req, P, M>>> },
        Rejected { rejected: Option<Rejected> },
    }
}

impl<S, Req, F, C, P: Policy<Req>, M> CallState<S, Req, F, C, P, M> {
    #[inline]
    pub(super) fn called(
        future: F,
        permit: Permit<P::StateRef>,
        call: C,
        mark: Option<SentMark>,
    ) -> Self {
        Self::Called { future, permit, call: Some(call), mark }
    }

    pub(super) fn queued(queued: QueuedCall<S, Req, P, M>) -> Self {
        Self::Queued { queued: Box::pin(queued) }
    }

    pub(super) fn rejected(rejected: Rejected) -> Self {
        Self::Rejected { rejected: Some(rejected) }
    }
}

impl<S, Req, F, C, P: Policy<Req>, M, R> AdmissionFuture<S, Req, F, C, P, M, R> {
    #[inline]
    pub(super) fn new(
        state: CallState<S, Req, F, C, P, M>,
        form: Option<ResponseFormat>,
        reject: R,
    ) -> Self {
        Self { state, form, reject: Some(reject) }
    }
}

impl<S, Req, P, M, R> Future for AdmissionFuture<S, Req, S::Future, M::Call, P, M, R>
where
    S: Service<Req>,
    P: Policy<Req>,
    M: Protocol<Req, S::Response, S::Error>,
    R: Reject<Req, M::Response, S::Error>,
{
    type Output = Result<M::Response, R::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                CallStateProj::Called { future, permit, call, mark } => {
                    WaitsFor::reset();
                    let polled = match measuring_permit::<S, Req, M>(call) {
                        Some(permit) => permit.guard(|| future.poll(cx)),
                        None => permit.guard(|| future.poll(cx)),
                    };
                    let mut response = match polled {
                        Poll::Ready(Ok(response)) => Poll::Ready(Ok(M::wrap(response))),
                        Poll::Ready(Err(error)) => {
                            let what = WaitsFor::reported();
                            match measuring_permit::<S, Req, M>(call) {
                                Some(permit) => permit.record_wait(what),
                                None => permit.record_wait(what),
                            }
                            set_clock(permit, mark);
                            M::classify(taken(call), Err(&error), permit);
                            return Poll::Ready(Err(R::error(error)));
                        }
                        Poll::Pending => {
                            let what = WaitsFor::reported();
                            match measuring_permit::<S, Req, M>(call) {
                                Some(permit) => permit.pending(what),
                                None => permit.pending(what),
                            }
                            return Poll::Pending;
                        }
                    };
                    // Classified in place: moving the response once more would copy it.
                    if let Poll::Ready(Ok(response)) = &mut response {
                        set_clock(permit, mark);
                        M::classify(taken(call), Ok(response), permit);
                    }
                    return response;
                }
                CallStateProj::Queued { queued } => {
                    let Poll::Ready(step) = queued.as_mut().poll(cx) else {
                        WaitsFor::Client.report();
                        return Poll::Pending;
                    };
                    let next = match step {
                        Ok((future, permit, call, mark)) => {
                            CallState::called(future, permit, call, mark)
                        }
                        Err(StepEnd::Rejected(mut rejected)) => {
                            let request = queued.as_mut().project().request.take();
                            if let Some((request, reject)) = request.zip(this.reject.as_ref()) {
                                *this.form = Some(reject.form(&request));
                                rejected = reject.discard(request, rejected);
                            }
                            CallState::rejected(rejected)
                        }
                        Err(StepEnd::Inner(error)) => return Poll::Ready(Err(R::error(error))),
                    };
                    this.state.set(next);
                }
                CallStateProj::Rejected { rejected } => {
                    let (Some(rejected), Some(form), Some(reject)) =
                        (rejected.take(), *this.form, this.reject.take())
                    else {
                        unreachable!("polled after completion")
                    };
                    return Poll::Ready(reject.reject(form, rejected));
                }
            }
        }
    }
}

/// Returns the measuring permit, if the protocol has lent the permit of the admission to the handler.
#[inline]
fn measuring_permit<S, Req, M>(call: &mut Option<M::Call>) -> Option<&mut Permit>
where
    S: Service<Req>,
    M: Protocol<Req, S::Response, S::Error>,
{
    call.as_mut().and_then(M::measuring_permit)
}

/// Starts the clock readings of the mark, and returns it.
#[inline]
pub(super) fn measured(mark: Option<SentMark>) -> Option<SentMark> {
    if let Some(mark) = &mark {
        mark.measure();
    }
    mark
}

#[inline]
fn set_clock<G: StateRef>(permit: &mut Permit<G>, mark: &mut Option<SentMark>) {
    if let Some(mark) = mark.take() {
        permit.set_clock(&mark);
    }
}

#[inline]
fn taken<C>(call: &mut Option<C>) -> C {
    call.take().unwrap_or_else(|| unreachable!("polled after completion"))
}

impl<S, Req, F, C, P: Policy<Req>, M, R> fmt::Debug for AdmissionFuture<S, Req, F, C, P, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            CallState::Called { .. } => "AdmissionFuture(called)",
            CallState::Queued { .. } => "AdmissionFuture(queued)",
            CallState::Rejected { .. } => "AdmissionFuture(rejected)",
        })
    }
}

// ===== The terms of a request =====

/// The [`Terms`] of a request, as its protocol reads them.
pub(super) struct RequestTerms<'a, Req, M, Res, E> {
    request: &'a Req,
    protocol: &'a M,
    of: PhantomData<fn(Res, E)>,
}

impl<'a, Req, M, Res, E> RequestTerms<'a, Req, M, Res, E> {
    #[inline]
    pub(super) fn new(request: &'a Req, protocol: &'a M) -> Self {
        Self { request, protocol, of: PhantomData }
    }
}

impl<Req, M: Protocol<Req, Res, E>, Res, E> Terms for RequestTerms<'_, Req, M, Res, E> {
    #[inline]
    fn deadline(&self) -> Option<Deadline> {
        self.protocol.deadline(self.request)
    }

    #[inline]
    fn sent_mark(&self) -> Option<SentMark> {
        self.protocol.sent_mark(self.request)
    }

    #[inline]
    fn health_call(&self) -> Option<HealthCall> {
        self.protocol.health_call(self.request)
    }
}

// ===== A call that waits for its permit or for the inner service =====

/// Marks the call of a permit as waiting inside the client: the upstream does not have the request yet.
fn queued<G: StateRef>(mut permit: Permit<G>) -> Permit<G> {
    permit.pending(WaitsFor::Client);
    permit
}

pin_project! {
    /// A call that waits. It polls its own clone of the service. Boxed, so that only calls that wait have its cost.
    ///
    /// It first waits for its permit, then for the inner service. If the policy starts to reject calls during the
    /// second wait, the permit is released and the policy decides again.
    pub(super) struct QueuedCall<S, Req, P, M>
    where
        P: Policy<Req>,
    {
        wait: Option<Pin<Box<P::Wait>>>,
        permit: Option<Permit<P::StateRef>>,
        request: Option<Req>,
        service: S,
        policy: P,
        protocol: M,
        closed_signal: ClosedWatch,
        expiry: Expiry,
    }
}

/// The deadline of a call that waits for the inner service.
enum Expiry {
    /// The deadline has not been read yet.
    Unset,
    At(Pin<Box<Sleep>>),
    /// There is no deadline, or it has passed and the policy does not reject the call.
    Never,
}

pub(super) enum StepEnd<E> {
    Rejected(Rejected),
    Inner(E),
}

/// The inner call with its permit, or the reason for which it is not made.
type CallStep<S, Req, P, M> = Result<Called<S, Req, P, M>, StepEnd<<S as Service<Req>>::Error>>;

type Called<S, Req, P, M> = (
    <S as Service<Req>>::Future,
    Permit<<P as Policy<Req>>::StateRef>,
    <M as Protocol<Req, <S as Service<Req>>::Response, <S as Service<Req>>::Error>>::Call,
    Option<SentMark>,
);

impl<S, Req, P: Policy<Req>, M> QueuedCall<S, Req, P, M> {
    pub(super) fn new(service: S, request: Req, policy: P, protocol: M) -> Self {
        Self {
            wait: None,
            permit: None,
            request: Some(request),
            service,
            policy,
            protocol,
            closed_signal: ClosedWatch::default(),
            expiry: Expiry::Unset,
        }
    }

    pub(super) fn with_permit(mut self, permit: Permit<P::StateRef>) -> Self {
        self.permit = Some(queued(permit));
        self
    }

    pub(super) fn with_wait(mut self, wait: Pin<Box<P::Wait>>) -> Self {
        self.wait = Some(wait);
        self
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<CallStep<S, Req, P, M>>
    where
        S: Service<Req>,
        M: Protocol<Req, S::Response, S::Error>,
    {
        let this = self.project();
        loop {
            if let Some(wait) = this.wait {
                let step = ready!(wait.as_mut().poll(cx));
                *this.wait = None;
                *this.permit = Some(queued(step.map_err(StepEnd::Rejected)?));
            }
            if let Poll::Ready(result) = this.service.poll_ready(cx) {
                if let Err(error) = result {
                    *this.permit = None;
                    return Poll::Ready(Err(StepEnd::Inner(error)));
                }
                break;
            }
            let Some(request) = this.request.as_ref() else {
                unreachable!("polled after completion")
            };
            if let Expiry::Unset = this.expiry {
                let deadline = this.protocol.deadline(request);
                *this.expiry =
                    deadline.map_or(Expiry::Never, |at| Expiry::At(Box::pin(sleep_until(at.at()))));
            }
            let is_late = match this.expiry {
                Expiry::At(timer) => poll_timer(timer.as_mut(), cx).is_ready(),
                Expiry::Unset | Expiry::Never => false,
            };
            if is_late {
                *this.expiry = Expiry::Never;
                if let Some(rejected) = this.policy.reject_late(request) {
                    *this.permit = None;
                    return Poll::Ready(Err(StepEnd::Rejected(rejected)));
                }
            }
            // `is_stale`, not `peek`: a probe that waits here occupies a slot itself, so `peek` could be false because
            // of it.
            let stale = || this.permit.as_ref().is_none_or(|permit| this.policy.is_stale(permit));
            let closed_signal = || this.policy.closed_signal(this.permit.as_ref());
            ready!(this.closed_signal.poll(cx, closed_signal, stale));
            // The permit is no longer valid. The policy decides again.
            *this.permit = None;
            match this.policy.admit(
                request,
                RequestTerms::<_, _, S::Response, S::Error>::new(request, this.protocol),
            ) {
                Admit::Pass(pass) => *this.permit = Some(queued(this.policy.permit(pass))),
                Admit::Queue(wait) => *this.wait = Some(wait),
                Admit::Reject(rejected) => return Poll::Ready(Err(StepEnd::Rejected(rejected))),
            }
        }
        let (Some(mut permit), Some(mut request)) = (this.permit.take(), this.request.take())
        else {
            unreachable!("polled after completion")
        };
        let mut mark = None;
        if this.policy.attributes() {
            let deadline = CallerDeadline::of(this.protocol.deadline(&request));
            mark = measured(this.protocol.sent_mark(&request));
            permit = permit.observing(deadline, mark.is_some());
        }
        let mut call = this.protocol.begin(&mut request, || permit.take());
        let future = match M::measuring_permit(&mut call) {
            Some(permit) => permit.guard(|| this.service.call(request)),
            None => permit.guard(|| this.service.call(request)),
        };
        Poll::Ready(Ok((future, permit, call, mark)))
    }
}
