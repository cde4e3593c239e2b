//! `HealthProbeLayer` through its public API, with a paused clock.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    BoxError, Health, HealthProbe, HealthProbeLayer, Rejected,
    health::{CheckState, ProbeFailure, ProbeState},
    outcome::RejectedKind,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::{Instant, advance, sleep, timeout};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

use crate::support::{alive_tasks, settle, within_an_hour};

// ===== A scripted upstream =====

type Req = Request<Full<Bytes>>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Status(u16),
    Slow(Duration),
    Hang,
    Panic,
    Fail,
    Refuse,
    EndlessBody,
    EmptyFrames,
    TricklingBody,
    BrokenBody,
    HangingBody,
}

#[derive(Default)]
struct Seen {
    probes: AtomicUsize,
    calls: AtomicUsize,
    polls: AtomicUsize,
    under_way: AtomicUsize,
    peak: AtomicUsize,
    read: AtomicUsize,
    not_ready: AtomicBool,
}

/// Panics if it is called without readiness. Each clone has its own readiness.
struct Upstream {
    probe: Arc<Mutex<Mode>>,
    seen: Arc<Seen>,
    ready: bool,
}

impl Upstream {
    fn new() -> Self {
        let probe = Arc::new(Mutex::new(Mode::Status(200)));
        Self { probe, seen: Arc::default(), ready: false }
    }

    fn will(self, mode: Mode) -> Self {
        *self.probe.lock().unwrap() = mode;
        self
    }

    fn probes(&self) -> usize {
        self.seen.probes.load(SeqCst)
    }
}

impl Clone for Upstream {
    fn clone(&self) -> Self {
        Self { probe: self.probe.clone(), seen: self.seen.clone(), ready: false }
    }
}

struct UnderWay(Arc<Seen>);

impl UnderWay {
    fn new(seen: Arc<Seen>) -> Self {
        let now = seen.under_way.fetch_add(1, SeqCst) + 1;
        seen.peak.fetch_max(now, SeqCst);
        Self(seen)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, SeqCst);
    }
}

impl Service<Req> for Upstream {
    type Response = Response<Scripted>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.seen.polls.fetch_add(1, SeqCst);
        if self.seen.not_ready.load(SeqCst) {
            return Poll::Pending;
        }
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Req) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called without readiness");
        let seen = self.seen.clone();
        if request.uri().path() != "/healthz" {
            seen.calls.fetch_add(1, SeqCst);
            return Box::pin(async move {
                let body = Scripted { mode: Mode::Status(200), sent: 0, seen };
                Ok(Response::new(body))
            });
        }
        assert_eq!(
            (request.method(), request.body().size_hint().exact()),
            (&http::Method::GET, Some(0))
        );
        seen.probes.fetch_add(1, SeqCst);
        let mode = *self.probe.lock().unwrap();
        let under_way = UnderWay::new(seen.clone());
        Box::pin(async move {
            let _under_way = under_way;
            let mut status = 200;
            match mode {
                Mode::Status(told) => status = told,
                Mode::Slow(time) => sleep(time).await,
                Mode::Hang => std::future::pending().await,
                Mode::Panic => panic!("scripted panic of a probe"),
                Mode::Fail => return Err("failed".into()),
                Mode::Refuse => return Err(Rejected::new(RejectedKind::Full).into()),
                _ => {}
            }
            let mut response = Response::new(Scripted { mode, sent: 0, seen });
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            Ok(response)
        })
    }
}

/// A body of five bytes and a trailer, or the body that the mode selects.
struct Scripted {
    mode: Mode,
    sent: usize,
    seen: Arc<Seen>,
}

impl Body for Scripted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.sent += 1;
        let data = |size| Poll::Ready(Some(Ok(Frame::data(Bytes::from(vec![b'x'; size])))));
        match (self.mode, self.sent) {
            (Mode::EndlessBody, _) => {
                self.seen.read.fetch_add(1024, SeqCst);
                data(1024)
            }
            (Mode::EmptyFrames, _) => data(0),
            (Mode::HangingBody, _) => Poll::Pending,
            (Mode::TricklingBody, _) => {
                let waker = cx.waker().clone();
                tokio::spawn(async move {
                    sleep(Duration::from_millis(100)).await;
                    waker.wake();
                });
                if self.sent % 2 == 0 { data(1) } else { Poll::Pending }
            }
            (Mode::BrokenBody, 2) => Poll::Ready(Some(Err("broke off".into()))),
            (_, 1) => data(5),
            (_, 2) => {
                let mut trailers = http::HeaderMap::new();
                trailers.insert("x-end", "yes".parse().unwrap());
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            _ => Poll::Ready(None),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(5)
    }
}

