use std::{
    sync::Arc,
    task::{Context, Poll, ready},
};

use tower_service::Service;

use super::{
    Admit, Policy,
    closed::{BackpressureWait, ClosedWatch},
    future::{AdmissionFuture, CallState, QueuedCall, RequestTerms, measured},
};
use crate::{
    classify::Protocol,
    fault::LayerName,
    outcome::{CallerDeadline, Outcome, Reason, Rejected, request_mark},
    permit::Permit,
    respond::Reject,
};

/// The service behind all admission layers.
pub(crate) struct Admission<S, P, M, R> {
    inner: S,
    policy: P,
    protocol: M,
    reject: R,
    fault: Option<Arc<LayerName>>,
    readiness: Readiness,
    /// `poll_ready` has returned ready, and the service stays ready until the call.
    reported_ready: bool,
    closed_signal: ClosedWatch,
    hold: BackpressureWait,
}

/// The use of the inner service since the last call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Readiness {
    Untouched,
    /// `poll_ready` returned `Pending`. The inner service may have registered a waiter.
    Polled,
    /// `poll_ready` returned ready. The inner service may hold a reservation.
    Ready,
}

impl<S, P, M, R> Admission<S, P, M, R> {
    pub(crate) fn new(
        inner: S,
        policy: P,
        protocol: M,
        reject: R,
        fault: Option<Arc<LayerName>>,
    ) -> Self {
        Self {
            inner,
            policy,
            protocol,
            reject,
            fault,
            readiness: Readiness::Untouched,
            reported_ready: false,
            closed_signal: ClosedWatch::default(),
            hold: BackpressureWait::default(),
        }
    }

    pub(crate) fn inner_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    pub(crate) fn into_inner(self) -> S {
        self.inner
    }

    pub(crate) fn inner(&self) -> &S {
        &self.inner
    }

    pub(crate) fn policy(&self) -> &P {
        &self.policy
    }
}

impl<S: Clone, P, M, R> Admission<S, P, M, R> {
    /// Replaces an inner service that was polled, so that its reservation or its waiter is released.
    fn discard_reservation(&mut self) {
        if self.readiness != Readiness::Untouched {
            self.inner = self.inner.clone();
            self.readiness = Readiness::Untouched;
        }
    }
}

impl<S: Clone, P: Clone, M: Clone, R: Clone> Clone for Admission<S, P, M, R> {
    /// Resets the readiness: a reservation belongs to the instance that made it.
    fn clone(&self) -> Self {
        Self::new(
            self.inner.clone(),
            self.policy.clone(),
            self.protocol.clone(),
            self.reject.clone(),
            self.fault.clone(),
        )
    }
}

