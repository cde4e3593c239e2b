//! An admitted call through a breaker or a limit, alone or in a stack, allocates nothing.

use std::{
    convert::Infallible,
    future::{Future, ready},
    hint::black_box,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Health, HealthProbeLayer, Outcome, Trip,
    breaker::CircuitBreakerHandle,
    limit::{
        adaptive::{Aimd, Gradient2, Knee, Vegas},
        partition::{CallClass, Priority},
    },
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower::{Layer, Service, ServiceBuilder, service_fn};

fn now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("the future is pending"),
    }
}

fn ready_now<S: Service<Req>, Req>(service: &mut S) {
    let Poll::Ready(Ok(())) = service.poll_ready(&mut Context::from_waker(Waker::noop())) else {
        panic!("not ready")
    };
}

/// Counts the allocations of 100 calls, after a first call, which may allocate once for all.
fn allocations(mut call: impl FnMut()) -> u64 {
    call();
    allocation_counter::measure(|| (0..100).for_each(|_| call())).count_total
}

/// Counts the allocations of 100 calls of a `service_fn` whose request is a number.
fn generic<L>(layer: L) -> u64
where
    L: Layer<Echo>,
    L::Service: Service<u64, Response = u64>,
{
    let mut service = layer.layer(service_fn(echo as fn(u64) -> _));
    allocations(|| {
        ready_now(&mut service);
        assert_eq!(now(service.call(7)).ok(), Some(7));
    })
}

type Echo = tower::util::ServiceFn<fn(u64) -> std::future::Ready<Result<u64, Infallible>>>;

fn echo(n: u64) -> std::future::Ready<Result<u64, Infallible>> {
    ready(Ok(n))
}

type Answer = Result<Response<Full<Bytes>>, Infallible>;
type Hello = tower::util::ServiceFn<fn(Request<()>) -> std::future::Ready<Answer>>;

fn hello(_: Request<()>) -> std::future::Ready<Answer> {
    ready(Ok(Response::new(Full::new(Bytes::from_static(b"hello")))))
}

/// Counts the allocations of 100 calls of an HTTP service. Each response is read to its end.
fn http<L, B>(layer: L) -> u64
where
    L: Layer<Hello>,
    L::Service: Service<Request<()>, Response = Response<B>>,
    B: Body<Data = Bytes, Error: std::fmt::Debug>,
{
    let mut service = layer.layer(service_fn(hello as fn(_) -> _));
    allocations(|| {
        ready_now(&mut service);
        let Ok(response) = now(service.call(Request::new(()))) else { panic!("refused") };
        let mut body = pin!(response.into_body());
        let mut read = 0;
        while let Some(frame) = now(std::future::poll_fn(|cx| body.as_mut().poll_frame(cx))) {
            read += frame.unwrap().data_ref().map_or(0, Bytes::len);
        }
        assert_eq!(black_box(read), 5);
    })
}

/// Runs a test within a runtime with timers, so that a limit that creates a timer for each call is detected.
fn in_runtime<T>(test: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _guard = runtime.enter();
    test()
}

fn limit() -> ConcurrencyLimitLayer {
    ConcurrencyLimitLayer::new(2).queue(8, Duration::from_secs(1))
}

fn ratio() -> Trip {
    Trip::any([Trip::consecutive(5), Trip::failure_ratio(0.5)])
}

fn judge(result: Result<&u64, &Infallible>) -> Outcome {
    result.map_or(Outcome::failure(), |_| Outcome::success())
}

fn judge_boxed(result: Result<&u64, &BoxError>) -> Outcome {
    result.map_or(Outcome::failure(), |_| Outcome::success())
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(black_box(Box::new(1)))), 100);
}

#[test]
fn an_admitted_call_allocates_nothing() {
    in_runtime(|| {
        assert_eq!(generic(CircuitBreakerLayer::http().per_response()), 0);
        assert_eq!(generic(CircuitBreakerLayer::http().classify(judge)), 0);
        assert_eq!(generic(CircuitBreakerLayer::new(ratio()).classify(judge)), 0);
        assert_eq!(generic(limit().per_response()), 0);
        assert_eq!(generic(limit().classify(judge)), 0);
        assert_eq!(generic(ConcurrencyLimitLayer::adaptive(Knee::default()).per_response()), 0);
        let both = ServiceBuilder::new()
            .layer(CircuitBreakerLayer::http().classify(judge_boxed))
            .layer(limit().per_response());
        assert_eq!(generic(both), 0);
    });
}