// ===== Helpers =====

const EVERY: Duration = Duration::from_secs(5);

/// Returns a layer that probes at 0 s, 5 s, 10 s, …, with thresholds of 1.
fn exact() -> HealthProbeLayer<buttress::health::Get<Full<Bytes>>> {
    HealthProbeLayer::get("/healthz").jitter(0.0).every(EVERY).thresholds(1, 1)
}

fn call() -> Req {
    Request::new(Full::default())
}

fn kind(error: &BoxError) -> RejectedKind {
    Rejected::find(&**error).expect("a rejection").kind()
}

// ===== Probe results =====

#[tokio::test(start_paused = true)]
async fn the_first_probe_is_sent_at_once_and_is_sufficient() {
    let layer = exact().thresholds(9, 9);
    let handle = layer.handle();
    let began = Instant::now();
    let _service = layer.layer(Upstream::new());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    assert_eq!(began.elapsed(), Duration::ZERO);
    let last = handle.snapshot().last.unwrap();
    assert_eq!((last.result, last.took), (Ok(()), Duration::ZERO));
    advance(Duration::from_secs(2)).await;
    assert_eq!(handle.snapshot().last.unwrap().age, Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn a_gate_of_unknown_state_admits_calls() {
    let layer = exact().thresholds(1, 3);
    let handle = layer.handle();
    let service = layer.layer(Upstream::new().will(Mode::Status(500)));
    settle().await;
    assert_eq!(handle.snapshot().consecutive_failures, 1);
    assert_eq!(handle.state(), ProbeState::Unknown);
    assert!(service.oneshot(call()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn the_gate_changes_by_its_thresholds() {
    let layer = exact().thresholds(2, 3);
    let handle = layer.handle();
    let upstream = Upstream::new();
    let service = layer.layer(upstream.clone());
    let began = Instant::now();
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);

    *upstream.probe.lock().unwrap() = Mode::Status(500);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(began.elapsed(), 3 * EVERY);
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.consecutive_failures, snapshot.probes), (3, 4));
    let why = ProbeFailure::Status(StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(snapshot.last.unwrap().result, Err(why));

    let refused = service.clone().oneshot(call()).await.unwrap_err();
    assert_eq!(kind(&refused), RejectedKind::Unhealthy);
    assert_eq!(upstream.seen.calls.load(SeqCst), 0);
    assert_eq!(handle.snapshot().rejected, 1);

    *upstream.probe.lock().unwrap() = Mode::Status(204);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    assert_eq!(began.elapsed(), 5 * EVERY);
    assert!(service.oneshot(call()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn probe_response_503_takes_the_upstream_down_at_once() {
    for (on, probes) in [(true, 2), (false, 4)] {
        let layer = exact().thresholds(2, 3).immediate_failure(on);
        let handle = layer.handle();
        let upstream = Upstream::new();
        let service = layer.layer(upstream.clone());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
        *upstream.probe.lock().unwrap() = Mode::Status(503);
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
        let snapshot = handle.snapshot();
        assert_eq!((snapshot.probes, snapshot.consecutive_failures), (probes, probes as u32 - 1));
        assert_eq!(kind(&service.oneshot(call()).await.unwrap_err()), RejectedKind::Unhealthy);

        // The rise threshold still applies.
        *upstream.probe.lock().unwrap() = Mode::Status(200);
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
        assert_eq!(handle.snapshot().probes, probes + 2);
    }
    // A first response of 503 takes it down, too.
    let layer = exact().thresholds(1, 3);
    let handle = layer.handle();
    let _service = layer.layer(Upstream::new().will(Mode::Status(503)));
    settle().await;
    assert_eq!(handle.state(), ProbeState::Down);
}

#[tokio::test(start_paused = true)]
async fn other_probe_failures_count_towards_the_threshold() {
    let modes = [500, 502, 504, 429].map(Mode::Status);
    for mode in modes.into_iter().chain([Mode::Hang, Mode::Fail, Mode::Panic, Mode::BrokenBody]) {
        let layer = exact().thresholds(1, 3);
        let handle = layer.handle();
        let upstream = Upstream::new();
        let _service = layer.layer(upstream.clone());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
        *upstream.probe.lock().unwrap() = mode;
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
        assert_eq!(handle.snapshot().probes, 4, "{mode:?}");
    }
    // The closure decides which statuses are failures at all.
    let layer = exact().thresholds(1, 3).expect_status(|status| status == 503);
    let handle = layer.handle();
    let _service = layer.layer(Upstream::new().will(Mode::Status(503)));
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
}

#[tokio::test(start_paused = true)]
async fn a_rejection_carries_the_time_until_the_next_probe() {
    let layer = exact().name("search");
    let handle = layer.handle();
    let service = layer.layer(Upstream::new().will(Mode::Fail));
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    advance(Duration::from_secs(2)).await;
    let error = service.oneshot(call()).await.unwrap_err();
    let refused = Rejected::find(&*error).unwrap();
    assert_eq!(refused.retry_after(), Some(Duration::from_secs(3)));
    assert_eq!((refused.layer(), refused.name()), ("health_probe", Some("search")));
}

#[tokio::test(start_paused = true)]
async fn respond_rejects_with_503_and_does_not_change_the_error_type() {
    let layer = exact().respond();
    let handle = layer.handle();
    let client = service_fn(|request: Req| async move {
        let status = if request.uri().path() == "/healthz" { 500 } else { 200 };
        let mut response = Response::new(Full::<Bytes>::default());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        Ok::<_, Infallible>(response)
    });
    let service = layer.layer(client);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    let response = service.oneshot(call()).await.unwrap_or_else(|never| match never {});
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (503, &"5".parse().unwrap())
    );
}

#[tokio::test(start_paused = true)]
async fn a_failed_probe_has_a_reason() {
    for (mode, why) in [
        (Mode::Status(500), ProbeFailure::Status(StatusCode::INTERNAL_SERVER_ERROR)),
        (Mode::Status(301), ProbeFailure::Status(StatusCode::MOVED_PERMANENTLY)),
        (Mode::Status(429), ProbeFailure::Status(StatusCode::TOO_MANY_REQUESTS)),
        (Mode::Fail, ProbeFailure::Error),
        (Mode::Hang, ProbeFailure::TimedOut),
        (Mode::Panic, ProbeFailure::Panicked),
        (Mode::BrokenBody, ProbeFailure::Body),
    ] {
        let layer = exact();
        let handle = layer.handle();
        let upstream = Upstream::new().will(mode);
        let _service = layer.layer(upstream.clone());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down, "{mode:?}");
        assert_eq!(handle.snapshot().last.unwrap().result, Err(why), "{mode:?}");
        assert_eq!(upstream.seen.under_way.load(SeqCst), 0, "{mode:?}");
        // Probing continues after each kind of failure.
        *upstream.probe.lock().unwrap() = Mode::Status(200);
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_endless_body_is_read_to_the_maximum_and_the_head_counts() {
    for mode in [Mode::EndlessBody, Mode::EmptyFrames, Mode::HangingBody, Mode::TricklingBody] {
        let layer = exact();
        let handle = layer.handle();
        let upstream = Upstream::new().will(mode);
        let began = Instant::now();
        let _service = layer.layer(upstream.clone());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up, "{mode:?}");
        assert!(began.elapsed() <= Duration::from_secs(1), "{mode:?}");
        assert!(upstream.seen.read.load(SeqCst) <= 65 * 1024, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_rejected_by_an_inner_layer_has_no_result() {
    let layer = exact();
    let handle = layer.handle();
    let upstream = Upstream::new();
    let _service = layer.layer(upstream.clone());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    *upstream.probe.lock().unwrap() = Mode::Refuse;
    sleep(10 * EVERY).await;
    assert_eq!(handle.state(), ProbeState::Up);
    assert_eq!(handle.snapshot().last.unwrap().result, Err(ProbeFailure::Rejected));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_hangs_before_it_is_ready_fails_its_probe() {
    let layer = exact();
    let handle = layer.handle();
    let upstream = Upstream::new();
    upstream.seen.not_ready.store(true, SeqCst);
    let began = Instant::now();
    let _service = layer.layer(upstream);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(began.elapsed(), Duration::from_secs(1));
}

// ===== Probing =====

#[tokio::test(start_paused = true)]
async fn probes_never_overlap_when_they_are_slower_than_the_interval() {
    let layer = exact().every(Duration::from_millis(100)).timeout(Duration::from_secs(10));
    let handle = layer.handle();
    let upstream = Upstream::new().will(Mode::Slow(Duration::from_secs(1)));
    let _service = layer.layer(upstream.clone());
    sleep(Duration::from_millis(10_500)).await;
    assert_eq!(upstream.seen.peak.load(SeqCst), 1);
    assert_eq!((upstream.probes(), handle.snapshot().probes), (10, 10));
    assert_eq!(handle.state(), ProbeState::Up);
}

#[tokio::test(start_paused = true)]
async fn jitter_extends_the_delay_by_its_share_or_less() {
    let upstream = Upstream::new();
    let layer = exact().jitter(0.5);
    let handle = layer.handle();
    let _service = layer.layer(upstream.clone());
    let mut waits = Vec::new();
    let mut last = Instant::now();
    for n in 2..50 {
        while handle.snapshot().probes < n {
            sleep(Duration::from_millis(10)).await;
        }
        waits.push(last.elapsed());
        last = Instant::now();
    }
    let slack = Duration::from_millis(20);
    assert!(
        waits.iter().all(|w| *w + slack >= EVERY && *w <= EVERY.mul_f64(1.5) + slack),
        "{waits:?}"
    );
    assert!(waits.iter().any(|w| *w > EVERY.mul_f64(1.1)), "{waits:?}");
}

#[tokio::test(start_paused = true)]
async fn state_shared_across_layer_calls() {
    let layer = exact();
    let handle = layer.handle();
    let upstream = Upstream::new().will(Mode::Fail);
    let services: Vec<_> = (0..100).map(|_| layer.clone().layer(upstream.clone())).collect();
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!((upstream.probes(), alive_tasks()), (1, 1));
    for service in services {
        assert_eq!(kind(&service.oneshot(call()).await.unwrap_err()), RejectedKind::Unhealthy);
    }
}

#[tokio::test(start_paused = true)]
async fn setters_after_the_handle_apply() {
    let layer = exact();
    let handle = layer.handle();
    let layer = layer.thresholds(1, 2).timeout(Duration::from_millis(10));
    let began = Instant::now();
    let _service = layer.layer(Upstream::new().will(Mode::Hang));
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(began.elapsed(), EVERY + 2 * Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn the_prober_ends_with_its_last_owner() {
    for mode in [Mode::Status(200), Mode::Hang] {
        // In the first case the prober sleeps. In the second case a probe is in flight.
        let upstream = Upstream::new().will(mode);
        let layer = exact().timeout(Duration::from_secs(3600));
        let (service, handle) = (layer.layer(upstream.clone()), layer.handle());
        settle().await;
        assert_eq!((alive_tasks(), upstream.probes()), (1, 1), "{mode:?}");
        drop(layer);
        drop(service);
        settle().await;
        assert_eq!(alive_tasks(), 1, "the handle keeps the prober: {mode:?}");
        let before = Instant::now();
        drop(handle);
        settle().await;
        assert_eq!(alive_tasks(), 0, "{mode:?}");
        assert_eq!(before.elapsed(), Duration::ZERO, "{mode:?}");
        assert_eq!(upstream.seen.under_way.load(SeqCst), 0, "{mode:?}");
        assert_eq!(Arc::strong_count(&upstream.seen), 1, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn calls_in_flight_do_not_extend_the_life_of_the_prober() {
    let upstream = Upstream::new();
    let mut service = exact().layer(upstream.clone());
    let unpolled = service.ready().await.unwrap().call(call());
    let response = service.ready().await.unwrap().call(call()).await.unwrap();
    settle().await;
    assert_eq!(alive_tasks(), 1);
    drop(service);
    settle().await;
    assert_eq!(alive_tasks(), 0);
    assert!(unpolled.await.is_ok());
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "xxxxx");
}

/// A service whose first four clones are made at the same time.
struct Meeting {
    upstream: Upstream,
    at_once: Arc<(std::sync::Barrier, AtomicUsize)>,
}

impl Clone for Meeting {
    fn clone(&self) -> Self {
        if self.at_once.1.fetch_add(1, SeqCst) < 4 {
            self.at_once.0.wait();
        }
        Self { upstream: self.upstream.clone(), at_once: self.at_once.clone() }
    }
}

impl Service<Req> for Meeting {
    type Response = Response<Scripted>;
    type Error = BoxError;
    type Future = <Upstream as Service<Req>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.upstream.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        self.upstream.call(request)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_prober_however_many_threads_apply_the_layer() {
    for _ in 0..50 {
        let layer = exact();
        let handle = layer.handle();
        let upstream = Upstream::new();
        // All four threads find no prober, and each creates one.
        let at_once = Arc::new((std::sync::Barrier::new(4), AtomicUsize::new(0)));
        let runtime = tokio::runtime::Handle::current();
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    let _runtime = runtime.enter();
                    let service = Meeting { upstream: upstream.clone(), at_once: at_once.clone() };
                    drop(layer.layer(service));
                });
            }
        });
        let until = async |done: &dyn Fn() -> bool| {
            while !done() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), until(&|| handle.state() == ProbeState::Up))
            .await
            .unwrap();
        assert_eq!((upstream.probes(), handle.snapshot().probes, alive_tasks()), (1, 1, 1));
        drop((layer, handle));
        timeout(Duration::from_secs(10), until(&|| alive_tasks() == 0)).await.unwrap();
    }
}

#[test]
fn a_layer_applied_outside_of_a_runtime_probes_from_its_first_call_on() {
    let upstream = Upstream::new();
    let layer = exact();
    let handle = layer.handle();
    let service = layer.layer(upstream.clone());
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().start_paused(true).build().unwrap()
    };
    runtime().block_on(async {
        settle().await;
        assert_eq!(upstream.probes(), 0);
        assert!(service.clone().oneshot(call()).await.is_ok());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
        assert_eq!((upstream.probes(), alive_tasks()), (1, 1));
    });
    // After the end of the runtime the state is unknown. The next runtime starts a new prober.
    assert_eq!(handle.state(), ProbeState::Unknown);
    *upstream.probe.lock().unwrap() = Mode::Fail;
    runtime().block_on(async {
        assert!(service.clone().oneshot(call()).await.is_ok());
        assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
        assert_eq!(upstream.probes(), 2);
    });
    drop((layer, handle, service));
    assert_eq!(Arc::strong_count(&upstream.seen), 1);
}

#[test]
fn a_runtime_without_timers_sends_no_probe_and_rejects_no_call() {
    let layer = exact();
    let handle = layer.handle();
    let upstream = Upstream::new();
    let service = layer.layer(upstream.clone());
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
        for _ in 0..3 {
            assert!(service.clone().oneshot(call()).await.is_ok());
            settle().await;
        }
        assert_eq!(alive_tasks(), 0);
    });
    assert_eq!(handle.state(), ProbeState::Unknown);
    assert!(handle.snapshot().probes <= 1);
}

// ===== The Tower contract, in addition to the test list for every layer =====

#[tokio::test(start_paused = true)]
async fn waiting_caller_woken_on_down() {
    let layer = exact();
    let handle = layer.handle();
    let upstream = Upstream::new();
    let service = layer.layer(upstream.clone());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    upstream.seen.not_ready.store(true, SeqCst);
    let waiters: Vec<_> = (0..10).map(|_| tokio::spawn(service.clone().oneshot(call()))).collect();
    for waiter in waiters {
        let refused = within_an_hour(waiter).await.unwrap().unwrap_err();
        assert_eq!(kind(&refused), RejectedKind::Unhealthy);
    }
}

#[tokio::test(start_paused = true)]
async fn rejected_while_inner_reserved_releases() {
    let upstream = Upstream::new();
    let limited = tower::limit::GlobalConcurrencyLimitLayer::new(1).layer(upstream.clone());
    let layer = exact();
    let handle = layer.handle();
    let mut service = layer.layer(limited.clone());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    service.ready().await.unwrap();
    // `service` has reserved the only permit, so the next probe cannot acquire it.
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    let refused = service.call(call()).await.unwrap_err();
    assert_eq!(kind(&refused), RejectedKind::Unhealthy);
    within_an_hour(limited.oneshot(call())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn works_inside_tokio_spawn() {
    let boxed = tower::util::BoxCloneSyncService::new(Upstream::new());
    let service = exact().layer(boxed);
    tokio::spawn(async move {
        let mut service = service;
        assert!(service.ready().await.unwrap().call(call()).await.is_ok());
    })
    .await
    .unwrap();
    tokio::spawn(exact().respond().layer(Upstream::new()).oneshot(call())).await.unwrap().unwrap();
}

#[test]
fn auto_traits() {
    fn fits<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send + 'static>(_: &T) {}
    let layer = exact();
    fits(&layer);
    fits(&layer.handle());
    let mut service: HealthProbe<Upstream> = layer.layer(Upstream::new());
    fits(&service);
    service.seen_ready();
    sent(&service.call(call()));
    let health = Health::new();
    fits(&health);
    fits(&health.endpoints());
    fits(&health.endpoints().layer(Upstream::new()));
    fits(&health.service());
    fits(&health.reporter("a").unwrap());
}

/// Polls a service ready whose inner service is ready immediately.
trait SeenReady {
    fn seen_ready(&mut self);
}

impl<S: Service<Req>> SeenReady for S
where
    S::Error: std::fmt::Debug,
{
    fn seen_ready(&mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(self.poll_ready(&mut cx), Poll::Ready(Ok(()))));
    }
}

// ===== Configuration =====

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
    let health = Health::new();
    let _taken = health.reporter("taken").unwrap();
    let zero = Duration::ZERO;
    for (layer, field) in [
        (exact().every(zero), "every"),
        (exact().timeout(zero), "timeout"),
        (exact().thresholds(0, 1), "thresholds.rise"),
        (exact().thresholds(1, 0), "thresholds.fall"),
        (exact().jitter(50.0), "jitter"),
        (exact().jitter(f64::NAN), "jitter"),
        (exact().jitter(-0.1), "jitter"),
        (exact().report_to(&health, "taken"), "check.name"),
        (exact().report_to(&health, "a b"), "check.name"),
        (HealthProbeLayer::get("healthz"), "get"),
        (HealthProbeLayer::get("no uri"), "get"),
    ] {
        let upstream = Upstream::new();
        let refused = layer.layer(upstream.clone()).oneshot(call()).await.unwrap_err();
        assert_eq!(kind(&refused), RejectedKind::Misconfigured, "{field}");
        settle().await;
        assert_eq!(upstream.probes(), 0, "{field}");
        assert_eq!(layer.checked().unwrap_err().field, field);
    }
    assert!(exact().checked().is_ok());
}

// ===== Custom types =====

#[derive(Clone, Debug)]
struct Pong(u32);

#[derive(Clone, Debug, PartialEq)]
struct DbError;

impl std::fmt::Display for DbError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("db")
    }
}

impl std::error::Error for DbError {}

#[tokio::test(start_paused = true)]
async fn services_of_any_types_are_probed_with_a_closure() {
    let lag = Arc::new(AtomicUsize::new(0));
    let now = lag.clone();
    let db = service_fn(move |query: &'static str| {
        let lag = now.load(SeqCst);
        async move {
            match query {
                "bad" => Err(DbError),
                _ => Ok(Pong(lag as u32)),
            }
        }
    });
    let layer = HealthProbeLayer::new(|| "select lag")
        .classify_probe(|answer: Result<&Pong, &DbError>| answer.is_ok_and(|pong| pong.0 < 10))
        .thresholds(1, 1);
    let handle = layer.handle();
    let service = layer.layer(db.clone());
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Up);
    assert!(service.clone().oneshot("bad").await.unwrap_err().is::<DbError>());
    lag.store(99, SeqCst);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
    assert_eq!(handle.snapshot().last.unwrap().result, Err(ProbeFailure::Classified));
    assert_eq!(kind(&service.oneshot("good").await.unwrap_err()), RejectedKind::Unhealthy);

    let layer = HealthProbeLayer::new(|| "bad").thresholds(1, 1);
    let handle = layer.handle();
    let _service = layer.layer(db);
    assert_eq!(within_an_hour(handle.changed()).await, ProbeState::Down);
}

#[tokio::test(start_paused = true)]
async fn closures_that_panic_are_failed_probes() {
    let calm = Arc::new(AtomicBool::new(false));
    let (make, judge) = (calm.clone(), calm.clone());
    let service = service_fn(|_: ()| async { Ok::<_, BoxError>(()) });
    let makes = HealthProbeLayer::new(move || assert!(make.load(SeqCst), "scripted panic"));
    let judges = HealthProbeLayer::new(|| ()).classify_probe(move |_: Result<&(), &BoxError>| {
        assert!(judge.load(SeqCst), "scripted panic");
        true
    });
    let (makes, judges) = (makes.thresholds(1, 1), judges.thresholds(1, 1));
    let handles = [makes.handle(), judges.handle()];
    let _services = (makes.layer(service), judges.layer(service));
    settle().await;
    for handle in &handles {
        assert_eq!(handle.state(), ProbeState::Down);
        assert_eq!(handle.snapshot().last.unwrap().result, Err(ProbeFailure::Panicked));
    }
    calm.store(true, SeqCst);
    sleep(2 * EVERY).await;
    assert!(handles.iter().all(|handle| handle.state() == ProbeState::Up));
}

// ===== The registry =====

#[tokio::test(start_paused = true)]
async fn a_probe_reports_to_a_registry_until_it_is_dropped() {
    let health = Health::new();
    let layer = exact().report_to(&health, "search");
    assert_eq!(health.checks(), [("search".to_owned(), CheckState::Unknown)]);
    assert!(!health.is_ready(), "not ready before the first result");
    let upstream = Upstream::new();
    let service = layer.layer(upstream.clone());
    assert!(within_an_hour(health.changed()).await);
    *upstream.probe.lock().unwrap() = Mode::Fail;
    assert!(!within_an_hour(health.changed()).await);
    let error = service.oneshot(call()).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("search"));
    drop(layer);
    settle().await;
    assert_eq!((health.checks(), health.is_ready()), (vec![], true));
    assert!(exact().report_to(&health, "search").checked().is_ok());
}

