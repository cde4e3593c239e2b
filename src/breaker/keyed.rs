//! A circuit for each key: one origin, one tenant, one route.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use http::Request;
use tokio::sync::Notify;
use tower_layer::Layer;

use super::{
    core::Circuit,
    handle::CircuitBreakerHandle,
    policy::{self, Breaker, Calls, Giver, Verdict},
};
use crate::{
    ConfigError,
    admission::{Admit, Plan, Policy, Terms, admission_layer},
    call::{Anchor, LayerKind, Lease, Nanos, Origin, Permit, Rejected, Token},
};

/// What of a request tells which circuit it belongs to. Any closure over the request is one.
#[diagnostic::on_unimplemented(
    message = "`{Self}` gives no key for requests of `{Req}`",
    note = "`.keyed(|request: &Req| key)` wants exactly the request of the service; `.per_origin()` wants `http::Request<B>`"
)]
pub trait Key<Req>: Clone + Send + Sync + 'static {
    /// What circuits are told apart by.
    type Key: Clone + Eq + Hash + Send + Sync + 'static;

    /// The key of this request.
    fn key(&self, request: &Req) -> Self::Key;
}

impl<F, Req, K> Key<Req> for F
where
    F: Fn(&Req) -> K + Clone + Send + Sync + 'static,
    K: Clone + Eq + Hash + Send + Sync + 'static,
{
    type Key = K;

    #[inline]
    fn key(&self, request: &Req) -> K {
        self(request)
    }
}

/// A circuit for each scheme and authority of a request's URI.
#[derive(Clone, Copy, Debug, Default)]
pub struct PerOrigin;

impl<B> Key<Request<B>> for PerOrigin {
    type Key = Origin;

    fn key(&self, request: &Request<B>) -> Origin {
        Origin::of(request.uri())
    }
}

// ===== The circuits =====

/// Keys beyond this share one circuit, unless told otherwise.
const MOST_KEYS: usize = 1024;
/// A full map is searched for circuits that can go at most this often.
const SWEEP_EVERY: Nanos = 100_000_000;

/// The circuits of a keyed layer, made as their keys come.
pub(super) struct Circuits<Q> {
    map: RwLock<HashMap<Q, Lease<Circuit>>>,
    most: AtomicUsize,
    swept: AtomicU64,
    /// For keys beyond the cap.
    other: Lease<Circuit>,
    /// What new ones are made like.
    template: Breaker,
    /// What one of this key is called, if the key says it.
    called: fn(&Q) -> String,
}

impl<Q: Clone + Eq + Hash> Circuits<Q> {
    fn find(&self, key: &Q) -> Lease<Circuit> {
        {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = map.get(key) {
                return known.clone();
            }
            // However many strange keys come, those that are known do not wait for them.
            if map.len() >= self.most.load(Ordering::Relaxed) && !self.may_sweep(self.other.now()) {
                return self.other.clone();
            }
        }
        self.add(key)
    }

    fn may_sweep(&self, now: Nanos) -> bool {
        let swept = self.swept.load(Ordering::Relaxed);
        swept == 0 || now.saturating_sub(swept) >= SWEEP_EVERY
    }

    #[cold]
    fn add(&self, key: &Q) -> Lease<Circuit> {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = map.get(key) {
            return known.clone();
        }
        let most = self.most.load(Ordering::Relaxed);
        if map.len() >= most {
            let now = self.other.now();
            if self.may_sweep(now) {
                self.swept.store(now.max(1), Ordering::Relaxed);
                // Only what is equal to a new one: nothing that was learnt is lost.
                map.retain(|_, circuit| !(circuit.is_unshared() && circuit.is_fresh()));
            }
            if map.len() >= most {
                return self.other.clone();
            }
        }
        let circuit = Lease::alone(self.template.like());
        circuit.name(&match (self.template.named(), (self.called)(key)) {
            (all, one) if one.is_empty() => all.to_owned(),
            ("", one) => one,
            (all, one) => format!("{all} {one}"),
        });
        map.insert(key.clone(), circuit.clone());
        circuit
    }
}

/// The policy of a keyed layer.
pub struct Keyed<F, Q> {
    key: F,
    circuits: Arc<Circuits<Q>>,
}

impl<F: Clone, Q> Clone for Keyed<F, Q> {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), circuits: self.circuits.clone() }
    }
}

impl<F, Q> fmt::Debug for Keyed<F, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys = self.circuits.map.read().unwrap_or_else(PoisonError::into_inner).len();
        f.debug_struct("Keyed").field("keys", &keys).finish_non_exhaustive()
    }
}

impl<F, Q, Req> Policy<Req> for Keyed<F, Q>
where
    F: Key<Req, Key = Q>,
    Q: Clone + Eq + Hash + Send + Sync + 'static,
{
    type Giver = Giver;
    type Pass = (Lease<Circuit>, Token);
    type Wait = Verdict<Lease<Circuit>>;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    /// Which circuit it will be is known with the request.
    fn peek(&self) -> bool {
        true
    }

    fn attributes(&self) -> bool {
        true
    }

    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Self::Pass, Self::Wait> {
        let circuit = self.circuits.find(&self.key.key(request));
        let deadline = terms.deadline().map(|deadline| deadline.at());
        match policy::admit(&circuit, deadline, || terms.sent_mark()) {
            Admit::Go(token) => Admit::Go((circuit, token)),
            Admit::Wait(wait) => Admit::Wait(wait),
            Admit::No(rejected) => Admit::No(rejected),
        }
    }

    fn permit(&self, (circuit, token): Self::Pass) -> Permit<Giver> {
        Permit::new(Anchor::Counted(circuit), token)
    }

    fn is_stale(&self, permit: &Permit<Giver>) -> bool {
        policy::is_stale(permit)
    }

    fn too_late(&self, request: &Req) -> Option<Rejected> {
        policy::too_late(&self.circuits.find(&self.key.key(request)))
    }

    /// Known once there is a permit.
    fn shut(&self, permit: Option<&Permit<Giver>>) -> Option<Arc<Notify>> {
        match permit?.giver()? {
            Anchor::Counted(circuit) => Some(circuit.changed().clone()),
            Anchor::Lasting(_) => None,
        }
    }
}

