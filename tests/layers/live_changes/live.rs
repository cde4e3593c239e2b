//! Settings that change through a handle while the state that they bound is in use.

use std::time::Duration;

use buttress::{BoxError, CircuitBreakerLayer, RetryLayer, Trip, breaker::CircuitState};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::advance;
use tower::{Layer, ServiceExt, service_fn};

type Body = Empty<Bytes>;

async fn call(layer: &CircuitBreakerLayer, status: u16) -> Result<StatusCode, BoxError> {
    let inner = service_fn(move |_: Request<()>| async move {
        let mut response = Response::new(Body::new());
        *response.status_mut() = status.try_into().unwrap();
        Ok::<_, BoxError>(response)
    });
    Ok(layer.layer(inner).oneshot(Request::new(())).await?.status())
}

/// A lower number of probes is reached already: the circuit closes, or a further probe is admitted. It must not wait
/// for ever.
#[tokio::test(start_paused = true)]
async fn fewer_half_open_probes_do_not_block_the_circuit() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_secs(1))
        .half_open(3);
    let handle = layer.handle();
    call(&layer, 503).await.unwrap();
    advance(Duration::from_secs(2)).await;
    call(&layer, 200).await.unwrap();
    assert_eq!(handle.state(), CircuitState::HalfOpen);
    handle.set_half_open_of(1, 1).unwrap();
    let mut admitted = false;
    for _ in 0..100 {
        advance(Duration::from_secs(60)).await;
        admitted |= call(&layer, 200).await.is_ok();
    }
    assert!(admitted, "rejected for 100 minutes: {:?}", handle.snapshot());
}

/// A ramp that is set to zero ends.
#[tokio::test(start_paused = true)]
async fn ramp_of_zero_ends_a_ramp() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_secs(1))
        .ramp(Duration::from_secs(3600));
    let handle = layer.handle();
    call(&layer, 503).await.unwrap();
    advance(Duration::from_secs(2)).await;
    call(&layer, 200).await.unwrap();
    assert_eq!(handle.state(), CircuitState::Closed);
    handle.set_ramp(Duration::ZERO);
    for _ in 0..200 {
        call(&layer, 200).await.unwrap();
    }
}

/// Contract 31: a layer that is applied for each connection reports a contradiction at most once in a while.
#[test]
fn contradiction_is_not_logged_for_each_application() {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    };
    use tracing::{Event, Level, Metadata, Subscriber, span};

    struct Count(Arc<AtomicU32>);

    impl Subscriber for Count {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            if *event.metadata().level() == Level::ERROR {
                self.0.fetch_add(1, SeqCst);
            }
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    let errors = Arc::new(AtomicU32::new(0));
    let _guard = crate::support::tracing_events::listen(Count(errors.clone()));
    let layer = RetryLayer::http()
        .unprocessed([StatusCode::TOO_MANY_REQUESTS])
        .never_on(StatusCode::TOO_MANY_REQUESTS);
    for _ in 0..100 {
        let _service = layer.layer(service_fn(|_: Request<()>| async {
            Ok::<_, BoxError>(Response::new(Body::new()))
        }));
    }
    assert!(errors.load(SeqCst) <= 1, "{} errors for 100 connections", errors.load(SeqCst));
}
