//! The metrics with Prometheus: the page with promtool, and every expression of the dashboard and of the rules.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use buttress::{
    Health, Lifecycle,
    config::{ClientConfig, ServerConfig},
    observe::{Registry, TraceId},
};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, sleep},
};
use tower::ServiceExt;

use crate::support::programs::{
    prometheus::{Prometheus, program},
    skip,
};

type Body = Empty<bytes::Bytes>;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// An upstream that is slow for some calls, fails for some, and fails for all calls in a part of each 8 s.
async fn upstream() -> std::net::SocketAddr {
    let (calls, start) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let response = move || {
        let nth = calls.fetch_add(1, Ordering::Relaxed);
        async move {
            let is_outage = start.elapsed().as_millis() % 8000 > 6000;
            sleep(ms(if nth % 7 == 0 { 150 } else { 5 })).await;
            match is_outage || nth % 11 == 0 {
                true => StatusCode::SERVICE_UNAVAILABLE,
                false => StatusCode::OK,
            }
        }
    };
    let app = Router::new().route("/", get(response)).route("/healthz", get(async || "ok"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// Each expression is asked of a Prometheus that has scraped a client and a server under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_expression_of_the_dashboard_and_the_rules_has_data() {
    let upstream = upstream().await;
    let client = ClientConfig::load("search").toml(&format!(
        "limit_max = 8\nlimit_queue = 8\nlimit_queue_wait = '100ms'\nhedge_after = '40ms'\n\
         retry_backoff = '5ms'\nbreaker_open_for = '1s'\nconnect_max_total = 6\n\
         connect_queue = 4\nconnect_queue_wait = '50ms'\ndeadline_default = '2s'\ntimeout_head = '500ms'\nconnect_timeout = '300ms'\n\
         health_probe_uri = 'http://{upstream}/healthz'"
    ));
    let client = buttress::client::<Body>(&client.finish().unwrap()).unwrap();
    let server = ServerConfig::load("front")
        .toml("limit_max = 10\nlimit_queue = 10\nlimit_queue_wait = '100ms'")
        .finish();
    let server = buttress::server(&server.unwrap()).unwrap();
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    lifecycle.ready();
    let disk = health.reporter("disk").unwrap();
    disk.pass();
    let registry = Registry::new();
    registry.watch(&client.handle()).unwrap();
    registry.watch(&server.handle()).unwrap();
    registry.watch(&health).unwrap();
    registry.watch(&lifecycle).unwrap();

    let search = client.clone();
    let forward = move || {
        let request = Request::get(format!("http://{upstream}/")).body(Body::new()).unwrap();
        let call = search.clone().oneshot(request);
        async move {
            match call.await {
                Ok(response) => {
                    let status = response.status();
                    let _ = response.into_body().collect().await;
                    status
                }
                Err(_) => StatusCode::BAD_GATEWAY,
            }
        }
    };
    let app = Router::new()
        .route("/", get(forward))
        .layer(server)
        .layer(lifecycle.layer())
        .layer(registry.endpoints());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let Some(prometheus) = Prometheus::start(address) else { return skip("prometheus") };

    let visitors = reqwest::Client::new();
    let until = Instant::now() + Duration::from_secs(30);
    while Instant::now() < until {
        // More at once than the client and the server admit.
        let mut burst = JoinSet::new();
        for _ in 0..26 {
            burst.spawn(visitors.get(format!("http://{address}/")).send());
        }
        burst.join_all().await;
        sleep(ms(20)).await;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("observability/query.py");
    let url = prometheus.url.clone();
    let output =
        tokio::task::spawn_blocking(move || Command::new("python3").arg(script).arg(url).output());
    let output = output.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);

    assert!(output.status.success(), "{text}\n{errors}\n{}\n{}", prometheus.log(), registry.text());
    check_metrics(&registry.text());
}

/// Prometheus stores the exemplars of the page and returns them with their labels, values and times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_returns_exemplars_of_the_page() {
    let server = ServerConfig::load("front").toml("limit_max = 1\nlimit_queue = 10");
    let server = buttress::server(&server.finish().unwrap()).unwrap();
    let registry = Registry::new();
    registry.watch(&server.handle()).unwrap();
    let calls = AtomicU64::new(0);
    registry.exemplars(move || {
        TraceId::from_bytes(u128::from(calls.fetch_add(1, Ordering::Relaxed) + 1).to_be_bytes())
    });
    let respond = async || {
        sleep(ms(20)).await;
        "hello"
    };
    let app = Router::new().route("/", get(respond)).layer(server).layer(registry.endpoints());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let Some(prometheus) = Prometheus::start(address) else { return skip("prometheus") };

    let client = reqwest::Client::new();
    let query = async |metric: &str| -> serde_json::Value {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let url = format!(
            "{}/api/v1/query_exemplars?query={metric}&start={}&end={}",
            prometheus.url,
            now - 60,
            now + 60
        );
        client.get(url).send().await.unwrap().json().await.unwrap()
    };
    let metrics =
        ["buttress_call_duration_seconds_bucket", "buttress_queue_wait_duration_seconds_bucket"];
    let until = Instant::now() + Duration::from_secs(20);
    for metric in metrics {
        let series = loop {
            let burst: JoinSet<_> =
                (0..4).map(|_| client.get(format!("http://{address}/")).send()).collect();
            burst.join_all().await;
            let response = query(metric).await;
            match response["data"].as_array().filter(|series| !series.is_empty()) {
                Some(series) => break series.clone(),
                None if Instant::now() < until => sleep(ms(200)).await,
                None => panic!("{response}\n{}\n{}", prometheus.log(), registry.open_metrics()),
            }
        };
        for one in series {
            assert_eq!(one["seriesLabels"]["name"], "front");
            let exemplar = &one["exemplars"][0];
            let id = exemplar["labels"]["trace_id"].as_str().unwrap();
            assert!(id.len() == 32 && u128::from_str_radix(id, 16).unwrap() > 0, "{one}");
            let value: f64 = exemplar["value"].as_str().unwrap().parse().unwrap();
            let max: f64 = one["seriesLabels"]["le"].as_str().unwrap().parse().unwrap();
            assert!((0.0..=max).contains(&value), "{one}");
        }
    }
}

/// `promtool check metrics` finds missing helps and names against the conventions.
fn check_metrics(page: &str) {
    let Some(promtool) = program("promtool") else { return skip("promtool") };
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}
