//! Circuit breakers with a circuit for each key, such as an origin, a tenant or a route.

#[cfg(feature = "observe")]
use std::cmp::Reverse;
use std::{
    fmt,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use http::Request;
use tokio::{sync::Notify, time::Instant};
use tower_layer::Layer;

#[cfg(feature = "observe")]
use super::state::CircuitState;
use super::{
    circuit::Circuit,
    events::CircuitEvents,
    handle::CircuitBreakerHandle,
    key_map::{Evict, KeyMap, Reservation},
    policy::{self, Breaker, CircuitRef, VerdictWait},
};
use crate::{
    admission::{Admit, Plan, Policy, Terms, admission_layer},
    error::ConfigError,
    event::{RepeatedEvent, event, settings_changed},
    origin::Origin,
    outcome::{LayerKind, Rejected},
    permit::{Permit, ShardOrSlot, ShardedRef, Token},
    sync::Mutex,
    time::{CallClock, Nanos},
};

/// Derives the key of a circuit from a request. Closures over the request implement this trait.
#[diagnostic::on_unimplemented(
    message = "`{Self}` returns no key for requests of type `{Req}`",
    note = "`.keyed(|request: &Req| key)` needs exactly the request type of the service; `.per_origin()` needs `http::Request<B>`"
)]
pub trait KeyExtractor<Req>: Clone + Send + Sync + 'static {
    /// The type of the keys. Each key has a circuit.
    type Key: Clone + Eq + Hash + Send + Sync + 'static;

    /// Returns the key of this request.
    fn key(&self, request: &Req) -> Self::Key;
}

impl<F, Req, K> KeyExtractor<Req> for F
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

/// Uses the scheme and the authority of a request's URI as the key.
#[derive(Clone, Copy, Debug, Default)]
pub struct PerOrigin;

impl<B> KeyExtractor<Request<B>> for PerOrigin {
    type Key = Origin;

    fn key(&self, request: &Request<B>) -> Origin {
        Origin::of(request.uri())
    }
}

// ===== The circuits =====

/// The default maximum number of circuits.
const MAX_KEYS: usize = 1024;
/// The default maximum size of a key. A host name has at most 253 bytes.
const MAX_KEY_BYTES: usize = 1024;
/// The maximum size of the part of a circuit's name that comes from its key.
const MAX_NAME_BYTES: usize = 256;
/// The maximum number of circuits that are evicted for one new key. More than one is needed only after a lower maximum
/// was set, or if other threads add keys.
const MAX_EVICTIONS: usize = 4;
/// The minimum time between a search that has found no idle circuit and the next search.
const SEARCH_INTERVAL: Nanos = 100_000_000;

impl Evict for ShardedRef<Circuit> {
    fn idle_for(&self, now: Instant) -> Option<Nanos> {
        if self.is_shared() { None } else { Circuit::idle_for(self, now) }
    }

    fn is_unused(&mut self) -> bool {
        self.is_unshared()
    }
}

/// The functions that make a circuit from its key.
pub(super) struct KeyFns<Q> {
    /// Returns the key to store, which must not keep memory of the request alive.
    pub(super) to_stored: fn(&Q) -> Q,
    /// Writes the name of the key.
    pub(super) write_name: WriteKeyName<Q>,
}

/// Writes the name of a key. It may run user code, the `Display` of the key.
type WriteKeyName<Q> = fn(&Q, &mut ShortName) -> fmt::Result;

/// The circuits of a keyed layer.
pub(super) struct Circuits<Q> {
    map: KeyMap<Q, ShardedRef<Circuit>>,
    max_keys: AtomicUsize,
    max_key_bytes: AtomicUsize,
    /// The time of the last search that has found no idle circuit. 0: never.
    full_at: AtomicU64,
    /// New circuits get its rules and settings.
    template: Breaker,
    to_stored: fn(&Q) -> Q,
    /// Read for each new key, and called after the lock is released.
    write_name: Mutex<WriteKeyName<Q>>,
    evicted: AtomicU64,
    uncovered: AtomicU64,
    oversized: AtomicU64,
    /// The events of all circuits.
    events: Arc<CircuitEvents>,
    /// Limits the events about calls without a circuit.
    uncovered_event: RepeatedEvent,
    /// A service has been built with the circuits, so a setter of their layer must not change them.
    is_in_use: AtomicBool,
}

