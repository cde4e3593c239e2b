//! The contract of every layer, and the basic behaviour of a circuit breaker.

use std::time::Duration;

use buttress::{
    BoxError, CircuitBreaker, CircuitBreakerLayer, ConcurrencyLimitLayer, ConfigError, Outcome,
    Rejected, Trip,
    breaker::{CircuitBreakerHandle, CircuitState, TripReason},
    outcome::{Reason, RejectedKind},
};
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, assert_ready_eq, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, util::Oneshot};

use crate::support::{
    Oops, Piece, ScriptBody, Strict, Then, Watch,
    contract::{Subject, contract_tests},
    empty, grpc, hello, is_refusal, read, refused_as, request, status, trailers, trailers_only,
};

const WAIT: Duration = Duration::from_secs(30);

type Breaker = CircuitBreaker<Strict>;
type Call = task::Spawn<Oneshot<Breaker, Request<()>>>;

// ===== The contract of every layer =====

/// A half-open circuit with one probe slot.
struct HalfOpen {
    layer: CircuitBreakerLayer,
    handle: CircuitBreakerHandle,
}

impl Subject for HalfOpen {
    type Layer = CircuitBreakerLayer;
    type Service = Breaker;

    async fn new() -> Self {
        let layer = breaker(1);
        half_open(layer.clone()).await;
        Self { handle: layer.handle(), layer }
    }

    fn layer(&self) -> &CircuitBreakerLayer {
        &self.layer
    }

    fn taken(&self) -> usize {
        self.handle.snapshot().probes
    }

    fn shut(&mut self) {
        self.handle.force_open();
    }

    fn unshut(&mut self) {
        self.handle.reset();
    }
}

contract_tests!(HalfOpen);

#[tokio::test(start_paused = true)]
async fn waiting_caller_woken_on_open() {
    let (service, watch, handle) = closed(breaker(1));
    let mut under_way = hold(&service);
    watch.set_ready(false);
    // One caller waits in `poll_ready`, another in the future of a call that was made before `poll_ready` was ready.
    let mut ready = tower_test::mock::Spawn::new(service.clone());
    assert_pending!(ready.poll_ready::<Request<()>>());
    let mut early = task::spawn(service.clone().call(request()));
    assert_pending!(early.poll());

    assert!(watch.end(0, Err(Oops("down"))));
    assert!(assert_ready!(under_way.poll()).is_err());
    assert_eq!(handle.state(), CircuitState::Open);
    assert!(ready.is_woken() && early.is_woken());
    assert_ready_ok!(ready.poll_ready::<Request<()>>());
    assert_eq!(refused_as(ready.call(request()).await), RejectedKind::Open);
    assert_eq!(refused_as(assert_ready!(early.poll())), RejectedKind::Open);
}

