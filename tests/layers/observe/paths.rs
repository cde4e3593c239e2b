//! The text page, the `metrics` facade and OpenTelemetry export the same series.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Health, HealthProbeLayer, Lifecycle, Trip,
    config::{ClientConfig, ServerConfig},
    connect::ConnectLayer,
    limit::adaptive::Knee,
    observe::{METRICS, MetricKind, MetricsPublisher, Registry},
    stack::ClientStack,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use metrics::with_local_recorder;
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Encoder, TextEncoder};
use tokio::time::{advance, sleep, timeout};
use tower::{Layer, ServiceExt, service_fn};

use crate::{
    layers::connect::fixtures::{Pipes, ask, client},
    support::{ms, secs, settle},
};

/// The labels of a series.
type Labels = BTreeMap<String, String>;

/// The values of one export by series, and the types by the name of the series.
#[derive(Default)]
struct Export {
    values: BTreeMap<(String, Labels), f64>,
    types: BTreeMap<String, String>,
}

impl Export {
    /// Parses a page. Leaves the samples of histograms out.
    fn of(page: &str) -> Self {
        let mut export = Self::default();
        for line in page.lines() {
            if let Some(of) = line.strip_prefix("# TYPE ") {
                let (name, kind) = of.split_once(' ').unwrap();
                export.types.insert(name.to_owned(), kind.to_owned());
            }
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let labels =
                labels.strip_suffix('}').unwrap().split(',').filter(|label| !label.is_empty());
            let labels = labels.map(|label| {
                let (label, value) = label.split_once('=').unwrap();
                (label.to_owned(), value.trim_matches('"').to_owned())
            });
            let key = (name.to_owned(), labels.collect());
            if export.types.contains_key(name) {
                let before = export.values.insert(key, value.parse().unwrap());
                assert_eq!(before, None, "twice: {line}");
            }
        }
        let is_histogram = |name: &String| matches!(&*export.types[name], "histogram" | "summary");
        export.values.retain(|(name, _), _| !is_histogram(name));
        export
    }

    fn assert_same(&self, path: &str, other: &Self) {
        let series = |export: &Self| export.values.keys().cloned().collect::<BTreeSet<_>>();
        let (own, others) = (series(self), series(other));
        let missing: Vec<_> = own.difference(&others).collect();
        let excess: Vec<_> = others.difference(&own).collect();
        assert!(missing.is_empty() && excess.is_empty(), "{path}: {missing:#?} {excess:#?}");
        for (key, value) in &self.values {
            // The wall clock advances between two reads.
            let tolerance = if key.0.contains("timestamp") { 60.0 } else { 1e-9 };
            let other = other.values[key];
            assert!((value - other).abs() <= tolerance, "{path}: {key:?} is {value} and {other}");
        }
    }
}

/// Responds with the status of the path after 100 ms.
async fn respond<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let status: u16 = request.uri().path()[1..].parse().unwrap_or(200);
    sleep(ms(100)).await;
    Ok(Response::builder().status(status).body(Full::from("hello")).unwrap())
}