impl<S, P, M, R, Req> Service<Req> for Admission<S, P, M, R>
where
    S: Service<Req> + Clone,
    P: Policy<Req>,
    M: Protocol<Req, S::Response, S::Error>,
    R: Reject<Req, M::Response, S::Error>,
{
    type Response = M::Response;
    type Error = R::Error;
    type Future = AdmissionFuture<S, Req, S::Future, M::Call, P, M, R>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), R::Error>> {
        if self.policy.attributes() {
            request_mark();
        }
        // A ready service stays ready until `call`, except with backpressure: a balancer polls again and must observe
        // the change.
        if self.reported_ready && (!self.policy.uses_backpressure() || self.policy.peek()) {
            return Poll::Ready(Ok(()));
        }
        self.reported_ready = false;
        while self.fault.is_none() {
            if !self.policy.peek() {
                self.discard_reservation();
                if !self.policy.uses_backpressure() {
                    break;
                }
                ready!(self.hold.poll::<Req, P>(cx, &self.policy));
            }
            if let Poll::Ready(result) = self.inner.poll_ready(cx) {
                result.map_err(R::error)?;
                self.readiness = Readiness::Ready;
                self.closed_signal.forget();
                break;
            }
            self.readiness = Readiness::Polled;
            ready!(self.closed_signal.poll(
                cx,
                || self.policy.closed_signal(None),
                || !self.policy.peek()
            ));
        }
        self.reported_ready = true;
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, mut request: Req) -> Self::Future {
        self.reported_ready = false;
        let admit = match &self.fault {
            None => self.policy.admit(
                &request,
                RequestTerms::<_, _, S::Response, S::Error>::new(&request, &self.protocol),
            ),
            Some(fault) => {
                self.policy.count_misconfigured();
                let name = self.policy.name();
                Admit::Reject(Rejected::misconfigured(P::LAYER, name, fault.clone()))
            }
        };
        // Computed only for rejected calls, because it reads the headers.
        let mut form = None;
        let state = match admit {
            Admit::Pass(pass) if self.readiness == Readiness::Ready => {
                let mut guard = PassGuard::<Req, P>::new(&self.policy, pass);
                let (mut deadline, mut mark) = (None, None);
                if self.policy.attributes() {
                    // Read before the call, because code that may panic after the call makes the compiler copy the
                    // inner future.
                    deadline = CallerDeadline::of(self.protocol.deadline(&request));
                    mark = measured(self.protocol.sent_mark(&request));
                }
                let call = self.protocol.begin(&mut request, || guard.permit());
                self.readiness = Readiness::Untouched;
                guard.drop_as = Outcome::failure().because(Reason::Panicked);
                // Built in place without intermediate variables, because a future is large to move.
                return AdmissionFuture::new(
                    CallState::called(
                        self.inner.call(request),
                        guard.permit().observing(deadline, mark.is_some()),
                        call,
                        mark,
                    ),
                    None,
                    self.reject.clone(),
                );
            }
            Admit::Pass(pass) => {
                let permit = self.policy.permit(pass);
                CallState::queued(self.queue(request).with_permit(permit))
            }
            Admit::Queue(wait) => CallState::queued(self.queue(request).with_wait(wait)),
            Admit::Reject(rejected) => {
                self.discard_reservation();
                form = Some(self.reject.form(&request));
                CallState::rejected(self.reject.discard(request, rejected))
            }
        };
        AdmissionFuture::new(state, form, self.reject.clone())
    }
}

/// A call between its admission and the return of the inner `call`. Dropping it ends the call, so that a panic releases
/// the permit: as cancelled if the classifier panics before the inner call, and as failed if the inner call panics.
struct PassGuard<'a, Req, P: Policy<Req>> {
    policy: &'a P,
    pass: Option<P::Pass>,
    drop_as: Outcome,
}

impl<'a, Req, P: Policy<Req>> PassGuard<'a, Req, P> {
    #[inline]
    fn new(policy: &'a P, pass: P::Pass) -> Self {
        Self { policy, pass: Some(pass), drop_as: Outcome::cancelled() }
    }

    /// Returns the permit, or a spent one if it has been returned already.
    #[inline]
    fn permit(&mut self) -> Permit<P::StateRef> {
        match self.pass.take() {
            Some(pass) => self.policy.permit(pass),
            None => Permit::spent(),
        }
    }
}

impl<Req, P: Policy<Req>> Drop for PassGuard<'_, Req, P> {
    #[inline]
    fn drop(&mut self) {
        if let Some(pass) = self.pass.take() {
            dropped(self.policy, pass, self.drop_as);
        }
    }
}

#[cold]
#[inline(never)]
fn dropped<Req, P: Policy<Req>>(policy: &P, pass: P::Pass, outcome: Outcome) {
    policy.permit(pass).release(outcome);
}

impl<S: Clone, P: Clone, M: Clone, R> Admission<S, P, M, R> {
    fn queue<Req>(&mut self, request: Req) -> QueuedCall<S, Req, P, M>
    where
        P: Policy<Req>,
    {
        self.discard_reservation();
        QueuedCall::new(self.inner.clone(), request, self.policy.clone(), self.protocol.clone())
    }
}
