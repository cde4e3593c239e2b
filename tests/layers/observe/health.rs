use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use buttress::{Health, HealthProbeLayer, health::Get, observe::Registry};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

use super::Page;
use crate::support::{alive_tasks, ms, secs, settle};

type Body = Full<Bytes>;

/// Returns a layer that probes at 0 s, 5 s, 10 s, …, with thresholds of 1.
fn layer() -> HealthProbeLayer<Get<Body>> {
    let layer = HealthProbeLayer::get("/healthz").jitter(0.0).every(secs(5)).thresholds(1, 1);
    layer.name("search")
}

/// Counts the probes, and responds to each of them with this status after 200 ms.
fn upstream(
    status: &Arc<AtomicU16>,
    probes: &Arc<AtomicUsize>,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
+ Clone
+ Send
+ 'static {
    let (status, probes) = (status.clone(), probes.clone());
    service_fn(move |request: Request<Body>| {
        let is_probe = request.uri().path() == "/healthz";
        probes.fetch_add(usize::from(is_probe), SeqCst);
        let status = if is_probe { status.load(SeqCst) } else { 200 };
        async move {
            sleep(ms(200)).await;
            Ok(Response::builder().status(status).body(Body::default()).unwrap())
        }
    })
}

fn state(registry: &Registry) -> String {
    let page = Page::of(registry);
    assert_eq!(page.sum("buttress_probe_state"), 1.0);
    assert_eq!(page.labels("buttress_probe_state", "state"), ["down", "unknown", "up"]);
    let states = page.family("buttress_probe_state");
    let now = states.iter().find(|(_, value)| *value == 1.0).unwrap();
    now.0.rsplit('=').next().unwrap().trim_matches(['"', '}']).to_owned()
}

