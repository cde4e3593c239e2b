use buttress::{connect::ConnectLayer, observe::Registry};
use tokio::time::sleep;
use tower::{Layer, ServiceExt};

use super::Page;
use crate::{
    layers::connect::fixtures::{Pipes, ask, client, http2, request},
    support::{ms, secs, settle},
};

fn watched(layer: ConnectLayer) -> (Registry, ConnectLayer) {
    let layer = layer.jitter(0.0).name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    (registry, layer)
}

fn count(registry: &Registry, state: &str) -> f64 {
    let series = format!(r#"buttress_connections{{name="search",state="{state}"}}"#);
    Page::of(registry).get(&series)
}

fn closed(registry: &Registry, reason: &str) -> f64 {
    let series = format!(r#"buttress_connection_closed_total{{name="search",reason="{reason}"}}"#);
    Page::of(registry).get(&series)
}

/// The count and the sum of the waits with a result.
fn waits(registry: &Registry, result: &str) -> (f64, f64) {
    let page = Page::of(registry);
    let [count, sum] = ["count", "sum"].map(|part| {
        let labels = format!(r#"{{name="search",layer="connect",result="{result}"}}"#);
        page.get(&format!("buttress_queue_wait_duration_seconds_{part}{labels}"))
    });
    (count, sum)
}

#[tokio::test(start_paused = true)]
async fn unused_layer_exports_all_labels_with_0() {
    let (registry, layer) = watched(ConnectLayer::new());
    let page = Page::of(&registry);
    for (metric, label, values) in [
        ("buttress_connections", "state", &["active", "connecting", "idle"][..]),
        (
            "buttress_connection_closed_total",
            "reason",
            &["age", "closed", "idle", "make_way", "requested"],
        ),
        ("buttress_connection_failures_total", "reason", &["error", "timeout"]),
        ("buttress_rejections_total", "reason", &["connections_saturated", "misconfigured"]),
        (
            "buttress_queue_wait_duration_seconds_count",
            "result",
            &["abandoned", "admitted", "rejected"],
        ),
        ("buttress_queue_depth", "layer", &["connect"]),
    ] {
        assert_eq!(page.labels(metric, label), values, "{metric}");
        assert_eq!(page.sum(metric), 0.0, "{metric}");
    }
    assert_eq!(page.get(r#"buttress_connection_opened_total{name="search"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_connection_reuses_total{name="search"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_queue_limit{name="search",layer="connect"}"#), 1024.0);
    assert!(page.family("buttress_connection_limit").is_empty(), "there is no limit");
    layer.handle().set_max_total(7).unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.family("buttress_connection_limit").len(), 1);
    assert_eq!(page.get(r#"buttress_connection_limit{name="search",scope="total"}"#), 7.0);
}

#[tokio::test(start_paused = true)]
async fn connections_are_counted_by_state_and_reuse() {
    for connect in [client, http2] {
        let (registry, layer) = watched(ConnectLayer::new().max_per_host(2));
        let pipes = Pipes::default();
        let client = connect(&layer, &pipes);
        for _ in 0..3 {
            ask(&client, "http://a/").await.unwrap();
        }
        let states = || ["connecting", "active", "idle"].map(|state| count(&registry, state));
        assert_eq!(states(), [0.0, 0.0, 1.0]);
        let slow = tokio::spawn(client.request(request("http://a/slow")));
        settle().await;
        assert_eq!(states(), [0.0, 1.0, 0.0]);
        pipes.stage.open();
        drop(slow.await);
        let page = Page::of(&registry);
        assert_eq!(page.get(r#"buttress_connection_opened_total{name="search"}"#), 1.0);
        assert_eq!(page.get(r#"buttress_connection_reuses_total{name="search"}"#), 3.0);
        assert_eq!(page.get(r#"buttress_connection_limit{name="search",scope="host"}"#), 2.0);
    }
}

#[tokio::test(start_paused = true)]
async fn closed_connections_are_counted_by_reason() {
    let layer = ConnectLayer::new().max_total(1).max_age(secs(100)).max_idle(secs(10));
    let (registry, layer) = watched(layer);
    let client = client(&layer, &Pipes::default());
    ask(&client, "http://a/").await.unwrap();
    // The call to the other host needs the only permit.
    ask(&client, "http://b/").await.unwrap();
    settle().await;
    assert_eq!(closed(&registry, "make_way"), 1.0);
    sleep(secs(11)).await;
    assert_eq!(closed(&registry, "idle"), 1.0);
    for _ in 0..11 {
        ask(&client, "http://a/").await.unwrap();
        sleep(secs(9) + ms(500)).await;
    }
    assert_eq!(closed(&registry, "age"), 1.0);
    ask(&client, "http://a/").await.unwrap();
    layer.handle().recycle();
    settle().await;
    assert_eq!(closed(&registry, "requested"), 1.0);
    assert_eq!(closed(&registry, "closed"), 0.0);
    // A connection that its owner drops.
    drop(layer.layer(Pipes::default()).oneshot("http://a/".parse().unwrap()).await.unwrap());
    assert_eq!(closed(&registry, "closed"), 1.0);
    let (page, seen) = (Page::of(&registry), layer.handle().snapshot());
    assert_eq!(page.sum("buttress_connection_closed_total"), 5.0);
    assert_eq!((seen.closed, seen.closed_for_age, seen.closed_for_idleness), (5, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn connects_that_fail_are_counted_by_reason() {
    let (registry, layer) = watched(ConnectLayer::new().connect_timeout(secs(1)));
    let pipes = Pipes::gated();
    let client = client(&layer, &pipes);
    let call = tokio::spawn(client.request(request("http://a/")));
    settle().await;
    assert_eq!(count(&registry, "connecting"), 1.0);
    call.await.unwrap().unwrap_err();
    pipes.let_in(2);
    for _ in 0..2 {
        client.request(request("http://down/")).await.unwrap_err();
    }
    let page = Page::of(&registry);
    let failures = |reason| {
        page.get(&format!(
            r#"buttress_connection_failures_total{{name="search",reason="{reason}"}}"#
        ))
    };
    assert_eq!((failures("timeout"), failures("error")), (1.0, 2.0));
}

#[tokio::test(start_paused = true)]
async fn waits_are_counted_by_result_and_calls_that_need_not_wait_are_left_out() {
    let (registry, layer) = watched(ConnectLayer::new().max_per_host(1).queue(1, secs(1)));
    let connector = layer.layer(Pipes::default());
    let connect = || connector.clone().oneshot("http://a/".parse().unwrap());
    let first = connect().await.unwrap();
    assert_eq!(waits(&registry, "admitted"), (0.0, 0.0));
    let waiting = tokio::spawn(connect());
    settle().await;
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_queue_depth{name="search",layer="connect"}"#), 1.0);
    connect().await.unwrap_err();
    assert_eq!(waits(&registry, "rejected"), (0.0, 0.0), "a full queue rejects without a wait");
    waiting.await.unwrap().unwrap_err();
    assert_eq!(waits(&registry, "rejected"), (1.0, 1.0));
    let rejected = r#"{name="search",layer="connect",reason="connections_saturated"}"#;
    let page = Page::of(&registry);
    assert_eq!(page.get(&format!("buttress_rejections_total{rejected}")), 2.0);

    let waiting = tokio::spawn(connect());
    sleep(ms(200)).await;
    waiting.abort();
    settle().await;
    assert_eq!(waits(&registry, "abandoned"), (1.0, 0.2));

    let waiting = tokio::spawn(connect());
    sleep(ms(300)).await;
    drop(first);
    waiting.await.unwrap().unwrap();
    assert_eq!(waits(&registry, "admitted"), (1.0, 0.3));
    let page = Page::of(&registry);
    let within = |bound| {
        page.get(&format!(
            r#"buttress_queue_wait_duration_seconds_bucket{{name="search",layer="connect",result="admitted",le="{bound}"}}"#
        ))
    };
    assert_eq!((within("0.25"), within("0.5"), within("+Inf")), (0.0, 1.0, 1.0));
    let seen = layer.handle().snapshot();
    assert_eq!((seen.waits, seen.waited), (3, ms(1500)));
}

#[tokio::test(start_paused = true)]
async fn calls_that_wait_for_a_stream_or_a_checkout_permit_are_counted() {
    for (connect, streams) in [(client as fn(&_, &_) -> _, 100), (http2, 1)] {
        let (registry, layer) = watched(ConnectLayer::new().max_per_host(1).queue(9, secs(5)));
        let pipes = Pipes::default().max_streams(streams);
        let client = connect(&layer, &pipes);
        ask(&client, "http://a/").await.unwrap();
        let slow = tokio::spawn(client.request(request("http://a/slow")));
        settle().await;
        let waiting = tokio::spawn(client.request(request("http://a/slow")));
        settle().await;
        sleep(secs(2)).await;
        assert_eq!(waits(&registry, "admitted"), (0.0, 0.0));
        pipes.stage.open();
        drop(slow.await);
        waiting.await.unwrap().unwrap();
        assert_eq!(waits(&registry, "admitted"), (1.0, 2.0));
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_client_disappears_with_its_connections() {
    let (registry, layer) = watched(ConnectLayer::new());
    let client = client(&layer, &Pipes::default());
    registry.watch(&client.connections()).unwrap_err();
    ask(&client, "http://a/").await.unwrap();
    drop(layer);
    assert!(Page::of(&registry).contains("search"));
    drop(client);
    settle().await;
    assert!(!Page::of(&registry).contains("search"));
}