impl<Q> Circuits<Q> {
    fn new(max_keys: usize, max_key_bytes: usize, template: Breaker, fns: KeyFns<Q>) -> Self {
        Self {
            map: KeyMap::default(),
            max_keys: AtomicUsize::new(max_keys),
            max_key_bytes: AtomicUsize::new(max_key_bytes),
            full_at: AtomicU64::new(0),
            template,
            to_stored: fns.to_stored,
            write_name: Mutex::new(fns.write_name),
            evicted: AtomicU64::new(0),
            uncovered: AtomicU64::new(0),
            oversized: AtomicU64::new(0),
            events: Arc::new(CircuitEvents::of_keyed()),
            uncovered_event: RepeatedEvent::new(),
            is_in_use: AtomicBool::new(false),
        }
    }

    /// Returns an empty map with the settings of this one.
    fn fork(&self) -> Self {
        let max_keys = self.max_keys.load(Ordering::Relaxed);
        let max_key_bytes = self.max_key_bytes.load(Ordering::Relaxed);
        let write_name = *self.write_name.lock();
        let fns = KeyFns { to_stored: self.to_stored, write_name };
        Self::new(max_keys, max_key_bytes, self.template.clone(), fns)
    }

    fn set_max_keys(&self, max_keys: usize) -> Result<(), ConfigError> {
        if max_keys == 0 {
            return Err(ConfigError::new("max_keys", max_keys, "use 1 or more"));
        }
        self.max_keys.store(max_keys, Ordering::Relaxed);
        Ok(())
    }

    fn set_max_key_bytes(&self, max_key_bytes: usize) -> Result<(), ConfigError> {
        if max_key_bytes == 0 {
            return Err(ConfigError::new("max_key_bytes", max_key_bytes, "use 1 or more"));
        }
        self.max_key_bytes.store(max_key_bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// The reason for which a call has no circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Uncovered {
    MaxKeys,
    MaxKeyBytes,
}

impl<Q: Clone + Eq + Hash> Circuits<Q> {
    /// Returns the circuit of a key, if there is one.
    fn get(&self, key: &Q) -> Option<ShardedRef<Circuit>> {
        let max_bytes = self.max_key_bytes.load(Ordering::Relaxed);
        let hash = self.map.hash(key, max_bytes);
        if hash.bytes > max_bytes { None } else { self.map.get(hash, key) }
    }

    /// Returns the circuit of a key, and adds one if there is none. `None`: the call is made without a circuit.
    #[inline]
    fn get_or_add(&self, key: &Q) -> Option<ShardedRef<Circuit>> {
        let max_bytes = self.max_key_bytes.load(Ordering::Relaxed);
        let hash = self.map.hash(key, max_bytes);
        if hash.bytes > max_bytes {
            return self.pass_uncovered(Uncovered::MaxKeyBytes);
        }
        if let Some(known) = self.map.get(hash, key) {
            return Some(known);
        }
        let now = Instant::now();
        let Some(reservation) = self.make_room(now) else {
            return self.pass_uncovered(Uncovered::MaxKeys);
        };
        let circuit = self.new_circuit(key);
        let inserted = self.map.insert(reservation, hash, (self.to_stored)(key), circuit, now);
        if inserted.is_none() {
            return self.pass_uncovered(Uncovered::MaxKeys);
        }
        inserted
    }

    /// Reserves an entry, and evicts idle circuits if the map is full.
    #[cold]
    fn make_room(&self, now: Instant) -> Option<Reservation<'_>> {
        let max_keys = self.max_keys.load(Ordering::Relaxed);
        for _ in 0..MAX_EVICTIONS {
            let reservation = self.map.reserve(max_keys);
            if reservation.is_some() {
                return reservation;
            }
            let nanos = self.template.nanos_at(now);
            let full_at = self.full_at.load(Ordering::Relaxed);
            if full_at > 0 && nanos.saturating_sub(full_at) < SEARCH_INTERVAL {
                return None;
            }
            if self.map.evict(now).is_none() {
                self.full_at.store(nanos.max(1), Ordering::Relaxed);
                return None;
            }
            self.evicted.fetch_add(1, Ordering::Relaxed);
        }
        self.map.reserve(max_keys)
    }

    fn new_circuit(&self, key: &Q) -> ShardedRef<Circuit> {
        let circuit = ShardedRef::alone(self.template.like(Some(&self.events)));
        let mut name = ShortName::new(self.template.named());
        let write_name = *self.write_name.lock();
        // An error means that the name has reached its maximum.
        let _ = write_name(key, &mut name);
        circuit.name(&name.finish());
        circuit
    }

    /// Counts a call without a circuit.
    #[cold]
    fn pass_uncovered(&self, reason: Uncovered) -> Option<ShardedRef<Circuit>> {
        self.uncovered.fetch_add(1, Ordering::Relaxed);
        if reason == Uncovered::MaxKeyBytes {
            self.oversized.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(occurrences) = self.uncovered_event.record() {
            event!(
                breaker,
                WARN,
                LayerKind::CircuitBreaker.as_str(),
                self.template.named(),
                reason = reason.as_str(),
                max = self.max(reason),
                occurrences = occurrences,
                "calls are made without a circuit",
            );
        }
        None
    }

    /// Returns the maximum that the call exceeds.
    fn max(&self, reason: Uncovered) -> usize {
        match reason {
            Uncovered::MaxKeys => self.max_keys.load(Ordering::Relaxed),
            Uncovered::MaxKeyBytes => self.max_key_bytes.load(Ordering::Relaxed),
        }
    }
}

impl Uncovered {
    const fn as_str(self) -> &'static str {
        match self {
            Self::MaxKeys => "max_keys",
            Self::MaxKeyBytes => "max_key_bytes",
        }
    }
}

/// The name of a circuit: the name of the layer, and at most [`MAX_NAME_BYTES`] of the name of the key.
pub(super) struct ShortName {
    name: String,
    layer_len: usize,
}

impl ShortName {
    fn new(layer: &str) -> Self {
        Self { name: layer.to_owned(), layer_len: layer.len() }
    }

