//! Deadlines: their sources, their enforcement, and their propagation to the next hop.

use std::{
    future::{Future, Ready, pending, poll_fn, ready},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, DeadlineLayer,
    DeadlineSource, Outcome, RetryLayer, TimeoutLayer, Timeouts, Trip, breaker::CircuitState,
    deadline::Codec, outcome::RejectedKind, timeout::TimeoutPhase,
};
use http::{HeaderMap, Method, Request, Response};
use tokio::time::{Instant, advance, sleep};
use tokio_test::task;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use super::fixtures::*;
use crate::support::{Strict, refused_as};

const LEFT: &str = "x-request-timeout-ms";

/// The requests that reached the service: the time to the deadline, and the headers.
type Seen = Arc<Mutex<Vec<(Option<Duration>, HeaderMap)>>>;

fn recording<B: 'static>(
    status: u16,
) -> (
    Seen,
    impl Service<Request<B>, Response = Response<Nothing>, Error = BoxError, Future: Send> + Clone,
) {
    let seen = Seen::default();
    let log = seen.clone();
    let service = serve(move |request: Request<B>| {
        let left = Deadline::of(request.extensions()).map(|deadline| deadline.left());
        log.lock().unwrap().push((left, request.headers().clone()));
        let response = Response::builder().status(status).body(Nothing::new());
        async move { Ok(response?) }
    });
    (seen, service)
}

