use std::time::{Duration, SystemTime};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Trip,
    breaker::OpenDuration,
    observe::{Registry, Severity},
};
use http::Request;
use http_body_util::Empty;
use serde_json::Value;
use tokio::time::advance;
use tower::{Layer, ServiceExt};

use super::Page;

#[tokio::test(start_paused = true)]
async fn open_circuit_is_first_with_reason_end_and_next_step() {
    let registry = Registry::new();
    let limit = ConcurrencyLimitLayer::new(10).name("front");
    let layer = CircuitBreakerLayer::new(Trip::consecutive(2))
        .open_for(OpenDuration::fixed(Duration::from_secs(30)))
        .name("search");
    registry.watch(&limit.handle()).unwrap();
    registry.watch(&layer.handle()).unwrap();
    assert_eq!(registry.status().verdict, "All 2 layers are healthy");
    for _ in 0..2 {
        layer.handle().record(Outcome::failure());
    }
    advance(Duration::from_secs(10)).await;
    let status = registry.status();
    assert_eq!(status.verdict, "1 of 2 layers needs attention");
    assert!(!status.is_healthy() && !status.is_sampled);
    let first = &status.layers[0];
    assert_eq!(
        (first.id(), first.severity),
        ("circuit_breaker/search".to_owned(), Severity::Failing)
    );
    assert_eq!((first.state, first.reason), ("open", Some("consecutive")));
    assert_eq!(first.sentence, "The circuit is open: 2 failures in a row.");
    let left = first.ends_at.unwrap().duration_since(SystemTime::now()).unwrap();
    assert!((19.0..=20.0).contains(&left.as_secs_f64()), "{left:?}");
    assert!(first.next.is_some());
    assert_eq!(status.decisions[0].event, "circuit opened");
    // The limit has no state, but its numbers have their limits.
    let in_flight = &status.layers[1].facts[0];
    assert_eq!((in_flight.label, in_flight.value, in_flight.max), ("in flight", 0.0, Some(10.0)));
}

#[tokio::test(start_paused = true)]
async fn json_has_the_status_and_escapes_names() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("a\"b\\c</script>\n");
    registry.watch(&layer.handle()).unwrap();
    layer.handle().force_open();
    let json: Value = serde_json::from_str(&registry.status().to_json()).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["healthy"], false);
    assert_eq!(json["process"]["phase"], Value::Null);
    let layer = &json["layers"][0];
    assert_eq!(layer["name"], "a\"b\\c</script> ");
    assert_eq!((&layer["severity"], &layer["state"]), (&"failing".into(), &"forced_open".into()));
    assert_eq!(layer["controls"], Value::Array(Vec::new()));
    assert_eq!(json["decisions"][0]["event"], "circuit forced");
    assert!(json["at"].as_u64().unwrap() > 1_700_000_000_000);
}

#[tokio::test(start_paused = true)]
async fn status_of_every_layer_is_json() {
    let registry = Registry::new();
    assert_eq!(registry.status().verdict, "No layer is watched");
    let config = buttress::config::ClientConfig::load("all").finish().unwrap();
    let client = buttress::stack::ClientStack::new(&config).unwrap();
    registry.watch(&client.handle()).unwrap();
    let keyed = CircuitBreakerLayer::http()
        .name("keyed")
        .keyed(|request: &Request<Empty<bytes::Bytes>>| request.uri().to_string());
    registry.watch(&keyed.handle()).unwrap();
    let json: Value = serde_json::from_str(&registry.status().to_json()).unwrap();
    assert_eq!(json["healthy"], true, "{json:#}");
    assert_eq!(json["layers"].as_array().unwrap().len(), registry.status().layers.len());
}

#[tokio::test(start_paused = true)]
async fn keyed_layer_names_only_as_many_keys_as_were_permitted() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1))
        .name("api")
        .keyed(|request: &Request<u32>| request.body() / 10 * 10)
        .max_keys(10_000)
        .named_keys();
    registry.watch(&layer.handle()).unwrap();
    let before = Page::of(&registry).len();
    let service = layer.layer(tower::service_fn(async |request: Request<u32>| {
        let is_failure = request.body() / 10 == 7;
        if is_failure {
            Err("failed")
        } else {
            Ok(http::Response::new(Empty::<bytes::Bytes>::new()))
        }
    }));
    for nth in 0..10_000 {
        let _ = service.clone().oneshot(Request::new(nth * 10)).await;
    }
    // Only the number of circuits in each state, which existed before the first key.
    assert_eq!(Page::of(&registry).len(), before);
    assert_eq!(Page::of(&registry).family("buttress_breaker_circuits").len(), 5);

    registry.set_max_keys(2).unwrap();
    let page = Page::of(&registry);
    let open = r#"buttress_breaker_state{name="api",key="70",state="open"}"#;
    assert_eq!(page.get(open), 1.0);
    assert_eq!(
        page.get(r#"buttress_breaker_state{name="api",key="other",state="closed"}"#),
        9998.0
    );
    assert_eq!(page.len(), before + 15);
    assert_eq!(page.get("buttress_observe_folded_series_total"), 9998.0);
    let error = registry.set_max_keys(1001).unwrap_err();
    assert_eq!((error.field, &*error.value), ("max_keys", "1001"));
}

/// A key whose text is not unique.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Tenant(u32);

impl std::fmt::Display for Tenant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(["", "other", "acme"][self.0 as usize % 3])
    }
}

#[tokio::test(start_paused = true)]
async fn keys_with_the_same_text_are_combined() {
    let registry = Registry::new();
    registry.set_max_keys(1000).unwrap();
    let layer = CircuitBreakerLayer::http()
        .name("api")
        .keyed(|request: &Request<u32>| Tenant(*request.body()))
        .named_keys();
    registry.watch(&layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(async |_: Request<u32>| {
        Ok::<_, &str>(http::Response::new(Empty::<bytes::Bytes>::new()))
    }));
    for nth in 0..9 {
        service.clone().oneshot(Request::new(nth)).await.unwrap();
    }
    // Fails for a series that occurs twice.
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_state{name="api",key="acme",state="closed"}"#), 1.0);
    assert_eq!(page.get(r#"buttress_breaker_state{name="api",key="other",state="closed"}"#), 8.0);
}