    fn finish(self) -> String {
        self.name
    }
}

impl fmt::Write for ShortName {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.is_empty() {
            return Ok(());
        }
        if self.layer_len > 0 && self.name.len() == self.layer_len {
            self.name.push(' ');
            self.layer_len += 1;
        }
        let room = MAX_NAME_BYTES.saturating_sub(self.name.len() - self.layer_len);
        if text.len() <= room {
            self.name.push_str(text);
            return Ok(());
        }
        let end = (0..=room).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        self.name.push_str(&text[..end]);
        self.name.push('\u{2026}');
        Err(fmt::Error)
    }
}

// ===== The policy =====

/// The policy of a keyed layer.
pub(super) struct Keyed<F, Q> {
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
        f.debug_struct("Keyed").field("circuits", &self.circuits.map.len()).finish_non_exhaustive()
    }
}

impl<F, Q, Req> Policy<Req> for Keyed<F, Q>
where
    F: KeyExtractor<Req, Key = Q>,
    Q: Clone + Eq + Hash + Send + Sync + 'static,
{
    type StateRef = CircuitRef;
    /// `None`: the call is made without a circuit.
    type Pass = Option<(ShardedRef<Circuit>, Token)>;
    type Wait = VerdictWait;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    fn name(&self) -> &str {
        self.circuits.template.named()
    }

    /// The key, and with it the circuit, is known only with the request.
    fn peek(&self) -> bool {
        true
    }

    fn attributes(&self) -> bool {
        true
    }

    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Self::Pass, Self::Wait> {
        let circuit = self.circuits.get_or_add(&self.key.key(request));
        let deadline = terms.deadline().map(|deadline| deadline.at());
        let Some(circuit) = circuit else {
            let rejected = if CallClock::is_past(deadline) {
                policy::reject_late(&self.circuits.template)
            } else {
                None
            };
            return rejected.map_or(Admit::Pass(None), Admit::Reject);
        };
        match policy::admit(&circuit, deadline, || terms.sent_mark(), || circuit.clone()) {
            Admit::Pass(token) => Admit::Pass(Some((circuit, token))),
            Admit::Queue(wait) => Admit::Queue(wait),
            Admit::Reject(rejected) => Admit::Reject(rejected),
        }
    }

    fn permit(&self, pass: Self::Pass) -> Permit<CircuitRef> {
        match pass {
            Some((circuit, token)) => policy::counted_permit(circuit, token),
            None => Permit::spent(),
        }
    }

    fn is_stale(&self, permit: &Permit<CircuitRef>) -> bool {
        policy::is_stale(permit)
    }

    fn reject_late(&self, request: &Req) -> Option<Rejected> {
        match self.circuits.get(&self.key.key(request)) {
            Some(circuit) => policy::reject_late(&circuit),
            None => policy::reject_late(&self.circuits.template),
        }
    }

    /// The circuit is known once the call has a permit.
    fn closed_signal(&self, permit: Option<&Permit<CircuitRef>>) -> Option<Arc<Notify>> {
        match permit?.state()? {
            ShardOrSlot::Shard(circuit) => Some(circuit.changed().clone()),
            ShardOrSlot::Slot(_) => None,
        }
    }
}

