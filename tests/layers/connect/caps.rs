//! The maximum number of connections, and the time for which each connection counts.

use std::time::Duration;

use buttress::{
    connect::{Client, ConnectLayer},
    outcome::RejectedKind,
};
use futures_util::future::join_all;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::fixtures::{Piped, Pipes, ask, client, http2, request};
use crate::support::{rejection, settle};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn two_hundred_callers_through_fifty_connections_all_receive_a_response() {
    let (layer, pipes) = (ConnectLayer::new().max_per_host(50), Pipes::default());
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    for _ in 0..5 {
        let answers = join_all((0..200).map(|_| ask(&client, "http://a/"))).await;
        assert!(answers.iter().all(Result::is_ok));
    }
    assert!((1..=50).contains(&pipes.open.peak()), "{} connections", pipes.open.peak());
    settle().await;
    let seen = handle.snapshot();
    assert_eq!((seen.waiting, seen.connecting, seen.in_use, seen.saturated), (0, 0, 0, 0));
    assert_eq!(seen.open, pipes.open.now());
    assert_eq!(seen.created + seen.reused, 1000);
}

#[tokio::test(start_paused = true)]
async fn a_connection_counts_for_as_long_as_it_is_open_not_while_it_is_made() {
    let layer = ConnectLayer::new().max_per_host(1).queue(10, SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let held = client.request(request("http://a/slow"));
    let held = tokio::spawn(held);
    settle().await;
    let error = ask(&client, "http://a/").await.unwrap_err();
    assert_eq!(rejection(&error).kind(), RejectedKind::Saturated);
    assert_eq!(rejection(&error).layer(), "connect");
    // Each host has its own cap.
    ask(&client, "http://b/").await.unwrap();
    // The head has arrived, but the body has not been read: the connection is still in use.
    pipes.stage.open();
    let held = held.await.unwrap().unwrap();
    assert_eq!((handle.snapshot().open, handle.snapshot().in_use), (2, 1));
    held.into_body().collect().await.unwrap();
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(handle.snapshot().open, 2);
}

#[tokio::test(start_paused = true)]
async fn connections_to_all_hosts_together_are_capped() {
    let layer = ConnectLayer::new().max_total(3).queue(10, SECOND);
    let pipes = Pipes::default();
    let client = client(&layer, &pipes);
    let hosts = ["http://a/slow", "http://b/slow", "http://c/slow"];
    let held: Vec<_> = hosts.map(|uri| tokio::spawn(client.request(request(uri)))).into();
    settle().await;
    let error = ask(&client, "http://d/").await.unwrap_err();
    assert_eq!(rejection(&error).kind(), RejectedKind::Saturated);
    pipes.stage.open();
    for held in held {
        held.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    ask(&client, "http://d/").await.unwrap();
    assert_eq!(pipes.open.peak(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_for_another_host_that_waits() {
    let layer = ConnectLayer::new().max_total(2).max_idle(None);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let start = Instant::now();
    ask(&client, "http://a/").await.unwrap();
    ask(&client, "http://b/").await.unwrap();
    ask(&client, "http://c/").await.unwrap();
    ask(&client, "http://b/").await.unwrap();
    assert_eq!(handle.snapshot().created, 3, "not only the longest idle connection was closed");
    // Also a connection that becomes idle only after the other host has begun to wait.
    let held: Vec<_> = ["http://b/slow", "http://c/slow"]
        .map(|uri| tokio::spawn(client.request(request(uri))))
        .into();
    settle().await;
    let waits = tokio::spawn({
        let client = client.clone();
        async move { ask(&client, "http://d/").await }
    });
    settle().await;
    assert_eq!(handle.snapshot().waiting, 1);
    pipes.stage.open();
    for held in held {
        held.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    waits.await.unwrap().unwrap();
    assert_eq!((handle.snapshot().created, handle.snapshot().open), (4, 2));
    assert_eq!((pipes.open.peak(), start.elapsed()), (2, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_for_each_host_that_waits() {
    let layer = ConnectLayer::new().max_total(3).max_idle(None);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let start = Instant::now();
    for n in 0..20 {
        let hosts = ["a", "b", "c"].map(|name| format!("http://{name}{n}/"));
        for answer in join_all(hosts.iter().map(|uri| ask(&client, uri))).await {
            answer.unwrap();
        }
    }
    assert_eq!((handle.snapshot().open, start.elapsed()), (3, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_no_call_uses_is_closed_for_another_host() {
    let layer = ConnectLayer::new().max_total(2).max_idle(None);
    let pipes = Pipes::gated();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    pipes.let_in(1);
    let first = client.request(request("http://a/tenth"));
    // The second call starts a connection of its own. Before that connection is established, the pool serves the call
    // by the connection of the first call.
    let second = client.request(request("http://a/slow"));
    let (first, second) = (tokio::spawn(first), tokio::spawn(second));
    drop(first.await.unwrap().unwrap());
    settle().await;
    pipes.let_in(100);
    settle().await;
    assert_eq!((handle.snapshot().open, handle.snapshot().in_use), (2, 1));
    let start = Instant::now();
    ask(&client, "http://b/").await.unwrap();
    assert!(start.elapsed() <= SECOND, "{:?}", start.elapsed());
    second.abort();
}

#[tokio::test(start_paused = true)]
async fn callers_of_one_host_close_none_of_its_connections_for_each_other() {
    let layer = ConnectLayer::new().max_total(2);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    for _ in 0..20 {
        let answers = join_all((0..20).map(|_| ask(&client, "http://a/"))).await;
        assert!(answers.iter().all(Result::is_ok));
    }
    assert_eq!(handle.snapshot().created, 2);
}

#[tokio::test(start_paused = true)]
async fn caps_are_resized_while_they_are_reached() {
    let layer = ConnectLayer::new().max_per_host(1).max_total(10);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let held: Vec<_> =
        (0..3).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
    settle().await;
    assert_eq!((handle.snapshot().open, handle.snapshot().waiting), (1, 2));
    handle.set_max_per_host(2).unwrap();
    settle().await;
    assert_eq!((handle.snapshot().open, handle.snapshot().waiting), (2, 1));
    handle.set_max_per_host(9).unwrap();
    settle().await;
    assert_eq!((handle.snapshot().open, handle.snapshot().waiting), (3, 0));
    assert_eq!(handle.snapshot().max_per_host, Some(9));
    handle.set_max_total(1).unwrap();
    pipes.stage.open();
    for held in held {
        held.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    handle.recycle();
    settle().await;
    assert_eq!(handle.snapshot().open, 0);
    join_all((0..9).map(|_| ask(&client, "http://a/"))).await;
    assert_eq!(handle.snapshot().open, 1);
    assert!(handle.set_max_total(0).is_err() && handle.set_max_per_host(0).is_err());
}

#[tokio::test(start_paused = true)]
async fn many_http2_calls_share_the_single_connection_within_the_cap() {
    let layer = ConnectLayer::new().max_per_host(1).queue(0, SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    ask(&client, "http://a/").await.unwrap();
    let held: Vec<_> =
        (0..20).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
    settle().await;
    assert_eq!(pipes.stage.inside.now(), 20);
    assert_eq!((handle.snapshot().open, handle.snapshot().in_use), (1, 1));
    pipes.stage.open();
    for held in held {
        held.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    let seen = handle.snapshot();
    assert_eq!((seen.created, seen.reused, seen.in_use), (1, 20, 0));
}

/// Before the first connection is established, the layer does not know that calls will share it.
#[tokio::test(start_paused = true)]
async fn waiting_calls_are_sent_as_soon_as_a_connection_is_known_to_be_http2() {
    let layer = ConnectLayer::new().max_per_host(2).max_total(2);
    let (pipes, down) = (Pipes::gated(), Pipes::default());
    let (http1, handle) = (client(&layer, &down), layer.handle());
    // As with ALPN, only the established connection reveals the protocol to the layer.
    let http2: Piped = Client::builder(layer)
        .hyper(|hyper| {
            hyper.http2_only(true);
        })
        .build(pipes.clone());
    let held: Vec<_> =
        (0..20).map(|_| tokio::spawn(http2.request(request("http://a/slow")))).collect();
    settle().await;
    assert_eq!(handle.snapshot().waiting, 18);
    pipes.let_in(2);
    settle().await;
    assert_eq!((pipes.stage.inside.now(), handle.snapshot().waiting), (20, 0));
    assert_eq!(handle.snapshot().open, 1);
    // No waiting call holds a permit that a call to another host needs.
    ask(&http1, "http://b/").await.unwrap();
    pipes.stage.open();
    for held in held {
        held.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
}

#[test]
fn invalid_settings_are_errors() {
    let field = |layer: ConnectLayer| layer.checked().unwrap_err().field;
    assert_eq!(field(ConnectLayer::new().max_per_host(0)), "max_per_host");
    assert_eq!(field(ConnectLayer::new().max_total(0)), "max_total");
    assert_eq!(field(ConnectLayer::new().queue(1, Duration::ZERO)), "queue.max_wait");
    assert_eq!(field(ConnectLayer::new().connect_timeout(Duration::ZERO)), "connect_timeout");
    assert_eq!(field(ConnectLayer::new().max_age(Duration::ZERO)), "max_age");
    assert_eq!(field(ConnectLayer::new().max_idle(Duration::ZERO)), "max_idle");
    for jitter in [-0.1, 0.91, f64::NAN, f64::INFINITY] {
        assert_eq!(field(ConnectLayer::new().jitter(jitter)), "jitter");
    }
    let layer = ConnectLayer::new().max_age(None).queue(0, Duration::ZERO).jitter(0.0);
    layer.checked().map(drop).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_layer_with_an_invalid_setting_rejects_connects() {
    let (layer, pipes) = (ConnectLayer::new().max_total(0), Pipes::default());
    let error = ask(&client(&layer, &pipes), "http://a/").await.unwrap_err();
    assert_eq!(rejection(&error).kind(), RejectedKind::Misconfigured);
    assert_eq!(pipes.open.total(), 0);
}

#[tokio::test(start_paused = true)]
async fn setter_after_the_first_use_returns_a_layer_with_state_of_its_own() {
    let layer = ConnectLayer::new().queue(0, Duration::ZERO).name("search");
    let before_use = layer.handle();
    let layer = layer.max_per_host(1);
    assert_eq!(
        before_use.snapshot().max_per_host,
        Some(1),
        "the state is shared before the first use"
    );

    let pipes = Pipes::default();
    let first = client(&layer, &pipes);
    let fork = layer.clone().max_per_host(2);
    let (handle, fork_handle) = (layer.handle(), fork.handle());
    let _held = tokio::spawn(first.request(request("http://a/slow")));
    settle().await;
    assert_eq!((handle.snapshot().max_per_host, handle.snapshot().open), (Some(1), 1));
    assert_eq!((fork_handle.snapshot().max_per_host, fork_handle.snapshot().open), (Some(2), 0));
    assert_eq!(rejection(&ask(&first, "http://a/").await.unwrap_err()).name(), Some("search"));

    let second = client(&fork, &pipes);
    let _held = [(); 2].map(|()| tokio::spawn(second.request(request("http://a/slow"))));
    settle().await;
    assert_eq!(fork_handle.snapshot().open, 2);
    let error = ask(&second, "http://a/").await.unwrap_err();
    assert_eq!(rejection(&error).kind(), RejectedKind::Saturated, "the fork has the same queue");
    assert_eq!(rejection(&error).name(), Some("search"));

    handle.set_max_per_host(2).unwrap();
    let _held = tokio::spawn(first.request(request("http://a/slow")));
    settle().await;
    assert_eq!(handle.snapshot().open, 2, "the handle changes the running layer");
}

#[test]
fn handle_rejects_the_settings_that_the_layer_rejects() {
    let handle = ConnectLayer::new().handle();
    let rejected = [
        handle.set_max_per_host(0),
        handle.set_max_total(0),
        handle.set_queue(1, Duration::ZERO),
        handle.set_connect_timeout(Duration::ZERO),
        handle.set_max_age(Duration::ZERO),
        handle.set_max_idle(Duration::ZERO),
        handle.set_jitter(1.0),
    ];
    let fields = [
        "max_per_host",
        "max_total",
        "queue.max_wait",
        "connect_timeout",
        "max_age",
        "max_idle",
        "jitter",
    ];
    assert_eq!(rejected.map(|error| error.unwrap_err().field), fields);
    handle.set_queue(0, Duration::ZERO).unwrap();
    handle.set_max_age(None).unwrap();
}
