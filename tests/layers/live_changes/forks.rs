//! Layers that are forked: what the copy has, and what it shares.

use std::time::Duration;

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, DeadlineLayer, HealthProbeLayer,
    HedgeLayer, RetryLayer, TimeoutLayer, Timeouts, Trip, outcome::Rejected,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tower::{Layer, ServiceExt, service_fn};

type Body = Empty<Bytes>;

fn ok()
-> impl tower::Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send>
+ Clone
+ Send
+ 'static {
    service_fn(|_: Request<Body>| async { Ok(Response::new(Body::new())) })
}

#[tokio::test(start_paused = true)]
async fn timeout_fork_has_every_setting() {
    let all = Timeouts::server()
        .total(Duration::from_secs(1))
        .response_total(Duration::from_millis(900))
        .first_frame(Duration::from_secs(3))
        .response_idle(Duration::from_secs(4))
        .request_stall(Duration::from_secs(5))
        .min_body_rate(7)
        .body_grace(Duration::from_secs(8))
        .min_body_rate_for_grpc(true);
    let layer = TimeoutLayer::new(all).as_is();
    let _service = layer.layer(ok());
    let fork = layer.clone().head(Duration::from_secs(77));
    let expected = all.head(Duration::from_secs(77));
    assert_eq!(format!("{:?}", fork.handle().snapshot().timeouts), format!("{expected:?}"));
    assert!(fork.handle().snapshot().timeouts == expected);
    assert!(layer.handle().snapshot().timeouts == all);
}

#[tokio::test(start_paused = true)]
async fn breaker_fork_starts_closed_with_the_changed_rules() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(5)).name("a");
    let handle = layer.handle();
    let _service = layer.layer(ok());
    handle.set_trip(&Trip::consecutive(2)).unwrap();
    handle.set_half_open_queue(3, Duration::from_secs(1)).unwrap();
    handle.set_external_probes(true);
    handle.set_shadow(true);
    handle.force_open();
    let fork = layer.clone().ramp(Duration::from_secs(1));
    let fork_handle = fork.handle();
    assert_eq!(fork_handle.state(), buttress::breaker::CircuitState::Closed);
    for _ in 0..2 {
        fork_handle.record(buttress::Outcome::failure());
    }
    assert_eq!(fork_handle.state(), buttress::breaker::CircuitState::Open);
    assert_eq!(handle.state(), buttress::breaker::CircuitState::ForcedOpen);
    // The fork of a fork, and the clone of a clone.
    let _service = fork.layer(ok());
    let third = fork.clone().clone().name("b").clone();
    fork_handle.force_closed();
    assert_eq!(third.handle().state(), buttress::breaker::CircuitState::Closed);
}

/// The name of a fork: a limit, a timeout, a retry and a breaker accept a name for the fork alike.
#[tokio::test(start_paused = true)]
async fn fork_can_be_renamed_like_that_of_a_breaker() {
    async fn name_of<S>(service: S) -> String
    where
        S: tower::Service<Request<Body>, Error = BoxError>,
    {
        let Err(error) = service.oneshot(Request::new(Body::new())).await else { panic!("ok") };
        format!("{}", Rejected::find(&*error).unwrap())
    }
    let breaker = CircuitBreakerLayer::http().name("first");
    let _service = breaker.layer(ok());
    let breaker = breaker.name("second");
    breaker.handle().force_open();
    let of_breaker = name_of(breaker.layer(ok())).await;
    assert!(of_breaker.contains("second"), "{of_breaker}");
    let limit = ConcurrencyLimitLayer::new(1).name("first");
    let _service = limit.layer(ok());
    let limit = limit.name("second");
    let _held = limit.handle().try_acquire().unwrap();
    let of_limit = name_of(limit.layer(ok())).await;
    assert!(
        of_limit.contains("second"),
        "a fork of a limit keeps the name of the old layer: {of_limit}"
    );
}

