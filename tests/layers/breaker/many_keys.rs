//! A map of circuits whose keys an untrusted client chooses.

use std::{
    sync::{Arc, Barrier, Mutex, OnceLock, mpsc},
    thread,
    time::Duration,
};

use buttress::{
    BoxError, Deadline,
    breaker::{KeyedCircuitBreaker, KeyedCircuitBreakerHandle, Origin, PerOrigin},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{Instant, advance};
use tower::{Layer, Service, ServiceExt, util::ServiceFn};

use super::fixtures::*;
use crate::support::{empty, refused_as, tracing_events::listen};

const DAY: Duration = Duration::from_secs(86_400);

fn to(host: &str) -> Request<()> {
    Request::get(format!("http://{host}/")).body(()).unwrap()
}

type Upstream =
    ServiceFn<fn(Request<()>) -> std::future::Ready<Result<Response<Full<Bytes>>, BoxError>>>;
type Client = KeyedCircuitBreaker<Upstream, PerOrigin, Origin>;

/// A client of upstreams that fail if their host name begins with `down`.
fn client(layer: CircuitBreakerLayer) -> (Client, KeyedCircuitBreakerHandle<Origin>) {
    client_with_max(layer, 1024)
}

fn client_with_max(
    layer: CircuitBreakerLayer,
    max_keys: usize,
) -> (Client, KeyedCircuitBreakerHandle<Origin>) {
    fn upstream(
        request: Request<()>,
    ) -> std::future::Ready<Result<Response<Full<Bytes>>, BoxError>> {
        let is_down = request.uri().host().is_some_and(|host| host.starts_with("down"));
        std::future::ready(if is_down { Err("down".into()) } else { Ok(Response::default()) })
    }
    let layer = layer.per_origin().max_keys(max_keys);
    (layer.layer(tower::service_fn(upstream as fn(_) -> _)), layer.handle())
}

/// Makes a call. Returns whether it was rejected.
async fn is_rejected(client: &Client, host: &str) -> bool {
    let result = client.clone().oneshot(to(host)).await;
    result.is_err_and(|error| buttress::Rejected::find(&*error).is_some())
}

fn find(handle: &KeyedCircuitBreakerHandle<Origin>, host: &str) -> Option<CircuitBreakerHandle> {
    handle.get(&Origin::of(to(host).uri()))
}

// ===== Old keys =====

/// Rules with each kind of memory.
fn rules() -> Vec<CircuitBreakerLayer> {
    let secs = Duration::from_secs;
    let ratio = || Trip::failure_ratio(0.5).min_calls(5);
    vec![
        CircuitBreakerLayer::http(),
        CircuitBreakerLayer::new(ratio()),
        CircuitBreakerLayer::new(ratio().within(secs(3600))),
        CircuitBreakerLayer::new(ratio().over(100)),
        CircuitBreakerLayer::new(Trip::slow_ratio(0.5, secs(1)).over(100)),
        CircuitBreakerLayer::new(Trip::any([Trip::consecutive(5), ratio(), Trip::when(|_| false)])),
        CircuitBreakerLayer::http().open_for(OpenDuration::backoff(secs(1), secs(600))),
        CircuitBreakerLayer::http().ramp(secs(60)).half_open_of(1, 3),
    ]
}

/// A day after `calls` failures of each of 1024 keys, 50 new origins get circuits that work.
async fn new_origins_get_circuits_after_failures(layer: CircuitBreakerLayer, calls: usize) {
    let (client, handle) = client(layer);
    for n in 0..1024 {
        for _ in 0..calls {
            is_rejected(&client, &format!("down{n}")).await;
        }
    }
    assert_eq!(handle.snapshot().circuits, 1024);
    advance(DAY).await;
    for n in 0..50 {
        assert!(!is_rejected(&client, &format!("new{n}")).await);
        assert!(find(&handle, &format!("new{n}")).is_some(), "{n}");
    }
    for _ in 0..5 {
        assert!(!is_rejected(&client, "down-new").await);
    }
    for n in 0..100 {
        assert!(!is_rejected(&client, &format!("new{n}")).await);
        assert!(find(&handle, &format!("new{n}")).is_some(), "{n}");
    }
    assert_eq!((handle.snapshot().circuits, handle.snapshot().uncovered), (1024, 0));
}

#[tokio::test(start_paused = true)]
async fn keys_that_failed_once_do_not_block_new_keys_a_day_later() {
    for layer in rules() {
        new_origins_get_circuits_after_failures(layer, 1).await;
    }
}

#[tokio::test(start_paused = true)]
async fn keys_that_tripped_do_not_block_new_keys_a_day_later() {
    for layer in rules() {
        new_origins_get_circuits_after_failures(layer, 6).await;
    }
}

#[tokio::test(start_paused = true)]
async fn least_recently_used_circuit_is_evicted_first() {
    let (client, handle) = client_with_max(CircuitBreakerLayer::http(), 4);
    for host in ["a", "b", "c", "d", "a", "c"] {
        is_rejected(&client, host).await;
    }
    for (new, evicted) in [("e", "b"), ("f", "d")] {
        is_rejected(&client, new).await;
        let hosts: Vec<_> = handle.all().iter().map(|(origin, _)| origin.to_string()).collect();
        assert!(!hosts.contains(&format!("http://{evicted}")), "{hosts:?}");
        assert_eq!(hosts.len(), 4);
    }
    // A failure is recorded with its time, so the order of the failures decides here.
    let (client, handle) = client_with_max(CircuitBreakerLayer::http(), 3);
    for host in ["down1", "down2", "down3", "down3", "down1", "down2"] {
        is_rejected(&client, host).await;
        advance(secs(1)).await;
    }
    advance(DAY).await;
    is_rejected(&client, "new").await;
    assert!(find(&handle, "down3").is_none());
}

#[tokio::test(start_paused = true)]
async fn failures_count_for_a_quiet_period() {
    for (layer, quiet) in [
        (CircuitBreakerLayer::http(), 60),
        (CircuitBreakerLayer::new(Trip::failure_ratio(1.0).over(10).min_calls(5)), 60),
        (CircuitBreakerLayer::new(Trip::failure_ratio(1.0).within(secs(600))), 600),
    ] {
        let (client, handle) = client_with_max(layer, 1);
        is_rejected(&client, "down").await;
        for _ in 0..quiet - 1 {
            advance(secs(1)).await;
            is_rejected(&client, "new").await;
            assert!(find(&handle, "down").is_some());
        }
        advance(secs(1)).await;
        is_rejected(&client, "new").await;
        assert!(find(&handle, "down").is_none() && find(&handle, "new").is_some());
        assert_eq!(handle.snapshot().uncovered, quiet - 1);
    }
}

#[tokio::test(start_paused = true)]
async fn half_open_circuit_is_evicted_after_its_own_open_time_without_calls() {
    for read_state in [false, true] {
        let (client, handle) = client_with_max(touchy(), 1);
        is_rejected(&client, "down").await;
        advance(WAIT).await;
        if read_state {
            assert_eq!(find(&handle, "down").unwrap().state(), CircuitState::HalfOpen);
        }
        advance(WAIT - ms(1)).await;
        assert!(!is_rejected(&client, "new").await);
        assert!(find(&handle, "down").is_some());
        advance(secs(1)).await;
        assert!(!is_rejected(&client, "new").await);
        assert!(find(&handle, "down").is_none() && find(&handle, "new").is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn half_open_circuit_is_not_evicted_soon_after_a_probe() {
    let (client, handle) = client_with_max(touchy().half_open_of(2, 3), 1);
    is_rejected(&client, "down").await;
    advance(2 * WAIT - ms(1)).await;
    assert!(!is_rejected(&client, "down").await, "the first of two necessary probes fails");
    advance(WAIT - ms(1)).await;
    is_rejected(&client, "new").await;
    assert!(find(&handle, "down").is_some());
}

// ===== Invented keys =====

#[tokio::test(start_paused = true)]
async fn open_circuit_is_not_evicted_by_any_number_of_names() {
    let (client, handle) = client(touchy());
    is_rejected(&client, "down").await;
    for n in 0..100_000 {
        let host = if n % 7 == 0 { format!("down{n}") } else { format!("host{n}") };
        assert!(!is_rejected(&client, &host).await);
        if n % 5000 == 0 {
            advance(ms(1000)).await;
            assert!(is_rejected(&client, "down").await);
        }
    }
    assert!(is_rejected(&client, "down").await);
    let snapshot = handle.snapshot();
    assert!(snapshot.circuits <= 1024 && snapshot.uncovered > 0, "{snapshot:?}");
}

#[tokio::test(start_paused = true)]
async fn circuits_changed_by_their_handle_are_not_evicted() {
    type Change = fn(CircuitBreakerHandle) -> Option<buttress::breaker::Isolation>;
    let changes: [Change; 4] = [
        |handle| {
            handle.force_open();
            None
        },
        |handle| {
            handle.force_closed();
            None
        },
        |handle| {
            handle.set_shadow(true);
            None
        },
        |handle| Some(handle.isolate()),
    ];
    for change in changes {
        let (client, handle) = client_with_max(touchy(), 1);
        is_rejected(&client, "kept").await;
        let _isolation = change(find(&handle, "kept").unwrap());
        advance(DAY).await;
        assert!(!is_rejected(&client, "new").await);
        assert!(find(&handle, "kept").is_some() && find(&handle, "new").is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn keys_larger_than_the_maximum_have_no_circuit() {
    let (client, handle) = client(touchy());
    for n in 0..100 {
        let host = format!("down{n}{}", "x".repeat(60_000));
        for _ in 0..2 {
            assert!(!is_rejected(&client, &host).await);
        }
        assert!(find(&handle, &host).is_none());
    }
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.circuits, snapshot.uncovered, snapshot.oversized), (0, 200, 200));

    let layer = touchy().keyed(|request: &Request<()>| request.uri().path().to_owned());
    let layer = layer.max_key_bytes(9);
    let (inner, _) = Strict::new();
    let service = layer.layer(inner);
    for path in ["/1234567", "/12345678"] {
        let request = Request::get(path).body(()).unwrap();
        assert!(service.clone().oneshot(request).await.is_ok());
    }
    assert!(layer.handle().get(&"/1234567".to_owned()).is_some());
    assert_eq!((layer.handle().all().len(), layer.handle().snapshot().oversized), (1, 1));
    assert_eq!(layer.max_key_bytes(0).checked().unwrap_err().field, "max_key_bytes");
}

#[tokio::test(start_paused = true)]
async fn name_of_a_circuit_is_bounded() {
    let layer = touchy().name("search").per_origin().max_key_bytes(100_000);
    let (inner, watch) = Strict::new();
    watch.script([Then::Fail(Oops("down"))]);
    let service = layer.layer(inner);
    let host = "x".repeat(60_000);
    assert!(service.clone().oneshot(to(&host)).await.is_err());
    let rejected = service.oneshot(to(&host)).await.unwrap_err();
    let rejected = buttress::Rejected::find(&*rejected).unwrap().clone();
    let expected = format!("search http://{}\u{2026}", "x".repeat(249));
    assert_eq!(rejected.name(), Some(expected.as_str()));
}

#[tokio::test(start_paused = true)]
async fn call_without_a_circuit_is_rejected_only_after_its_deadline() {
    let layer = touchy().per_origin().max_keys(1);
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    watch.script([Then::Fail(Oops("down"))]);
    assert!(service.clone().oneshot(to("down")).await.is_err());
    let with_deadline = |after: Duration| {
        let mut request = to("new");
        request.extensions_mut().insert(Deadline::new(Instant::now() + after));
        request
    };
    watch.script([Then::Answer(empty())]);
    assert!(service.clone().oneshot(with_deadline(secs(1))).await.is_ok());
    let late = service.clone().oneshot(with_deadline(Duration::ZERO)).await;
    assert_eq!(refused_as(late), RejectedKind::DeadlinePassed);
    // While the inner service is not ready.
    watch.set_ready(false);
    let mut call = tokio_test::task::spawn(service.clone().call(with_deadline(secs(1))));
    tokio_test::assert_pending!(call.poll());
    advance(secs(2)).await;
    assert_eq!(refused_as(tokio_test::assert_ready!(call.poll())), RejectedKind::DeadlinePassed);
    assert_eq!(layer.handle().snapshot().uncovered, 3);
    assert_eq!(watch.seen().reserved, 0);
}

// ===== Locks =====

/// Calls a closure in each event, and counts the events with this message.
struct Subscriber {
    message: &'static str,
    events: Mutex<usize>,
    then: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Subscriber {
    fn new(message: &'static str) -> Arc<Self> {
        Arc::new(Self { message, events: Mutex::default(), then: OnceLock::new() })
    }
}

struct Listens(Arc<Subscriber>);

struct Message<'a>(&'a str, bool);

impl tracing::field::Visit for Message<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.1 |= field.name() == "message" && format!("{value:?}") == self.0;
    }
}

impl tracing::Subscriber for Listens {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut message = Message(self.0.message, false);
        event.record(&mut message);
        *self.0.events.lock().unwrap() += usize::from(message.1);
        if let Some(then) = self.0.then.get() {
            then();
        }
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Runs a test on a thread of its own, and fails if the thread does not end.
fn within_a_minute(test: impl AsyncFnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(test());
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(60)).expect("hangs or has failed");
}

#[test]
fn subscriber_may_call_the_handle_in_every_event() {
    within_a_minute(async || {
        let subscriber = Subscriber::new("circuit opened");
        let _guard = listen(Listens(subscriber.clone()));
        let (client, handle) = client_with_max(touchy(), 8);
        let listens = handle.clone();
        let calls_handle = move || {
            for (key, circuit) in listens.all() {
                let _ = (circuit.state(), circuit.snapshot(), listens.get(&key));
            }
            let _ = listens.snapshot();
        };
        assert!(subscriber.then.set(Box::new(calls_handle)).is_ok());
        for n in 0..200 {
            is_rejected(&client, &format!("down{n}")).await;
            is_rejected(&client, &format!("down{n}")).await;
            // Open circuits become half-open, and like new.
            advance(WAIT / 2).await;
        }
        assert!(handle.snapshot().evicted > 100);
        assert!(*subscriber.events.lock().unwrap() > 100);
    });
}

#[test]
fn calls_without_a_circuit_are_reported_once_in_ten_seconds() {
    within_a_minute(async || {
        let subscriber = Subscriber::new("calls are made without a circuit");
        let _guard = listen(Listens(subscriber.clone()));
        let (client, handle) = client_with_max(touchy(), 1);
        is_rejected(&client, "down").await;
        for n in 0..1000 {
            is_rejected(&client, &format!("host{n}")).await;
            advance(ms(25)).await;
        }
        assert_eq!(handle.snapshot().uncovered, 1000);
        assert_eq!(*subscriber.events.lock().unwrap(), 3);
    });
}

/// A key whose destructor, and whose `Clone`, call the handle.
#[derive(PartialEq, Eq, Hash)]
struct Reentrant(u64);

static REENTRANT: OnceLock<KeyedCircuitBreakerHandle<Reentrant>> = OnceLock::new();

fn call_handle() {
    thread_local!(static IS_CALLING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
    if let Some(handle) = REENTRANT.get().filter(|_| !IS_CALLING.replace(true)) {
        let _ = (handle.all(), handle.snapshot());
        IS_CALLING.set(false);
    }
}

impl Clone for Reentrant {
    fn clone(&self) -> Self {
        call_handle();
        Self(self.0)
    }
}

impl Drop for Reentrant {
    fn drop(&mut self) {
        call_handle();
    }
}

#[test]
fn destructor_and_clone_of_a_key_may_call_the_handle() {
    within_a_minute(async || {
        let layer = touchy().keyed(|n: &u64| Reentrant(*n)).max_keys(8).per_response();
        assert!(REENTRANT.set(layer.handle()).is_ok());
        let service = layer.layer(tower::service_fn(|n: u64| async move { Ok::<_, BoxError>(n) }));
        for n in 0..200 {
            assert!(service.clone().oneshot(n).await.is_ok());
        }
        assert_eq!(layer.handle().snapshot().evicted, 192);
    });
}

/// A key that panics in `Eq` or `Hash`.
#[derive(Clone, Debug)]
struct Panics(u64);

impl PartialEq for Panics {
    fn eq(&self, other: &Self) -> bool {
        assert!(other.0 != 7 && self.0 != 7, "eq");
        self.0 == other.0
    }
}

impl Eq for Panics {}

impl std::hash::Hash for Panics {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        assert!(self.0 != 8, "hash");
        // All keys collide.
        state.write_u64(0);
    }
}

#[tokio::test(start_paused = true)]
async fn key_that_panics_leaves_the_map_intact() {
    let layer = touchy().keyed(|n: &u64| Panics(*n)).per_response();
    let service = layer.layer(tower::service_fn(|n: u64| async move { Ok::<_, BoxError>(n) }));
    for n in [1, 7, 8, 2, 7, 8, 3] {
        let call = tokio::spawn(service.clone().oneshot(n)).await;
        assert_eq!(call.is_err(), n > 6, "{n}");
    }
    let snapshot = layer.handle().snapshot();
    assert_eq!((snapshot.circuits, layer.handle().all().len()), (3, 3));
    // The keys collide, so all of them are in one shard, which is full with 64. There is no other effect.
    for n in 100..200 {
        assert!(service.clone().oneshot(n).await.is_ok());
    }
    assert_eq!(layer.handle().snapshot().circuits, 64);
}

#[test]
fn threads_share_one_circuit_per_key_under_eviction() {
    let layer = touchy().keyed(|n: &u64| *n).max_keys(64).per_response();
    let service = layer.layer(tower::service_fn(|n: u64| async move {
        if n == 0 { Err(BoxError::from("down")) } else { Ok(n) }
    }));
    let barrier = Arc::new(Barrier::new(4));
    let threads: Vec<_> = (0..4_u64)
        .map(|thread| {
            let (service, barrier, handle) = (service.clone(), barrier.clone(), layer.handle());
            thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
                runtime.unwrap().block_on(async {
                    barrier.wait();
                    let mut reached = 0;
                    for n in 0..5000 {
                        let key = 1 + (n * 7 + thread * 13) % 300;
                        assert!(service.clone().oneshot(key).await.is_ok());
                        let down = service.clone().oneshot(0).await.unwrap_err();
                        reached += usize::from(buttress::Rejected::find(&*down).is_none());
                        if n % 100 == 0 {
                            let all = handle.all();
                            assert!(all.len() <= 64);
                            let keys: std::collections::BTreeSet<_> =
                                all.iter().map(|(key, _)| *key).collect();
                            assert_eq!(keys.len(), all.len(), "one circuit per key");
                        }
                    }
                    reached
                })
            })
        })
        .collect();
    let reached: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!((1..=4).contains(&reached), "{reached} calls reached the upstream that is down");
    assert_eq!(layer.handle().get(&0).unwrap().state(), CircuitState::Open);
}