/// A closed breaker with each kind of rule, with and without failures in its window, and with all options.
#[test]
fn a_closed_breaker_allocates_nothing_with_any_setting() {
    let slow = Trip::slow_ratio(0.5, Duration::from_secs(9));
    let count = || Trip::failure_ratio(0.5).over(100);
    in_runtime(|| {
        for trip in [
            count(),
            Trip::failure_ratio(0.5),
            slow.clone(),
            slow.clone().over(50),
            Trip::any([Trip::consecutive(5), count(), slow, Trip::when(|_| false)]),
        ] {
            let layer = || CircuitBreakerLayer::new(trip.clone());
            assert_eq!(generic(layer().classify(judge)), 0, "{trip:?}");
            assert_eq!(http(layer()), 0, "{trip:?}");
            let failed = layer().classify(judge);
            failed.handle().record(Outcome::failure());
            assert_eq!(generic(failed), 0, "{trip:?} with a failure");
            let all = layer()
                .ramp(Duration::from_secs(9))
                .half_open_queue(9, Duration::from_secs(9))
                .backpressure()
                .shadow()
                .name("all");
            assert_eq!(generic(all.per_response()), 0, "{trip:?}");
            assert_eq!(generic(layer().keyed(|n: &u64| n % 3).per_response()), 0, "{trip:?}");
            assert_eq!(http(layer().per_origin()), 0, "{trip:?}");
        }
        let held_closed = CircuitBreakerLayer::http().classify(judge);
        held_closed.handle().force_closed();
        assert_eq!(generic(held_closed), 0);
    });
}

/// A limit of each kind below its maximum, with all options that do not need to allocate.
#[test]
fn a_limit_with_a_free_permit_allocates_nothing_with_any_setting() {
    let by_number =
        |n: &u64| CallClass::from(Priority::NORMAL.with_key(n.to_le_bytes())).partition(0);
    let by_path = |request: &Request<()>| match request.uri().path() {
        "/livez" => CallClass::exempt(),
        _ => CallClass::default().partition(1),
    };
    let adaptive = |algorithm: &str| match algorithm {
        "aimd" => ConcurrencyLimitLayer::adaptive(Aimd::default()),
        "vegas" => ConcurrencyLimitLayer::adaptive(Vegas::default()),
        _ => ConcurrencyLimitLayer::adaptive(Gradient2::default()),
    };
    in_runtime(|| {
        for algorithm in ["aimd", "vegas", "gradient2"] {
            assert_eq!(generic(adaptive(algorithm).per_response()), 0, "{algorithm}");
            assert_eq!(http(adaptive(algorithm).until_body_end()), 0, "{algorithm}");
        }
        assert_eq!(http(limit().release_at_head().name("all").shadow()), 0);
        assert_eq!(http(limit().exempt_paths(["/", "/livez"])), 0);
        assert_eq!(generic(limit().classify_by(by_number).per_response()), 0);
        let sorted = limit().classify_by(by_number).partitions(&[0.5, 0.5]).reject_by_priority();
        assert_eq!(generic(sorted.per_response()), 0);
        assert_eq!(http(limit().classify_by(by_path).partitions(&[0.5, 0.5]).respond()), 0);
        // The permit that the call and the handler share, and its entry in the extensions of the request.
        assert!((1..=400).contains(&http(limit().upgrades())));
    });
}

/// A rejection allocates the box of its error, or nothing if `respond_with` returns another value.
#[test]
fn a_rejected_call_allocates_at_most_once() {
    fn refused<L>(layer: L, most: u64)
    where
        L: Layer<Echo>,
        L::Service: Service<u64, Response = u64>,
    {
        let mut service = layer.layer(service_fn(echo as fn(u64) -> _));
        let count = allocations(|| {
            ready_now(&mut service);
            assert_ne!(now(service.call(7)).ok(), Some(7));
        });
        assert!(count <= most * 100, "{count} for 100 calls");
    }
    in_runtime(|| {
        for force in [CircuitBreakerHandle::force_open, |handle: &CircuitBreakerHandle| {
            handle.record(Outcome::failure());
        }] {
            let layer = || CircuitBreakerLayer::new(Trip::consecutive(1)).name("refuses");
            let boxed = layer().classify(judge);
            force(&boxed.handle());
            refused(boxed, 1);
            let own = layer().classify(|_: Result<&u64, &Infallible>| Outcome::success());
            let own = own.respond_with(|_| Ok(0));
            force(&own.handle());
            refused(own, 0);
        }
        let half_open = CircuitBreakerLayer::http().external_probes().classify(judge);
        half_open.handle().half_open();
        refused(half_open, 1);
    });
}

