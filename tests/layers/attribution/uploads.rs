//! Slow uploads and slow readers: their time is not attributed to the upstream.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, HedgeLayer, RetryLayer, TimeoutLayer, Timeouts,
    Trip,
    breaker::CircuitState,
    config::{ClientConfig, ServerConfig},
    connect::{Client, ConnectLayer},
    limit::{
        CallPermit,
        adaptive::{Algorithm, LimitChange, Sample},
    },
    outcome::SentMark,
    stack::ClientStack,
};
use futures_util::FutureExt;
use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, advance, sleep, timeout};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use super::fixtures::{
    TestBody, Upstream, UpstreamService, get, make_half_open, ms, secs, trickle, upload,
};
use crate::support::{self, Piece, ScriptBody, status};

fn slow_rule() -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::slow_ratio(0.5, secs(1)).over(10).min_calls(5))
}

#[tokio::test(start_paused = true)]
async fn slow_uploads_are_not_slow_calls() {
    let upstream = || UpstreamService::new(Upstream::Responds(ms(1)));
    let breaker = slow_rule();
    let under_retry = RetryLayer::http().layer(breaker.layer(upstream()));
    for _ in 0..25 {
        under_retry.clone().oneshot(upload(secs(3))).await.unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Closed, "under a retry");

    let breaker = slow_rule();
    let over_timeout = breaker.layer(TimeoutLayer::http().layer(upstream()));
    for _ in 0..25 {
        over_timeout.clone().oneshot(upload(secs(3))).await.unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Closed, "over a timeout");
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_responds_slowly_after_an_upload_is_slow() {
    let upstream = || UpstreamService::new(Upstream::Responds(ms(1500)));
    let breaker = slow_rule();
    let under_retry = RetryLayer::http().layer(breaker.layer(upstream()));
    for _ in 0..5 {
        under_retry.clone().oneshot(upload(secs(3))).await.unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open, "under a retry");

    let breaker = slow_rule();
    let over_timeout = breaker.layer(TimeoutLayer::http().layer(upstream()));
    for _ in 0..5 {
        over_timeout.clone().oneshot(upload(secs(3))).await.unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open, "over a timeout");
}

#[tokio::test(start_paused = true)]
async fn without_a_mark_the_clock_starts_at_the_call() {
    let breaker = slow_rule();
    let client = breaker.layer(UpstreamService::new(Upstream::Responds(ms(1))));
    for _ in 0..5 {
        client.clone().oneshot(upload(secs(3))).await.unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_during_an_upload_is_neutral() {
    let breaker = CircuitBreakerLayer::http();
    let client =
        RetryLayer::http()
            .layer(breaker.layer(
                TimeoutLayer::http().layer(UpstreamService::new(Upstream::Responds(ms(1)))),
            ));
    for request in [|| upload(secs(60)), || trickle(ms(300), 200)] {
        for _ in 0..5 {
            timeout(secs(20), client.clone().oneshot(request())).await.unwrap_err();
        }
        assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_on_an_upstream_that_stopped_reading_is_a_failure() {
    /// Reads the first frame of the request, and no more.
    async fn reads_one_frame(
        request: http::Request<impl http_body::Body<Data = bytes::Bytes> + Send>,
    ) -> Result<http::Response<http_body_util::Empty<bytes::Bytes>>, buttress::BoxError> {
        let mut body = std::pin::pin!(request.into_body());
        let _ = body.frame().await;
        std::future::pending().await
    }
    let breaker = CircuitBreakerLayer::http();
    let client = RetryLayer::http().layer(breaker.layer(tower::service_fn(reads_one_frame)));
    for _ in 0..5 {
        let call = client.clone().oneshot(trickle(ms(10), 100));
        timeout(secs(5), call).await.unwrap_err();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_hedge_inside_of_a_breaker_publishes_the_mark_that_the_breaker_requests() {
    let breaker = CircuitBreakerLayer::http();
    let upstream = UpstreamService::new(Upstream::Responds(ms(1)));
    let hedged = HedgeLayer::http(secs(600)).layer(upstream);
    let client = RetryLayer::http().layer(breaker.layer(hedged));
    for _ in 0..5 {
        timeout(secs(3), client.clone().oneshot(upload(secs(300)))).await.unwrap_err();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
}

/// The second poll does not reach the breaker, because the limit is already ready.
#[tokio::test(start_paused = true)]
async fn a_service_that_is_polled_twice_for_readiness_publishes_a_mark() {
    let upstream = || UpstreamService::new(Upstream::Responds(ms(1)));
    macro_rules! hang_ups {
        ($outer:expr) => {{
            let breaker = CircuitBreakerLayer::http();
            let limit = ConcurrencyLimitLayer::new(10);
            let client = $outer.layer(limit.layer(breaker.layer(upstream())));
            for _ in 0..5 {
                let mut client = client.clone();
                for _ in 0..2 {
                    ServiceExt::<Request<TestBody>>::ready(&mut client).await.unwrap();
                }
                timeout(secs(3), client.call(upload(secs(300)))).await.unwrap_err();
            }
            breaker.handle().state()
        }};
    }
    assert_eq!(hang_ups!(RetryLayer::http()), CircuitState::Closed, "retry");
    assert_eq!(hang_ups!(HedgeLayer::http(secs(600))), CircuitState::Closed, "hedge");
}

// ===== Half-open =====

#[tokio::test(start_paused = true)]
async fn a_half_open_circuit_closes_with_the_first_quick_call_during_slow_uploads() {
    for with_mark in [true, false] {
        let breaker = CircuitBreakerLayer::http();
        let guarded = breaker
            .layer(TimeoutLayer::http().layer(UpstreamService::new(Upstream::Responds(ms(5)))));
        let marked = RetryLayer::http().attempts(1).layer(guarded.clone());
        make_half_open(&breaker).await;
        let mut served = 0;
        for n in 0..20 {
            let slow = n % 2 == 0;
            let request = || if slow { upload(secs(50)) } else { get() };
            let call = match with_mark {
                true => tokio::spawn({
                    let call = marked.clone().oneshot(request());
                    async move { call.await.map(drop) }
                }),
                false => tokio::spawn({
                    let call = guarded.clone().oneshot(request());
                    async move { call.await.map(drop) }
                }),
            };
            sleep(ms(250)).await;
            if !slow {
                served += u32::from(call.await.unwrap().is_ok());
            }
            if n == 1 {
                assert_eq!(
                    breaker.handle().state(),
                    CircuitState::Closed,
                    "with a mark: {with_mark}"
                );
            }
        }
        assert_eq!(served, 10, "with a mark: {with_mark}");
        assert_eq!(breaker.handle().snapshot().opened, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn the_timeout_of_a_probe_starts_when_its_request_has_been_sent() {
    for responds in [true, false] {
        let breaker = CircuitBreakerLayer::http().probe_timeout(secs(10));
        let upstream = if responds { Upstream::Responds(secs(5)) } else { Upstream::Hangs };
        let client = RetryLayer::http().layer(breaker.layer(UpstreamService::new(upstream)));
        make_half_open(&breaker).await;
        let probe = tokio::spawn(client.oneshot(upload(secs(50))));
        sleep(secs(52)).await;
        assert_eq!(
            breaker.handle().state(),
            CircuitState::HalfOpen,
            "the request was sent 2 s ago"
        );
        sleep(secs(9)).await;
        let state = if responds { CircuitState::Closed } else { CircuitState::Open };
        assert_eq!(breaker.handle().state(), state);
        probe.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_open_circuit_admits_one_upload_at_a_time() {
    let breaker = CircuitBreakerLayer::http();
    let upstream = UpstreamService::new(Upstream::Responds(ms(5)));
    let client = RetryLayer::http().attempts(1).layer(breaker.layer(upstream.clone()));
    make_half_open(&breaker).await;
    for _ in 0..50 {
        tokio::spawn(client.clone().oneshot(upload(secs(50))));
        sleep(ms(1)).await;
    }
    assert_eq!(upstream.calls(), 1);
}

/// Responds with a body of two frames. The second one needs a permit of the semaphore.
fn two_frames(
    second: &Arc<tokio::sync::Semaphore>,
) -> impl tower::Service<
    http::Request<super::fixtures::TestBody>,
    Response = http::Response<
        impl http_body::Body<Data = bytes::Bytes, Error = buttress::BoxError>,
    >,
    Error = buttress::BoxError,
    Future: Send,
> + Clone
+ Send
+ 'static {
    let second = second.clone();
    tower::service_fn(move |_| {
        let second = second.clone();
        let frames = futures_util::stream::unfold(0, move |n| {
            let second = second.clone();
            async move {
                if n == 1 {
                    second.acquire().await.unwrap().forget();
                }
                let frame = http_body::Frame::data(bytes::Bytes::from_static(b"frame"));
                (n < 2).then_some((Ok::<_, buttress::BoxError>(frame), n + 1))
            }
        });
        let body = http_body_util::StreamBody::new(Box::pin(frames));
        std::future::ready(Ok(http::Response::new(body)))
    })
}

#[tokio::test(start_paused = true)]
async fn a_probe_with_a_successful_response_passes_when_its_reader_is_slow() {
    for frames_read in [0, 1] {
        let breaker = CircuitBreakerLayer::http();
        let second = Arc::new(tokio::sync::Semaphore::new(9));
        let client = breaker.layer(two_frames(&second));
        make_half_open(&breaker).await;
        let mut held = client.clone().oneshot(get()).await.unwrap();
        for _ in 0..frames_read {
            held.body_mut().frame().await.unwrap().unwrap();
        }
        assert_eq!(breaker.handle().state(), CircuitState::HalfOpen);
        advance(ms(100)).await;
        assert_eq!(breaker.handle().state(), CircuitState::Closed, "{frames_read} frames read");
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_whose_reader_waits_for_the_upstream_keeps_its_slot() {
    let breaker = CircuitBreakerLayer::http().probe_timeout(secs(10));
    let second = Arc::new(tokio::sync::Semaphore::new(0));
    let client = breaker.layer(two_frames(&second));
    make_half_open(&breaker).await;
    let mut held = client.clone().oneshot(get()).await.unwrap().into_body();
    held.frame().await.unwrap().unwrap();
    timeout(ms(9_900), held.frame()).await.unwrap_err();
    assert!(client.clone().oneshot(get()).await.is_err(), "the slot is taken");
    assert_eq!(breaker.handle().state(), CircuitState::HalfOpen);
    sleep(ms(100)).await;
    assert_eq!(breaker.handle().state(), CircuitState::Closed, "its head was good");
}

// ===== Adaptive limits =====

#[derive(Clone, Debug, Default)]
struct Recorder(Arc<Mutex<Vec<(Duration, bool)>>>);

impl Algorithm for Recorder {
    fn limit(&self) -> u32 {
        100
    }

    fn set_limit(&mut self, _: u32) {}

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        self.0.lock().unwrap().push((sample.latency, sample.dropped));
        None
    }
}

impl Recorder {
    fn latencies(&self) -> Vec<u128> {
        self.0.lock().unwrap().drain(..).map(|(latency, _)| latency.as_millis()).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_measures_from_when_the_request_has_been_sent() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
    let upstream = UpstreamService::new(Upstream::Responds(ms(20)));
    let client = RetryLayer::http().layer(limit.layer(upstream.clone()));
    client.clone().oneshot(upload(secs(3))).await.unwrap();
    client.oneshot(get()).await.unwrap();
    assert_eq!(recorder.latencies(), [20, 20]);
    let over_timeout = limit.layer(TimeoutLayer::http().layer(upstream));
    over_timeout.oneshot(upload(secs(3))).await.unwrap();
    assert_eq!(recorder.latencies(), [20]);
}

/// An axum handler reads the upload, and a server timeout inside of the limit detects its end.
#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_of_a_server_does_not_measure_slow_uploads() {
    use axum::{Router, body::Body, routing::put};

    let recorder = Recorder::default();
    let handler = async |body: Body| {
        body.collect().await.unwrap();
        sleep(ms(20)).await;
        "ok"
    };
    let app: Router = Router::new().route("/", put(handler)).layer(
        ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::adaptive(recorder.clone()).respond())
            .layer(TimeoutLayer::server().respond()),
    );
    let request = upload(secs(3)).map(Body::new);
    assert_eq!(app.oneshot(request).await.unwrap().status(), 200);
    assert_eq!(recorder.latencies(), [20]);
}

/// Responds 50 ms after the call. Until then the transport waits for frames of the request body. It drops the body after
/// the response.
fn responds_early<B>(
    response: fn() -> http::Response<ScriptBody>,
) -> impl Service<
    Request<B>,
    Response = http::Response<ScriptBody>,
    Error = buttress::BoxError,
    Future: Send,
> + Clone
where
    B: http_body::Body<Data = bytes::Bytes, Error: Send> + Send + 'static,
{
    tower::service_fn(move |request: Request<B>| async move {
        let mut body = Box::pin(request.into_body());
        let reads = async {
            while let Some(Ok(_)) = body.frame().await {}
            std::future::pending::<()>().await;
        };
        timeout(ms(50), reads).await.unwrap_err();
        tokio::spawn(async move { drop(body) });
        Ok(response())
    })
}

#[tokio::test(start_paused = true)]
async fn a_call_that_ends_before_its_request_has_been_sent_is_not_a_sample() {
    let responses: [fn() -> http::Response<ScriptBody>; 4] = [
        || status(401),
        || status(503),
        || support::grpc([Piece::Trailers(support::trailers("0"))]),
        || support::grpc([Piece::Trailers(support::trailers("14"))]),
    ];
    for response in responses {
        let recorder = Recorder::default();
        let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
        let inner = limit.layer(responds_early(response));
        let with_mark = RetryLayer::http().attempts(1).layer(inner);
        let over_timeout = limit.layer(TimeoutLayer::http().layer(responds_early(response)));
        for request in [get(), upload(secs(300))] {
            let is_sent = http_body::Body::is_end_stream(request.body());
            let samples = if is_sent { vec![50] } else { Vec::new() };
            let response = with_mark.clone().oneshot(request).await.unwrap();
            response.into_body().collect().await.unwrap();
            assert_eq!(recorder.latencies(), samples, "with a mark");
        }
        let response = over_timeout.oneshot(upload(secs(300))).await.unwrap();
        response.into_body().collect().await.unwrap();
        assert_eq!(recorder.latencies(), [0; 0], "over a timeout");
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_during_an_upload_is_not_a_drop_for_an_adaptive_limit() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
    let timeout = || TimeoutLayer::new(Timeouts::server().total(secs(10)));
    let upstream = || UpstreamService::new(Upstream::Responds(ms(1)));
    let inside = limit.layer(timeout().layer(upstream()));
    assert!(inside.oneshot(trickle(ms(300), 10_000)).await.is_err());
    let outside = RetryLayer::http().layer(timeout().layer(limit.layer(upstream())));
    assert!(outside.oneshot(upload(secs(300))).await.is_err());
    assert_eq!(recorder.latencies(), [0; 0]);
}

/// The handler of an axum server responds without reading the request body.
#[tokio::test(start_paused = true)]
async fn requests_whose_bodies_never_arrive_do_not_reduce_an_adaptive_limit() {
    use axum::{Router, routing::any};

    let recorder = Recorder::default();
    let handler = async |body: axum::body::Body| {
        sleep(ms(50)).await;
        drop(body);
    };
    let app: Router = Router::new().route("/", any(handler)).layer(
        ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::adaptive(recorder.clone()).respond())
            .layer(TimeoutLayer::server().respond()),
    );
    for request in [get(), upload(secs(300)), get()] {
        assert_eq!(
            app.clone().oneshot(request.map(axum::body::Body::new)).await.unwrap().status(),
            200
        );
    }
    assert!(recorder.latencies().iter().all(|latency| *latency == 50));
}

#[tokio::test(start_paused = true)]
async fn a_response_without_a_wait_is_a_sample() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
    let at_once =
        tower::service_fn(|_: Request<_>| async { Ok::<_, buttress::BoxError>(status(200)) });
    let client = RetryLayer::http().layer(limit.layer(at_once));
    for request in [get(), upload(secs(3))] {
        client.clone().oneshot(request).await.unwrap();
    }
    assert_eq!(recorder.latencies(), [0, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_to_connect_in_time_is_a_drop_although_nothing_has_been_sent() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
    let connects = ConnectLayer::new().connect_timeout(ms(200));
    let hangs = tower::service_fn(|_: http::Uri| {
        std::future::pending::<std::io::Result<TokioIo<tokio::net::TcpStream>>>()
    });
    let client = limit.layer(Client::builder(connects).build(hangs));
    let client = RetryLayer::http().attempts(1).layer(client);
    let mut request = upload(secs(3));
    *request.uri_mut() = "http://localhost/".parse().unwrap();
    assert!(client.oneshot(request).await.is_err());
    let samples: Vec<_> =
        recorder.0.lock().unwrap().drain(..).map(|(_, dropped)| dropped).collect();
    assert_eq!(samples, [true]);
}

#[tokio::test(start_paused = true)]
async fn a_limit_with_upgrades_measures_as_without() {
    type MakeRequest = fn() -> Request<TestBody>;

    let samples = async |upgrades: bool, upstream: Upstream, request: MakeRequest| {
        let recorder = Recorder::default();
        let limit = ConcurrencyLimitLayer::adaptive(recorder.clone());
        macro_rules! call {
            ($limit:expr) => {{
                let over_timeout =
                    $limit.layer(TimeoutLayer::http().layer(UpstreamService::new(upstream)));
                let with_mark =
                    RetryLayer::http().layer($limit.layer(UpstreamService::new(upstream)));
                let _ = timeout(secs(5), over_timeout.oneshot(request())).await.map(Result::unwrap);
                let _ = timeout(secs(5), with_mark.oneshot(request())).await.map(Result::unwrap);
            }};
        }
        if upgrades {
            call!(limit.clone().upgrades());
        } else {
            call!(limit.clone());
        }
        assert_eq!(limit.handle().snapshot().in_flight, 0);
        recorder.0.lock().unwrap().drain(..).collect::<Vec<_>>()
    };
    let responds = Upstream::Responds(ms(20));
    let sample = (ms(20), false);
    let drop = (secs(5), true);
    let cases: [(&str, Upstream, MakeRequest, [_; 2]); 4] = [
        ("a response", responds, get, [Some(sample), Some(sample)]),
        ("a response after an upload", responds, || upload(secs(3)), [Some(sample), Some(sample)]),
        ("a hang-up during an upload", responds, || upload(secs(300)), [None, None]),
        ("a hang-up on a hung upstream", Upstream::Hangs, get, [Some(drop), Some(drop)]),
    ];
    for (name, upstream, request, expected) in cases {
        let expected: Vec<_> = expected.into_iter().flatten().collect();
        assert_eq!(samples(false, upstream, request).await, expected, "{name}");
        assert_eq!(samples(true, upstream, request).await, expected, "{name}, with upgrades");
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_with_upgrades_measures_a_queued_call_from_its_permit_on() {
    #[derive(Clone, Debug)]
    struct OneCall(Recorder);

    impl Algorithm for OneCall {
        fn limit(&self) -> u32 {
            1
        }

        fn set_limit(&mut self, _: u32) {}

        fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
            self.0.on_sample(sample)
        }
    }

    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(OneCall(recorder.clone())).queue(10, secs(60));
    let client = limit.upgrades().layer(UpstreamService::new(Upstream::Responds(ms(20))));
    let calls = [(); 3].map(|()| tokio::spawn(client.clone().oneshot(get())));
    for call in calls {
        let response = call.await.unwrap().unwrap();
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(recorder.latencies(), [20; 3]);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_during_an_upload_is_not_a_drop_for_a_limit_with_upgrades() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone()).upgrades();
    let limited = limit.layer(UpstreamService::new(Upstream::Responds(ms(1))));
    let client = TimeoutLayer::new(Timeouts::new().total(secs(10))).layer(limited);
    assert!(RetryLayer::http().attempts(1).layer(client).oneshot(upload(secs(300))).await.is_err());
    assert_eq!(recorder.latencies(), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_holds_a_permit_after_its_call_is_not_a_sample() {
    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone()).upgrades();
    let hangs = tower::service_fn(|request: Request<TestBody>| async move {
        let held = request.extensions().get::<CallPermit>().unwrap().take();
        tokio::spawn(async move {
            sleep(secs(60)).await;
            std::mem::drop(held);
        });
        std::future::pending::<Result<http::Response<ScriptBody>, buttress::BoxError>>().await
    });
    timeout(secs(5), limit.layer(hangs).oneshot(get())).await.unwrap_err();
    assert_eq!(limit.handle().snapshot().in_flight, 1);
    sleep(secs(61)).await;
    assert_eq!(limit.handle().snapshot().in_flight, 0);
    assert_eq!(recorder.latencies(), [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_limit_counts_cancelled_calls_after_less_than_a_millisecond() {
    let recorder = Recorder::default();
    let time = Duration::from_micros(900);
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone()).count_cancelled_after(time);
    let client = limit.layer(UpstreamService::new(Upstream::Hangs));
    for (after, samples) in [(Duration::from_micros(899), 0), (time, 1)] {
        let mut call = Box::pin(client.clone().oneshot(get()));
        assert!((&mut call).now_or_never().is_none());
        advance(after).await;
        drop(call);
        assert_eq!(recorder.latencies().len(), samples, "after {after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_slow_reader_is_not_measured() {
    use http_body_util::StreamBody;

    let recorder = Recorder::default();
    let limit = ConcurrencyLimitLayer::adaptive(recorder.clone()).until_body_end();
    let breaker = slow_rule();
    // Two frames, each of them 10 ms after it is polled for.
    let upstream = tower::service_fn(|_: http::Request<_>| async {
        sleep(ms(30)).await;
        let frames = futures_util::stream::unfold(0, |n| async move {
            sleep(ms(10)).await;
            let frame = http_body::Frame::data(bytes::Bytes::from_static(b"frame"));
            (n < 2).then_some((Ok::<_, buttress::BoxError>(frame), n + 1))
        });
        Ok::<_, buttress::BoxError>(http::Response::new(StreamBody::new(Box::pin(frames))))
    });
    let client = breaker.layer(limit.layer(upstream));
    for _ in 0..5 {
        let mut body = client.clone().oneshot(get()).await.unwrap().into_body();
        let began = Instant::now();
        while let Some(frame) = body.frame().await {
            frame.unwrap();
            sleep(secs(5)).await;
        }
        assert!(began.elapsed() > secs(10));
    }
    // 30 ms to the head, and 10 ms for each frame and the end.
    assert_eq!(recorder.latencies(), [60; 5]);
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
}

// ===== The mark =====

#[tokio::test(start_paused = true)]
async fn a_mark_that_the_caller_publishes_starts_the_clock() {
    let breaker = slow_rule();
    let client = breaker.layer(UpstreamService::new(Upstream::Responds(ms(1))));
    for _ in 0..25 {
        let mark = SentMark::new();
        let mut request = get();
        request.extensions_mut().insert(mark.clone());
        let call = tokio::spawn(client.clone().oneshot(request));
        advance(ms(1)).await;
        tokio::task::yield_now().await;
        mark.sent();
        call.await.unwrap().unwrap();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn the_ready_made_client_counts_no_failure_for_a_hang_up_during_an_upload() {
    let config = ClientConfig::from_toml("breaker_failure_ratio = 0.5").unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let client = stack.layer(UpstreamService::new(Upstream::Responds(ms(1))));
    for _ in 0..30 {
        let hang_up = timeout(secs(5), client.clone().oneshot(upload(secs(30)))).await;
        assert!(hang_up.is_err());
    }
    assert_eq!(stack.handle().breaker().state(), CircuitState::Closed);
    assert!(buttress::server(&ServerConfig::default()).is_ok());
}
