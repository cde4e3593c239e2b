//! The attribution of calls that end by a deadline or by a hang-up.

use std::{sync::Arc, time::Duration};

use axum::{Extension, Router, body::Body, routing::any};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, DeadlineLayer, DeadlineSource,
    HedgeLayer, RetryLayer, TimeoutLayer, Timeouts,
    breaker::{CircuitState, TripReason},
    config::{ClientConfig, ServerConfig},
    outcome::Reason,
    stack::ClientStack,
    timeout::SendingBody,
};
use futures_util::future::BoxFuture;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    sync::Semaphore,
    time::{Instant, advance, sleep, timeout},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

use super::fixtures::{Upstream, UpstreamService, get, ms, secs, trickle};
use crate::support::{Strict, Then, empty, request, status};

fn caller_deadline(time: Duration) -> Deadline {
    Deadline::after(time).with_source(DeadlineSource::Caller)
}

/// A server of the default stack whose handler passes its deadline on to a client of the default stack.
fn gateway(server: &ServerConfig, upstream: Duration) -> (Router, ClientStack) {
    let client = ClientStack::new(&ClientConfig::default()).unwrap();
    let upstream = client.layer(UpstreamService::new(Upstream::Responds(upstream)));
    let handler = move |deadline: Option<Extension<Deadline>>| {
        let mut request = get();
        if let Some(Extension(deadline)) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let upstream = upstream.clone();
        async move {
            let response = upstream.oneshot(request).await;
            response.map_or(StatusCode::BAD_GATEWAY, |response| response.status())
        }
    };
    let app = Router::new().route("/", any(handler)).layer(buttress::server(server).unwrap());
    (app, client)
}

