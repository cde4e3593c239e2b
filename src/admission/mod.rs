//! The service behind all layers that decide *whether* a call is made. It implements the contract of Tower once.
//!
//! A layer provides a [`Policy`]: synchronous decisions, without a `poll` function. [`Admission`] keeps the following
//! rules for all of them:
//!
//! - A call is made on the instance of the inner service that was polled ready. A call that has to wait gets a clone of
//!   the service and polls it itself ([`future`]).
//! - While a call would be rejected, the inner service is not polled. An instance that was polled but is not called is
//!   replaced by a clone, so that it holds no reservation and no queue entry.
//! - Once ready, the service stays ready until `call`, except with backpressure.
//! - A caller that waits for the inner service is woken when the policy starts to reject calls ([`closed`]).
//! - An idle service holds no permit: a policy admits in `call`, and queues in the returned future.
//! - The inner future is dropped before its permit.

mod closed;
#[cfg(all(test, not(buttress_loom)))]
#[allow(dead_code, unreachable_pub)] // The layer has more setters than its test uses.
mod example;
mod future;
mod layer;
mod service;

use std::{future::Future, pin::Pin, sync::Arc};

use tokio::{sync::Notify, time::Instant};

pub(crate) use self::{
    future::AdmissionFuture,
    layer::{Plan, admission_layer, admission_service},
    service::Admission,
};
use crate::outcome::HealthCall;
use crate::{
    outcome::{LayerKind, Rejected, RejectedKind, SentMark},
    permit::{Permit, StateRef},
    time::Deadline,
};

/// The decision of a policy on a call.
#[derive(Debug)]
pub(crate) enum Admit<T, W> {
    /// The call is made now.
    Pass(T),
    /// The call waits for a permit. Dropping the future leaves the queue. Boxed, so that only calls that wait have its
    /// cost.
    Queue(Pin<Box<W>>),
    /// The call is rejected.
    Reject(Rejected),
}

/// The terms of a request: its deadline, its sent mark, and whether it is a health call. Each method reads the request.
pub(crate) trait Terms {
    /// Returns the deadline of the call.
    fn deadline(&self) -> Option<Deadline>;

    /// Returns the mark of the request's progress.
    fn sent_mark(&self) -> Option<SentMark>;

    /// Returns which health call the request is, if a health registry of this process serves `grpc.health.v1`.
    fn health_call(&self) -> Option<HealthCall>;
}

/// Decides whether calls are made.
pub(crate) trait Policy<Req>: Clone + Send + Sync + 'static {
    /// The state that records the end of a call.
    type StateRef: StateRef;
    /// The record of an admission, from which [`permit`](Self::permit) makes the permit. It must be small, because it
    /// stays in registers until the inner service has been called. A permit would be written to memory and read again
    /// at once, which takes as long as the rest of the admission.
    type Pass;
    /// The wait for a permit. [`std::future::Ready`] for policies without a queue.
    type Wait: Future<Output = Result<Permit<Self::StateRef>, Rejected>> + Send;

    /// The layer that rejections name.
    const LAYER: LayerKind;

    /// Returns the name of the layer, for events. Empty for a layer without a name.
    fn name(&self) -> &str {
        ""
    }

    /// Returns whether a call would be admitted now. Reserves nothing. A wrong result only costs time,
    /// because [`admit`](Self::admit) decides.
    fn peek(&self) -> bool;

    /// Decides whether this call is admitted under the terms of its request.
    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Self::Pass, Self::Wait>;

    /// Returns whether outcomes are attributed. If so, permits record the terms of the request.
    fn attributes(&self) -> bool {
        false
    }

    /// Returns the permit of an admitted call.
    fn permit(&self, pass: Self::Pass) -> Permit<Self::StateRef>;

    /// Counts a call that is rejected because a setting of the layer cannot work.
    fn count_misconfigured(&self) {}

    /// Returns whether a permit, whose inner call has not begun, is no longer valid.
    fn is_stale(&self, permit: &Permit<Self::StateRef>) -> bool {
        let _ = permit;
        false
    }

    /// Returns the rejection of an admitted call that still waits for the inner service at its deadline. `None`: the
    /// call is not rejected.
    fn reject_late(&self, request: &Req) -> Option<Rejected> {
        let _ = request;
        Some(Rejected::by(Self::LAYER, RejectedKind::DeadlinePassed).reported())
    }

    /// Returns the notification for callers that wait for the inner service. It wakes them when [`peek`](Self::peek)
    /// becomes false, or when their permit becomes [stale](Self::is_stale). `None`: neither happens.
    fn closed_signal(&self, permit: Option<&Permit<Self::StateRef>>) -> Option<Arc<Notify>> {
        let _ = permit;
        None
    }

    /// Returns whether the policy uses backpressure, for balancers: while [`peek`](Self::peek) is false, the service is
    /// not ready, instead of rejecting calls. The notification of [`closed_signal`](Self::closed_signal) wakes it.
    fn uses_backpressure(&self) -> bool {
        false
    }

    /// Returns the next time at which [`peek`](Self::peek) may change by time alone.
    fn changes_at(&self) -> Option<Instant> {
        None
    }
}

/// A service that can be cloned. An admission layer needs a new instance for each call that waits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be cloned, and this layer needs a clone of the wrapped service",
    label = "not `Clone`",
    note = "derive `Clone` for it, with its state behind an `Arc` so that a clone is cheap, or put `tower::buffer::BufferLayer` between this layer and it"
)]
pub trait Reusable: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> Reusable for S {}
