//! The options of a `HealthProbeLayer`.

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    sync::{
        Arc, Mutex,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::Poll,
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, Health, HealthProbeLayer, Outcome, Rejected, Trip,
    breaker::CircuitState,
    health::{FailOpen, Get, ProbeFailure, ProbeState},
    outcome::RejectedKind,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{settle, within_an_hour};

type Req = Request<Full<Bytes>>;
type Answer = Response<BoxBody<Bytes, Infallible>>;

const EVERY: Duration = Duration::from_secs(5);

/// Returns a layer that probes at 0 s, 5 s, 10 s, …, with thresholds of 1.
fn exact() -> HealthProbeLayer<Get<Full<Bytes>>> {
    HealthProbeLayer::get("/healthz").jitter(0.0).every(EVERY).thresholds(1, 1)
}

fn call() -> Req {
    Request::new(Full::default())
}

fn kind(error: &BoxError) -> RejectedKind {
    Rejected::find(&**error).expect("a rejection").kind()
}

/// An upstream that can be switched off. It counts probes and calls separately.
#[derive(Clone, Default)]
struct Upstream {
    down: Arc<AtomicBool>,
    calls_fail: Arc<AtomicBool>,
    probes: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
}

impl Upstream {
    fn service(
        &self,
    ) -> impl Service<Req, Response = Answer, Error = BoxError, Future: Send> + Clone + Send + use<>
    {
        let here = self.clone();
        service_fn(move |request: Req| {
            let probe = request.uri().path() == "/healthz";
            if probe { &here.probes } else { &here.calls }.fetch_add(1, SeqCst);
            let fails = here.down.load(SeqCst) || !probe && here.calls_fail.load(SeqCst);
            async move {
                let mut response = Response::new(Full::from("well").boxed());
                if fails {
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                }
                Ok(response)
            }
        })
    }

    fn probes(&self) -> usize {
        self.probes.load(SeqCst)
    }
}

// ===== Expected responses =====

#[tokio::test(start_paused = true)]
async fn expected_statuses_and_bodies_pass() {
    let answer = |status: u16, body: BoxBody<Bytes, Infallible>| {
        let body = Arc::new(Mutex::new(Some(body)));
        service_fn(move |_: Req| {
            let mut response = Response::new(body.lock().unwrap().take().unwrap());
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            async move { Ok::<_, BoxError>(response) }
        })
    };
    let text = |text: &'static str| Full::from(text).boxed();
    let big = || Full::from(vec![b'x'; 65 * 1024]).boxed();
    let status = |code| Err(ProbeFailure::Status(StatusCode::from_u16(code).unwrap()));
    let hangs = || {
        let (sender, body) = http_body_util::channel::Channel::<Bytes, Infallible>::new(1);
        std::mem::forget(sender);
        body.boxed()
    };
    let moved = |layer: HealthProbeLayer<Get<Full<Bytes>>>| {
        layer.expect_status(|status| status.is_success() || status == StatusCode::UNAUTHORIZED)
    };
    let well =
        |layer: HealthProbeLayer<Get<Full<Bytes>>>| layer.expect_body(|body| body == b"well");
    for (layer, service, result) in [
        (exact(), answer(200, text("")), Ok(())),
        (exact(), answer(401, text("")), status(401)),
        (moved(exact()), answer(401, text("")), Ok(())),
        (moved(exact()), answer(204, text("")), Ok(())),
        (moved(exact()), answer(403, text("")), status(403)),
        (well(exact()), answer(200, text("well")), Ok(())),
        (well(exact()), answer(200, text("ill")), Err(ProbeFailure::Classified)),
        (well(exact()), answer(500, text("well")), status(500)),
        (exact(), answer(200, big()), Ok(())),
        (exact().expect_body(|_| true), answer(200, big()), Err(ProbeFailure::Classified)),
        (exact(), answer(200, hangs()), Ok(())),
        (well(exact()), answer(200, hangs()), Err(ProbeFailure::TimedOut)),
        (
            exact().expect_body(|_| panic!("scripted panic")),
            answer(200, text("")),
            Err(ProbeFailure::Panicked),
        ),
    ] {
        let handle = layer.handle();
        let _service = layer.layer(service);
        within_an_hour(handle.changed()).await;
        assert_eq!(handle.snapshot().last.unwrap().result, result);
    }
}

#[tokio::test(start_paused = true)]
async fn a_grpc_probe_calls_the_health_service() {
    #[derive(Clone, Copy)]
    enum Says {
        Status(i32),
        Code(u16),
        CodeInHead(u16),
        Nothing,
        Http(u16),
        Garbage,
    }
    for (says, result) in [
        (Says::Status(1), Ok(())),
        (Says::Status(0), Err(ProbeFailure::NotServing)),
        (Says::Status(2), Err(ProbeFailure::NotServing)),
        (Says::Status(3), Err(ProbeFailure::NotServing)),
        (Says::Code(5), Err(ProbeFailure::GrpcStatus(5))),
        (Says::CodeInHead(14), Err(ProbeFailure::GrpcStatus(14))),
        // gRFC A17: a server without the health service (UNIMPLEMENTED) counts as healthy.
        (Says::CodeInHead(12), Ok(())),
        (Says::Nothing, Err(ProbeFailure::Body)),
        (Says::Http(502), Err(ProbeFailure::Status(StatusCode::BAD_GATEWAY))),
        (Says::Garbage, Err(ProbeFailure::NotServing)),
    ] {
        let service = service_fn(move |request: Req| async move {
            assert_eq!(request.uri(), "http://search:50051/grpc.health.v1.Health/Check");
            assert_eq!((request.method().as_str(), request.version()), ("POST", Version::HTTP_2));
            assert_eq!(request.headers()["content-type"], "application/grpc");
            assert_eq!(request.headers()["te"], "trailers");
            let asked = request.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(&asked[..], b"\0\0\0\0\x03\x0a\x01s");
            let trailers = |code: u16| {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", code.into());
                std::future::ready(Some(Ok(trailers)))
            };
            let frame = |status: u8| -> Full<Bytes> {
                match status {
                    0 => Full::from(vec![0, 0, 0, 0, 0]),
                    status => Full::from(vec![0, 0, 0, 0, 2, 8, status]),
                }
            };
            let body: BoxBody<Bytes, Infallible> = match says {
                Says::Status(status) => frame(status as u8).with_trailers(trailers(0)).boxed(),
                Says::Code(code) => Full::default().with_trailers(trailers(code)).boxed(),
                Says::Garbage => Full::from("?").with_trailers(trailers(0)).boxed(),
                _ => Full::default().boxed(),
            };
            let mut response = Response::new(body);
            match says {
                Says::CodeInHead(code) => {
                    response.headers_mut().insert("grpc-status", code.into());
                }
                Says::Http(status) => {
                    *response.status_mut() = StatusCode::from_u16(status).unwrap()
                }
                _ => {}
            }
            Ok::<_, BoxError>(response)
        });
        let layer = HealthProbeLayer::grpc("http://search:50051/", "s", Full::new).thresholds(1, 1);
        let handle = layer.handle();
        let _service = layer.layer(service);
        within_an_hour(handle.changed()).await;
        assert_eq!(handle.snapshot().last.unwrap().result, result);
    }
    let bad = HealthProbeLayer::grpc("search:50051", "", Full::<Bytes>::new);
    assert_eq!(bad.checked().unwrap_err().field, "grpc.origin");
    assert!(HealthProbeLayer::grpc("/", "", Full::<Bytes>::new).checked().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_check_probe_runs_a_closure_instead_of_the_service() {
    let (upstream, lag) = (Upstream::default(), Arc::new(AtomicUsize::new(0)));
    let here = lag.clone();
    let layer = HealthProbeLayer::check(move || {
        let lag = here.load(SeqCst);
        async move {
            match lag {
                0..10 => Ok(()),
                99 => pending().await,
                _ => Err("lags behind"),
            }
        }
    })
    .thresholds(1, 1);
    let handle = layer.handle();
    let service = layer.layer(upstream.service());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    lag.store(10, SeqCst);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(handle.snapshot().last.unwrap().result, Err(ProbeFailure::Error));
    lag.store(99, SeqCst);
    sleep(3 * EVERY).await;
    assert_eq!(handle.snapshot().last.unwrap().result, Err(ProbeFailure::TimedOut));
    assert_eq!(
        kind(&service.oneshot(call()).await.map(drop).unwrap_err()),
        RejectedKind::Unhealthy
    );
    assert_eq!((upstream.probes(), upstream.calls.load(SeqCst)), (0, 0));
    // The layer works for any request and response types.
    let layer = HealthProbeLayer::check(|| async { Ok::<(), ()>(()) }).per_response();
    let doubles = layer.layer(service_fn(|n: u32| async move { Ok::<_, Infallible>(2 * n) }));
    assert_eq!(doubles.oneshot(21).await.unwrap(), 42);
}

// ===== Schedule =====

#[tokio::test(start_paused = true)]
async fn probes_are_more_frequent_while_down() {
    let upstream = Upstream::default();
    let layer = exact().thresholds(2, 3).immediate_failure(false);
    let layer = layer.every_while_down(Duration::from_secs(1));
    let handle = layer.handle();
    let service = layer.layer(upstream.service());
    let began = Instant::now();
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    upstream.down.store(true, SeqCst);
    // The probes fail at 5 s, 6 s and 7 s.
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(began.elapsed(), Duration::from_secs(7));
    let refused = service.oneshot(call()).await.map(drop).unwrap_err();
    let hint = Rejected::find(&*refused).unwrap().retry_after();
    assert_eq!(hint, Some(Duration::from_secs(1)));
    upstream.down.store(false, SeqCst);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    assert_eq!(began.elapsed(), Duration::from_secs(9));
    sleep(EVERY - Duration::from_millis(1)).await;
    assert_eq!(upstream.probes(), 6);
    let bad = exact().every_while_down(Duration::ZERO).checked();
    assert_eq!(bad.unwrap_err().field, "every_while_down");
}

#[tokio::test(start_paused = true)]
async fn no_probe_while_calls_prove_health() {
    let (upstream, health) = (Upstream::default(), Health::new());
    let layer = exact().passive().report_to(&health, "search");
    let handle = layer.handle();
    let service = layer.layer(upstream.service());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    let traffic = async |calls: u32| {
        for _ in 0..calls {
            let response = service.clone().oneshot(call()).await.unwrap();
            response.into_body().collect().await.unwrap();
        }
    };
    // The calls are made between two probes.
    sleep(Duration::from_secs(1)).await;
    for _ in 0..10 {
        traffic(3).await;
        sleep(EVERY).await;
    }
    assert_eq!((upstream.probes(), handle.snapshot().skipped), (1, 10));
    assert!(health.snapshot()[0].age.unwrap() <= EVERY);
    // Without calls, the layer probes again.
    sleep(3 * EVERY).await;
    assert_eq!((upstream.probes(), handle.snapshot().skipped), (4, 10));
    // A success does not replace a probe if another call has failed.
    traffic(1).await;
    upstream.calls_fail.store(true, SeqCst);
    traffic(1).await;
    sleep(EVERY).await;
    assert_eq!((upstream.probes(), handle.state()), (5, ProbeState::Up));
    // A cancelled call does not replace a probe.
    upstream.calls_fail.store(false, SeqCst);
    drop(service.clone().ready().await.unwrap().call(call()));
    sleep(EVERY).await;
    assert_eq!(upstream.probes(), 6);
    // While the upstream is down, no probe is skipped.
    upstream.down.store(true, SeqCst);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    let probes = upstream.probes();
    sleep(3 * EVERY + EVERY / 2).await;
    assert_eq!(upstream.probes(), probes + 3);
}

#[tokio::test(start_paused = true)]
async fn calls_do_not_replace_probes_unless_the_layer_is_passive() {
    let upstream = Upstream::default();
    let layer = exact();
    let handle = layer.handle();
    let service = layer.layer(upstream.service());
    for _ in 0..10 {
        service.clone().oneshot(call()).await.unwrap();
        sleep(EVERY).await;
    }
    assert_eq!((upstream.probes(), handle.snapshot().skipped), (10, 0));
}

// ===== Calls while the upstream is down =====

#[tokio::test(start_paused = true)]
async fn shadow_mode_admits_calls_and_reports_to_the_registry() {
    let (upstream, health) = (Upstream::default(), Health::new());
    upstream.down.store(true, SeqCst);
    let layer = exact().shadow().report_to(&health, "search");
    let handle = layer.handle();
    let service = layer.layer(upstream.service());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert!(!health.is_ready());
    assert_eq!(service.oneshot(call()).await.unwrap().status(), 503);
    let snapshot = handle.snapshot();
    assert_eq!((upstream.calls.load(SeqCst), snapshot.rejected, snapshot.shadowed), (1, 0, 1));
    handle.set_shadow(false);
    let error = layer.layer(upstream.service()).oneshot(call()).await.unwrap_err();
    assert_eq!(kind(&error), RejectedKind::Unhealthy);
    assert_eq!(handle.snapshot().rejected, 1);
}

#[tokio::test(start_paused = true)]
async fn backpressure_makes_the_service_not_ready_while_down() {
    let upstream = Upstream::default();
    let layer = exact().backpressure();
    let handle = layer.handle();
    let mut service = layer.layer(upstream.service());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    service.ready().await.unwrap();
    upstream.down.store(true, SeqCst);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    // A second poll is pending, although the first one was ready.
    let again =
        poll_fn(|cx| Poll::Ready(Service::<Req>::poll_ready(&mut service, cx).is_pending()));
    assert!(again.await);
    // A call after `Pending` is rejected.
    assert_eq!(kind(&service.call(call()).await.map(drop).unwrap_err()), RejectedKind::Unhealthy);

    let waiting = tokio::spawn(service.clone().oneshot(call()));
    sleep(10 * EVERY).await;
    assert!(!waiting.is_finished());
    upstream.down.store(false, SeqCst);
    assert_eq!(within_an_hour(waiting).await.unwrap().unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn fail_open_admits_calls_when_a_whole_set_is_down() {
    let guard = FailOpen::new();
    let replicas = [Upstream::default(), Upstream::default(), Upstream::default()];
    let layers = [(); 3].map(|()| exact().fail_open(&guard).backpressure());
    let handles = layers.each_ref().map(HealthProbeLayer::handle);
    let mut services: Vec<_> = layers
        .iter()
        .zip(&replicas)
        .map(|(layer, replica)| layer.layer(replica.service()))
        .collect();
    settle().await;
    for n in [0, 1] {
        replicas[n].down.store(true, SeqCst);
        assert_eq!(within_an_hour(handles[n].changed()).await, ProbeState::Down);
        assert!(!guard.is_active());
        let refused = services[n].call(call()).await.map(drop).unwrap_err();
        assert_eq!(kind(&refused), RejectedKind::Unhealthy);
    }
    let waiting = tokio::spawn(services[0].clone().oneshot(call()));
    settle().await;
    assert!(!waiting.is_finished());
    replicas[2].down.store(true, SeqCst);
    assert_eq!(within_an_hour(handles[2].changed()).await, ProbeState::Down);
    assert!(guard.is_active());
    // The waiting caller is woken, although the state of its own upstream has not changed.
    assert_eq!(within_an_hour(waiting).await.unwrap().unwrap().status(), 503);
    for service in &mut services {
        assert_eq!(
            within_an_hour(service.ready()).await.unwrap().call(call()).await.unwrap().status(),
            503
        );
    }
    replicas[1].down.store(false, SeqCst);
    assert_eq!(within_an_hour(handles[1].changed()).await, ProbeState::Up);
    assert!(!guard.is_active());
    // A dropped member is not part of the set.
    drop((services, layers));
    let [first, second, third] = handles;
    drop(second);
    settle().await;
    assert!(guard.is_active());
    drop((first, third));
    settle().await;
    assert!(!guard.is_active());
}

// ===== Changes of a running layer =====

#[tokio::test(start_paused = true)]
async fn setter_of_a_layer_in_use_leaves_the_running_gate_unchanged() {
    let (upstream, health) = (Upstream::default(), Health::new());
    let base = exact().report_to(&health, "search").name("base");
    let service = base.layer(upstream.service());
    let forked = base.clone().shadow().name("forked");
    let (gate, fork) = (base.handle(), forked.handle());
    upstream.down.store(true, SeqCst);
    assert_eq!(within_an_hour(gate.changed()).await, ProbeState::Down);
    assert_eq!(fork.state(), ProbeState::Unknown);
    let error = service.oneshot(call()).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("base"));
    // The fork has a prober of its own, and does not report to the check of the other gate.
    let service = forked.layer(upstream.service());
    assert_eq!(within_an_hour(fork.changed()).await, ProbeState::Down);
    assert_eq!(service.oneshot(call()).await.unwrap().status(), 503);
    assert_eq!((gate.snapshot().rejected, fork.snapshot().shadowed), (1, 1));
    drop((base, gate));
    settle().await;
    assert_eq!(health.check("search"), None);
}

#[tokio::test(start_paused = true)]
async fn handle_changes_the_settings_of_a_running_layer() {
    let upstream = Upstream::default();
    let layer = exact();
    let handle = layer.handle();
    let _service = layer.layer(upstream.service());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    for error in [
        handle.set_every(Duration::ZERO),
        handle.set_every_while_down(Duration::ZERO),
        handle.set_jitter(1.1),
        handle.set_timeout(Duration::ZERO),
        handle.set_thresholds(0, 1),
    ] {
        error.unwrap_err();
    }
    handle.set_every(10 * EVERY).unwrap();
    handle.set_thresholds(1, 2).unwrap();
    handle.set_immediate_failure(false);
    // The delay that has begun ends as before.
    sleep(EVERY + Duration::from_secs(1)).await;
    assert_eq!(upstream.probes(), 2);
    upstream.down.store(true, SeqCst);
    sleep(10 * EVERY).await;
    assert_eq!((upstream.probes(), handle.state()), (3, ProbeState::Up));
    sleep(10 * EVERY).await;
    assert_eq!((upstream.probes(), handle.state()), (4, ProbeState::Down));
}

// ===== `on_probe` =====

/// The circuit opens for 12 s after three failures, and closes after three passed probes.
#[tokio::test(start_paused = true)]
async fn health_probes_replace_the_half_open_probes_of_a_breaker() {
    let upstream = Upstream::default();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(3))
        .open_for(Duration::from_secs(12))
        .half_open(3)
        .external_probes();
    let (circuit, wired) = (breaker.handle(), breaker.handle());
    let layer = exact().shadow().on_probe(move |result| {
        let outcome = match result {
            Ok(()) => Outcome::success(),
            Err(ProbeFailure::Rejected) => return,
            Err(_) => Outcome::failure(),
        };
        if wired.state() == CircuitState::HalfOpen {
            wired.record(outcome);
        }
    });
    let probe = layer.handle();
    let service = breaker.layer(layer.layer(upstream.service()));
    let began = Instant::now();
    upstream.down.store(true, SeqCst);
    // The probe at 0 s fails.
    assert_eq!(within_an_hour(probe.changed()).await, ProbeState::Down);
    for _ in 0..3 {
        assert_eq!(service.clone().oneshot(call()).await.unwrap().status(), 503);
    }
    assert_eq!(circuit.state(), CircuitState::Open);
    // Half-open from 12 s on; the probe at 15 s fails.
    for (state, at) in
        [(CircuitState::HalfOpen, 12), (CircuitState::Open, 15), (CircuitState::HalfOpen, 27)]
    {
        assert_eq!(within_an_hour(circuit.changed()).await, state);
        assert_eq!(began.elapsed().as_secs(), at);
        let refused = service.clone().oneshot(call()).await.map(drop).unwrap_err();
        assert!(Rejected::find(&*refused).is_some(), "no call serves as a half-open probe");
    }
    upstream.down.store(false, SeqCst);
    // The probes at 30 s, 35 s and 40 s pass.
    assert_eq!(within_an_hour(circuit.changed()).await, CircuitState::Closed);
    assert_eq!((began.elapsed().as_secs(), upstream.calls.load(SeqCst)), (40, 3));
    assert_eq!(service.oneshot(call()).await.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_panics_does_not_end_the_probes() {
    let (heard, upstream) = (Arc::new(AtomicUsize::new(0)), Upstream::default());
    let here = heard.clone();
    let layer = exact().on_probe(|_| panic!("scripted panic")).on_probe(move |result| {
        assert_eq!(result, Ok(()));
        here.fetch_add(1, Relaxed);
    });
    let handle = layer.handle();
    let _service = layer.layer(upstream.service());
    sleep(3 * EVERY + EVERY / 2).await;
    assert_eq!((heard.load(Relaxed), handle.state()), (4, ProbeState::Up));
}