fn runs(registry: &Registry, result: &str) -> f64 {
    let series = format!(r#"buttress_probe_runs_total{{name="search",result="{result}"}}"#);
    Page::of(registry).get(&series)
}

#[tokio::test(start_paused = true)]
async fn unused_probe_exports_all_results_with_0_and_no_last_probe() {
    let (registry, layer) = (Registry::new(), layer());
    registry.watch(&layer.handle()).unwrap();
    let page = Page::of(&registry);
    assert_eq!(
        page.labels("buttress_probe_runs_total", "result"),
        [
            "body",
            "classified",
            "error",
            "grpc_status",
            "not_serving",
            "panicked",
            "pass",
            "rejected",
            "skipped",
            "status",
            "timed_out"
        ]
    );
    assert_eq!(page.sum("buttress_probe_runs_total"), 0.0);
    let rejected = r#"{name="search",layer="health_probe",reason="unhealthy"}"#;
    assert_eq!(page.get(&format!("buttress_rejections_total{rejected}")), 0.0);
    assert_eq!(page.sum("buttress_shadow_rejections_total"), 0.0);
    assert_eq!(page.family("buttress_shadow_rejections_total").len(), 1);
    assert_eq!(state(&registry), "unknown");
    assert!(!page.contains("buttress_probe_last"));
}

#[tokio::test(start_paused = true)]
async fn probes_are_counted_by_result_and_the_last_one_is_dated() {
    let (registry, layer) = (Registry::new(), layer());
    registry.watch(&layer.handle()).unwrap();
    let (status, probes) = (Arc::new(AtomicU16::new(200)), Arc::default());
    let service = layer.layer(upstream(&status, &probes));
    settle().await;
    assert_eq!((probes.load(SeqCst), runs(&registry, "pass")), (1, 0.0), "it has not ended");
    sleep(secs(1)).await;
    assert_eq!((state(&registry), runs(&registry, "pass")), ("up".to_owned(), 1.0));
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_probe_last_duration_seconds{name="search"}"#), 0.2);
    let ended = page.get(r#"buttress_probe_last_timestamp_seconds{name="search"}"#);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    // The paused clock is 0.8 s after the end of the probe. The wall clock runs on between the two reads.
    assert!((0.8..60.0).contains(&(now - ended)), "{}", now - ended);

    status.store(500, SeqCst);
    sleep(secs(6)).await;
    assert_eq!((state(&registry), runs(&registry, "status")), ("down".to_owned(), 1.0));
    service.clone().oneshot(Request::default()).await.unwrap_err();
    layer.handle().set_shadow(true);
    service.clone().oneshot(Request::default()).await.unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.sum("buttress_rejections_total"), 1.0);
    assert_eq!(page.sum("buttress_shadow_rejections_total"), 1.0);

    layer.handle().set_timeout(ms(100)).unwrap();
    sleep(secs(5)).await;
    assert_eq!(runs(&registry, "timed_out"), 1.0);
    assert_eq!(Page::of(&registry).sum("buttress_probe_runs_total"), 3.0);
}

#[tokio::test(start_paused = true)]
async fn skipped_probe_is_counted() {
    let (registry, layer) = (Registry::new(), layer().passive());
    registry.watch(&layer.handle()).unwrap();
    let (status, probes) = (Arc::new(AtomicU16::new(200)), Arc::default());
    let service = layer.layer(upstream(&status, &probes));
    sleep(secs(1)).await;
    service.clone().oneshot(Request::default()).await.unwrap();
    sleep(secs(5)).await;
    assert_eq!((runs(&registry, "pass"), runs(&registry, "skipped")), (1.0, 1.0));
    assert_eq!(probes.load(SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn watched_probe_stops_when_its_layer_and_services_are_gone() {
    let (registry, layer) = (Registry::new(), layer());
    registry.watch(&layer.handle()).unwrap();
    let (status, probes) = (Arc::new(AtomicU16::new(200)), Arc::default());
    let before = alive_tasks();
    let service = layer.layer(upstream(&status, &probes));
    sleep(secs(11)).await;
    assert_eq!((probes.load(SeqCst), runs(&registry, "pass")), (3, 3.0));
    drop(layer);
    sleep(secs(5)).await;
    assert_eq!((probes.load(SeqCst), runs(&registry, "pass")), (4, 4.0));
    drop(service);
    settle().await;
    assert_eq!(alive_tasks(), before);
    assert!(!Page::of(&registry).contains("search"));
    sleep(secs(100)).await;
    assert_eq!(probes.load(SeqCst), 4);
}

#[tokio::test(start_paused = true)]
async fn checks_of_the_process_are_exported_without_a_name() {
    let (registry, health) = (Registry::new(), Health::new());
    registry.watch(&health).unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.get("buttress_health_ready"), 1.0);
    assert!(page.family("buttress_health_check_state").is_empty());

    let (db, search) =
        (health.reporter("db").unwrap(), health.reporter("search").unwrap().degrading());
    search.fail();
    let check = |check: &str, critical: bool, state: &str| {
        Page::of(&registry).get(&format!(
            r#"buttress_health_check_state{{check="{check}",critical="{critical}",state="{state}"}}"#
        ))
    };
    assert_eq!(Page::of(&registry).sum("buttress_health_check_state"), 2.0);
    assert_eq!(Page::of(&registry).family("buttress_health_check_state").len(), 6);
    assert_eq!((check("db", true, "unknown"), check("search", false, "fail")), (1.0, 1.0));
    assert_eq!((check("db", true, "pass"), check("db", true, "fail")), (0.0, 0.0));
    assert_eq!(Page::of(&registry).get("buttress_health_ready"), 0.0);
    db.pass();
    assert_eq!((check("db", true, "pass"), check("db", true, "unknown")), (1.0, 0.0));
    assert_eq!(Page::of(&registry).get("buttress_health_ready"), 1.0, "a degraded process is");
    db.fail();
    assert_eq!(Page::of(&registry).get("buttress_health_ready"), 0.0);
    drop(db);
    assert!(!Page::of(&registry).contains("\"db\""), "the check is gone");
    advance(secs(1)).await;
    drop((search, health));
    assert!(!Page::of(&registry).contains("buttress_health"));
}

#[tokio::test(start_paused = true)]
async fn second_health_registry_is_declined() {
    let (registry, first, second) = (Registry::new(), Health::new(), Health::new());
    registry.watch(&first).unwrap();
    let error = registry.watch(&second).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("part", "\"health\""));
    drop(first);
    registry.watch(&second).unwrap();
}