fn with(headers: &[(&'static str, &str)]) -> Request<Nothing> {
    let mut request = request();
    for (name, value) in headers {
        if value.starts_with("application/grpc") {
            *request.method_mut() = Method::POST;
        }
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    request
}

async fn seen_of(layer: DeadlineLayer, request: Request<Nothing>) -> (Option<Duration>, HeaderMap) {
    let (seen, service) = recording(200);
    layer.layer(service).oneshot(request).await.unwrap();
    seen.lock().unwrap().remove(0)
}

// ===== Sources and propagation =====

#[tokio::test(start_paused = true)]
async fn the_earliest_deadline_applies() {
    let grpc = ("content-type", "application/grpc");
    let layer = || DeadlineLayer::new().header(LEFT).default_of(secs(9));
    for (headers, extension, left) in [
        (&[][..], None, 9000),
        (&[(LEFT, "700")], None, 700),
        (&[(LEFT, "soon")], None, 9000),
        (&[(LEFT, "700")], Some(500), 500),
        (&[(LEFT, "700")], Some(900), 700),
        // A deadline of the application replaces the default, and no header extends it.
        (&[], Some(90_000), 90_000),
        (&[(LEFT, "600000")], Some(90_000), 90_000),
        (&[(LEFT, "50000")], Some(90_000), 50_000),
        (&[grpc, ("grpc-timeout", "99999999H")], Some(90_000), 90_000),
        (&[grpc, ("grpc-timeout", "3S")], None, 3000),
        (&[grpc, ("grpc-timeout", "3S"), (LEFT, "700")], None, 700),
        (&[("grpc-timeout", "3S")], None, 9000),
        // A header never extends the default.
        (&[(LEFT, "600000")], None, 9000),
        (&[grpc, ("grpc-timeout", "99999999H")], None, 9000),
    ] {
        let mut request = with(headers);
        if let Some(extension) = extension {
            request.extensions_mut().insert(Deadline::after(ms(extension)));
        }
        let (seen, said) = seen_of(layer(), request).await;
        assert_eq!(seen, Some(ms(left)), "{headers:?} {extension:?}");
        assert_eq!(said[LEFT], left.to_string(), "the header has the remaining time");
        let grpc = headers.contains(&grpc).then(|| format!("{}u", left * 1000));
        if let Some(grpc) = grpc {
            assert_eq!(said["grpc-timeout"], grpc);
        }
    }
    let (seen, said) = seen_of(DeadlineLayer::new().header(LEFT), request()).await;
    assert_eq!((seen, said.len()), (None, 0), "a request without a deadline is unchanged");
}

#[tokio::test(start_paused = true)]
async fn headers_are_bounded_by_the_maximum_less_the_reserve() {
    let layer = || DeadlineLayer::new().header(LEFT).max(secs(5)).reserve(ms(20));
    assert_eq!(seen_of(layer(), with(&[(LEFT, "600000")])).await.0, Some(ms(4980)));
    assert_eq!(seen_of(layer(), with(&[(LEFT, "99999999999999999999")])).await.0, Some(ms(4980)));
    let (seen, said) = seen_of(layer(), with(&[(LEFT, "100")])).await;
    assert_eq!((seen, said[LEFT].to_str().unwrap()), (Some(ms(80)), "80"));
    let (seen, service) = recording(200);
    let refused = layer().layer(service).oneshot(with(&[(LEFT, "20")])).await;
    assert_eq!(refused_as(refused.map(drop)), RejectedKind::DeadlinePassed);
    assert!(seen.lock().unwrap().is_empty(), "no useful time is left for the call");
}

#[tokio::test(start_paused = true)]
async fn deadline_of_the_application_replaces_the_default_and_the_maximum() {
    let layer = || DeadlineLayer::new().header(LEFT).default_of(secs(9)).max(secs(20));
    let set = |headers: &[(&'static str, &str)], deadline: Deadline| {
        let mut request = with(headers);
        request.extensions_mut().insert(deadline);
        request
    };
    let own = Deadline::after(secs(60));
    assert_eq!(seen_of(layer(), set(&[], own)).await.0, Some(secs(60)));
    // The header of a caller does not extend it. A shorter time in the header applies.
    assert_eq!(seen_of(layer(), set(&[(LEFT, "90000")], own)).await.0, Some(secs(60)));
    assert_eq!(seen_of(layer(), set(&[(LEFT, "30000")], own)).await.0, Some(secs(30)));
    let kept = layer().reserve(secs(1));
    assert_eq!(seen_of(kept, set(&[], own)).await.0, Some(secs(59)));
    let no_default = DeadlineLayer::new().max(secs(20));
    assert_eq!(seen_of(no_default, set(&[], own)).await.0, Some(secs(60)));
}

#[tokio::test(start_paused = true)]
async fn deadline_of_a_caller_that_is_passed_on_keeps_its_bound() {
    let set = |left: Duration| {
        let mut request = request();
        let deadline = Deadline::after(left).with_source(DeadlineSource::Caller);
        request.extensions_mut().insert(deadline);
        request
    };
    let default = || DeadlineLayer::new().default_of(secs(9));
    assert_eq!(seen_of(default(), set(secs(100))).await.0, Some(secs(9)));
    assert_eq!(seen_of(default(), set(secs(3))).await.0, Some(secs(3)));
    let max = || DeadlineLayer::new().max(secs(20));
    assert_eq!(seen_of(max(), set(secs(100))).await.0, Some(secs(20)));
    assert_eq!(seen_of(max(), set(secs(3))).await.0, Some(secs(3)));
}

/// A codec with whole seconds.
#[derive(Clone, Copy)]
struct Seconds;

impl Codec for Seconds {
    fn read(&self, headers: &HeaderMap) -> Option<Duration> {
        headers.get("x-wait")?.to_str().ok()?.parse().ok().map(Duration::from_secs)
    }

    fn write(&self, left: Duration, headers: &mut HeaderMap) {
        headers.insert("x-wait", left.as_secs().max(1).into());
    }

    fn resolution(&self) -> Duration {
        secs(1)
    }
}

/// Returns the deadline that reaches a service within two deadline layers.
async fn within_two(
    outer: DeadlineLayer,
    inner: DeadlineLayer,
    request: Request<Nothing>,
) -> Deadline {
    let seen = Arc::new(Mutex::new(None));
    let log = seen.clone();
    let service = serve(move |request: Request<Nothing>| {
        *log.lock().unwrap() = Deadline::of(request.extensions());
        ready(Ok::<_, BoxError>(Response::new(Nothing::new())))
    });
    let service = inner.propagate_only().layer(service);
    outer.propagate_only().layer(service).oneshot(request).await.unwrap();
    seen.lock().unwrap().expect("a deadline")
}

/// The inner layer reads the header that the outer layer has written.
#[tokio::test(start_paused = true)]
async fn deadline_keeps_its_source_in_a_second_layer_that_reads_the_same_header() {
    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    let millis = || DeadlineLayer::new().header(LEFT);
    let seconds = || DeadlineLayer::new().codec(Seconds);
    let layers: [fn() -> DeadlineLayer; 4] = [millis, seconds, DeadlineLayer::new, millis];
    let headers = [&[][..], &[], &[GRPC], &[GRPC]];
    for (case, (layer, headers)) in layers.into_iter().zip(headers).enumerate() {
        // The last one is written in seconds to `grpc-timeout`.
        for time in [ms(1), Duration::from_nanos(9_700_000_123), secs(200_000) + ms(999)] {
            let case = format!("case {case}, {time:?}");
            let expected = Deadline::after(time);
            let seen = within_two(layer().default_of(time), layer(), with(headers)).await;
            assert_eq!(seen.source(), DeadlineSource::Operator, "{case}");
            assert_eq!(seen.left(), ms(time.as_nanos().div_ceil(1_000_000) as u64), "{case}");
            // A deadline of the application.
            let mut request = with(headers);
            request.extensions_mut().insert(expected);
            let seen = within_two(layer(), layer(), request).await;
            assert_eq!((seen, seen.source()), (expected, DeadlineSource::Operator), "{case}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn shorter_time_of_a_caller_is_of_the_caller_in_both_layers() {
    let layer = || DeadlineLayer::new().header(LEFT).default_of(secs(9));
    let seen = within_two(layer(), layer(), with(&[(LEFT, "700")])).await;
    assert_eq!((seen.left(), seen.source()), (ms(700), DeadlineSource::Caller));
    // Only the inner layer reads the header.
    let outer = DeadlineLayer::new().default_of(secs(1));
    let seen = within_two(outer, layer(), with(&[(LEFT, "998")])).await;
    assert_eq!((seen.left(), seen.source()), (ms(998), DeadlineSource::Caller));
}

/// A server's default is not a deadline of the application, so it does not replace the default of a client.
#[tokio::test(start_paused = true)]
async fn default_of_a_server_that_is_passed_on_keeps_the_default_of_the_client() {
    for (server, header) in [(secs(10), None), (secs(10), Some("600000"))] {
        let (seen, client) = recording::<Nothing>(200);
        let client = DeadlineLayer::new().default_of(secs(2)).layer(client);
        let handler = serve(move |request: Request<Nothing>| {
            let mut passed_on = super::fixtures::request();
            let deadline = Deadline::of(request.extensions()).expect("a deadline");
            passed_on.extensions_mut().insert(deadline);
            client.clone().oneshot(passed_on)
        });
        let server = DeadlineLayer::new().header(LEFT).default_of(server).layer(handler);
        let headers: Vec<_> = header.into_iter().map(|left| (LEFT, left)).collect();
        server.oneshot(with(&headers)).await.unwrap();
        assert_eq!(seen.lock().unwrap()[0].0, Some(secs(2)), "{header:?}");
    }
}

/// A codec of the user may return any resolution.
#[tokio::test(start_paused = true)]
async fn resolution_without_bound_does_not_panic() {
    struct Coarse;

    impl Codec for Coarse {
        fn read(&self, headers: &HeaderMap) -> Option<Duration> {
            Seconds.read(headers)
        }

        fn write(&self, left: Duration, headers: &mut HeaderMap) {
            Seconds.write(left, headers);
        }

        fn resolution(&self) -> Duration {
            Duration::MAX
        }
    }

    let layer = || DeadlineLayer::new().codec(Coarse).default_of(secs(9));
    let seen = within_two(layer(), layer(), request()).await;
    assert_eq!((seen.left(), seen.source()), (secs(9), DeadlineSource::Operator));
}

#[tokio::test(start_paused = true)]
async fn setter_of_a_layer_in_use_does_not_change_its_services() {
    for propagate_only in [false, true] {
        let (seen, service) = recording(200);
        let layer = DeadlineLayer::new().default_of(secs(5));
        let handle = layer.handle();
        let forked = if propagate_only {
            let running = layer.clone().propagate_only().layer(service.clone());
            let forked = layer.max(secs(2)).reserve(secs(1));
            running.oneshot(request()).await.unwrap();
            forked
        } else {
            let running = layer.layer(service.clone());
            let forked = layer.max(secs(2)).reserve(secs(1));
            running.oneshot(request()).await.unwrap();
            forked
        };
        handle.set_default(secs(9)).unwrap();
        forked.layer(service).oneshot(request()).await.unwrap();
        let left: Vec<_> = seen.lock().unwrap().iter().map(|(left, _)| *left).collect();
        assert_eq!(left, [Some(secs(5)), Some(secs(1))]);
    }
}

#[tokio::test(start_paused = true)]
async fn invalid_settings_are_typed_errors() {
    for (layer, field) in [
        (DeadlineLayer::new().default_of(ms(0)), "default_of"),
        (DeadlineLayer::new().max(ms(0)), "max"),
        (DeadlineLayer::new().header("no such name"), "header"),
    ] {
        assert_eq!(layer.checked().unwrap_err().field, field);
    }
    let layer = DeadlineLayer::new().default_of(secs(1)).checked().unwrap();
    let handle = layer.handle();
    assert_eq!(handle.set_default(ms(0)).unwrap_err().field, "default_of");
    handle.set_default(secs(3)).unwrap();
    assert_eq!(seen_of(layer.clone(), request()).await.0, Some(secs(3)), "the new default applies");
    assert_eq!(handle.set_max(ms(0)).unwrap_err().field, "max");
    handle.set_max(secs(2)).unwrap();
    handle.set_reserve(ms(100));
    assert_eq!(seen_of(layer.clone(), request()).await.0, Some(ms(1900)));
    handle.set_default(None).unwrap();
    handle.set_reserve(None);
    assert_eq!(seen_of(layer, request()).await.0, None);
}

// ===== Enforcement =====

#[tokio::test(start_paused = true)]
async fn a_call_after_its_deadline_is_not_begun_and_a_call_in_flight_is_ended() {
    let (inner, watch) = Strict::holding();
    let layer = DeadlineLayer::new().default_of(secs(2)).name("search");
    let (handle, service) = (layer.handle(), layer.layer(inner));
    let start = Instant::now();
    let error = service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(2)));
    assert_eq!(
        error.to_string(),
        "rejected by deadline `search`: deadline passed with the call in flight"
    );
    let refused =
        service.oneshot(with(&[("content-type", "application/grpc"), ("grpc-timeout", "0n")]));
    assert_eq!(refused_as(refused.await.map(drop)), RejectedKind::DeadlinePassed);
    assert_eq!((watch.seen().calls, watch.seen().in_flight, watch.seen().reserved), (1, 0, 0));
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.ended, snapshot.rejected), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_response_to_a_passed_deadline_is_504_or_deadline_exceeded() {
    let (inner, _watch) = Strict::holding();
    let service = DeadlineLayer::new().default_of(secs(2)).respond().layer(inner);
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(response.status(), 504);
    let response = service.oneshot(with(&[("content-type", "application/grpc")])).await.unwrap();
    assert_eq!(response.headers()["grpc-status"], "4");
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_cut_off_at_the_deadline() {
    let service = DeadlineLayer::new()
        .default_of(secs(50))
        .layer(serve(|_: Request<_>| async { Ok(Response::new(Paced::every(secs(20), 9))) }));
    let response = service.oneshot(request()).await.unwrap();
    let (frames, end) = drain(response.into_body()).await;
    assert_eq!((frames, phase_of(&end.unwrap_err())), (2, TimeoutPhase::Deadline));
}

#[tokio::test(start_paused = true)]
async fn the_deadline_is_enforced_although_the_inner_call_with_the_timer_is_dropped() {
    let timed = TimeoutLayer::http()
        .layer(serve(|_: Request<_>| pending::<Result<Response<Nothing>, BoxError>>()));
    let dropping = serve(move |request: Request<Nothing>| {
        let mut call = Some(Box::pin(timed.clone().oneshot(request)));
        poll_fn(move |cx| {
            if let Some(mut call) = call.take() {
                assert!(call.as_mut().poll(cx).is_pending(), "the call has registered its timer");
            }
            Poll::<Result<Response<Nothing>, BoxError>>::Pending
        })
    });
    let start = Instant::now();
    let call = DeadlineLayer::new().default_of(secs(2)).layer(dropping).oneshot(request());
    let error = call.await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(2)));
}

/// After its first poll the inner call moves to another task. Its timer wakes that task, so the outer deadline layer
/// needs its own timer.
#[tokio::test(start_paused = true)]
async fn the_deadline_is_enforced_although_the_inner_call_moves_to_another_task() {
    let timed = TimeoutLayer::http()
        .layer(serve(|_: Request<_>| pending::<Result<Response<Nothing>, BoxError>>()));
    let detaching = serve(move |request: Request<Nothing>| {
        let mut call = Some(Box::pin(timed.clone().oneshot(request)));
        poll_fn(move |cx| {
            if let Some(mut call) = call.take() {
                assert!(call.as_mut().poll(cx).is_pending());
                tokio::spawn(call);
            }
            Poll::<Result<Response<Nothing>, BoxError>>::Pending
        })
    });
    let start = Instant::now();
    let call = DeadlineLayer::new().default_of(secs(2)).layer(detaching).oneshot(request());
    let error =
        tokio::time::timeout(secs(60), call).await.expect("the deadline is enforced").unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(2)));
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_a_request_apply_to_each_attempt() {
    let (inner, watch) = Strict::holding();
    let wait = Backoff::constant(secs(1)).without_jitter();
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(secs(60)))
        .layer(RetryLayer::http().backoff(wait))
        .layer(TimeoutLayer::http())
        .service(inner);
    let mut request = request();
    request.extensions_mut().insert(Timeouts::new().head(secs(2)));
    let start = Instant::now();
    service.oneshot(request).await.unwrap_err();
    assert_eq!((watch.seen().calls, start.elapsed()), (3, secs(2 + 1 + 2 + 1 + 2)));
}

#[tokio::test(start_paused = true)]
async fn the_reserve_is_subtracted_from_a_time_beyond_the_clock() {
    let ages = Duration::from_millis(u64::MAX);
    let layer = DeadlineLayer::new().default_of(ages).reserve(ages - secs(5));
    assert_eq!(seen_of(layer, with(&[])).await.0, Some(secs(5)));
}

/// A service that blocks for this time in its `call`, and then runs the closure.
#[derive(Clone)]
struct Blocks<F>(Duration, F);

fn blocked(time: Duration) {
    assert!(task::spawn(advance(time)).poll().is_pending());
}

impl<F: Fn(Request<Nothing>)> Service<Request<Nothing>> for Blocks<F> {
    type Response = Response<Nothing>;
    type Error = BoxError;
    type Future = Ready<Result<Response<Nothing>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Nothing>) -> Self::Future {
        blocked(self.0);
        self.1(request);
        ready(Ok(Response::new(Nothing::new())))
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_blocks_reads_the_current_time() {
    let inner = Blocks(secs(3), |request: Request<_>| {
        let deadline = Deadline::of(request.extensions()).unwrap();
        assert_eq!((deadline.left(), Deadline::after(secs(1)).left()), (secs(2), secs(1)));
        assert_eq!(Deadline::after(secs(1)).at(), Instant::now() + secs(1));
        blocked(secs(3));
        assert_eq!(deadline.left(), Duration::ZERO);
    });
    for propagate_only in [false, true] {
        let layer = DeadlineLayer::new().default_of(secs(5));
        if propagate_only {
            layer.propagate_only().layer(inner.clone()).oneshot(request()).await.unwrap();
        } else {
            layer.layer(inner.clone()).oneshot(request()).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn calls_of_a_service_that_blocks_read_the_current_time() {
    fn calls<L>(layer: L)
    where
        L: Layer<Blocks<fn(Request<Nothing>)>>,
        L::Service: Service<Request<Nothing>, Error = BoxError> + Clone,
    {
        let further = layer.layer(Blocks(secs(0), |request: Request<_>| {
            let at = Deadline::of(request.extensions()).unwrap().at();
            assert_eq!(at, Instant::now() + secs(2));
        }));
        for _ in 0..3 {
            blocked(secs(3));
            let mut call = task::spawn(further.clone().oneshot(request()));
            assert!(matches!(call.poll(), Poll::Ready(Ok(_))));
        }
    }
    let layer = || DeadlineLayer::new().default_of(secs(2));
    let inner = Blocks(secs(3), move |_: Request<_>| {
        calls(layer());
        calls(layer().propagate_only());
    });
    layer().layer(inner).oneshot(request()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn bodies_read_by_a_service_that_blocks_end_at_the_deadline() {
    let streams = serve(|_| async { Ok(Response::new(Paced::at([Duration::ZERO; 9]))) });
    let streams = DeadlineLayer::new().default_of(secs(2)).layer(streams);
    let inner = Blocks(secs(3), move |_: Request<_>| {
        let answer = task::spawn(streams.clone().oneshot(request())).poll();
        let Poll::Ready(Ok(response)) = answer else { panic!("the response is not ready") };
        blocked(secs(3));
        let end = task::spawn(drain(response.into_body())).poll();
        let Poll::Ready((0, Err(late))) = end else { panic!("{end:?}") };
        assert_eq!(phase_of(&late), TimeoutPhase::Deadline);
    });
    DeadlineLayer::new().default_of(secs(9)).layer(inner).oneshot(request()).await.unwrap();
}

// ===== Propagation only =====

#[tokio::test(start_paused = true)]
async fn a_propagated_deadline_is_written_alike_and_not_enforced() {
    let (seen, inner) = recording(200);
    let layer = DeadlineLayer::new().header(LEFT).default_of(secs(2)).propagate_only();
    let (handle, service) = (layer.handle(), layer.layer(inner));
    service.clone().oneshot(with(&[])).await.unwrap();
    handle.set_max(secs(1)).unwrap();
    service.oneshot(with(&[(LEFT, "1500")])).await.unwrap();
    let seen: Vec<_> = seen.lock().unwrap().drain(..).collect();
    let said: Vec<_> = seen.iter().map(|(_, said)| said[LEFT].to_str().unwrap()).collect();
    assert_eq!(said, ["2000", "1000"]);
    let left: Vec<_> = seen.iter().map(|(left, _)| *left).collect();
    assert_eq!(left, [secs(2), secs(1)].map(Some));
    assert_eq!((handle.snapshot().ended, handle.snapshot().rejected), (0, 0));

    let error = DeadlineLayer::new().header("no header").propagate_only().checked().unwrap_err();
    assert_eq!(error.field, "header");
}

#[tokio::test(start_paused = true)]
async fn retry_and_timeout_enforce_a_propagated_deadline() {
    let limit = ConcurrencyLimitLayer::new(1).queue(9, secs(60));
    let places = limit.handle();
    let (inner, watch) = Strict::holding();
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(secs(2)).propagate_only())
        .layer(RetryLayer::http())
        .layer(limit)
        .layer(TimeoutLayer::http())
        .service(inner);
    let start = Instant::now();
    let queued = async {
        sleep(ms(1)).await;
        service.clone().oneshot(request()).await
    };
    let (first, second) = tokio::join!(service.clone().oneshot(request()), queued);
    assert_eq!(
        (phase_of(&first.unwrap_err()), start.elapsed()),
        (TimeoutPhase::Deadline, ms(2001))
    );
    assert!(second.is_err(), "the queued call had a permit, with 1 ms left");
    assert_eq!((watch.seen().calls, places.in_flight()), (2, 0));
    assert_eq!(watch.seen().in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_cut_off_at_a_propagated_deadline() {
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(secs(50)).propagate_only())
        .layer(TimeoutLayer::http())
        .service(serve(|_: Request<_>| async { Ok(Response::new(Paced::every(secs(20), 9))) }));
    let response = service.oneshot(request()).await.unwrap();
    let (frames, end) = drain(response.into_body()).await;
    assert_eq!((frames, phase_of(&end.unwrap_err())), (2, TimeoutPhase::Deadline));
}

// ===== The remaining time in other layers =====

#[tokio::test(start_paused = true)]
async fn each_attempt_sends_the_time_left_and_none_begins_after_the_deadline() {
    let (seen, inner) = recording(503);
    let wait = Backoff::constant(ms(400)).without_jitter();
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(secs(1)))
        .layer(RetryLayer::http().attempts(9).backoff(wait))
        .layer(DeadlineLayer::new().header(LEFT))
        .service(inner);
    let start = Instant::now();
    assert_eq!(service.oneshot(request()).await.unwrap().status(), 503);
    let told: Vec<_> = seen
        .lock()
        .unwrap()
        .iter()
        .map(|(_, said)| said[LEFT].to_str().unwrap().to_owned())
        .collect();
    assert!(start.elapsed() <= ms(803), "no delay ends after the deadline: {:?}", start.elapsed());
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[0], "1000");
    assert!((598..=600).contains(&told[1].parse::<u32>().unwrap()), "{told:?}");
    assert!((196..=200).contains(&told[2].parse::<u32>().unwrap()), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn a_queued_call_waits_until_the_deadline_and_the_timeout_ends_a_call_in_flight() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let limit = ConcurrencyLimitLayer::new(1).queue(9, secs(60));
    let (circuit, places) = (breaker.handle(), limit.handle());
    let (inner, watch) = Strict::holding();
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(secs(2)))
        .layer(breaker)
        .layer(limit)
        .layer(TimeoutLayer::http())
        .service(inner);
    let start = Instant::now();
    let first = tokio::spawn(service.clone().oneshot(with(&[])));
    sleep(secs(1)).await;
    let second = tokio::spawn(service.oneshot(request()));
    let error = first.await.unwrap().unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(2)));
    assert_eq!(
        circuit.state(),
        CircuitState::Open,
        "the breaker counts a hang that an outer deadline ends"
    );
    // The second call received its permit at the end of the first one, with one second left.
    let error = second.await.unwrap().unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Deadline, secs(3)));
    assert_eq!((watch.seen().calls, places.in_flight()), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_circuit_rejects_a_call_after_its_deadline_in_half_open() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(secs(1))
        .half_open_queue(9, secs(60));
    let circuit = breaker.handle();
    let (inner, watch) = Strict::holding();
    let service = breaker.layer(inner);
    circuit.record(Outcome::failure());
    sleep(secs(1)).await;
    let within = |time| {
        let mut request = request();
        request.extensions_mut().insert(Deadline::after(time));
        request
    };
    let late = service.clone().oneshot(within(ms(0))).await;
    assert_eq!(refused_as(late.map(drop)), RejectedKind::DeadlinePassed);
    assert_eq!((circuit.snapshot().probes, watch.seen().calls), (0, 0));
    // One half-open probe, and one call that waits for its outcome until its own deadline.
    let probe = tokio::spawn(service.clone().oneshot(request()));
    sleep(ms(1)).await;
    let start = Instant::now();
    let waited = service.oneshot(within(secs(5))).await;
    assert_eq!(refused_as(waited.map(drop)), RejectedKind::DeadlinePassed);
    assert_eq!((start.elapsed(), watch.seen().calls), (secs(5), 1));
    assert_eq!(circuit.snapshot().rejected, 2);
    probe.abort();
}

#[test]
fn auto_traits() {
    fn is<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sends<T: Send + 'static>(_: &T) {}
    let (inner, _watch) = Strict::new();
    let layer = DeadlineLayer::new().header(LEFT);
    is(&layer);
    is(&layer.handle());
    let service = layer.layer(inner);
    is(&service);
    sends(&service.oneshot(request()));
}
