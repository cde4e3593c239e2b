//! Connection housekeeping: neutral, unless the upstream has never responded or has stopped responding.

use std::fmt;

use buttress::{Outcome, classify::Classify, outcome::Reason};
use tokio::time::advance;
use tower::{Layer, ServiceExt, service_fn};

use super::fixtures::*;

/// The outcome of a call, as its request and, unless it is a success, as its error.
#[derive(Clone, Copy, Debug)]
struct Ends(Outcome);

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Ends {}

type Classifier = fn(Result<&Outcome, &Ends>) -> Outcome;

/// A circuit over a service that ends each call with the outcome in its request.
struct Circuit {
    layer: CircuitBreakerLayer<Classify<Classifier>>,
}

impl Circuit {
    fn new(layer: CircuitBreakerLayer) -> Self {
        fn classify(result: Result<&Outcome, &Ends>) -> Outcome {
            result.map_or_else(|ends| ends.0, |outcome| *outcome)
        }
        Self { layer: layer.classify(classify as Classifier) }
    }

    /// Makes a call. Returns `false` if the circuit rejected it.
    async fn call(&self, outcome: Outcome) -> bool {
        let inner = service_fn(|Ends(outcome)| async move {
            if outcome.is_success() { Ok(outcome) } else { Err(Ends(outcome)) }
        });
        match self.layer.layer(inner).oneshot(Ends(outcome)).await {
            Ok(_) => true,
            Err(error) => error.is::<Ends>(),
        }
    }

    async fn calls(&self, outcome: Outcome, calls: u32) {
        for _ in 0..calls {
            assert!(self.call(outcome).await, "rejected");
        }
    }

    fn state(&self) -> CircuitState {
        self.layer.handle().state()
    }

    fn trip(&self) -> Option<TripReason> {
        self.layer.handle().snapshot().last_trip
    }

    fn failures(&self) -> u32 {
        self.layer.handle().snapshot().seen.consecutive_failures
    }
}

const ALL: [Reason; 5] = [
    Reason::NeverSent,
    Reason::RefusedStream,
    Reason::GoAway,
    Reason::StaleConnection,
    Reason::Reset,
];

fn housekeeping(reason: Reason) -> Outcome {
    Outcome::cancelled().because(reason)
}

