//! The values of histograms that are exported one by one, and exemplars.

use std::{
    cell::RefCell,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use buttress::{
    ConcurrencyLimitLayer,
    config::{ClientConfig, ServerConfig},
    observe::{MetricsPublisher, Registry, TraceId},
    stack::ClientStack,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use metrics::set_default_local_recorder;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Encoder, TextEncoder};
use tokio::time::{advance, sleep};
use tower::{Layer, ServiceExt, service_fn};

use super::Page;
use crate::support::{Strict, hello, ms, request, secs, settle};

tokio::task_local! {
    static TRACE: RefCell<String>;
}

/// Returns the trace of the task.
fn trace() -> Option<TraceId> {
    TRACE.try_with(|trace| TraceId::from_text(&trace.borrow())).ok().flatten()
}

fn traced<F: Future>(trace: &str, future: F) -> impl Future<Output = F::Output> + use<F> {
    TRACE.scope(RefCell::new(trace.to_owned()), future)
}

/// Responds after 100 ms for each 100 of the status in the path.
async fn respond<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let status: u16 = request.uri().path()[1..].parse().unwrap();
    sleep(ms(u64::from(status / 100 * 100))).await;
    Ok(Response::builder().status(status).body(Full::from("hello")).unwrap())
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(path).body(Empty::new()).unwrap()
}