// ===== The layer =====

admission_layer! {
    /// A circuit breaker with a circuit for each key, made by
    /// [`CircuitBreakerLayer::keyed`](super::layer::CircuitBreakerLayer::keyed) or
    /// [`per_origin`](super::layer::CircuitBreakerLayer::per_origin).
    ///
    /// The circuits are in a map that is bounded by [`max_keys`](Self::max_keys) and
    /// [`max_key_bytes`](Self::max_key_bytes). A call beyond these bounds is made without a circuit: it is not rejected
    /// (except after its deadline), its outcome is not recorded, and the
    /// [snapshot](KeyedCircuitBreakerHandle::snapshot) counts it. The [module](super#keys) states which
    /// circuits are evicted for new keys.
    ///
    /// The circuit of a call is known only with its request. Therefore the inner service is polled ready also for a
    /// call that is rejected.
    ///
    /// All clones of a layer and all services that they make share the circuits. A setter after the layer has built a
    /// service returns a layer with circuits of its own; use the [handle](Self::handle) to change a running layer.
    layer KeyedCircuitBreakerLayer {}
    /// The service of a [`KeyedCircuitBreakerLayer`].
    service KeyedCircuitBreaker [Sel, Id]
    future KeyedCircuitBreakerFuture
    policy Keyed<Sel, Id>
    where Sel: KeyExtractor<Req, Key = Id>, Id: Clone, Id: Eq, Id: Hash, Id: Send, Id: Sync, Id: 'static
}

impl<Sel, Id, M, R> KeyedCircuitBreakerLayer<Sel, Id, M, R> {
    /// Each circuit gets the rules and settings of the circuit of `plan`.
    pub(super) fn new(key: Sel, plan: Plan<Breaker, M, R>, fns: KeyFns<Id>) -> Self {
        let Plan { policy: template, protocol, reject, mut fault } = plan;
        if template.has_backpressure() {
            let remedy = "remove it, because the circuit of a call is known only with its request";
            fault.get_or_insert(ConfigError::new("backpressure", "keyed", remedy));
        }
        // A setter of a clone of the layer of `plan` gives it a circuit of its own, and does not change this template.
        template.set_in_use();
        let circuits = Circuits::new(MAX_KEYS, MAX_KEY_BYTES, template, fns);
        let policy = Keyed { key, circuits: Arc::new(circuits) };
        Self { plan: Plan { policy, protocol, reject, fault } }
    }

    /// Sets the maximum number of circuits. 1024 by default; must be 1 or more.
    ///
    /// If the map is full, a new key replaces the least recently used circuit that is [like new](super#keys).
    /// If there is none, calls of new keys are made without a circuit.
    ///
    /// A lower maximum takes effect as new keys arrive: each of them evicts up to 4 circuits.
    ///
    /// At run time: [`KeyedCircuitBreakerHandle::set_max_keys`].
    pub fn max_keys(self, max_keys: usize) -> Self {
        self.set(|circuits| circuits.set_max_keys(max_keys))
    }