#[tokio::test(start_paused = true)]
async fn unread_body_of_a_regular_response_is_no_failure() {
    let stuck = || Response::new(ScriptBody::new([Piece::data("a"), Piece::Stuck]));
    let (service, watch, handle) = half_open(breaker(1)).await;
    watch.script([Then::Answer(stuck())]);
    drop(service.clone().oneshot(request()).await.unwrap());
    assert_eq!(handle.state(), CircuitState::Closed);

    // The outcome of a gRPC call is unknown before its status: the probe only releases its slot.
    let (service, watch, handle) = half_open(breaker(1)).await;
    watch.script([Then::Answer(grpc([Piece::data("a"), Piece::Stuck]))]);
    drop(service.clone().oneshot(request()).await.unwrap());
    assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::HalfOpen, 0));
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
    let new = CircuitBreakerLayer::new;
    let ratio = Trip::failure_ratio;
    let good = || new(Trip::default());
    for (layer, field, value, remedy) in [
        (new(Trip::consecutive(0)), "trip.consecutive", "0", "1 or more"),
        (new(ratio(0.0)), "trip.failure_ratio", "0.0", "at most 1"),
        (new(ratio(50.0)), "trip.failure_ratio", "50.0", "such as 0.5"),
        (new(ratio(-0.1)), "trip.failure_ratio", "-0.1", "above 0"),
        (new(ratio(f64::NAN)), "trip.failure_ratio", "NaN", "above 0"),
        (new(ratio(f64::INFINITY)), "trip.failure_ratio", "inf", "at most 1"),
        (new(ratio(0.5).within(Duration::ZERO)), "trip.within", "0ns", "10ms"),
        (new(ratio(0.5).min_calls(0)), "trip.min_calls", "0", "1 or more"),
        (new(Trip::any([])), "trip.any", "0", "at least one rule"),
        (new(Trip::any([Trip::default(), ratio(2.0)])), "trip.failure_ratio", "2.0", "at most 1"),
        (good().open_for(Duration::ZERO), "open_for", "0ns", "above zero"),
        (good().half_open(0), "half_open", "0", "1 to 1000"),
        (good().half_open(1001), "half_open", "1001", "1 to 1000"),
        (good().probe_timeout(Duration::ZERO), "probe_timeout", "0ns", "above zero"),
    ] {
        // A misconfigured layer rejects every call with the error of its configuration.
        let (inner, watch) = Strict::new();
        let error = layer.layer(inner).oneshot(request()).await.unwrap_err();
        let refused = Rejected::find(&*error).expect("a rejection");
        assert_eq!(refused.kind(), RejectedKind::Misconfigured);
        let source = std::error::Error::source(refused).expect("a source");
        let told: &ConfigError =
            source.downcast_ref().expect("the source is the configuration error");
        assert_eq!((watch.seen().polls, watch.seen().calls), (0, 0));
        // A layer reports its first fault.
        let fault = layer.half_open(0).checked().unwrap_err();
        assert_eq!(&fault, told);
        assert_eq!((fault.field, fault.value.as_str()), (field, value));
        assert!(fault.remedy.contains(remedy), "{fault}");
    }
    assert!(good().half_open(1000).checked().is_ok());
}

#[tokio::test(start_paused = true)]
async fn handle_sees_setters_that_precede_the_first_service() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1));
    let (inner, watch) = Strict::holding();
    let handle = layer.handle();
    let layer = layer.open_for(Duration::from_secs(5)).half_open(2).name("late");
    let service = layer.layer(inner);
    fail(&service, &watch).await;
    assert_eq!(handle.snapshot().open_for, Some(Duration::from_secs(5)));
    let error = service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("late"));
    advance(Duration::from_secs(5)).await;
    let _probes = [hold(&service), hold(&service)];
    assert_eq!(handle.snapshot().probes, 2);
}

#[tokio::test(start_paused = true)]
async fn setter_after_the_first_service_does_not_change_that_service() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(WAIT).name("first");
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    let other = layer.clone().open_for(3 * WAIT).name("second").shadow();
    let (inner, other_watch) = Strict::holding();
    let other_service = other.layer(inner);
    fail(&service, &watch).await;
    assert_eq!((handle.state(), handle.snapshot().open_for), (CircuitState::Open, Some(WAIT)));
    let error = service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("first"));
    assert_eq!(other.handle().state(), CircuitState::Closed, "it has a circuit of its own");
    fail(&other_service, &other_watch).await;
    assert_eq!(other.handle().snapshot().open_for, Some(3 * WAIT));
    other.handle().set_shadow(false);
    let error = other_service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("second"));
    // A conversion is no setter, so the circuit stays the same.
    assert_eq!(layer.respond().handle().state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn handle_changes_the_settings_of_a_running_circuit() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(WAIT);
    let (service, watch, handle) = closed(layer);
    handle.set_open_for(2 * WAIT).unwrap();
    handle.set_half_open_of(1, 2).unwrap();
    handle.set_probe_timeout(WAIT).unwrap();
    handle.set_half_open_queue(1, WAIT).unwrap();
    handle.set_count_cancelled_after(None).unwrap();
    handle.set_ramp(Duration::ZERO);
    assert_eq!(handle.set_half_open_of(3, 2).unwrap_err().field, "half_open_of.needed");
    assert_eq!(handle.set_half_open_of(1, 1001).unwrap_err().field, "half_open");
    assert_eq!(handle.set_probe_timeout(Duration::ZERO).unwrap_err().field, "probe_timeout");
    fail(&service, &watch).await;
    assert_eq!(handle.snapshot().open_for, Some(2 * WAIT));
    advance(2 * WAIT).await;
    assert_eq!(
        handle.snapshot().half_open.map(|progress| (progress.needed, progress.total)),
        Some((1, 2))
    );
    handle.set_external_probes(true);
    let mut queued = task::spawn(service.clone().oneshot(request()));
    assert_pending!(queued.poll(), "the call waits for the verdict");
}