/// Returns the lines of a page with exemplars, without the time.
fn exemplars(registry: &Registry) -> Vec<String> {
    let page = registry.open_metrics();
    let lines = page.lines().filter(|line| line.contains(" # {"));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn exemplar_has_the_trace_of_the_call_in_its_bucket() {
    let registry = Registry::new();
    let config = ServerConfig::load("front").finish().unwrap();
    let server = buttress::server(&config).unwrap();
    registry.watch(&server.handle()).unwrap();
    registry.exemplars(trace);
    let service = server.layer(service_fn(respond));
    for (id, path) in [("a", "/200"), ("", "/200"), ("b", "/200"), ("c", "/500"), ("d", "/200")] {
        let response = traced(id, service.clone().oneshot(get(path))).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    let bucket = |outcome: &str, le: &str, count: u64, id: &str, value: &str| {
        format!(
            r#"buttress_call_duration_seconds_bucket{{name="front",outcome="{outcome}",le="{le}"}} {count} # {{trace_id="{id}"}} {value}"#
        )
    };
    // Call d is in the next second of the bucket.
    assert_eq!(
        exemplars(&registry),
        [bucket("success", "0.25", 4, "d", "0.2"), bucket("failure", "0.5", 1, "c", "0.5")]
    );
    assert!(!registry.text().contains(" # {"));
    // A timestamp has milliseconds.
    let page = registry.open_metrics();
    let line = page.lines().find(|line| line.contains("trace_id=\"d\"")).unwrap();
    let (seconds, fraction) = line.rsplit(' ').next().unwrap().split_once('.').unwrap();
    assert!(seconds.parse::<u64>().unwrap() > 1_700_000_000 && fraction.len() == 3, "{line}");
}

#[tokio::test(start_paused = true)]
async fn exemplar_of_a_queue_wait_has_the_trace_of_the_call_that_waited() {
    let registry = Registry::new();
    registry.exemplars(trace);
    let layer = ConcurrencyLimitLayer::new(1).queue(9, secs(1)).name("front");
    registry.watch(&layer.handle()).unwrap();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    let call = |id: &str| tokio::spawn(traced(id, service.clone().oneshot(request())));
    let first = call("first");
    settle().await;
    let second = call("second");
    settle().await;
    advance(ms(300)).await;
    let third = call("third");
    settle().await;
    // The first call ends in the task of this test, and passes its permit to the second.
    assert!(watch.end(0, Ok(hello())));
    drop(first.await.unwrap().unwrap());
    settle().await;
    third.abort();
    settle().await;
    let bucket = |result: &str, le: &str, id: &str, value: &str| {
        format!(
            r#"buttress_queue_wait_duration_seconds_bucket{{name="front",layer="concurrency_limit",result="{result}",le="{le}"}} 1 # {{trace_id="{id}"}} {value}"#
        )
    };
    assert_eq!(
        exemplars(&registry),
        [bucket("admitted", "0.5", "second", "0.3"), bucket("abandoned", "0.001", "third", "0")]
    );
    second.abort();
}

#[tokio::test(start_paused = true)]
async fn trace_hook_runs_once_per_bucket_and_second_and_its_panic_fails_no_call() {
    let registry = Registry::new();
    let config = ServerConfig::load("front").finish().unwrap();
    let server = buttress::server(&config).unwrap();
    registry.watch(&server.handle()).unwrap();
    let service = server.layer(service_fn(async |_: Request<Empty<Bytes>>| {
        Ok::<Response<Full<Bytes>>, Infallible>(Response::new(Full::from("hello")))
    }));
    let call = async || {
        let response = service.clone().oneshot(get("/")).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    };
    registry.exemplars(|| panic!("the hook of the user"));
    call().await;
    assert_eq!(exemplars(&registry), [""; 0]);
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let page = registry.clone();
    registry.exemplars(move || {
        counted.fetch_add(1, SeqCst);
        // The hook may read the registry.
        assert!(page.open_metrics().ends_with("# EOF\n"));
        TraceId::from_text("a")
    });
    for expected in [1, 2] {
        for _ in 0..100 {
            call().await;
        }
        assert_eq!(runs.load(SeqCst), expected);
        advance(secs(1)).await;
    }
    assert_eq!(exemplars(&registry).len(), 1);
}

/// The counts and sums of a histogram: its lines without the buckets.
fn histogram(page: &Page, name: &str) -> Vec<(String, f64)> {
    let parts = ["count", "sum"].map(|part| format!("{name}_{part}"));
    let samples = parts.iter().flat_map(|part| page.family(part));
    let mut samples: Vec<_> = samples
        .filter(|(_, value)| *value != 0.0)
        .map(|(series, value)| {
            let (name, labels) = series.split_once('{').unwrap();
            let mut labels: Vec<_> = labels.trim_end_matches('}').split(',').collect();
            labels.sort_unstable();
            (format!("{name} {labels:?}"), (value * 1e6).round())
        })
        .collect();
    samples.sort_by(|a, b| a.0.cmp(&b.0));
    samples
}

#[tokio::test(start_paused = true)]
async fn exporters_receive_each_value_and_call_durations_only_when_enabled() {
    let recorder = PrometheusBuilder::new();
    let recorder = recorder.set_buckets_for_metric(Matcher::Prefix("buttress".into()), &[0.1, 1.0]);
    let recorder = recorder.unwrap().build_recorder();
    let _guard = set_default_local_recorder(&recorder);
    let prometheus = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(prometheus.clone());
    let exporter = exporter.scope_info_enabled(false).without_target_info().build().unwrap();
    let provider = SdkMeterProvider::builder().with_reader(exporter).build();

    let toml = "retry_attempts = 3\nretry_backoff = '10ms'\nlimit_max = 1\nlimit_queue = 2\n\
                limit_queue_wait = '250ms'";
    let config = ClientConfig::load("search").toml(toml).finish().unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let registry = Registry::new();
    registry.meter_into(&provider.meter("buttress"));
    registry.watch(&stack.handle()).unwrap();
    MetricsPublisher::new().publish(&registry);
    let client = stack.layer(service_fn(respond));
    let spawn = |path| tokio::spawn(client.clone().oneshot(get(path)));
    let calls = async || {
        // The second call waits for 200 ms, the third is dropped, and the fifth waits for 250 ms.
        let first = spawn("/200");
        settle().await;
        let (second, third) = (spawn("/300"), spawn("/200"));
        settle().await;
        third.abort();
        for call in [first, second] {
            call.await.unwrap().unwrap().into_body().collect().await.unwrap();
        }
        let fourth = spawn("/400");
        settle().await;
        let fifth = spawn("/200");
        fifth.await.unwrap().unwrap_err();
        drop(fourth.await);
        // A retried call.
        drop(client.clone().oneshot(get("/503")).await);
    };
    calls().await;

    let pages = || {
        let mut page = Vec::new();
        TextEncoder::new().encode(&prometheus.gather(), &mut page).unwrap();
        let meter = Page::parse(std::str::from_utf8(&page).unwrap());
        (Page::of(&registry), Page::parse(&recorder.handle().render()), meter)
    };
    let (text, facade, meter) = pages();
    let names = [
        "buttress_queue_wait_duration_seconds",
        "buttress_retry_call_retries",
        "buttress_retry_delay_seconds",
    ];
    for name in names {
        let expected = histogram(&text, name);
        assert!(!expected.is_empty(), "{name}");
        assert_eq!(histogram(&facade, name), expected, "{name}");
        assert_eq!(histogram(&meter, name), expected, "{name}");
    }
    let results = text.family("buttress_queue_wait_duration_seconds_count");
    assert_eq!(results.iter().filter(|(_, count)| *count == 1.0).count(), 3, "{results:?}");
    let durations = "buttress_call_duration_seconds";
    assert!(!facade.contains(durations) && !meter.contains(durations));

    registry.export_call_durations();
    let before = histogram(&pages().0, durations);
    calls().await;
    let (text, facade, meter) = pages();
    let doubled: Vec<_> = before.into_iter().map(|(series, value)| (series, 2.0 * value)).collect();
    assert_eq!(histogram(&text, durations).len(), doubled.len());
    for page in [&facade, &meter] {
        let seen = histogram(page, durations);
        assert_eq!(seen.len(), doubled.len(), "{seen:?} {doubled:?}");
        let counts = |of: &[(String, f64)]| of.iter().map(|(_, n)| *n).sum::<f64>();
        assert!(counts(&seen) > 0.0);
    }
    let last = meter.labels("buttress_call_duration_seconds_bucket", "le");
    assert!(last.contains(&"0.075") && last.contains(&"7.5"), "{last:?}");
}
