use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer,
    observe::{MetricsPublisher, Registry},
};
use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    set_default_local_recorder, with_local_recorder,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::time::{advance, sleep};

use super::Page;
use crate::support::secs;

#[tokio::test(start_paused = true)]
async fn recorder_installed_after_the_first_publication_receives_the_values() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    let mut publisher = MetricsPublisher::new();
    publisher.publish(&registry);
    let recorder = PrometheusBuilder::new().build_recorder();
    layer.handle().force_open();
    advance(secs(3)).await;
    with_local_recorder(&recorder, || publisher.publish(&registry));
    let page = Page::parse(&recorder.handle().render());
    assert_eq!(page.get(r#"buttress_breaker_state{name="search",state="forced_open"}"#), 1.0);
    let time = r#"buttress_breaker_state_time_seconds_total{name="search",state="forced_open"}"#;
    assert_eq!(page.get(time), 3.0);
    let text = recorder.handle().render();
    assert!(text.contains("# TYPE buttress_breaker_transitions_total counter\n"), "{text}");
    assert!(text.contains("# HELP buttress_breaker_transitions_total Transitions of"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn dropped_layer_has_gauges_of_0_and_the_next_one_continues_its_counters() {
    let registry = Registry::new();
    let recorder = PrometheusBuilder::new().build_recorder();
    let mut publisher = MetricsPublisher::new();
    let mut publish = |registry: &Registry| {
        with_local_recorder(&recorder, || publisher.publish(registry));
        Page::parse(&recorder.handle().render())
    };
    let transitions = r#"buttress_breaker_transitions_total{name="search",state="forced_open"}"#;
    let state = r#"buttress_breaker_state{name="search",state="forced_open"}"#;
    for counted in [1.0, 2.0] {
        let layer = CircuitBreakerLayer::http().name("search");
        registry.watch(&layer.handle()).unwrap();
        layer.handle().force_open();
        let page = publish(&registry);
        assert_eq!((page.get(state), page.get(transitions)), (1.0, counted));
        drop(layer);
        let page = publish(&registry);
        assert_eq!((page.get(state), page.get(transitions)), (0.0, counted));
        assert_eq!(page.sum("buttress_breaker_state"), 0.0);
    }
}

#[tokio::test(start_paused = true)]
async fn layer_replaced_between_two_publications_continues_the_counters() {
    let registry = Registry::new();
    let recorder = PrometheusBuilder::new().build_recorder();
    let mut publisher = MetricsPublisher::new();
    for openings in [2, 1] {
        let layer = CircuitBreakerLayer::http().name("search");
        registry.watch(&layer.handle()).unwrap();
        for _ in 0..openings {
            layer.handle().force_open();
            layer.handle().reset();
        }
        with_local_recorder(&recorder, || publisher.publish(&registry));
    }
    let transitions = r#"buttress_breaker_transitions_total{name="search",state="forced_open"}"#;
    assert_eq!(Page::parse(&recorder.handle().render()).get(transitions), 3.0);
}

/// Counts the handles that it makes.
#[derive(Default)]
struct Counting {
    handles: AtomicUsize,
    described: Mutex<Vec<(String, Option<Unit>, String)>>,
}

impl Counting {
    fn describe(&self, key: &KeyName, unit: Option<Unit>, help: &SharedString) {
        let description = (key.as_str().to_owned(), unit, help.to_string());
        self.described.lock().unwrap().push(description);
    }
}

impl Recorder for Counting {
    fn describe_counter(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        self.describe(&key, unit, &help);
    }

    fn describe_gauge(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        self.describe(&key, unit, &help);
    }

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, help: SharedString) {
        self.describe(&key, unit, &help);
    }

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        self.handles.fetch_add(1, SeqCst);
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        self.handles.fetch_add(1, SeqCst);
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

#[tokio::test(start_paused = true)]
async fn handles_and_descriptions_are_made_once() {
    let registry = Registry::new();
    let limits = ["front", "back"].map(|name| ConcurrencyLimitLayer::new(7).name(name));
    for limit in &limits {
        registry.watch(&limit.handle()).unwrap();
    }
    let (recorder, mut publisher) = (Counting::default(), MetricsPublisher::new());
    for _ in 0..3 {
        with_local_recorder(&recorder, || publisher.publish(&registry));
    }
    let page = Page::of(&registry);
    let histogram = page.family("buttress_queue_wait_duration_seconds_bucket").len() / 13 * 15;
    assert_eq!(recorder.handles.load(SeqCst), page.len() - histogram);
    let mut described = recorder.described.into_inner().unwrap();
    described.sort_by(|a, b| a.0.cmp(&b.0));
    let names: Vec<_> = described.iter().map(|(name, ..)| &**name).collect();
    assert_eq!(
        names,
        [
            "buttress_build_info",
            "buttress_concurrency_exempt_active",
            "buttress_concurrency_exempt_total",
            "buttress_concurrency_limit",
            "buttress_concurrency_usage",
            "buttress_observe_folded_series_total",
            "buttress_queue_depth",
            "buttress_queue_limit",
            "buttress_rejections_total",
            "buttress_shadow_rejections_total",
        ]
    );
    assert!(described.iter().all(|(_, unit, help)| *unit == Some(Unit::Count) && !help.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn sampler_publishes_once_a_second_after_publication_is_turned_on() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    let recorder = PrometheusBuilder::new().build_recorder();
    let _installed = set_default_local_recorder(&recorder);
    tokio::spawn(registry.run());
    sleep(secs(3)).await;
    assert_eq!(recorder.handle().render(), "");
    registry.publish_metrics();
    sleep(secs(2)).await;
    let state = r#"buttress_breaker_state{name="search",state="forced_open"}"#;
    assert_eq!(Page::parse(&recorder.handle().render()).get(state), 0.0);
    layer.handle().force_open();
    sleep(secs(2)).await;
    assert_eq!(Page::parse(&recorder.handle().render()).get(state), 1.0);
}