#[tokio::test(start_paused = true)]
async fn housekeeping_is_not_counted_once_the_upstream_has_responded() {
    for reason in ALL {
        for response in [Outcome::success(), Outcome::throttled().because(Reason::Status)] {
            let circuit = Circuit::new(touchy());
            circuit.calls(response, 1).await;
            circuit.calls(housekeeping(reason), 100).await;
            assert_eq!(
                (circuit.state(), circuit.failures()),
                (CircuitState::Closed, 0),
                "{reason}"
            );
            assert!(circuit.call(Outcome::failure().because(reason)).await);
            assert_eq!(circuit.state(), CircuitState::Open, "a failure for the same reason counts");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn housekeeping_neither_fills_a_window_nor_ends_a_run_of_failures() {
    let circuit = Circuit::new(CircuitBreakerLayer::new(Trip::any([
        Trip::consecutive(3),
        Trip::failure_ratio(0.9).over(10).min_calls(10),
    ])));
    circuit.calls(Outcome::success(), 1).await;
    circuit.calls(Outcome::failure(), 2).await;
    circuit.calls(housekeeping(Reason::StaleConnection), 9).await;
    let seen = circuit.layer.handle().snapshot().seen;
    assert_eq!((seen.consecutive_failures, seen.window_calls, seen.window_failures), (2, 3, 2));
    circuit.calls(Outcome::failure(), 1).await;
    assert_eq!(circuit.state(), CircuitState::Open);
}

/// Before the first response no connection can have been reused, so a connection that broke was new.
#[tokio::test(start_paused = true)]
async fn a_broken_connection_before_the_first_response_is_a_failure() {
    for reason in [Reason::NeverSent, Reason::Reset] {
        let circuit = Circuit::new(CircuitBreakerLayer::http());
        circuit.calls(housekeeping(reason), 5).await;
        assert_eq!(circuit.trip(), Some(TripReason::Consecutive { failures: 5 }), "{reason}");
        advance(WAIT).await;
        // The same holds for a half-open probe, whose reason is kept.
        assert!(circuit.call(housekeeping(reason)).await);
        let outcome = Outcome::failure().because(reason);
        assert_eq!(circuit.trip(), Some(TripReason::Probe { outcome }));
    }
    for reason in [Reason::RefusedStream, Reason::GoAway] {
        let circuit = Circuit::new(touchy());
        circuit.calls(housekeeping(reason), 100).await;
        assert_eq!(circuit.state(), CircuitState::Closed, "{reason} comes from the server");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_response_counts_as_a_response() {
    let circuit = Circuit::new(CircuitBreakerLayer::http());
    circuit.calls(Outcome::failure().because(Reason::Status).with_code(500), 1).await;
    circuit.calls(housekeeping(Reason::Reset), 50).await;
    assert_eq!((circuit.state(), circuit.failures()), (CircuitState::Closed, 1));
}

#[tokio::test(start_paused = true)]
async fn housekeeping_beyond_a_hundred_calls_is_a_failure() {
    for reason in ALL {
        let circuit = Circuit::new(CircuitBreakerLayer::http());
        circuit.calls(Outcome::success(), 1).await;
        circuit.calls(housekeeping(reason), 100).await;
        advance(secs(1)).await;
        circuit.calls(housekeeping(reason), 4).await;
        assert_eq!((circuit.state(), circuit.failures()), (CircuitState::Closed, 4), "{reason}");
        circuit.calls(housekeeping(reason), 1).await;
        assert_eq!(circuit.trip(), Some(TripReason::Consecutive { failures: 5 }), "{reason}");
    }
}

/// One closed HTTP/2 connection may end as many calls as it has streams, all at once.
#[tokio::test(start_paused = true)]
async fn any_number_of_calls_that_end_by_housekeeping_within_a_second_is_neutral() {
    let circuit = Circuit::new(CircuitBreakerLayer::http());
    circuit.calls(Outcome::success(), 1).await;
    circuit.calls(housekeeping(Reason::GoAway), 10_000).await;
    assert_eq!((circuit.state(), circuit.failures()), (CircuitState::Closed, 0));
    advance(secs(1)).await;
    circuit.calls(housekeeping(Reason::GoAway), 5).await;
    assert_eq!(circuit.state(), CircuitState::Open);
}

const RESPONSES: [Outcome; 4] = [
    Outcome::success(),
    Outcome::throttled().because(Reason::Status),
    Outcome::success().because(Reason::GrpcStatus),
    Outcome::failure().because(Reason::Status),
];

/// The upstream ends 98 % of the calls. The responses in between do not keep the circuit closed.
#[tokio::test(start_paused = true)]
async fn housekeeping_that_outnumbers_responses_opens_the_circuit() {
    for response in RESPONSES {
        let circuit = Circuit::new(CircuitBreakerLayer::http());
        for _ in 0..2 {
            circuit.calls(response, 1).await;
            circuit.calls(housekeeping(Reason::Reset), 49).await;
            advance(secs(1)).await;
        }
        // Housekeeping now exceeds the responses by 97.
        circuit.calls(housekeeping(Reason::Reset), 3).await;
        assert_eq!(circuit.state(), CircuitState::Closed, "{response}");
        for _ in 0..5 {
            circuit.call(housekeeping(Reason::Reset)).await;
        }
        assert_eq!(circuit.state(), CircuitState::Open, "{response}");
    }
}

#[tokio::test(start_paused = true)]
async fn as_many_responses_as_housekeeping_keep_the_circuit_closed() {
    let circuit = Circuit::new(touchy());
    for _ in 0..1000 {
        circuit.calls(Outcome::success(), 1).await;
        circuit.calls(housekeeping(Reason::Reset), 1).await;
        advance(secs(1)).await;
    }
    assert_eq!(circuit.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn only_a_response_reduces_the_count_of_housekeeping() {
    let circuit = Circuit::new(touchy());
    circuit.calls(Outcome::success(), 1).await;
    circuit.calls(housekeeping(Reason::Reset), 100).await;
    advance(secs(1)).await;
    circuit.calls(Outcome::success(), 1).await;
    circuit.calls(housekeeping(Reason::Reset), 1).await;
    assert_eq!(circuit.state(), CircuitState::Closed);
    circuit.calls(Outcome::cancelled(), 1).await;
    circuit.calls(Outcome::cancelled().because(Reason::Rejected), 1).await;
    assert!(circuit.call(housekeeping(Reason::GoAway)).await);
    assert_eq!(circuit.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn ten_seconds_without_housekeeping_restart_its_count() {
    for (gap, state) in [(9, CircuitState::Open), (10, CircuitState::Closed)] {
        let circuit = Circuit::new(touchy());
        circuit.calls(Outcome::success(), 1).await;
        circuit.calls(housekeeping(Reason::StaleConnection), 100).await;
        advance(secs(gap)).await;
        circuit.calls(housekeeping(Reason::StaleConnection), 1).await;
        assert_eq!(circuit.state(), state, "{gap} s");
    }
}

/// Another circuit over the same connections has recorded its response.
#[tokio::test(start_paused = true)]
async fn a_stale_connection_is_neutral_before_the_first_response() {
    let circuit = Circuit::new(touchy());
    circuit.calls(housekeeping(Reason::StaleConnection), 100).await;
    assert_eq!((circuit.state(), circuit.failures()), (CircuitState::Closed, 0));
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_ends_by_housekeeping_releases_its_slot() {
    for reason in ALL {
        let circuit = Circuit::new(touchy());
        circuit.calls(Outcome::success(), 1).await;
        circuit.calls(Outcome::failure(), 1).await;
        advance(WAIT).await;
        circuit.calls(housekeeping(reason), 100).await;
        let snapshot = circuit.layer.handle().snapshot();
        assert_eq!((snapshot.state, snapshot.probes), (CircuitState::HalfOpen, 0), "{reason}");
        circuit.calls(Outcome::success(), 1).await;
        assert_eq!(circuit.state(), CircuitState::Closed, "the next caller probes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_fails_by_housekeeping_after_a_hundred_calls_in_a_row() {
    let circuit = Circuit::new(touchy());
    circuit.calls(Outcome::success(), 1).await;
    circuit.calls(Outcome::failure(), 1).await;
    advance(WAIT).await;
    circuit.calls(housekeeping(Reason::Reset), 100).await;
    advance(secs(1)).await;
    assert_eq!(circuit.state(), CircuitState::HalfOpen);
    circuit.calls(housekeeping(Reason::Reset), 1).await;
    let outcome = Outcome::failure().because(Reason::Reset);
    assert_eq!(circuit.trip(), Some(TripReason::Probe { outcome }));
    assert_eq!(circuit.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_waiting_caller_probes_when_housekeeping_releases_the_slot() {
    let layer = touchy().half_open_queue(1, secs(10));
    let layer = layer.classify(|result: Result<&(), &Ends>| {
        result.map_or_else(|ends| ends.0, |()| Outcome::success())
    });
    let handle = layer.handle();
    handle.record(Outcome::success());
    handle.record(Outcome::failure());
    advance(WAIT).await;
    let service = layer.layer(service_fn(|result: Result<(), Ends>| async move {
        tokio::time::sleep(secs(1)).await;
        result
    }));
    let stale = Ends(housekeeping(Reason::StaleConnection));
    let first = tokio::spawn(service.clone().oneshot(Err(stale)));
    tokio::task::yield_now().await;
    let second = tokio::spawn(service.oneshot(Ok(())));
    assert!(first.await.unwrap().unwrap_err().is::<Ends>());
    second.await.unwrap().unwrap();
    assert_eq!(handle.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn housekeeping_is_never_slow() {
    for reason in ALL {
        let slow = Trip::slow_ratio(1.0, secs(1)).over(2).min_calls(1);
        let layer = CircuitBreakerLayer::new(slow)
            .classify(move |_: Result<&(), &Ends>| housekeeping(reason));
        let handle = layer.handle();
        handle.record(Outcome::throttled());
        let service = layer.layer(service_fn(|()| async {
            tokio::time::sleep(secs(2)).await;
            Ok::<(), Ends>(())
        }));
        service.clone().oneshot(()).await.unwrap();
        assert_eq!(handle.state(), CircuitState::Closed, "{reason}");
        // A half-open probe releases its slot.
        handle.half_open();
        service.oneshot(()).await.unwrap();
        let snapshot = handle.snapshot();
        assert_eq!((snapshot.state, snapshot.probes), (CircuitState::HalfOpen, 0), "{reason}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restored_circuit_keeps_the_record_of_a_response() {
    let first = Circuit::new(touchy());
    first.calls(Outcome::success(), 1).await;
    let second = Circuit::new(touchy());
    second.layer.handle().restore(&first.layer.handle().snapshot());
    second.calls(housekeeping(Reason::Reset), 9).await;
    assert_eq!(second.state(), CircuitState::Closed);
}
