//! Timeouts and deadlines.

use std::future::pending;

use buttress::{BoxError, Deadline, DeadlineLayer, TimeoutLayer, observe::Registry};
use http::{Request, Response};
use http_body_util::Empty;
use tower::{Layer, ServiceExt, service_fn};

use super::Page;
use crate::support::{ms, secs};

type Nothing = Empty<bytes::Bytes>;

const PHASES: [&str; 10] = [
    "body_rate",
    "deadline",
    "first_frame",
    "head",
    "idle",
    "response_total",
    "sending",
    "taking",
    "total",
    "unread",
];

fn get() -> Request<Nothing> {
    Request::new(Nothing::new())
}

async fn never<B>(_: Request<B>) -> Result<Response<Nothing>, BoxError> {
    pending().await
}

fn timeouts(page: &Page, layer: &str, phase: &str) -> f64 {
    let labels = format!(r#"{{name="search",layer="{layer}",phase="{phase}"}}"#);
    page.get(&format!("buttress_timeouts_total{labels}"))
}

fn rejected(page: &Page, layer: &str) -> f64 {
    let labels = format!(r#"{{name="search",layer="{layer}",reason="deadline_passed"}}"#);
    page.get(&format!("buttress_rejections_total{labels}"))
}

#[tokio::test(start_paused = true)]
async fn timeouts_count_by_phase() {
    let layer = TimeoutLayer::http().head(secs(2)).name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.labels("buttress_timeouts_total", "phase"), PHASES);
    assert_eq!(page.sum("buttress_timeouts_total"), 0.0);
    assert_eq!(rejected(&page, "timeout"), 0.0);
    let service = layer.layer(service_fn(never));
    service.clone().oneshot(get()).await.unwrap_err();
    let mut late = get();
    late.extensions_mut().insert(Deadline::after(ms(500)));
    service.clone().oneshot(late).await.unwrap_err();
    let mut passed = get();
    passed.extensions_mut().insert(Deadline::after(ms(0)));
    service.oneshot(passed).await.unwrap_err();
    let page = Page::of(&registry);
    assert_eq!(timeouts(&page, "timeout", "head"), 1.0);
    assert_eq!(timeouts(&page, "timeout", "deadline"), 1.0);
    assert_eq!(page.sum("buttress_timeouts_total"), 2.0);
    assert_eq!(rejected(&page, "timeout"), 1.0);
    assert_eq!(page.sum("buttress_rejections_total"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn layers_of_a_server_have_labels_of_their_own() {
    let timeout = TimeoutLayer::server().head(secs(2)).name("search");
    let deadline = DeadlineLayer::new().default_of(secs(1)).name("search");
    let registry = Registry::new();
    registry.watch(&timeout.handle()).unwrap();
    registry.watch(&deadline.handle()).unwrap();
    timeout.layer(service_fn(never)).oneshot(get()).await.unwrap_err();
    let service = deadline.layer(service_fn(never));
    service.clone().oneshot(get()).await.unwrap_err();
    let mut passed = get();
    passed.extensions_mut().insert(Deadline::after(ms(0)));
    service.oneshot(passed).await.unwrap_err();
    let page = Page::of(&registry);
    assert_eq!(timeouts(&page, "server_timeout", "head"), 1.0);
    assert_eq!(timeouts(&page, "deadline", "deadline"), 1.0);
    assert_eq!(timeouts(&page, "deadline", "unread"), 0.0);
    assert_eq!(page.family("buttress_timeouts_total").len(), 10 + 2);
    assert_eq!((rejected(&page, "server_timeout"), rejected(&page, "deadline")), (0.0, 1.0));
}

#[tokio::test(start_paused = true)]
async fn forked_layer_keeps_its_label() {
    let layer = TimeoutLayer::server().name("search");
    let _service = layer.layer(service_fn(never::<Nothing>));
    let fork = layer.head(secs(1)).name("search");
    let registry = Registry::new();
    registry.watch(&fork.handle()).unwrap();
    assert_eq!(timeouts(&Page::of(&registry), "server_timeout", "head"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn dropped_layers_disappear() {
    let registry = Registry::new();
    let (timeout, deadline) =
        (TimeoutLayer::http().name("search"), DeadlineLayer::new().name("search"));
    registry.watch(&timeout.handle()).unwrap();
    registry.watch(&deadline.handle()).unwrap();
    assert_eq!(Page::of(&registry).family("buttress_rejections_total").len(), 4);
    drop((timeout, deadline));
    assert!(!Page::of(&registry).contains("search"));
}