async fn visit(app: &Router, header: Option<(&str, &str)>) -> StatusCode {
    let mut request = Request::new(Body::empty());
    if let Some((name, value)) = header {
        if name == "grpc-timeout" {
            *request.method_mut() = http::Method::POST;
            request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        }
        let name: http::HeaderName = name.parse().unwrap();
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    app.clone().oneshot(request).await.unwrap().status()
}

#[tokio::test(start_paused = true)]
async fn callers_with_short_deadlines_do_not_open_the_circuit_for_the_next_visitor() {
    let with_header = ServerConfig::from_toml("deadline_header = 'x-request-timeout-ms'").unwrap();
    for (config, header) in [
        (&ServerConfig::default(), ("grpc-timeout", "10m")),
        (&ServerConfig::default(), ("grpc-timeout", "20m")),
        (&with_header, ("x-request-timeout-ms", "20")),
    ] {
        let (app, client) = gateway(config, ms(40));
        for _ in 0..5 {
            visit(&app, Some(header)).await;
        }
        assert_eq!(client.handle().breaker().state(), CircuitState::Closed, "{header:?}");
        assert_eq!(visit(&app, None).await, StatusCode::OK, "{header:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn callers_with_short_deadlines_cost_no_legitimate_call() {
    let (app, client) = gateway(&ServerConfig::default(), ms(40));
    let began = Instant::now();
    let mut served = 0;
    for n in 0..6000_u32 {
        if n % 240 == 0 {
            let app = app.clone();
            tokio::spawn(async move { visit(&app, Some(("grpc-timeout", "10m"))).await });
        }
        let app = app.clone();
        let visit = tokio::spawn(async move { visit(&app, None).await });
        advance(ms(10)).await;
        served += u32::from(n < 5990 && { visit.await.unwrap() == StatusCode::OK });
    }
    assert!(began.elapsed() >= secs(60));
    assert_eq!(served, 5990);
    assert_eq!(client.handle().breaker().snapshot().opened, 0);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_ends_by_a_caller_deadline_releases_its_slot() {
    let layer = CircuitBreakerLayer::http().open_for(secs(5));
    let (inner, watch) = Strict::holding();
    let client = ServiceBuilder::new()
        .layer(layer.clone())
        .layer(TimeoutLayer::http().as_is())
        .service(inner);
    let handle = layer.handle();
    for _ in 0..5 {
        watch.script([Then::Answer(status(500))]);
        client.clone().oneshot(request()).await.unwrap();
    }
    assert_eq!(handle.state(), CircuitState::Open);
    for _ in 0..20 {
        // The caller comes exactly when the circuit can be probed, and gets the probe slot.
        advance(handle.snapshot().open_for.unwrap_or_default()).await;
        let mut short = request();
        short.extensions_mut().insert(caller_deadline(ms(20)));
        client.clone().oneshot(short).await.unwrap_err();
        assert_eq!(handle.state(), CircuitState::HalfOpen, "the probe decided nothing");
    }
    watch.script([Then::Answer(empty())]);
    client.clone().oneshot(request()).await.unwrap();
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_hung_upstream_opens_the_circuit_although_every_caller_has_a_deadline_of_two_seconds() {
    let client = ClientStack::new(&ClientConfig::default()).unwrap();
    let upstream = client.layer(UpstreamService::new(Upstream::Hangs));
    for call in 1.. {
        let mut request = get();
        request.extensions_mut().insert(caller_deadline(secs(2)));
        upstream.clone().oneshot(request).await.unwrap_err();
        if client.handle().breaker().state() == CircuitState::Open {
            break;
        }
        assert!(call < 10, "still closed after {call} calls");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hung_upstream_opens_the_circuit_although_every_caller_hangs_up_first() {
    for (after, opens) in [(secs(2), true), (ms(900), false)] {
        let layer = CircuitBreakerLayer::http();
        let client = layer.layer(UpstreamService::new(Upstream::Hangs));
        for _ in 0..5 {
            timeout(after, client.clone().oneshot(get())).await.unwrap_err();
        }
        assert_eq!(layer.handle().state() == CircuitState::Open, opens, "after {after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn count_cancelled_after_sets_when_a_hang_up_counts() {
    let hang_ups = async |layer: CircuitBreakerLayer, after: Duration| {
        let client = layer.layer(UpstreamService::new(Upstream::Hangs));
        for _ in 0..5 {
            timeout(after, client.clone().oneshot(get())).await.unwrap_err();
        }
        layer.handle().snapshot().last_trip
    };
    let layer = CircuitBreakerLayer::http;
    let opened = Some(TripReason::Consecutive { failures: 5 });
    assert_eq!(hang_ups(layer().count_cancelled_after(ms(100)), ms(101)).await, opened);
    assert_eq!(hang_ups(layer().count_cancelled_after(secs(60)), secs(59)).await, None);
    assert_eq!(hang_ups(layer().count_cancelled_after(None), secs(3600)).await, None);
    assert!(layer().count_cancelled_after(Duration::ZERO).checked().is_err());
}

/// An expired operator deadline is a timeout, whichever layer enforces it.
#[tokio::test(start_paused = true)]
async fn an_operator_timeout_is_a_failure_in_every_layer_order() {
    type Stack =
        fn(
            CircuitBreakerLayer,
        )
            -> tower::util::BoxCloneSyncService<Request<super::fixtures::TestBody>, (), BoxError>;
    fn boxed<S, B>(
        service: S,
    ) -> tower::util::BoxCloneSyncService<Request<super::fixtures::TestBody>, (), BoxError>
    where
        B: 'static,
        S: Service<
                Request<super::fixtures::TestBody>,
                Response = http::Response<B>,
                Error = BoxError,
            > + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send,
    {
        tower::util::BoxCloneSyncService::new(service.map_response(drop))
    }
    fn upstream() -> UpstreamService {
        UpstreamService::new(Upstream::Hangs)
    }
    let stacks: [(&str, Stack); 5] = [
        ("timeout inside", |breaker| {
            boxed(breaker.layer(TimeoutLayer::new(Timeouts::new().head(ms(50))).layer(upstream())))
        }),
        ("timeout outside", |breaker| {
            boxed(TimeoutLayer::new(Timeouts::new().head(ms(50))).layer(breaker.layer(upstream())))
        }),
        ("deadline outside", |breaker| {
            boxed(DeadlineLayer::new().default_of(ms(50)).layer(breaker.layer(upstream())))
        }),
        ("retry's attempt timeout", |breaker| {
            let retry = RetryLayer::http().attempts(1).attempt_timeout(ms(50));
            boxed(retry.layer(breaker.layer(upstream())))
        }),
        ("retry and a deadline that is only propagated", |breaker| {
            let deadline = DeadlineLayer::new().default_of(ms(50)).propagate_only();
            boxed(deadline.layer(RetryLayer::http().attempts(1).layer(breaker.layer(upstream()))))
        }),
    ];
    for (name, stack) in stacks {
        let breaker = CircuitBreakerLayer::http();
        let handle = breaker.handle();
        let client = stack(breaker);
        for _ in 0..5 {
            client.clone().oneshot(get()).await.unwrap_err();
        }
        assert_eq!(handle.state(), CircuitState::Open, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_deadline_is_neutral_in_every_layer_order() {
    let upstream = || UpstreamService::new(Upstream::Hangs);
    let check =
        async |name: &str, breaker: CircuitBreakerLayer, ends: Vec<Result<(), BoxError>>| {
            assert!(ends.iter().all(Result::is_err), "{name}");
            assert_eq!(breaker.handle().state(), CircuitState::Closed, "{name}");
            assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0, "{name}");
        };
    macro_rules! ends {
        ($client:expr) => {{
            let client = $client;
            let mut ends = Vec::new();
            for _ in 0..8 {
                let mut request = get();
                request.extensions_mut().insert(caller_deadline(ms(50)));
                ends.push(client.clone().oneshot(request).await.map(drop));
            }
            ends
        }};
    }
    let breaker = CircuitBreakerLayer::http();
    let inside = TimeoutLayer::http().layer(upstream());
    check("timeout inside", breaker.clone(), ends!(breaker.layer(inside))).await;

    let breaker = CircuitBreakerLayer::http();
    let outside = TimeoutLayer::http().layer(breaker.layer(upstream()));
    check("timeout outside", breaker, ends!(outside)).await;

    let breaker = CircuitBreakerLayer::http();
    let retry = RetryLayer::http().layer(breaker.layer(upstream()));
    check("retry", breaker, ends!(retry)).await;

    let breaker = CircuitBreakerLayer::http();
    let deadline = DeadlineLayer::new().layer(breaker.layer(upstream()));
    check("deadline", breaker, ends!(deadline)).await;

    let breaker = CircuitBreakerLayer::http();
    let hedged = HedgeLayer::http(ms(10)).layer(breaker.layer(upstream()));
    let hedged = TimeoutLayer::http().layer(hedged);
    check("hedge under a timeout", breaker, ends!(hedged)).await;
}

/// The next hop enforces the same deadline, and may report it first.
#[tokio::test(start_paused = true)]
async fn a_failure_by_which_the_upstream_reports_the_callers_deadline_is_neutral() {
    let gateway_timeout = || status(504);
    let deadline_exceeded = || crate::support::trailers_only("4");
    for (name, response) in [
        ("504", gateway_timeout as fn() -> _),
        ("DEADLINE_EXCEEDED", deadline_exceeded as fn() -> _),
    ] {
        for (deadline, is_neutral) in [(Some(ms(20)), true), (Some(secs(10)), false), (None, false)]
        {
            let breaker = CircuitBreakerLayer::http();
            let client = breaker.layer(service_fn(move |_: Request<()>| async move {
                sleep(ms(19)).await;
                Ok::<_, BoxError>(response())
            }));
            for _ in 0..5 {
                let mut request = request();
                if let Some(time) = deadline {
                    request.extensions_mut().insert(caller_deadline(time));
                }
                client.clone().oneshot(request).await.unwrap();
            }
            let state = breaker.handle().state();
            assert_eq!(
                state == CircuitState::Closed,
                is_neutral,
                "{name} with {deadline:?}: {state:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_far_in_the_future_has_not_passed() {
    use crate::support::{Piece, ScriptBody, trailers_only};
    use http_body_util::BodyExt;

    const DAY: u64 = 24 * 3600;
    type MakeResponse = fn() -> http::Response<ScriptBody>;
    let causes: [(&str, MakeResponse); 3] = [
        ("504", || status(504)),
        ("DEADLINE_EXCEEDED", || trailers_only("4")),
        ("body", || http::Response::new(ScriptBody::new([Piece::data("a"), Piece::Error]))),
    ];
    let times = [1, 24, 25, 30, 48, 50, 400 * 365].map(|days| secs(days * DAY));
    for time in times.into_iter().chain([Duration::MAX]) {
        for (name, response) in causes {
            let breaker = CircuitBreakerLayer::http();
            let client = breaker.layer(service_fn(move |_: Request<()>| async move {
                Ok::<_, BoxError>(response())
            }));
            for _ in 0..5 {
                let mut request = request();
                request.extensions_mut().insert(caller_deadline(time));
                let response = client.clone().oneshot(request).await.unwrap();
                let _ = response.into_body().collect().await;
            }
            assert_eq!(breaker.handle().state(), CircuitState::Open, "{name} with {time:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_cut_off_at_the_callers_deadline_is_neutral() {
    use http_body_util::BodyExt;

    let breaker = CircuitBreakerLayer::http();
    let client =
        breaker.layer(TimeoutLayer::http().as_is().layer(service_fn(|_: Request<()>| async {
            let body = crate::support::ScriptBody::new([
                crate::support::Piece::data("a"),
                crate::support::Piece::Stuck,
            ]);
            Ok::<_, BoxError>(http::Response::new(body))
        })));
    for _ in 0..8 {
        let mut request = request();
        request.extensions_mut().insert(caller_deadline(secs(3)));
        let response = client.clone().oneshot(request).await.unwrap();
        response.into_body().collect().await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_hedge_attempt_that_lost_is_neutral_however_long_it_took() {
    let breaker = CircuitBreakerLayer::http();
    let (inner, watch) = Strict::holding();
    let client = HedgeLayer::http(secs(2)).layer(breaker.layer(inner));
    for n in 0..8 {
        let call = tokio::spawn(
            client.clone().oneshot(Request::new(http_body_util::Empty::<bytes::Bytes>::new())),
        );
        sleep(ms(2500)).await;
        // The first attempt has taken 2.5 s, the second one wins.
        watch.end(2 * n + 1, Ok(empty()));
        call.await.unwrap().unwrap();
    }
    let seen = breaker.handle().snapshot();
    assert_eq!(
        (seen.state, seen.seen.consecutive_failures, seen.opened),
        (CircuitState::Closed, 0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_retry_makes_no_attempt_after_the_callers_deadline() {
    let upstream = UpstreamService::new(Upstream::Hangs);
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http().attempts(5))
        .layer(TimeoutLayer::http())
        .service(upstream.clone());
    let mut request = get();
    request.extensions_mut().insert(caller_deadline(ms(50)));
    let error = client.oneshot(request).await.unwrap_err();
    assert_eq!(upstream.calls(), 1);
    let attempts = buttress::Attempts::find(&*error).unwrap();
    let reasons: Vec<_> = attempts.records().iter().map(|tried| tried.outcome.reason()).collect();
    assert_eq!(reasons, [Reason::CallerDeadline]);
    let rejected = buttress::Rejected::find(&*error).unwrap();
    assert_eq!(rejected.deadline_source(), Some(DeadlineSource::Caller));
}

// ===== The source of a deadline =====

#[tokio::test(start_paused = true)]
async fn a_deadline_records_its_source() {
    let source = async |layer: DeadlineLayer, headers: &[(&str, &str)], own: Option<Deadline>| {
        let seen = service_fn(|request: Request<()>| async move {
            let deadline = Deadline::of(request.extensions());
            let mut response = http::Response::new(http_body_util::Empty::<bytes::Bytes>::new());
            if let Some(deadline) = deadline {
                response.extensions_mut().insert(deadline);
            }
            Ok::<_, BoxError>(response)
        });
        let mut request = request();
        for (name, value) in headers {
            if *name == "grpc-timeout" {
                *request.method_mut() = http::Method::POST;
            }
            let name: http::HeaderName = name.parse().unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        if let Some(own) = own {
            request.extensions_mut().insert(own);
        }
        let response = layer.propagate_only().layer(seen).oneshot(request).await.unwrap();
        response.extensions().get::<Deadline>().map(Deadline::source)
    };
    use DeadlineSource::{Caller, Operator};
    let layer = || DeadlineLayer::new().header("x-left").default_of(secs(10)).max(secs(30));
    let grpc = [("content-type", "application/grpc"), ("grpc-timeout", "2S")];
    assert_eq!(source(layer(), &[], None).await, Some(Operator), "the default");
    assert_eq!(source(layer(), &[("x-left", "500")], None).await, Some(Caller));
    assert_eq!(source(layer(), &grpc, None).await, Some(Caller));
    assert_eq!(source(layer(), &[("x-left", "99000")], None).await, Some(Operator), "the maximum");
    let own = Some(Deadline::after(secs(1)));
    assert_eq!(source(layer(), &[("x-left", "5000")], own).await, Some(Operator));
    assert_eq!(source(layer(), &[("x-left", "500")], own).await, Some(Caller), "the earlier one");
    let passed_on = Some(caller_deadline(secs(1)));
    assert_eq!(source(layer(), &[], passed_on).await, Some(Caller), "the next layer keeps it");
    let reserve = layer().reserve(ms(100));
    assert_eq!(source(reserve, &[], passed_on).await, Some(Caller));
}

// ===== Adaptive limits =====

#[tokio::test(start_paused = true)]
async fn short_deadlines_of_callers_do_not_change_an_adaptive_limit() {
    use buttress::limit::adaptive::{Aimd, Algorithm, Knee, Vegas};

    /// Returns the mean limit in front of 20 workers in the last 10 of 20 s. They receive more calls than they can
    /// serve.
    async fn limit(algorithm: impl Algorithm + Clone, short_deadlines: bool) -> u32 {
        fastrand::seed(7);
        let workers = Arc::new(Semaphore::new(20));
        let layer = ConcurrencyLimitLayer::adaptive(algorithm);
        let handle = layer.handle();
        let service = ServiceBuilder::new()
            .layer(DeadlineLayer::new().respond())
            .layer(layer.respond())
            .layer(TimeoutLayer::server().respond())
            .service(service_fn(move |_: Request<()>| {
                let workers = workers.clone();
                async move {
                    let _worker = workers.acquire().await;
                    sleep(Duration::from_micros(fastrand::u64(8_000..12_000))).await;
                    Ok::<_, std::convert::Infallible>(empty())
                }
            }));
        let mut limits = Vec::new();
        for n in 0..60_000_u32 {
            let mut request = request();
            if short_deadlines && n % 10 == 0 {
                request.extensions_mut().insert(caller_deadline(ms(1)));
            }
            tokio::spawn(service.clone().oneshot(request));
            if n % 3 == 0 {
                sleep(ms(1)).await;
            }
            if n >= 30_000 && n % 100 == 0 {
                limits.push(handle.snapshot().limit);
            }
        }
        limits.iter().sum::<u32>() / limits.len() as u32
    }
    fn near(with: u32, without: u32, name: &str) {
        let (with, without) = (f64::from(with), f64::from(without));
        assert!((with - without).abs() <= 0.1 * without + 1.0, "{name}: {with} of {without}");
    }
    let knee = || Knee::new(100, 1..=1000).unwrap();
    near(limit(knee(), true).await, limit(knee(), false).await, "Knee");
    let aimd = || Aimd::new(100, 20..=200).unwrap();
    near(limit(aimd(), true).await, limit(aimd(), false).await, "Aimd");
    near(limit(Vegas::default(), true).await, limit(Vegas::default(), false).await, "Vegas");
}

#[tokio::test(start_paused = true)]
async fn an_operator_timeout_during_an_upload_is_neutral() {
    type Call = BoxFuture<'static, Result<(), BoxError>>;
    fn healthy() -> UpstreamService {
        UpstreamService::new(Upstream::Responds(ms(1)))
    }
    fn call<S, B>(service: S) -> Call
    where
        S: Service<Request<super::fixtures::TestBody>, Response = http::Response<B>>
            + Send
            + 'static,
        S::Error: Into<BoxError> + Send,
        S::Future: Send,
    {
        let call = service.oneshot(trickle(ms(300), 10_000));
        Box::pin(async move { call.await.map(drop).map_err(Into::into) })
    }
    type Build = fn(CircuitBreakerLayer) -> Call;
    let stacks: [(&str, Build); 4] = [
        ("retry's attempt timeout", |breaker| {
            let retry = RetryLayer::http().attempts(1).attempt_timeout(secs(10));
            call(retry.layer(breaker.layer(healthy())))
        }),
        ("total inside", |breaker| {
            call(breaker.layer(TimeoutLayer::http().total(secs(10)).layer(healthy())))
        }),
        ("deadline and retry outside", |breaker| {
            let retry = RetryLayer::http().layer(breaker.layer(healthy()));
            call(DeadlineLayer::new().default_of(secs(10)).layer(retry))
        }),
        ("retry outside, total inside", |breaker| {
            let inner = TimeoutLayer::new(Timeouts::new().total(secs(10))).layer(healthy());
            call(RetryLayer::http().attempts(1).layer(breaker.layer(inner)))
        }),
    ];
    for (name, stack) in stacks {
        let breaker = CircuitBreakerLayer::http();
        for _ in 0..5 {
            stack(breaker.clone()).await.unwrap_err();
        }
        assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0, "{name}");
    }
}

/// The duration of the upload determines how much of the server's timeout is left for the upstream.
#[tokio::test(start_paused = true)]
async fn a_server_timeout_that_a_slow_upload_used_up_does_not_count_against_the_upstream() {
    for (upload_takes, opens) in [(ms(9_980), false), (ms(2_000), true)] {
        let breaker = CircuitBreakerLayer::http();
        let upstream = breaker.layer(UpstreamService::new(Upstream::Hangs));
        let handler = service_fn(move |request: Request<SendingBody<_>>| {
            let upstream = upstream.clone();
            async move {
                let _ = request.into_body().collect().await;
                upstream.oneshot(get()).await
            }
        });
        let server = TimeoutLayer::new(Timeouts::server().total(secs(10))).layer(handler);
        for _ in 0..5 {
            server.clone().oneshot(trickle(upload_takes, 1)).await.unwrap_err();
        }
        let state = if opens { CircuitState::Open } else { CircuitState::Closed };
        assert_eq!(breaker.handle().state(), state, "{upload_takes:?}");
    }
}