#[test]
fn an_admitted_http_call_allocates_nothing_to_the_end_of_its_body() {
    in_runtime(|| {
        assert_eq!(http(tower::layer::util::Identity::new()), 0, "the inner service alone");
        assert_eq!(http(CircuitBreakerLayer::http()), 0);
        assert_eq!(http(CircuitBreakerLayer::new(ratio()).respond()), 0);
        assert_eq!(http(limit()), 0);
        assert_eq!(http(limit().respond()), 0);
        assert_eq!(http(ConcurrencyLimitLayer::adaptive(Knee::default())), 0);
        assert_eq!(http(Health::new().endpoints()), 0, "a request that is not a health check");
        assert_eq!(http(HealthProbeLayer::get("/healthz")), 0);
        assert_eq!(http(HealthProbeLayer::get("/healthz").passive()), 0);
        let client = ServiceBuilder::new().layer(CircuitBreakerLayer::http()).layer(limit());
        assert_eq!(http(client), 0);
        let server = ServiceBuilder::new()
            .layer(limit().respond())
            .layer(CircuitBreakerLayer::http().respond());
        assert_eq!(http(server), 0);
    });
}

/// The token in the extensions of the request, and the map of the extensions, which a server has usually filled before.
#[test]
fn a_call_with_a_drain_token_allocates_only_for_its_extension() {
    in_runtime(|| {
        let lifecycle = buttress::Lifecycle::without_signals(&Health::new()).unwrap();
        assert_eq!(http(lifecycle.layer()), 300);
    });
}

#[test]
fn a_timeout_on_a_response_that_is_ready_allocates_nothing() {
    use buttress::TimeoutLayer;
    // No runtime here: a timer would panic.
    assert_eq!(generic(TimeoutLayer::http().per_response()), 0);
    assert_eq!(http(TimeoutLayer::http().as_is()), 0);
    assert_eq!(http(TimeoutLayer::http().as_is().respond()), 0);
    assert_eq!(http(TimeoutLayer::server().respond()), 0);
}

/// The memory that stays in use after 1024 keys of 60 KB: in the host, in the userinfo and in the path of a URI.
#[test]
fn large_keys_leave_little_memory_behind() {
    const LIMIT: i64 = 4 * 1024 * 1024;
    let large = "x".repeat(60_000);
    let uris: [&dyn Fn(usize) -> String; 3] =
        [&|n| format!("http://{n}.{large}/"), &|n| format!("http://{large}@{n}/"), &|n| {
            format!("http://{n}/{large}")
        }];
    in_runtime(|| {
        for uri in uris {
            let layer = CircuitBreakerLayer::http().per_origin();
            let mut service = layer.layer(service_fn(hello as fn(_) -> _));
            let memory = allocation_counter::measure(|| {
                for n in 0..1024 {
                    let request = Request::get(uri(n)).body(()).unwrap();
                    ready_now(&mut service);
                    assert!(now(service.call(request)).is_ok());
                }
            });
            assert!(memory.bytes_current < LIMIT, "{} bytes", memory.bytes_current);
            drop(layer);
        }
        let layer = CircuitBreakerLayer::http().keyed(|key: &String| key.clone()).per_response();
        let mut service = layer.layer(service_fn(|_: String| ready(Ok::<_, Infallible>(()))));
        let memory = allocation_counter::measure(|| {
            for n in 0..1024 {
                ready_now(&mut service);
                assert!(now(service.call(format!("{n}{large}"))).is_ok());
            }
        });
        assert!(memory.bytes_current < LIMIT, "{} bytes", memory.bytes_current);
    });
}
