//! The events of keyed circuits during an outage of all upstreams.

use buttress::{BoxError, CircuitBreakerLayer, Trip};
use http::{Request, Response};
use tokio::time::advance;
use tower::{Service, ServiceExt, layer::Layer, service_fn};

use super::Body;
use crate::support::{secs, tracing_events::EventLog};

#[tokio::test(start_paused = true)]
async fn outage_of_all_keys_emits_a_bounded_number_of_events() {
    let (log, _guard) = EventLog::listen();
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1)).name("upstreams");
    let breaker = breaker.keyed(|request: &Request<Body>| request.uri().path().to_owned());
    let mut service = breaker.layer(service_fn(|request: Request<Body>| async move {
        match request.headers().contains_key("up") {
            true => Ok(Response::new(Body::default())),
            false => Err(BoxError::from("down")),
        }
    }));
    let mut call_all = async |is_up: bool| {
        for key in 0..1024 {
            let mut request = Request::get(format!("/{key}"));
            if is_up {
                request = request.header("up", "1");
            }
            let request = request.body(Body::default()).unwrap();
            let _ = service.ready().await.unwrap().call(request).await;
        }
    };
    // Each second all circuits become half-open and open again, for one minute.
    for _ in 0..60 {
        call_all(false).await;
        advance(secs(1)).await;
    }
    call_all(true).await;
    let events = log.take();
    let of = |message: &str, level: &str| {
        let is = |event: &&_| {
            let event: &crate::support::tracing_events::Entry = event;
            event.message == message && event.level == level
        };
        events.iter().filter(is).collect::<Vec<_>>()
    };
    let opened = of("circuit opened", "WARN");
    assert_eq!(opened.len(), 1, "{opened:?}");
    assert_eq!(opened[0].get("resilience.name"), "upstreams");
    // One event in 10 s. Their counts add up to the number of openings.
    let again = of("circuit opened", "INFO");
    assert_eq!(again.len(), 6, "{again:?}");
    let counted: u64 =
        again.iter().map(|event| event.get("occurrences").parse::<u64>().unwrap()).sum();
    assert!((1024 * 50..=1024 * 59).contains(&counted), "{counted}");
    assert_eq!(of("circuit closed", "INFO").len(), 1);
    // At DEBUG each circuit has events of its own.
    assert_eq!(opened.len() + again.len() + of("circuit opened", "DEBUG").len(), 1024 * 60);
    assert_eq!(of("circuit closed", "DEBUG").len(), 1023);
}