/// The name of a gate: the first one stays, as in the other layers and as before.
#[tokio::test(start_paused = true)]
async fn health_probe_keeps_its_first_name() {
    let layer = HealthProbeLayer::get::<Body>("/healthz").name("first").name("second");
    let text = format!("{:?}", layer.handle());
    assert!(text.contains("first"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn deadline_fork_keeps_the_running_service() {
    let layer = DeadlineLayer::new().default_of(Duration::from_secs(1)).propagate_only();
    let _service = layer.layer(ok());
    let base = DeadlineLayer::new().default_of(Duration::from_secs(1));
    let running = base.clone().propagate_only();
    let service = running.layer(service_fn(|request: Request<Body>| async move {
        Ok::<_, BoxError>(buttress::Deadline::of(request.extensions()).map(|at| at.left()))
    }));
    let _other = base.default_of(Duration::from_secs(9));
    let left = service.oneshot(Request::new(Body::new())).await.unwrap();
    assert_eq!(left, Some(Duration::from_secs(1)));
}

#[tokio::test(start_paused = true)]
async fn hedge_and_retry_forks_keep_settings() {
    let hedge = HedgeLayer::http(Duration::from_millis(5)).max_hedges(3);
    let _service = hedge.layer(ok());
    let fork = hedge.clone().max_replay_bytes(9);
    assert!(format!("{fork:?}").contains("5ms"));
    let retry = RetryLayer::http().attempts(7).attempt_timeout(Duration::from_secs(3));
    let _service = retry.layer(ok());
    let fork = retry.clone().max_replay_bytes(9);
    assert!(format!("{fork:?}").contains("attempts: 7"), "{fork:?}");
}

/// All gates of the set that probe an upstream are down. A layer that wraps no service, forked or not, must not count
/// as a gate that is up.
#[tokio::test(start_paused = true)]
async fn fork_without_a_service_does_not_count_in_its_fail_open_set() {
    use buttress::health::FailOpen;
    let down = || {
        service_fn(|_: Request<Body>| async {
            let mut response = Response::new(Body::new());
            *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, BoxError>(response)
        })
    };
    let set = FailOpen::new();
    let layers = [(); 2].map(|()| HealthProbeLayer::get::<Body>("/healthz").fail_open(&set));
    let services = layers.each_ref().map(|layer| layer.layer(down()));
    // The application prepares a variant of the layer.
    let _variant = layers[0].clone().shadow();
    let _unused = HealthProbeLayer::get::<Body>("/healthz").fail_open(&set);
    tokio::time::sleep(Duration::from_secs(60)).await;
    for layer in &layers {
        assert_eq!(layer.handle().state(), buttress::health::ProbeState::Down);
    }
    assert!(set.is_active(), "both upstreams are down: {set:?}");
    for service in services {
        assert!(service.oneshot(Request::new(Body::new())).await.is_ok());
    }
}

/// Gradient2 measures windows on the clock of the limit, too.
#[tokio::test(start_paused = true)]
async fn fork_of_gradient2_adapts() {
    use buttress::limit::adaptive::Gradient2;
    let inner = |ms: u64| {
        service_fn(move |_: Request<Body>| async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            Ok::<_, BoxError>(Response::new(Body::new()))
        })
    };
    let layer = ConcurrencyLimitLayer::adaptive(Gradient2::new(4, 1..=1000).unwrap());
    tokio::time::advance(Duration::from_secs(3600)).await;
    for _ in 0..10_005 {
        let calls = (0..4).map(|_| layer.layer(inner(10)).oneshot(Request::new(Body::new())));
        futures_util::future::join_all(calls).await;
        if layer.handle().limit() > 8 {
            break;
        }
    }
    let before = layer.handle().limit();
    let fork = layer.clone().retry_after(Duration::from_secs(2));
    let mut changed = [false, false];
    for (layer, changed) in [&layer, &fork].into_iter().zip(&mut changed) {
        for _ in 0..6000 {
            let calls =
                (0..before).map(|_| layer.layer(inner(40)).oneshot(Request::new(Body::new())));
            futures_util::future::join_all(calls).await;
            *changed |= layer.handle().limit() != before;
        }
    }
    assert!(changed[0], "the old layer adapts");
    assert!(changed[1], "the fork does not adapt in 240 s");
}