/// Its calls are counted: it goes only when none is under way.
impl Calls for Lease<Circuit> {
    fn permit(&self, token: Token) -> Permit<Giver> {
        Permit::new(Anchor::Counted(self.clone()), token)
    }
}

// ===== The layer =====

admission_layer! {
    /// A circuit breaker with a circuit for each key, made by [`CircuitBreakerLayer::keyed`](super::CircuitBreakerLayer::keyed) or
    /// [`per_origin`](super::CircuitBreakerLayer::per_origin).
    ///
    /// The circuits are in a bounded map: 1024 keys, unless [`max_keys`](Self::max_keys) says otherwise. Where
    /// it is full, circuits that are as good as new make room: closed, nothing in their windows, their trips
    /// forgotten, not steered by hand, no call under way. Where there are none, further keys share one circuit
    /// (`other`). So keys from requests never grow memory. With a window of calls a key that was called is never
    /// as good as new: choose one of time where there are many.
    ///
    /// Which circuit a call belongs to is known only with the request: what is wrapped is asked to be ready
    /// before, also for a call that will be refused.
    layer KeyedCircuitBreakerLayer {}
    /// The service of a [`KeyedCircuitBreakerLayer`].
    service KeyedCircuitBreaker [Sel, Id]
    policy Keyed<Sel, Id>
}

impl<Sel, Id, M, R> KeyedCircuitBreakerLayer<Sel, Id, M, R> {
    /// Every circuit is made as the one of `plan` is.
    pub(super) fn new(key: Sel, plan: Plan<Breaker, M, R>, called: fn(&Id) -> String) -> Self {
        let Plan { policy: template, protocol, reject, mut fault } = plan;
        if Circuit::holds_back(&template) {
            let remedy = "leave it away: which circuit it is about is known only with the request";
            fault.get_or_insert(ConfigError::new("backpressure", "keyed", remedy));
        }
        let other = Lease::alone(template.like());
        other.name("other");
        let circuits = Arc::new(Circuits {
            map: RwLock::default(),
            most: AtomicUsize::new(MOST_KEYS),
            swept: AtomicU64::new(0),
            other,
            template,
            called,
        });
        let policy = Keyed { key, circuits };
        Self { plan: Plan { policy, protocol, reject, fault } }
    }

    /// How many keys have a circuit of their own: 1024 by default, 1 or more.
    pub fn max_keys(mut self, most: usize) -> Self {
        let checked = match most {
            0 => Err(ConfigError::new("max_keys", most, "use 1 or more")),
            most => Ok(most),
        };
        if let Some(most) = self.plan.accept(checked) {
            self.plan.policy.circuits.most.store(most, Ordering::Relaxed);
        }
        self
    }

    /// Looks at the circuits and steers them.
    #[must_use]
    pub fn handle(&self) -> KeyedCircuitBreakerHandle<Id> {
        KeyedCircuitBreakerHandle(self.plan.policy.circuits.clone())
    }
}

impl<S, Sel: Clone, Id, M: Clone, R: Clone> Layer<S> for KeyedCircuitBreakerLayer<Sel, Id, M, R> {
    type Service = KeyedCircuitBreaker<S, Sel, Id, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        KeyedCircuitBreaker { admission: self.plan.service(inner) }
    }
}

/// Looks at the circuits of a keyed layer and steers them, from outside of the stack.
pub struct KeyedCircuitBreakerHandle<Q>(Arc<Circuits<Q>>);

impl<Q: Clone + Eq + Hash> KeyedCircuitBreakerHandle<Q> {
    /// The circuit of this key, if it has one of its own.
    #[must_use]
    pub fn get(&self, key: &Q) -> Option<CircuitBreakerHandle> {
        let map = self.0.map.read().unwrap_or_else(PoisonError::into_inner);
        map.get(key).map(handle)
    }

    /// The circuit that keys beyond the cap share.
    #[must_use]
    pub fn other(&self) -> CircuitBreakerHandle {
        handle(&self.0.other)
    }

    /// All keys that have a circuit of their own, with it, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<(Q, CircuitBreakerHandle)> {
        let map = self.0.map.read().unwrap_or_else(PoisonError::into_inner);
        map.iter().map(|(key, circuit)| (key.clone(), handle(circuit))).collect()
    }
}

fn handle(circuit: &Lease<Circuit>) -> CircuitBreakerHandle {
    CircuitBreakerHandle(circuit.state().clone())
}

impl<Q> Clone for KeyedCircuitBreakerHandle<Q> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Q> fmt::Debug for KeyedCircuitBreakerHandle<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyedCircuitBreakerHandle")
    }
}