// ===== Type inference =====

#[tokio::test]
async fn the_example_needs_no_type_annotation() {
    use hyper_util::{client::legacy::Client, rt::TokioExecutor};

    let health = Health::new();
    let client = Client::builder(TokioExecutor::new()).build_http();
    let upstream = ServiceBuilder::new()
        .layer(
            HealthProbeLayer::get("/healthz")
                .every(Duration::from_secs(5))
                .thresholds(2, 3)
                .report_to(&health, "search"),
        )
        .service(client);
    let request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
    assert!(upstream.oneshot(request).await.is_err(), "hyper's client requires an absolute URI");

    let client = Client::builder(TokioExecutor::new()).build_http();
    let probe = HealthProbeLayer::request(|| {
        Request::get("http://[::1]:1/").body(Full::default()).unwrap()
    });
    let mut upstream = ServiceBuilder::new().layer(probe).service(client);
    poll_fn(|cx| Service::<Req>::poll_ready(&mut upstream, cx)).await.unwrap();

    let channel = tonic::transport::Channel::from_static("http://[::1]:1").connect_lazy();
    let mut upstream =
        ServiceBuilder::new().layer(HealthProbeLayer::get("/healthz").respond()).service(channel);
    poll_fn(|cx| upstream.poll_ready(cx)).await.unwrap();

    // A service for any body needs the type of the body.
    let router = axum::Router::<()>::new();
    let mut routed = HealthProbeLayer::get::<Empty<Bytes>>("/healthz").layer(router);
    poll_fn(|cx| Service::<Request<Full<Bytes>>>::poll_ready(&mut routed, cx)).await.unwrap();
}
