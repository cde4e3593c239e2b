//! How to add an admission layer: a small one, which only the tests compile.
//!
//! The layer rejects calls while an operator has closed it for maintenance, and counts the failures of the calls that
//! it admits. A new layer consists of the same parts, in a module of its own: the state with its [`Release`], the
//! [`Policy`], the layer and its service by [`admission_layer`](super::admission_layer), and a handle.

use std::{
    future::Ready,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::sync::Notify;
use tower_layer::Layer;

use super::{Admit, Plan, Policy, Terms, admission_layer};
use crate::{
    classify::Http,
    fault::Fault,
    outcome::{LayerKind, Outcome, Rejected, RejectedKind},
    permit::{Permit, Release, ReleaseAt, Token},
    respond::AsError,
    sealed::Sealed,
};

// ===== 1. The state: what the layer, its services and its handle share. It receives the outcome of each call. =====

#[derive(Debug, Default)]
struct Maintenance {
    is_closed: AtomicBool,
    /// Wakes callers that wait for the inner service when the layer is closed.
    changed: Arc<Notify>,
    failures: AtomicU64,
}

impl Sealed for Maintenance {}

impl Release for Maintenance {
    fn release(&self, _: Token, outcome: Outcome) {
        if outcome.is_failure() {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }
}

// ===== 2. The policy: synchronous decisions. `Admission` keeps the contract of Tower for it. =====

impl<Req> Policy<Req> for Arc<Maintenance> {
    type StateRef = Self;
    /// What the permit is made of: nothing here, the token of a circuit in the breaker.
    type Pass = ();
    /// No queue.
    type Wait = Ready<Result<Permit<Self>, Rejected>>;

    // A real layer adds a kind of its own.
    const LAYER: LayerKind = LayerKind::User;

    fn peek(&self) -> bool {
        !self.is_closed.load(Ordering::Relaxed)
    }

    fn admit(&self, _: &Req, _: impl Terms) -> Admit<(), Self::Wait> {
        if Policy::<Req>::peek(self) {
            return Admit::Pass(());
        }
        Admit::Reject(Rejected::by(LayerKind::User, RejectedKind::ForcedOpen))
    }

    fn permit(&self, (): ()) -> Permit<Self> {
        Permit::of(self, Token::default())
    }

    fn closed_signal(&self, _: Option<&Permit<Self>>) -> Option<Arc<Notify>> {
        Some(self.changed.clone())
    }
}

// ===== 3. The layer and its service, with the setters that all admission layers have. =====

admission_layer! {
    /// Rejects calls during maintenance.
    layer MaintenanceLayer {}
    /// The service of a [`MaintenanceLayer`].
    service UnderMaintenance []
    future MaintenanceFuture
    policy Arc<Maintenance>
}

impl MaintenanceLayer {
    fn http() -> Self {
        let plan = Plan {
            policy: Arc::default(),
            protocol: Http,
            reject: AsError,
            fault: Fault::default(),
        };
        Self { plan }
    }
}

impl<M, R> MaintenanceLayer<M, R> {
    fn handle(&self) -> MaintenanceHandle {
        MaintenanceHandle(self.plan.policy.clone())
    }
}

impl<S, M: Clone, R: Clone> Layer<S> for MaintenanceLayer<M, R> {
    type Service = UnderMaintenance<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        UnderMaintenance { admission: self.plan.service(inner) }
    }
}

// ===== 4. The handle: changes the running layer. =====

struct MaintenanceHandle(Arc<Maintenance>);

impl MaintenanceHandle {
    fn set_closed(&self, is_closed: bool) {
        self.0.is_closed.store(is_closed, Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }
}

// ===== 5. A test of the behaviour. `tests/support/contract.rs` has the rules that every admission layer keeps. =====

#[tokio::test]
async fn maintenance_rejects_calls_and_failures_are_counted() {
    use tower::{ServiceExt, service_fn};

    let layer = MaintenanceLayer::http().per_response();
    let handle = layer.handle();
    let service = layer.layer(service_fn(|(): ()| async { Err::<(), _>(std::fmt::Error) }));
    service.clone().oneshot(()).await.expect_err("the error of the inner service");
    assert_eq!(handle.0.failures.load(Ordering::Relaxed), 1);
    handle.set_closed(true);
    let error = service.oneshot(()).await.expect_err("closed");
    let rejected = Rejected::find(&*error).expect("a rejection");
    assert_eq!(rejected.kind(), RejectedKind::ForcedOpen);
    assert_eq!(handle.0.failures.load(Ordering::Relaxed), 1, "a rejection is not a failure");
}