// ===== Opening =====

fn breaker(failures: u32) -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::consecutive(failures)).open_for(WAIT)
}

/// A closed circuit over a service that holds every call, unless it is scripted.
fn closed(layer: CircuitBreakerLayer) -> (Breaker, Watch, CircuitBreakerHandle) {
    let (inner, watch) = Strict::holding();
    (layer.layer(inner), watch, layer.handle())
}

/// [`closed`], then tripped by its first failures, and half-open after [`WAIT`].
async fn half_open(layer: CircuitBreakerLayer) -> (Breaker, Watch, CircuitBreakerHandle) {
    let (service, watch, handle) = closed(layer);
    while handle.state() == CircuitState::Closed {
        fail(&service, &watch).await;
    }
    advance(WAIT).await;
    assert_eq!(handle.state(), CircuitState::HalfOpen);
    (service, watch, handle)
}

/// Makes a call with this scripted end, and reads the response to its end.
async fn call(service: &Breaker, watch: &Watch, then: Then) -> Result<(), BoxError> {
    watch.script([then]);
    let response = service.clone().oneshot(request()).await?;
    read(response.into_body()).await?;
    Ok(())
}

async fn fail(service: &Breaker, watch: &Watch) {
    let error = call(service, watch, Then::Fail(Oops("down"))).await.unwrap_err();
    assert!(!is_refusal(&*error), "{error}");
}

async fn succeed(service: &Breaker, watch: &Watch) {
    call(service, watch, Then::Answer(hello())).await.unwrap();
}

/// A call in flight.
fn hold(service: &Breaker) -> Call {
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    call
}

async fn refused(service: &Breaker) -> RejectedKind {
    refused_as(service.clone().oneshot(request()).await)
}

#[tokio::test(start_paused = true)]
async fn opens_at_the_nth_failure_in_a_row() {
    let (service, watch, handle) = closed(breaker(3));
    for _ in 0..2 {
        fail(&service, &watch).await;
    }
    succeed(&service, &watch).await;
    for n in 1..=3 {
        assert_eq!(handle.state(), CircuitState::Closed);
        fail(&service, &watch).await;
        assert_eq!(handle.snapshot().seen.consecutive_failures, n);
    }
    assert_eq!(handle.state(), CircuitState::Open);
    let seen = handle.snapshot();
    assert_eq!((seen.opened, seen.last_trip), (1, Some(TripReason::Consecutive { failures: 3 })));

    advance(Duration::from_secs(10)).await;
    let error = service.clone().oneshot(request()).await.unwrap_err();
    let told = Rejected::find(&*error).unwrap();
    assert_eq!((told.kind(), told.layer()), (RejectedKind::Open, "circuit_breaker"));
    assert_eq!(told.retry_after(), Some(Duration::from_secs(20)), "the rest of the open time");
    // The hint is rounded up, so that a caller does not retry while the circuit is still open.
    advance(Duration::from_nanos(1)).await;
    let error = service.clone().oneshot(request()).await.unwrap_err();
    let told = Rejected::find(&*error).unwrap().retry_after().unwrap();
    assert_eq!(told, Duration::from_secs(20));
    assert_eq!((handle.snapshot().rejected, watch.seen().calls), (2, 6));
}