/// Returns the layers that the registry watches. They must exist until the exports are read.
async fn scenario(registry: &Registry) -> Box<dyn std::any::Any> {
    let request = |path: &str| Request::get(path).body(Empty::<Bytes>::new()).unwrap();

    let toml = "retry_attempts = 3\nretry_backoff = '10ms'\nbreaker_failures = 5\nhedge_after = '50ms'\nconnect_timeout = '60ms'\n\
                limit_max = 1\nlimit_queue = 4\nlimit_queue_wait = '150ms'\ntimeout_head = '90ms'";
    let config = ClientConfig::load("search").toml(toml).finish().unwrap();
    let stack = ClientStack::new(&config).unwrap();
    registry.watch(&stack.handle()).unwrap();
    let search = stack.layer(service_fn(respond));
    for path in ["/200", "/503"] {
        let _ = search.clone().oneshot(request(path)).await;
    }
    stack.handle().breaker().reset();
    let calls = (0..4).map(|_| tokio::spawn(search.clone().oneshot(request("/429"))));
    for call in calls.collect::<Vec<_>>() {
        let _ = call.await;
    }
    stack.handle().breaker().force_open();
    let _ = search.clone().oneshot(request("/200")).await;
    advance(secs(3)).await;

    let config = ServerConfig::load("front").toml("limit_max = 3").finish().unwrap();
    let server = buttress::server(&config).unwrap();
    registry.watch(&server.handle()).unwrap();
    let front = server.layer(service_fn(respond));
    for path in ["/200", "/500", "/429"] {
        let response = front.clone().oneshot(request(path)).await.unwrap();
        let _ = response.into_body().collect().await;
    }
    let _ = timeout(ms(10), front.clone().oneshot(request("/200"))).await;
    let unread = front.clone().oneshot(request("/200")).await.unwrap();

    let tenants = CircuitBreakerLayer::new(Trip::consecutive(1)).name("tenants");
    let tenants = tenants.keyed(|key: &u32| *key).per_response();
    registry.watch(&tenants.handle()).unwrap();
    let service = tenants.layer(service_fn(async |key: u32| {
        if key < 2 { Err(std::io::Error::other("down")) } else { Ok(()) }
    }));
    for key in 0..7 {
        let _ = service.clone().oneshot(key).await;
    }

    let adaptive = ConcurrencyLimitLayer::adaptive(Knee::default()).name("adaptive");
    registry.watch(&adaptive.handle()).unwrap();

    let connect = ConnectLayer::new().max_per_host(2).max_total(7).name("search");
    registry.watch(&connect.handle()).unwrap();
    let connections = client(&connect, &Pipes::default());
    for _ in 0..3 {
        ask(&connections, "http://a/").await.unwrap();
    }

    let probe = HealthProbeLayer::get("/healthz").jitter(0.0).every(secs(5)).name("search");
    registry.watch(&probe.handle()).unwrap();
    let probed = probe.layer(service_fn(respond::<Full<Bytes>>));
    settle().await;
    sleep(secs(6)).await;

    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    registry.watch(&health).unwrap();
    registry.watch(&lifecycle).unwrap();
    let disk = health.reporter("disk").unwrap().degrading();
    disk.fail();
    lifecycle.ready();
    Box::new((
        (stack, search, server, front, unread, tenants, service, adaptive),
        (connect, connections, probe, probed, health, lifecycle, disk),
    ))
}

#[tokio::test(start_paused = true)]
async fn three_paths_export_the_same_counters_and_gauges() {
    let registry = Registry::new();
    let prometheus = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(prometheus.clone());
    let exporter = exporter.scope_info_enabled(false).without_target_info().build().unwrap();
    let provider = SdkMeterProvider::builder().with_reader(exporter).build();
    registry.meter_into(&provider.meter("buttress"));
    let recorder = PrometheusBuilder::new().build_recorder();
    let mut publisher = MetricsPublisher::new();

    let watched = scenario(&registry).await;
    // A second read of each path has the values of that time.
    for _ in 0..2 {
        let text = Export::of(&registry.text());
        with_local_recorder(&recorder, || publisher.publish(&registry));
        let facade = Export::of(&recorder.handle().render());
        let mut page = Vec::new();
        TextEncoder::new().encode(&prometheus.gather(), &mut page).unwrap();
        let opentelemetry = Export::of(std::str::from_utf8(&page).unwrap());

        text.assert_same("facade", &facade);
        text.assert_same("OpenTelemetry", &opentelemetry);
        let exported: BTreeSet<_> = text.values.keys().map(|(name, _)| name.clone()).collect();
        for metric in METRICS.iter().filter(|metric| metric.kind != MetricKind::Histogram) {
            let series = metric.series();
            assert!(exported.contains(&series), "the scenario has no {series}");
            assert_eq!(text.types[&series], opentelemetry.types[&series], "{series}");
            let is_seconds = metric.kind == MetricKind::Counter && metric.unit == "s";
            let of_facade = if is_seconds { "gauge" } else { &*text.types[&series] };
            assert_eq!(facade.types[&series], of_facade, "{series}");
        }
        assert!(text.values.len() > 200, "{}", text.values.len());
        let nonzero = text.values.values().filter(|value| **value != 0.0).count();
        assert!(nonzero > 50, "{nonzero}");
        advance(secs(3)).await;
    }
    drop(watched);
}

#[tokio::test(start_paused = true)]
async fn dropped_layer_and_dropped_registry_have_no_series_in_open_telemetry() {
    let registry = Registry::new();
    let prometheus = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(prometheus.clone());
    let provider = SdkMeterProvider::builder().with_reader(exporter.build().unwrap()).build();
    registry.meter_into(&provider.meter("buttress"));
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    let page = || {
        let mut page = Vec::new();
        TextEncoder::new().encode(&prometheus.gather(), &mut page).unwrap();
        String::from_utf8(page).unwrap()
    };
    assert!(page().contains("name=\"search\""));
    drop(layer);
    let seen = page();
    assert!(!seen.contains("name=\"search\"") && seen.contains("buttress_build_info"), "{seen}");
    drop(registry);
    assert!(!page().contains("buttress_build_info"));
}