    /// Sets the maximum size of a key, in bytes. 1024 by default; must be 1 or more. Calls with a larger key are made
    /// without a circuit.
    ///
    /// The size is the number of bytes that the key's [`Hash`] writes: for a string its length and 1, for an [`Origin`]
    /// about the length of its text. So the keys of the map hold at most `max_keys` × `max_key_bytes`, 1 MiB by
    /// default, if `Hash` covers everything that a key owns. A key that shares the buffer of its request, such as
    /// `bytes::Bytes`, keeps that buffer alive: return a copy. `per_origin` stores a copy without the userinfo.
    ///
    /// At run time: [`KeyedCircuitBreakerHandle::set_max_key_bytes`].
    pub fn max_key_bytes(self, max_key_bytes: usize) -> Self {
        self.set(|circuits| circuits.set_max_key_bytes(max_key_bytes))
    }

    /// Adds the key to the name of each circuit, in events and in metrics. Without this setting, the circuits have no
    /// names of their own. The metrics contain at most as many keys as
    /// [`Registry::set_max_keys`](crate::observe::Registry::set_max_keys) permits.
    ///
    /// A name is shortened to 256 bytes. Use this setting only for keys that may be in logs: not for API keys or user
    /// names. It applies to circuits that are made from now on. The circuits of
    /// [`per_origin`](super::layer::CircuitBreakerLayer::per_origin) have names without this setting.
    pub fn named_keys(self) -> Self
    where
        Id: fmt::Display,
    {
        self.set(|circuits| {
            *circuits.write_name.lock() =
                |key, name| fmt::Write::write_fmt(name, format_args!("{key}"));
            Ok(())
        })
    }

    /// Changes a setting. A layer that has built a service gets a map of its own first.
    fn set(mut self, set: impl FnOnce(&Circuits<Id>) -> Result<(), ConfigError>) -> Self {
        let policy = &mut self.plan.policy;
        if policy.circuits.is_in_use.load(Ordering::Relaxed) {
            policy.circuits = Arc::new(policy.circuits.fork());
        }
        let checked = set(&policy.circuits);
        self.plan.accept(checked);
        self
    }

    /// Returns the handle of the circuits.
    #[must_use]
    pub fn handle(&self) -> KeyedCircuitBreakerHandle<Id> {
        KeyedCircuitBreakerHandle(self.plan.policy.circuits.clone())
    }
}

impl<S, Sel: Clone, Id, M: Clone, R: Clone> Layer<S> for KeyedCircuitBreakerLayer<Sel, Id, M, R> {
    type Service = KeyedCircuitBreaker<S, Sel, Id, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.plan.policy.circuits.is_in_use.store(true, Ordering::Relaxed);
        KeyedCircuitBreaker { admission: self.plan.service(inner) }
    }
}

/// Reads and changes the circuits of a keyed layer.
///
/// Clones refer to the same circuits, and so do all services that the layer or a clone of it made.
pub struct KeyedCircuitBreakerHandle<Q>(Arc<Circuits<Q>>);

/// A snapshot of the map of a keyed layer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyedCircuitBreakerSnapshot {
    /// The number of circuits.
    pub circuits: usize,
    /// The maximum number of circuits.
    pub max_keys: usize,
    /// The maximum size of a key, in bytes.
    pub max_key_bytes: usize,
    /// The number of circuits that were evicted for new keys.
    pub evicted: u64,
    /// The number of calls that were made without a circuit.
    pub uncovered: u64,
    /// The number of these calls whose key was larger than the maximum.
    pub oversized: u64,
}

impl<Q: Clone + Eq + Hash> KeyedCircuitBreakerHandle<Q> {
    /// Returns the circuit of this key, if it has one. Counts as a use of the circuit.
    ///
    /// A circuit is not evicted while there is a handle of it.
    #[must_use]
    pub fn get(&self, key: &Q) -> Option<CircuitBreakerHandle> {
        self.0.get(key).as_ref().map(handle)
    }

    /// Returns all keys with their circuits, in no order.
    ///
    /// Keys that are added meanwhile may be missing. The map is locked in slices of at most 64 circuits, so calls do
    /// not wait for this method.
    #[must_use]
    pub fn all(&self) -> Vec<(Q, CircuitBreakerHandle)> {
        let entries = self.0.map.entries();
        entries.iter().map(|entry| (entry.key.clone(), handle(&entry.value))).collect()
    }

