//! Circuits of a server: how they open and close, and their half-open probes.

use super::*;

// ===== Circuits =====

#[tokio::test]
async fn handler_that_always_responds_500_opens_the_circuit() {
    for per_route in [false, true] {
        let hits = Arc::new(AtomicUsize::new(0));
        let seen = hits.clone();
        let handler = get(move || {
            seen.fetch_add(1, Ordering::SeqCst);
            async { StatusCode::INTERNAL_SERVER_ERROR }
        });
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(3)).respond();
        let state = breaker.handle();
        let app = if per_route {
            Router::new().route("/", handler.layer(breaker))
        } else {
            Router::new().route("/", handler).layer(breaker)
        };
        let addr = serve(app).await;
        let mut statuses = Vec::new();
        for _ in 0..5 {
            // Each call has a connection of its own: the state must not be per connection.
            let answer = answers(&mut send_all(addr, ["/"]), 1).await.remove(0);
            if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                assert_eq!(answer.headers["retry-after"], "30");
                assert_eq!(answer.headers["content-type"], "application/problem+json");
            }
            statuses.push(answer.status.as_u16());
        }
        assert_eq!(statuses, [500, 500, 500, 503, 503]);
        assert_eq!(hits.load(Ordering::SeqCst), 3);
        assert_eq!((state.state(), state.snapshot().rejected), (CircuitState::Open, 2));
    }
}

#[tokio::test]
async fn a_handler_that_recovers_closes_the_breaker() {
    let well = Arc::new(AtomicUsize::new(0));
    let answer = well.clone();
    let handler = get(move || async move {
        match answer.load(Ordering::SeqCst) {
            0 => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::OK,
        }
    });
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_millis(50))
        .respond();
    let state = breaker.handle();
    let addr = serve(Router::new().route("/", handler).layer(breaker)).await;
    answers(&mut send_all(addr, ["/"]), 1).await;
    assert_eq!(state.state(), CircuitState::Open);
    well.store(1, Ordering::SeqCst);
    assert_eq!(soon(state.changed()).await, CircuitState::HalfOpen);
    let answer = answers(&mut send_all(addr, ["/"]), 1).await.remove(0);
    assert_eq!(answer.status, StatusCode::OK);
    until(|| state.state() == CircuitState::Closed).await;
    assert_eq!(state.snapshot().probes, 0);
}

/// Serves a route that fails once and is a [`Stage`] afterwards, behind a circuit that is half-open.
async fn half_open() -> (std::net::SocketAddr, Stage, CircuitBreakerHandle) {
    let (stage, failed) = (Stage::default(), Arc::new(AtomicUsize::new(0)));
    let inner = stage.clone();
    let handler = get(move || async move {
        match failed.fetch_add(1, Ordering::SeqCst) {
            0 => Err(StatusCode::INTERNAL_SERVER_ERROR),
            _ => Ok(inner.plain().await),
        }
    });
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(Duration::from_millis(20));
    let state = breaker.handle();
    let addr = serve(Router::new().route("/", handler).layer(breaker.respond())).await;
    answers(&mut send_all(addr, ["/"]), 1).await;
    while state.state() == CircuitState::Open {
        soon(state.changed()).await;
    }
    assert_eq!(state.state(), CircuitState::HalfOpen);
    (addr, stage, state)
}

#[tokio::test]
async fn half_open_lets_one_probe_through_of_twenty_callers() {
    let (addr, stage, state) = half_open().await;
    let mut calls = send_all(addr, repeat_n("/", CALLERS));
    for refused in answers(&mut calls, CALLERS - 1).await {
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers["retry-after"], "1");
    }
    assert_eq!((stage.inside.now(), stage.inside.total(), state.snapshot().probes), (1, 1, 1));
    stage.open();
    assert_eq!(answers(&mut calls, 1).await[0].status, StatusCode::OK);
    until(|| state.state() == CircuitState::Closed).await;
    assert_eq!(state.snapshot().probes, 0);
}

#[tokio::test]
async fn a_probe_whose_client_disconnects_releases_its_slot() {
    let (addr, stage, state) = half_open().await;
    for round in 1..=3 {
        let mut probe = send_all(addr, ["/"]);
        until(|| stage.inside.total() == round).await;
        assert_eq!(state.snapshot().probes, 1);
        probe.abort_all();
        until(|| stage.inside.now() == 0 && state.snapshot().probes == 0).await;
        assert_eq!(state.state(), CircuitState::HalfOpen);
    }
    stage.open();
    assert_eq!(answers(&mut send_all(addr, ["/"]), 1).await[0].status, StatusCode::OK);
    until(|| state.state() == CircuitState::Closed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_breaker_rejects_many_callers_at_once_and_no_call_hangs() {
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let addr = serve(routes(&Stage::default()).layer(breaker.respond())).await;
    state.force_open();
    for answer in answers(&mut send_all(addr, repeat_n("/a", 200)), 200).await {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(state.snapshot().rejected, 200);
}

// ===== Panics =====

/// If a layer catches the panic, the call is dropped after the unwinding and not during it.
#[tokio::test]
async fn a_panic_counts_as_failure_whether_or_not_a_layer_catches_it() {
    for caught in [false, true] {
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
        let state = breaker.handle();
        let app = Router::new().route(
            "/",
            get(|| async {
                if true {
                    panic!("a handler's panic, as expected");
                }
            }),
        );
        let app = app.layer(breaker.respond());
        let addr = serve(if caught { app.layer(CatchPanicLayer::new()) } else { app }).await;
        for _ in 0..2 {
            let result = soon(client().request(net::get(addr, "/"))).await;
            assert_eq!(
                result.map(|response| response.status().as_u16()).ok(),
                caught.then_some(500)
            );
        }
        until(|| state.state() == CircuitState::Open).await;
    }
}