#[tokio::test(start_paused = true)]
async fn what_counts_as_a_failure_by_head() {
    for (code, kind) in [
        (200, CircuitState::Closed),
        (404, CircuitState::Closed),
        (408, CircuitState::Closed),
        (429, CircuitState::Closed),
        (500, CircuitState::Open),
        (501, CircuitState::Closed),
        (503, CircuitState::Open),
        (505, CircuitState::Closed),
    ] {
        let (service, watch, handle) = closed(breaker(1));
        call(&service, &watch, Then::Answer(status(code))).await.unwrap();
        assert_eq!(handle.state(), kind, "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn throttled_and_cancelled_calls_neither_count_nor_end_a_run_of_failures() {
    let (service, watch, handle) = closed(breaker(2));
    fail(&service, &watch).await;
    call(&service, &watch, Then::Answer(status(429))).await.unwrap();
    drop(hold(&service));
    assert_eq!(handle.snapshot().seen.consecutive_failures, 1);
    fail(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_failed_head_ends_the_call_before_its_body() {
    let (service, watch, handle) = closed(breaker(1));
    let mut bad = hello();
    *bad.status_mut() = http::StatusCode::BAD_GATEWAY;
    watch.script([Then::Answer(bad)]);
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(handle.state(), CircuitState::Open);
    assert_eq!(read(response.into_body()).await.unwrap().0, b"hello");
}

#[tokio::test(start_paused = true)]
async fn a_body_error_is_a_failure() {
    let (service, watch, handle) = closed(breaker(1));
    let broken = || Response::new(ScriptBody::new([Piece::data("a"), Piece::Error]));
    call(&service, &watch, Then::Answer(broken())).await.unwrap_err();
    assert_eq!(handle.state(), CircuitState::Open);
    // The same for the body of a 404.
    let (service, watch, handle) = closed(breaker(1));
    let mut broken = broken();
    *broken.status_mut() = http::StatusCode::NOT_FOUND;
    call(&service, &watch, Then::Answer(broken)).await.unwrap_err();
    assert_eq!(handle.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn grpc_status_in_the_head_or_in_the_trailers() {
    for (code, state) in [
        ("0", CircuitState::Closed),
        ("1", CircuitState::Closed),
        ("2", CircuitState::Open),
        ("3", CircuitState::Closed),
        ("4", CircuitState::Open),
        ("5", CircuitState::Closed),
        ("8", CircuitState::Closed),
        ("13", CircuitState::Open),
        ("14", CircuitState::Open),
        ("15", CircuitState::Open),
        ("16", CircuitState::Closed),
        ("999", CircuitState::Open),
        ("no number", CircuitState::Open),
    ] {
        let in_trailers = grpc([Piece::data("a"), Piece::Trailers(trailers(code))]);
        for response in [trailers_only(code), in_trailers] {
            let (service, watch, handle) = closed(breaker(1));
            call(&service, &watch, Then::Answer(response)).await.unwrap();
            assert_eq!(handle.state(), state, "{code}");
        }
    }
    // The stream ends without a status.
    for response in [grpc([Piece::data("a")]), grpc([])] {
        let (service, watch, handle) = closed(breaker(1));
        call(&service, &watch, Then::Answer(response)).await.unwrap();
        assert_eq!(handle.state(), CircuitState::Open);
    }
}

/// gRPC-Web carries its trailers in the body, so a missing status in the trailers is not a failure.
#[tokio::test(start_paused = true)]
async fn grpc_web_is_classified_by_its_head_only() {
    for (in_head, state) in [(None, CircuitState::Closed), (Some("14"), CircuitState::Open)] {
        let (service, watch, handle) = closed(breaker(1));
        let mut response = hello();
        let headers = response.headers_mut();
        headers.insert("content-type", "application/grpc-web+proto".parse().unwrap());
        if let Some(code) = in_head {
            headers.insert("grpc-status", code.parse().unwrap());
        }
        call(&service, &watch, Then::Answer(response)).await.unwrap();
        assert_eq!(handle.state(), state);
    }
}

#[tokio::test(start_paused = true)]
async fn a_classifier_of_the_user_determines_the_outcome() {
    let layer = breaker(1).classify(|result: Result<&u8, &Oops>| match result {
        Ok(0) => Outcome::failure(),
        _ => Outcome::success(),
    });
    let (inner, watch) = Strict::<u8>::of(|| Then::Fail(Oops("not a failure")));
    let service = layer.layer(inner);
    service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(layer.handle().state(), CircuitState::Closed);
    watch.script([Then::Answer(0)]);
    service.clone().oneshot(request()).await.unwrap();
    assert_eq!(layer.handle().state(), CircuitState::Open);

    let layer = breaker(1).classify_head(|status, _| match status.as_u16() {
        404 => Outcome::failure(),
        _ => Outcome::success(),
    });
    let (inner, watch) = Strict::new();
    let service = layer.layer(inner);
    watch.script([500, 404].map(|code| Then::Answer(status(code))));
    service.clone().oneshot(request()).await.unwrap();
    assert_eq!(layer.handle().state(), CircuitState::Closed);
    service.clone().oneshot(request()).await.unwrap();
    assert_eq!(layer.handle().state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_rejection_by_an_inner_limit_is_not_a_failure() {
    // A rejection as an error.
    let (outer, limit) = (breaker(1), ConcurrencyLimitLayer::new(1));
    let (inner, _watch) = Strict::holding();
    let service = outer.layer(limit.layer(inner));
    let mut under_way = task::spawn(service.clone().oneshot(request()));
    assert_pending!(under_way.poll());
    assert_eq!(refused_as(service.clone().oneshot(request()).await), RejectedKind::Full);
    assert_eq!(outer.handle().state(), CircuitState::Closed);

    // A rejection as a response: HTTP and gRPC.
    let (outer, limit) = (breaker(1).respond(), ConcurrencyLimitLayer::new(1).respond());
    let (inner, _watch) = Strict::holding();
    let service = outer.layer(limit.layer(inner));
    let mut under_way = task::spawn(service.clone().oneshot(request()));
    assert_pending!(under_way.poll());
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(response.status(), 503);
    let mut call = request();
    *call.method_mut() = http::Method::POST;
    call.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let response = service.clone().oneshot(call).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "14");
    assert_eq!(outer.handle().state(), CircuitState::Closed);

    // A half-open probe that an inner layer rejects decides nothing.
    let outer = breaker(1);
    half_open(outer.clone()).await;
    let limit = ConcurrencyLimitLayer::new(1);
    let (inner, _watch) = Strict::holding();
    let inner = limit.layer(inner);
    let mut under_way = task::spawn(inner.clone().oneshot(request()));
    assert_pending!(under_way.poll());
    assert_eq!(refused_as(outer.layer(inner).oneshot(request()).await), RejectedKind::Full);
    let seen = outer.handle().snapshot();
    assert_eq!((seen.state, seen.probes), (CircuitState::HalfOpen, 0));
}

// ===== The failure ratio =====

#[tokio::test(start_paused = true)]
async fn a_ratio_opens_at_its_share_and_not_before_enough_calls() {
    let (service, watch, handle) =
        closed(CircuitBreakerLayer::new(Trip::failure_ratio(0.5).min_calls(4)));
    for _ in 0..3 {
        fail(&service, &watch).await;
    }
    assert_eq!(handle.state(), CircuitState::Closed, "3 of 3 calls failed, and min_calls is 4");
    for _ in 0..4 {
        succeed(&service, &watch).await;
    }
    assert_eq!(handle.state(), CircuitState::Closed, "3 of 7 calls failed");
    fail(&service, &watch).await;
    let seen = handle.snapshot();
    assert_eq!(
        (seen.state, seen.seen.window_calls, seen.seen.window_failures),
        (CircuitState::Open, 8, 4)
    );
    assert_eq!(seen.last_trip, Some(TripReason::FailureRatio { failures: 4, calls: 8 }));
}

/// 7 of 100 calls are 7 %, although 0.07 × 100 is 7.000000000000001 in floating point.
#[tokio::test(start_paused = true)]
async fn a_ratio_is_inclusive_whatever_its_binary_fraction() {
    for (percent, calls) in
        [(7, 100), (14, 100), (28, 100), (29, 100), (55, 100), (57, 100), (30, 10)]
    {
        let ratio = f64::from(percent) / 100.0;
        let failures = percent * calls / 100;
        let trip = Trip::failure_ratio(ratio).min_calls(calls);
        let (service, watch, handle) = closed(CircuitBreakerLayer::new(trip));
        for _ in 0..calls - failures {
            succeed(&service, &watch).await;
        }
        for _ in 0..failures {
            assert_eq!(handle.state(), CircuitState::Closed);
            fail(&service, &watch).await;
        }
        assert_eq!(handle.state(), CircuitState::Open, "{percent} % of {calls}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_ratio_forgets_what_has_left_its_window() {
    let trip = Trip::failure_ratio(0.5).within(Duration::from_secs(10)).min_calls(4);
    let (service, watch, handle) = closed(CircuitBreakerLayer::new(trip));
    for _ in 0..3 {
        fail(&service, &watch).await;
    }
    advance(Duration::from_millis(8_999)).await;
    assert_eq!(handle.snapshot().seen.window_failures, 3);
    advance(Duration::from_millis(1_001)).await;
    assert_eq!(
        (handle.snapshot().seen.window_calls, handle.snapshot().seen.window_failures),
        (0, 0)
    );
    for _ in 0..3 {
        fail(&service, &watch).await;
    }
    assert_eq!(handle.state(), CircuitState::Closed, "3 of 3 calls in the window, not 6 of 6");
}

// ===== Half-open =====

#[tokio::test(start_paused = true)]
async fn the_end_of_the_open_time_is_part_of_half_open() {
    let (service, watch, handle) = closed(breaker(1));
    fail(&service, &watch).await;
    advance(WAIT - Duration::from_nanos(1)).await;
    assert_eq!(handle.state(), CircuitState::Open);
    assert_eq!(refused(&service).await, RejectedKind::Open);
    advance(Duration::from_nanos(1)).await;
    assert_eq!((handle.state(), handle.snapshot().open_for), (CircuitState::HalfOpen, None));
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn half_open_lets_exactly_n_probes_through() {
    let (service, watch, handle) = half_open(breaker(1).half_open(3)).await;
    let mut probes = [hold(&service), hold(&service), hold(&service)];
    assert_eq!(handle.snapshot().probes, 3);
    assert_eq!(refused(&service).await, RejectedKind::Probing);
    for (n, probe) in probes.iter_mut().enumerate() {
        assert_eq!(handle.state(), CircuitState::HalfOpen);
        assert_eq!(
            refused(&service).await,
            RejectedKind::Probing,
            "the number of probes bounds all probes, not only those in flight"
        );
        assert!(watch.end(n + 1, Ok(empty())));
        assert_ready_ok!(probe.poll());
    }
    assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::Closed, 0));
}

/// One of two probes has passed and the other one is in flight, so no probe slot is left.
#[tokio::test(start_paused = true)]
async fn rejection_never_polls_inner_between_probes() {
    let (service, watch, _handle) = half_open(breaker(1).half_open(2)).await;
    let _under_way = hold(&service);
    succeed(&service, &watch).await;
    watch.set_ready(false);
    let polls = watch.seen().polls;
    let mut late = tower_test::mock::Spawn::new(service.clone());
    assert_ready_ok!(late.poll_ready::<Request<()>>());
    assert_eq!(refused_as(late.call(request()).await), RejectedKind::Probing);
    assert_eq!(watch.seen().polls, polls);
}

#[tokio::test(start_paused = true)]
async fn a_failed_or_throttled_probe_opens_again() {
    for answer in [500, 503, 429] {
        let (service, watch, handle) = half_open(breaker(1)).await;
        call(&service, &watch, Then::Answer(status(answer))).await.unwrap();
        let seen = handle.snapshot();
        assert_eq!((seen.state, seen.open_for, seen.opened), (CircuitState::Open, Some(WAIT), 2));
        let Some(TripReason::Probe { outcome }) = seen.last_trip else {
            panic!("{:?}", seen.last_trip)
        };
        assert_eq!((outcome.reason(), outcome.code()), (Reason::Status, Some(answer)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_probe_releases_its_slot() {
    let (service, watch, handle) = half_open(breaker(1)).await;
    for _ in 0..100 {
        let probe = hold(&service);
        assert_eq!(refused(&service).await, RejectedKind::Probing);
        drop(probe);
        assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::HalfOpen, 0));
    }
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);
}

/// The probe itself holds the only slot. It must not be rejected for the lack of a slot.
#[tokio::test(start_paused = true)]
async fn a_probe_waits_for_its_inner_service() {
    let (service, watch, handle) = half_open(breaker(1)).await;
    watch.set_ready(false);
    let mut probe = task::spawn(service.clone().call(request()));
    assert_pending!(probe.poll());
    assert_eq!(handle.snapshot().probes, 1);
    watch.script([Then::Answer(empty())]);
    watch.set_ready(true);
    assert!(probe.is_woken());
    assert_ready_ok!(probe.poll());
    assert_eq!(handle.state(), CircuitState::Closed);
}

/// A caller waits for a hung service in half-open. When the last probe slot is taken, it is rejected like a later call.
#[tokio::test(start_paused = true)]
async fn waiting_caller_woken_when_the_last_slot_is_taken() {
    for probes in [1, 2, 3] {
        let (service, watch, _handle) = half_open(breaker(1).half_open(probes)).await;
        watch.set_ready(false);
        let mut waiting = tower_test::mock::Spawn::new(service.clone());
        let mut under_way = Vec::new();
        for _ in 0..probes {
            assert_pending!(waiting.poll_ready::<Request<()>>());
            let mut probe = task::spawn(service.clone().call(request()));
            assert_pending!(probe.poll());
            under_way.push(probe);
        }
        assert!(waiting.is_woken());
        assert_ready_ok!(waiting.poll_ready::<Request<()>>());
        assert_eq!(refused_as(waiting.call(request()).await), RejectedKind::Probing);
        for probe in &mut under_way {
            assert_pending!(probe.poll(), "a probe is not rejected for the slot it holds");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn stragglers_admitted_before_the_trip_never_count() {
    let (service, watch, handle) = closed(breaker(1));
    let mut stragglers: Vec<_> = (0..4).map(|_| hold(&service)).collect();
    let mut end = |watch: &Watch, n: usize, with| {
        assert!(watch.end(n, with));
        let _ = assert_ready!(stragglers[n].poll());
    };
    fail(&service, &watch).await;
    end(&watch, 0, Err(Oops("late")));
    assert_eq!((handle.state(), handle.snapshot().opened), (CircuitState::Open, 1));
    advance(WAIT).await;
    let _probe = hold(&service);
    end(&watch, 1, Ok(empty()));
    end(&watch, 2, Err(Oops("late")));
    assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::HalfOpen, 1));
    handle.reset();
    end(&watch, 3, Err(Oops("late")));
    assert_eq!(
        (handle.state(), handle.snapshot().seen.consecutive_failures),
        (CircuitState::Closed, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_never_ends_is_decided_by_its_head() {
    let lease = Duration::from_secs(7);
    // A good head: the probe has passed.
    let (service, watch, handle) = half_open(breaker(1).probe_timeout(lease)).await;
    watch.script([Then::Answer(Response::new(ScriptBody::new([Piece::Stuck])))]);
    let mut stream = service.clone().oneshot(request()).await.unwrap().into_body();
    assert_pending!(task::spawn(stream.frame()).poll());
    advance(lease - Duration::from_nanos(1)).await;
    assert_eq!(refused(&service).await, RejectedKind::Probing);
    advance(Duration::from_nanos(1)).await;
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);
    drop(stream);
    assert_eq!(handle.state(), CircuitState::Closed);

    // A good gRPC head without a status is sufficient when the probe times out.
    let (service, watch, handle) = half_open(breaker(1).probe_timeout(lease)).await;
    watch.script([Then::Answer(grpc([Piece::Stuck]))]);
    let mut stream = service.clone().oneshot(request()).await.unwrap().into_body();
    assert_pending!(task::spawn(stream.frame()).poll());
    advance(lease).await;
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);

    // No head: the probe has failed, and its late response is ignored.
    let (service, watch, handle) = half_open(breaker(1).probe_timeout(lease)).await;
    let mut probe = hold(&service);
    advance(lease).await;
    assert_eq!(refused(&service).await, RejectedKind::Open);
    assert_eq!(handle.snapshot().last_trip, Some(TripReason::ProbeTimeout));
    assert!(watch.end(1, Ok(empty())));
    assert_ready_ok!(probe.poll());
    assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::Open, 0));
}

#[tokio::test(start_paused = true)]
async fn closing_starts_the_count_anew() {
    let (service, watch, handle) = half_open(breaker(3)).await;
    succeed(&service, &watch).await;
    for _ in 0..2 {
        fail(&service, &watch).await;
    }
    assert_eq!(handle.state(), CircuitState::Closed);
    fail(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Open);
}

// ===== The handle =====

#[tokio::test(start_paused = true)]
async fn circuit_can_be_forced_open_forced_closed_and_reset() {
    let (service, watch, handle) = closed(breaker(1));
    handle.force_open();
    let error = service.clone().oneshot(request()).await.unwrap_err();
    let told = Rejected::find(&*error).unwrap();
    assert_eq!((told.kind(), told.retry_after()), (RejectedKind::ForcedOpen, None));
    advance(WAIT * 10).await;
    assert_eq!(
        (handle.state(), refused(&service).await),
        (CircuitState::ForcedOpen, RejectedKind::ForcedOpen)
    );

    handle.force_closed();
    for _ in 0..10 {
        fail(&service, &watch).await;
    }
    assert_eq!(handle.state(), CircuitState::ForcedClosed);
    assert_eq!(handle.snapshot().seen.consecutive_failures, 0, "nothing is counted");

    handle.reset();
    assert_eq!(handle.state(), CircuitState::Closed);
    fail(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Open);
    handle.reset();
    succeed(&service, &watch).await;
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn changed_reports_changes_by_calls_and_by_time() {
    let (service, watch, handle) = closed(breaker(1));
    let mut changed = task::spawn(handle.changed());
    assert_pending!(changed.poll());
    succeed(&service, &watch).await;
    assert_pending!(changed.poll());
    fail(&service, &watch).await;
    assert!(changed.is_woken());
    assert_ready_eq!(changed.poll(), CircuitState::Open);

    // Without a call, the end of the open time is reported as well.
    let mut changed = task::spawn(handle.changed());
    assert_pending!(changed.poll());
    advance(WAIT - Duration::from_millis(1)).await;
    assert_pending!(changed.poll());
    advance(Duration::from_millis(1)).await;
    assert!(changed.is_woken());
    assert_ready_eq!(changed.poll(), CircuitState::HalfOpen);

    let mut changed = task::spawn(handle.changed());
    assert_pending!(changed.poll());
    handle.force_open();
    assert_ready_eq!(changed.poll(), CircuitState::ForcedOpen);
}

#[tokio::test(start_paused = true)]
async fn maximum_wait_and_probe_timeout_cause_no_overflow() {
    let layer = breaker(1).open_for(Duration::MAX).probe_timeout(Duration::MAX);
    let (service, watch, handle) = closed(layer);
    fail(&service, &watch).await;
    let mut changed = task::spawn(handle.changed());
    assert_pending!(changed.poll());
    advance(Duration::from_secs(3600)).await;
    assert_pending!(changed.poll());
    assert_eq!(refused(&service).await, RejectedKind::Open);
}

/// A caller that panics while it holds a good response is not a failure of the service.
#[tokio::test(start_paused = true)]
async fn a_callers_own_panic_is_not_the_services_failure() {
    let (service, watch, handle) = closed(breaker(1));
    watch.script([Then::Answer(Response::new(ScriptBody::new([Piece::Stuck])))]);
    let before_head = service.clone();
    let task = tokio::spawn(async move {
        let _response = service.oneshot(request()).await.unwrap();
        panic!("a panic of the caller");
    });
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(handle.state(), CircuitState::Closed);
    let task = tokio::spawn(async move {
        let mut under_way = task::spawn(before_head.oneshot(request()));
        assert_pending!(under_way.poll());
        panic!("a panic of the caller");
    });
    assert!(task.await.unwrap_err().is_panic());
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_service_is_a_failure() {
    for step in [
        Then::PanicInCall,
        Then::PanicInPoll,
        Then::Answer(Response::new(ScriptBody::new([Piece::Panic]))),
    ] {
        let (service, watch, handle) = closed(breaker(1));
        watch.script([step]);
        let task = tokio::spawn(async move {
            let response = service.oneshot(request()).await.unwrap();
            read(response.into_body()).await.map(drop)
        });
        assert!(task.await.unwrap_err().is_panic());
        assert_eq!(handle.state(), CircuitState::Open);
    }
}

/// The inner service has a queue. A circuit that opens gives up its position or permit there, so that other callers can
/// acquire it.
#[tokio::test(start_paused = true)]
async fn an_opened_circuit_leaves_the_queue_of_its_inner_service() {
    for layer in [breaker(1), breaker(1).backpressure()] {
        let handle = layer.handle();
        let shared = tower::limit::GlobalConcurrencyLimitLayer::new(1);
        let limited = shared.layer(Strict::new().0);
        let mut first = limited.clone();
        ServiceExt::<Request<()>>::ready(&mut first).await.unwrap();

        let mut waiting = task::spawn(layer.layer(limited.clone()));
        let mut poll =
            || waiting.enter(|cx, mut it| Service::<Request<()>>::poll_ready(&mut *it, cx));
        assert_pending!(poll());
        handle.force_open();
        let _ = poll();
        drop(first);
        let mut second = limited.clone();
        let ready = task::spawn(ServiceExt::<Request<()>>::ready(&mut second)).poll().is_ready();
        assert!(ready, "an open circuit holds the only permit");
    }
}