    /// Sets the maximum number of circuits. See [`KeyedCircuitBreakerLayer::max_keys`].
    ///
    /// # Errors
    ///
    /// Returns an error for 0.
    pub fn set_max_keys(&self, max_keys: usize) -> Result<(), ConfigError> {
        self.0.set_max_keys(max_keys)?;
        self.report_setting("max_keys");
        Ok(())
    }

    /// Sets the maximum size of a key, in bytes. See [`KeyedCircuitBreakerLayer::max_key_bytes`].
    ///
    /// # Errors
    ///
    /// Returns an error for 0.
    pub fn set_max_key_bytes(&self, max_key_bytes: usize) -> Result<(), ConfigError> {
        self.0.set_max_key_bytes(max_key_bytes)?;
        self.report_setting("max_key_bytes");
        Ok(())
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let is_in_use = self.0.is_in_use.load(Ordering::Relaxed);
        let layer = LayerKind::CircuitBreaker.as_str();
        settings_changed!(breaker, is_in_use, layer, self.0.template.named(), key);
    }

    /// Returns the size and the counters of the map.
    #[must_use]
    pub fn snapshot(&self) -> KeyedCircuitBreakerSnapshot {
        KeyedCircuitBreakerSnapshot {
            circuits: self.0.map.len(),
            max_keys: self.0.max_keys.load(Ordering::Relaxed),
            max_key_bytes: self.0.max_key_bytes.load(Ordering::Relaxed),
            evicted: self.0.evicted.load(Ordering::Relaxed),
            uncovered: self.0.uncovered.load(Ordering::Relaxed),
            oversized: self.0.oversized.load(Ordering::Relaxed),
        }
    }
}

#[cfg(feature = "observe")]
impl<Q> KeyedCircuitBreakerHandle<Q> {
    pub(super) fn circuits(&self) -> &Arc<Circuits<Q>> {
        &self.0
    }
}

#[cfg(feature = "observe")]
impl<Q> Circuits<Q> {
    pub(super) fn named(&self) -> &str {
        self.template.named()
    }

    /// Returns the state of each circuit, with the name of its key if `with_names`.
    pub(super) fn of_keys(&self, with_names: bool) -> Vec<KeyedCircuit> {
        let prefix = self.template.named();
        let name = |circuit: &Circuit| {
            circuit.named().strip_prefix(prefix).unwrap_or_default().trim_start().to_owned()
        };
        let read = |circuit: &Circuit| KeyedCircuit {
            key: if with_names { name(circuit) } else { String::new() },
            state: circuit.state().0,
            rejected: circuit.rejected().iter().sum(),
        };
        let mut circuits = Vec::with_capacity(self.map.len());
        self.map.for_each(|entry| circuits.push(read(entry.value.state())));
        circuits
    }
}

/// The state of the circuit of one key.
#[cfg(feature = "observe")]
pub(super) struct KeyedCircuit {
    /// The name of the key, without the name of the layer. Empty if the circuits have no names of their own.
    pub(super) key: String,
    pub(super) state: CircuitState,
    pub(super) rejected: u64,
}

#[cfg(feature = "observe")]
impl KeyedCircuit {
    /// Returns the sort key of a circuit: circuits with names first, of these the ones that are not closed, and of
    /// these the ones that have rejected the most calls.
    pub(super) fn rank(&self) -> impl Ord + '_ {
        let is_closed = self.state == CircuitState::Closed;
        (self.key.is_empty(), is_closed, Reverse(self.rejected), &self.key)
    }

    /// Returns the number of circuits in each state, in the order of [`CircuitState::ALL`].
    pub(super) fn count_states(circuits: &[Self]) -> [u64; CircuitState::ALL.len()] {
        let mut counts = [0; CircuitState::ALL.len()];
        circuits.iter().for_each(|circuit| counts[circuit.state as usize] += 1);
        counts
    }
}

fn handle(circuit: &ShardedRef<Circuit>) -> CircuitBreakerHandle {
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
