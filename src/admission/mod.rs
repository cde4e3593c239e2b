//! The one admission service: where the Tower contract is kept for every layer that decides *whether*
//! a call goes. A layer contributes a [`Policy`]: synchronous, told what it needs, with no `poll` in it.

mod future;
mod layer;
mod service;
mod shut;

use std::{future::Future, pin::Pin, sync::Arc};

use tokio::{sync::Notify, time::Instant};

pub use self::future::ResponseFuture;
pub(crate) use self::{layer::Plan, layer::admission_layer, service::Admission};
#[cfg(feature = "limit")]
use crate::call::grpc::HealthCall;
use crate::call::{Deadline, Giver, LayerKind, Permit, Rejected, RejectedKind, SentMark};

/// What a policy says to a call.
#[derive(Debug)]
pub enum Admit<T, W> {
    /// Now.
    Go(T),
    /// When this future says so. Dropping it gives the place back. Boxed: only who waits pays for it.
    Wait(Pin<Box<W>>),
    /// No.
    No(Rejected),
}

/// The deadline and the sent mark of a request. Each method reads the request.
pub trait Terms {
    /// Returns the deadline of the call.
    fn deadline(&self) -> Option<Deadline>;

    /// Returns the mark of the request's progress.
    fn sent_mark(&self) -> Option<SentMark>;

    /// Returns which health call the request is, if a health registry of this process serves `grpc.health.v1`.
    #[cfg(feature = "limit")]
    fn health_call(&self) -> Option<HealthCall>;
}

/// Whether a call goes.
pub trait Policy<Req>: Clone + Send + Sync + 'static {
    /// What its permits end at.
    type Giver: Giver;
    /// What a call that goes has its permit for. Small: it stays in registers until the inner service has been
    /// called, where a permit would be written and read again at once, which takes as long as all the rest.
    type Pass;
    /// A place in its queue; [`std::future::Ready`] where nobody waits.
    type Wait: Future<Output = Result<Permit<Self::Giver>, Rejected>> + Send;

    /// The layer, as refusals name it.
    const LAYER: LayerKind;

    /// Would a call go now? Reserves nothing; a wrong answer costs time, never correctness.
    fn peek(&self) -> bool;

    /// Decides whether this call is admitted under the terms of its request.
    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Self::Pass, Self::Wait>;

    /// Returns whether outcomes are attributed. If so, permits record the terms of the request.
    fn attributes(&self) -> bool {
        false
    }

    /// The permit of a call that goes.
    fn permit(&self, pass: Self::Pass) -> Permit<Self::Giver>;

    /// Is this permit, given but not used yet, worth nothing any more?
    fn is_stale(&self, permit: &Permit<Self::Giver>) -> bool {
        let _ = permit;
        false
    }

    /// The refusal of a call that may go, and waits for the inner service longer than its caller waits for it. None:
    /// it is not to be refused.
    fn too_late(&self, request: &Req) -> Option<Rejected> {
        let _ = request;
        Some(Rejected::by(Self::LAYER, RejectedKind::DeadlinePassed))
    }

    /// What wakes those who wait for the inner service when [`peek`](Self::peek) turns false, or the permit
    /// that they have already [stale](Self::is_stale).
    fn shut(&self, permit: Option<&Permit<Self::Giver>>) -> Option<Arc<Notify>> {
        let _ = permit;
        None
    }

    /// Whether the service is not ready, instead of refusing, while [`peek`](Self::peek) is false: for
    /// balancers. What [`shut`](Self::shut) gives wakes it.
    fn holds_back(&self) -> bool {
        false
    }

    /// When [`peek`](Self::peek) may change by time alone.
    fn changes_at(&self) -> Option<Instant> {
        None
    }
}

/// A service that can be cloned: an admission layer needs a fresh instance for every call that waits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be cloned, and this layer needs a clone of what it wraps",
    label = "not `Clone`",
    note = "derive `Clone` for it (a cheap one, its state behind an `Arc`), or put `tower::buffer::BufferLayer` between this layer and it"
)]
pub trait Reusable: Clone {}

#[diagnostic::do_not_recommend]
impl<S: Clone> Reusable for S {}
