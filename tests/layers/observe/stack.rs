use std::convert::Infallible;

use buttress::{
    Deadline,
    config::{ClientConfig, ServerConfig},
    observe::Registry,
    stack::ClientStack,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::sleep;
use tower::{Layer, Service, ServiceExt, service_fn};

use super::Page;
use crate::support::{alive_tasks, ms, secs, settle};

type Nothing = Empty<Bytes>;

const OUTCOMES: [&str; 5] = ["cancelled", "failure", "rejected", "success", "throttled"];
const TIMED: [&str; 4] = ["cancelled", "failure", "success", "throttled"];

/// Responds with the status of the path, after 100 ms for each 100 of the status.
fn upstream<B: 'static>()
-> impl Service<Request<B>, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send> + Clone
{
    service_fn(|request: Request<B>| {
        let status: u16 = request.uri().path()[1..].parse().unwrap();
        async move {
            sleep(ms(u64::from(status / 100 * 100))).await;
            Ok(Response::builder().status(status).body(Full::from("hello")).unwrap())
        }
    })
}

fn request(path: &str) -> Request<Nothing> {
    Request::get(path).body(Nothing::new()).unwrap()
}

fn calls(registry: &Registry) -> [f64; 5] {
    let page = Page::of(registry);
    assert_eq!(page.labels("buttress_calls_total", "outcome"), OUTCOMES);
    OUTCOMES.map(|outcome| {
        page.get(&format!(r#"buttress_calls_total{{name="search",outcome="{outcome}"}}"#))
    })
}

/// The number and the sum of the durations, by outcome.
fn durations(registry: &Registry) -> [(f64, f64); 4] {
    let page = Page::of(registry);
    assert_eq!(page.labels("buttress_call_duration_seconds_count", "outcome"), TIMED);
    TIMED.map(|outcome| {
        let [count, sum] = ["count", "sum"].map(|part| {
            let labels = format!(r#"{{name="search",outcome="{outcome}"}}"#);
            page.get(&format!("buttress_call_duration_seconds_{part}{labels}"))
        });
        (count, sum)
    })
}

fn active(registry: &Registry) -> f64 {
    Page::of(registry).get(r#"buttress_call_active{name="search"}"#)
}

#[tokio::test(start_paused = true)]
async fn unused_stack_exports_all_outcomes_with_0_under_its_name() {
    let (registry, config) = (Registry::new(), ClientConfig::load("search").finish().unwrap());
    let stack = ClientStack::new(&config).unwrap();
    registry.watch(&stack.handle()).unwrap();
    assert_eq!(calls(&registry), [0.0; 5]);
    assert_eq!(durations(&registry), [(0.0, 0.0); 4]);
    assert_eq!(active(&registry), 0.0);
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_state{name="search",state="closed"}"#), 1.0);
    assert_eq!(page.family("buttress_call_duration_seconds_bucket").len(), 4 * 15);
    for layer in ["circuit_breaker", "concurrency_limit", "deadline", "timeout"] {
        let rejections = page.labels("buttress_rejections_total", "layer");
        assert!(rejections.contains(&layer), "{layer}: {rejections:?}");
    }
    assert_eq!(page.sum("buttress_rejections_total"), 0.0);
    assert_eq!(page.get(r#"buttress_concurrency_usage{name="search"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_hedge_attempts_total{name="search"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_retry_recoveries_total{name="search"}"#), 0.0);
    assert!(page.family("buttress_timeouts_total").len() > 7);
    let error = registry.watch(&stack.handle()).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("name", "\"search\""));
}

#[tokio::test(start_paused = true)]
async fn calls_and_their_durations_are_counted_by_outcome() {
    let (registry, toml) = (Registry::new(), "retry_attempts = 1\nbreaker_failures = 5");
    let config = ClientConfig::load("search").toml(toml).finish().unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let handle = stack.handle();
    registry.watch(&handle).unwrap();
    let client = stack.layer(upstream());
    let call = |path| client.clone().oneshot(request(path));

    let response = call("/200").await.unwrap();
    assert_eq!((active(&registry), calls(&registry)), (1.0, [0.0; 5]));
    assert_eq!(durations(&registry)[2], (1.0, 0.2), "the duration ends at the response head");
    sleep(secs(3)).await;
    response.into_body().collect().await.unwrap();
    assert_eq!((active(&registry), calls(&registry)), (0.0, [0.0, 0.0, 0.0, 1.0, 0.0]));
    call("/500").await.unwrap();
    call("/429").await.unwrap();
    assert!(tokio::time::timeout(ms(50), call("/200")).await.is_err());
    assert_eq!(calls(&registry), [1.0, 1.0, 0.0, 1.0, 1.0]);
    assert_eq!(durations(&registry), [(1.0, 0.05), (1.0, 0.5), (1.0, 0.2), (1.0, 0.4)]);

    // A rejected call is counted, and its duration is left out.
    handle.breaker().force_open();
    call("/200").await.map(drop).unwrap_err();
    assert_eq!(calls(&registry), [1.0, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(durations(&registry), [(1.0, 0.05), (1.0, 0.5), (1.0, 0.2), (1.0, 0.4)]);
    let page = Page::of(&registry);
    let rejected = r#"{name="search",layer="circuit_breaker",reason="circuit_forced_open"}"#;
    assert_eq!(page.get(&format!("buttress_rejections_total{rejected}")), 1.0);
    let within = |bound| {
        page.get(&format!(
            r#"buttress_call_duration_seconds_bucket{{name="search",outcome="success",le="{bound}"}}"#
        ))
    };
    assert_eq!((within("0.1"), within("0.25"), within("+Inf")), (0.0, 1.0, 1.0));
    let seen = handle.snapshot();
    assert_eq!((seen.total, seen.in_flight, seen.rejected), (5, 0, 1));
    assert_eq!(seen.average, Some((ms(50) + ms(500) + ms(200) + ms(400)) / 4));
    let p99 = seen.p99.unwrap();
    assert!((ms(500)..ms(505)).contains(&p99), "{p99:?}");
}

#[tokio::test(start_paused = true)]
async fn rejections_of_a_server_are_not_timed() {
    let (registry, config) = (Registry::new(), ServerConfig::load("search").finish().unwrap());
    let stack = buttress::server(&config).unwrap();
    let handle = stack.handle();
    registry.watch(&handle).unwrap();
    let server = stack.layer(upstream());
    let mut late = request("/200");
    late.extensions_mut().insert(Deadline::after(secs(0)));
    let response = server.clone().oneshot(late).await.unwrap();
    assert_eq!(response.status(), 504);
    drop(response.into_body().collect().await);
    let response = server.clone().oneshot(request("/200")).await.unwrap();
    response.into_body().collect().await.unwrap();
    assert_eq!(calls(&registry), [0.0, 0.0, 1.0, 1.0, 0.0]);
    assert_eq!(durations(&registry), [(0.0, 0.0), (0.0, 0.0), (1.0, 0.2), (0.0, 0.0)]);
    let seen = handle.snapshot();
    assert_eq!((seen.rejected, seen.average), (1, Some(ms(200))));
    let p99 = seen.p99.unwrap();
    assert!((ms(200)..ms(203)).contains(&p99), "{p99:?}");
    drop((handle, stack, server));
    assert!(!Page::of(&registry).contains("search"));
}

#[tokio::test(start_paused = true)]
async fn dropped_stack_disappears() {
    let (registry, config) = (Registry::new(), ClientConfig::load("search").finish().unwrap());
    let stack = ClientStack::new(&config).unwrap();
    let handle = stack.handle();
    registry.watch(&handle).unwrap();
    let client = stack.layer(upstream::<()>());
    drop((stack, handle));
    assert!(Page::of(&registry).contains("search"), "the services keep the stack");
    drop(client);
    assert!(!Page::of(&registry).contains("search"));
    // The name is free again.
    let stack = ClientStack::new(&config).unwrap();
    registry.watch(&stack.handle()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn stack_needs_a_name() {
    let registry = Registry::new();
    let stack = ClientStack::new(&ClientConfig::default()).unwrap();
    let error = registry.watch(&stack.handle()).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("name", "\"\""));
    assert!(error.remedy.contains("`name` of the configuration"), "{error}");
    assert_eq!(format!("{registry:?}"), "Registry { watched: [] }");
}

#[tokio::test(start_paused = true)]
async fn client_with_connections_and_a_probe_exports_both_and_stops_probing_when_it_is_dropped() {
    let toml = "connect_max_per_host = 7\nhealth_probe_uri = 'http://localhost:1/'";
    let config = ClientConfig::load("search").toml(toml).finish().unwrap();
    let before = alive_tasks();
    let client = buttress::client::<Nothing>(&config).unwrap();
    let registry = Registry::new();
    registry.watch(&client.handle()).unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_connection_limit{name="search",scope="host"}"#), 7.0);
    assert_eq!(page.get(r#"buttress_probe_state{name="search",state="unknown"}"#), 1.0);
    assert_eq!(page.get(r#"buttress_queue_depth{name="search",layer="connect"}"#), 0.0);
    assert_eq!(page.family("buttress_probe_runs_total").len(), 11);
    assert!(alive_tasks() > before);
    drop(client);
    settle().await;
    assert_eq!(alive_tasks(), before);
    assert!(!Page::of(&registry).contains("search"));
}
