//! Measures the cost of a scrape as CPU time of the thread that reads the metrics. The load of the machine has no
//! effect on this time. Fails if a cost exceeds its maximum.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench scrape
//! ```
//!
//! A scrape of 1,000 circuits takes at most 5 ms. A scrape of a server with a client stack and a server stack takes at
//! most 1 ms, which is 0.1 % of one core with one scrape per second. The read of one layer takes at most 100 µs; it
//! contains the time for which a lock of the layer is held, so no call waits longer for a scrape. `keyed` is a layer
//! with 10,000 keys, which is read in slices: its maximum is that of the whole read.

use std::{fs, hint::black_box, time::Duration};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Health, HedgeLayer, Lifecycle, Outcome, RetryLayer,
    Trip,
    config::{ClientConfig, ServerConfig},
    connect::ConnectLayer,
    limit::adaptive::Knee,
    observe::{Metric, MetricsPublisher, NamedVisit, Registry, Value},
    stack::ClientStack,
};
use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry::metrics::MeterProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use tower::{Layer, Service, ServiceExt};

const ROUNDS: usize = 20;
const CIRCUITS: usize = 1000;

fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

/// Returns the CPU time of this thread.
fn cpu_time() -> Duration {
    // Linux updates the time when the thread yields.
    std::thread::yield_now();
    let stat = fs::read_to_string("/proc/thread-self/schedstat").expect("Linux has schedstat");
    let nanos = stat.split(' ').next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.expect("the first number is the CPU time in nanoseconds"))
}

/// Returns the minimum CPU time of a run: of the means of several rounds of `runs` runs.
fn min_time(runs: u32, mut run: impl FnMut()) -> Duration {
    run();
    let round = |_| {
        let start = cpu_time();
        (0..runs).for_each(|_| run());
        (cpu_time() - start) / runs
    };
    (0..ROUNDS).map(round).min().unwrap_or_default()
}

struct Report {
    has_failed: bool,
}

impl Report {
    fn line(&mut self, what: &str, took: Duration, max: Option<Duration>) {
        let verdict = match max {
            Some(max) if took > max => {
                self.has_failed = true;
                format!("MORE THAN {max:?}")
            }
            Some(max) => format!("maximum {max:?}"),
            None => String::new(),
        };
        println!("{what:<52} {:>10.1} µs  {verdict}", took.as_nanos() as f64 / 1e3);
    }
}

/// Discards the values: the read of a layer without an export.
struct Discard;

impl NamedVisit for Discard {
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    ) {
        black_box((metric, name, labels, &value));
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let mut report = Report { has_failed: false };
    runtime.expect("a runtime").block_on(measure(&mut report));
    if report.has_failed {
        std::process::exit(1);
    }
}

async fn measure(report: &mut Report) {
    circuits(report);
    server(report).await;
    layers(report).await;
}

/// A scrape of 1,000 circuits, by each path.
fn circuits(report: &mut Report) {
    let registry = Registry::new();
    let layers: Vec<_> = (0..CIRCUITS)
        .map(|nth| CircuitBreakerLayer::http().name(&format!("circuit {nth}")))
        .collect();
    for layer in &layers {
        registry.watch(&layer.handle()).expect("each circuit has a name of its own");
        layer.handle().record(Outcome::failure());
    }
    let max = Some(Duration::from_millis(5));
    let lines = registry.text().lines().count();
    println!("{CIRCUITS} circuits, {lines} lines, {} bytes", registry.text().len());
    let read = min_time(1, || registry.visit(&mut Discard));
    report.line("  read", read, max);
    report.line("  page of Prometheus", min_time(1, || drop(black_box(registry.text()))), max);
    report.line(
        "  page of OpenMetrics",
        min_time(1, || drop(black_box(registry.open_metrics()))),
        max,
    );

    let recorder = PrometheusBuilder::new().build_recorder();
    let mut publisher = MetricsPublisher::new();
    metrics::with_local_recorder(&recorder, || {
        report.line(
            "  publication through the facade",
            min_time(1, || publisher.publish(&registry)),
            None,
        );
    });

    let prometheus = prometheus::Registry::new();
    let exporter = opentelemetry_prometheus::exporter().with_registry(prometheus.clone());
    let provider = SdkMeterProvider::builder().with_reader(exporter.build().expect("an exporter"));
    let provider = provider.build();
    registry.meter_into(&provider.meter("buttress"));
    report.line(
        "  collection of OpenTelemetry",
        min_time(1, || drop(black_box(prometheus.gather()))),
        None,
    );
}

/// A scrape of a usual server: a client stack, a server stack, the health and the lifecycle of the process.
async fn server(report: &mut Report) {
    let registry = Registry::new();
    let client = ClientConfig::load("search").finish().expect("valid defaults");
    let client = ClientStack::new(&client).expect("valid defaults");
    let server = ServerConfig::load("front").finish().expect("valid defaults");
    let server = buttress::server(&server).expect("valid defaults");
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).expect("the only lifecycle");
    registry.watch(&client.handle()).expect("named");
    registry.watch(&server.handle()).expect("named");
    registry.watch(&health).expect("the only one");
    registry.watch(&lifecycle).expect("the only one");
    println!("a client stack and a server stack");
    let max = Some(Duration::from_millis(1));
    report.line("  page of Prometheus", min_time(100, || drop(black_box(registry.text()))), max);
}

/// The read of one layer of each kind.
async fn layers(report: &mut Report) {
    println!("read of one layer");
    let max = Some(us(100));
    let mut one = |name: &str, watch: &dyn Fn(&Registry), max| {
        let registry = Registry::new();
        watch(&registry);
        let took = min_time(300, || registry.visit(&mut Discard));
        report.line(&format!("  {name}"), took, max);
    };
    let breaker = CircuitBreakerLayer::http().name("a");
    one("circuit breaker", &|registry| registry.watch(&breaker.handle()).expect("named"), max);
    let limit = ConcurrencyLimitLayer::adaptive(Knee::default()).queue(100, us(1000)).name("a");
    one("concurrency limit", &|registry| registry.watch(&limit.handle()).expect("named"), max);
    let retry = RetryLayer::http().name("a");
    one("retry", &|registry| registry.watch(&retry.handle()).expect("named"), max);
    let hedge = HedgeLayer::http(us(100)).name("a");
    one("hedge", &|registry| registry.watch(&hedge.handle()).expect("named"), max);
    let connect = ConnectLayer::new().name("a");
    one("connect", &|registry| registry.watch(&connect.handle()).expect("named"), max);
    let health = Health::new();
    let reporters: Vec<_> =
        (0..100).map(|nth| health.reporter(&format!("check-{nth}")).expect("a new name")).collect();
    one("health, 100 checks", &|registry| registry.watch(&health).expect("the only one"), max);
    drop(reporters);

    let keyed = CircuitBreakerLayer::new(Trip::consecutive(1)).name("a").keyed(|key: &u32| *key);
    let keyed = keyed.max_keys(20_000).per_response();
    let mut service = keyed.layer(tower::service_fn(async |_: u32| Ok::<_, std::io::Error>(())));
    for key in 0..10_000 {
        let service = service.ready().await.expect("a service that never fails");
        service.call(key).await.expect("a closed circuit");
    }
    let max = Some(Duration::from_millis(5));
    one("keyed circuit breaker, 10,000 keys", &|to| to.watch(&keyed.handle()).expect("named"), max);
}
