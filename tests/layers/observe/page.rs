use std::{fmt::Write, fs, path::Path};

use buttress::{
    CircuitBreakerLayer,
    observe::{METRICS, Registry},
};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use tower::ServiceExt;

use super::Page;

async fn get(
    registry: &Registry,
    method: Method,
    path: &str,
    accept: &str,
) -> (StatusCode, String, String) {
    let request = Request::builder().method(method).uri(path).header(header::ACCEPT, accept);
    let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
    let (head, body) = registry.service().oneshot(request).await.unwrap().into_parts();
    let content_type = head.headers[header::CONTENT_TYPE].to_str().unwrap().to_owned();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status, content_type, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn accept_selects_the_format_and_its_exact_content_type() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    let (status, content_type, page) = get(&registry, Method::GET, "/metrics", "*/*").await;
    assert_eq!(
        (status, &*content_type),
        (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8")
    );
    assert!(page.contains("# TYPE buttress_breaker_trips_total counter\n"), "{page}");
    assert!(!page.contains("# UNIT") && !page.contains("# EOF"));
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
    let (_, content_type, page) = get(&registry, Method::GET, "/metrics", accept).await;
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(page.contains("# TYPE buttress_breaker_trips counter\n"), "{page}");
    assert!(page.contains("# UNIT buttress_breaker_state_time_seconds seconds\n"), "{page}");
    assert!(page.ends_with("# EOF\n"));
    // Both formats have the same samples.
    assert_eq!(Page::parse(&page).len(), Page::of(&registry).len());
}

#[tokio::test]
async fn other_paths_and_methods_are_declined() {
    let registry = Registry::new();
    assert_eq!(get(&registry, Method::GET, "/", "").await.0, StatusCode::NOT_FOUND);
    assert_eq!(
        get(&registry, Method::POST, "/metrics", "").await.0,
        StatusCode::METHOD_NOT_ALLOWED
    );
    let (status, _, body) = get(&registry, Method::HEAD, "/metrics", "").await;
    assert_eq!((status, body.len()), (StatusCode::OK, 0));
}

#[tokio::test(start_paused = true)]
async fn name_is_escaped() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("a\"b\\c\nd");
    registry.watch(&layer.handle()).unwrap();
    let series = r#"buttress_breaker_state{name="a\"b\\c\nd",state="closed"}"#;
    assert_eq!(Page::of(&registry).get(series), 1.0);
}

#[tokio::test(start_paused = true)]
async fn every_family_has_a_header_and_no_value_is_not_a_number() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    let text = registry.text();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split(' ').next().unwrap().to_owned();
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&family), "{line} under {family}");
            let value = line.rsplit(' ').next().unwrap();
            assert!(value.parse::<f64>().unwrap().is_finite(), "{line}");
        }
    }
}

/// `docs/metrics.md` is made from the table in the source. With `BUTTRESS_WRITE_DOCS=1` this test writes it.
#[test]
fn documented_table_is_that_of_the_source() {
    let mut page = String::from(
        "# Metrics\n\n\
         The registry of `buttress::observe` exports these metrics. The series of a histogram end in `_bucket`, `_sum` and\n\
         `_count`. All values of a label except `name`, `key`, `check` and `version` are a closed set, and each value is\n\
         exported from the first scrape. This table is made from the table in the source.\n\n\
         | metric | Prometheus | kind | unit | labels | meaning |\n|---|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let (labels, kind) = (metric.labels.join(", "), metric.kind.as_str().replace('_', "-"));
        let _ = writeln!(
            page,
            "| {} | {} | {kind} | {} | {labels} | {} |",
            metric.name,
            metric.series(),
            metric.unit,
            metric.help
        );
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    if std::env::var_os("BUTTRESS_WRITE_DOCS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "run this test with BUTTRESS_WRITE_DOCS=1 to write {}",
        path.display()
    );
}
