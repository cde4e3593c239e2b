//! HTTP/2 with all streams of a connection in use: another connection is opened, up to the cap, and calls beyond that
//! wait inside the client.

use std::time::Duration;

use buttress::{connect::ConnectLayer, outcome::RejectedKind};
use futures_util::future::join_all;
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::fixtures::{Pipes, ask, http2, request};
use crate::support::{net::soon, rejection, settle};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn another_connection_is_opened_when_all_streams_are_in_use() {
    for (max_streams, calls) in [(1, 8), (3, 24)] {
        let layer = ConnectLayer::new().max_per_host(8);
        let pipes = Pipes::default().max_streams(max_streams);
        let (client, handle) = (http2(&layer, &pipes), layer.handle());
        let held: Vec<_> =
            (0..calls).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
        settle().await;
        settle().await;
        assert_eq!(pipes.stage.inside.now(), calls, "some calls have not arrived at the server");
        let seen = handle.snapshot();
        assert_eq!((seen.open, seen.in_use, seen.waiting), (8, 8, 0));
        pipes.stage.open();
        for held in held {
            held.await.unwrap().unwrap().into_body().collect().await.unwrap();
        }
        assert_eq!((handle.snapshot().created, handle.snapshot().in_use), (8, 0));
        // The streams are released: no further connection is needed.
        for answer in join_all((0..calls).map(|_| ask(&client, "http://a/"))).await {
            answer.unwrap();
        }
        assert_eq!(handle.snapshot().created, 8);
    }
}

#[tokio::test(start_paused = true)]
async fn call_beyond_the_cap_waits_for_a_stream_and_is_counted() {
    let layer = ConnectLayer::new().max_per_host(2).queue(1, SECOND);
    let pipes = Pipes::default().max_streams(2);
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    let call = |path| tokio::spawn(client.request(request(&format!("http://a{path}"))));
    ask(&client, "http://a/").await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(call("/stream").await.unwrap().unwrap());
    }
    let waits = call("/");
    settle().await;
    let seen = handle.snapshot();
    assert_eq!((seen.open, seen.waiting, seen.waits_for_stream), (2, 1, 1), "{seen:?}");

    // The queue is full.
    let error = call("/").await.unwrap().unwrap_err();
    assert_eq!(rejection(&error).kind(), RejectedKind::Saturated);

    // The end of a stream admits the waiting call, regardless of the connection that the stream belonged to.
    drop(streams.pop());
    waits.await.unwrap().unwrap().into_body().collect().await.unwrap();
    drop(streams.remove(0));
    ask(&client, "http://a/").await.unwrap();

    // The maximum wait rejects a call that gets no stream.
    streams.push(call("/stream").await.unwrap().unwrap());
    streams.push(call("/stream").await.unwrap().unwrap());
    let start = Instant::now();
    let error = call("/").await.unwrap().unwrap_err();
    assert_eq!((rejection(&error).kind(), start.elapsed()), (RejectedKind::Saturated, SECOND));
    assert_eq!(handle.snapshot().waiting, 0);
    drop(streams);
    settle().await;
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(handle.snapshot().in_use, 0);
}

#[tokio::test(start_paused = true)]
async fn calls_wait_for_a_stream_in_order_and_a_cancelled_call_loses_none() {
    let layer = ConnectLayer::new().max_per_host(1);
    let pipes = Pipes::default().max_streams(1);
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    let held = client.request(request("http://a/stream")).await.unwrap();
    let (done, mut order) = tokio::sync::mpsc::unbounded_channel();
    let mut calls = Vec::new();
    for nth in 0..6 {
        let (client, done) = (client.clone(), done.clone());
        calls.push(tokio::spawn(async move {
            ask(&client, "http://a/").await.unwrap();
            done.send(nth).unwrap();
        }));
        settle().await;
    }
    assert_eq!(handle.snapshot().waiting, 6);
    for cancelled in [0, 3] {
        calls[cancelled].abort();
    }
    settle().await;
    assert_eq!(handle.snapshot().waiting, 4);
    drop(held);
    for nth in [1, 2, 4, 5] {
        assert_eq!(order.recv().await, Some(nth));
    }
    assert_eq!(handle.snapshot().created, 1);
}

/// The first call opens the connection and gets its first stream. When the call is cancelled, before or after the
/// connection is established, other calls get this stream.
#[tokio::test(start_paused = true)]
async fn cancelled_first_call_leaves_its_stream_to_others() {
    for before_the_connection in [true, false] {
        let layer = ConnectLayer::new().max_per_host(1);
        let pipes = if before_the_connection { Pipes::gated() } else { Pipes::default() };
        let pipes = pipes.max_streams(1);
        let client = http2(&layer, &pipes);
        let first = tokio::spawn(client.request(request("http://a/slow")));
        settle().await;
        let others = (0..3).map(|_| ask(&client, "http://a/"));
        first.abort();
        if before_the_connection {
            pipes.let_in(1);
        }
        for answer in soon(join_all(others)).await {
            answer.unwrap();
        }
        assert_eq!(layer.handle().snapshot().created, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn second_connection_that_cannot_be_made_does_not_fail_calls() {
    let layer = ConnectLayer::new().connect_timeout(SECOND);
    let pipes = Pipes::gated().max_streams(1);
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    pipes.let_in(1);
    ask(&client, "http://a/").await.unwrap();
    let held = client.request(request("http://a/stream")).await.unwrap();
    // The next call opens another connection, which fails. Then it waits too. All get the stream of the first connection.
    let opens = tokio::spawn(client.request(request("http://a/")));
    settle().await;
    let waits = tokio::spawn(client.request(request("http://a/")));
    settle().await;
    assert_eq!((handle.snapshot().connecting, handle.snapshot().waiting), (1, 1));
    drop(held);
    waits.await.unwrap().unwrap().into_body().collect().await.unwrap();
    opens.await.unwrap().unwrap();
    assert_eq!(handle.snapshot().timed_out, 1);
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(handle.snapshot().created, 1);
}

#[tokio::test(start_paused = true)]
async fn connections_without_calls_are_closed_when_they_are_idle() {
    let layer = ConnectLayer::new().max_per_host(8).jitter(0.0);
    let pipes = Pipes::default().max_streams(1);
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    let held: Vec<_> = join_all((0..8).map(|_| client.request(request("http://a/stream")))).await;
    assert_eq!(handle.snapshot().open, 8);
    drop(held);
    for _ in 0..20 {
        ask(&client, "http://a/").await.unwrap();
        tokio::time::sleep(SECOND / 2).await;
    }
    assert_eq!(handle.snapshot().open, 1, "sequential calls need one connection only");
    assert_eq!(pipes.open.now(), 1);
}

/// An idle connection of another host is closed for a connection whose calls wait for a stream.
#[tokio::test(start_paused = true)]
async fn idle_connection_of_another_host_is_closed_for_another_connection() {
    let layer = ConnectLayer::new().max_total(2).max_idle(60 * SECOND);
    let pipes = Pipes::default().max_streams(1);
    let client = http2(&layer, &pipes);
    ask(&client, "http://b/").await.unwrap();
    let _held = client.request(request("http://a/stream")).await.unwrap();
    let start = Instant::now();
    ask(&client, "http://a/").await.unwrap();
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    assert_eq!(pipes.open_to("b").now(), 0);
}

#[tokio::test(start_paused = true)]
async fn clients_over_one_layer_do_not_mix_their_connections() {
    let layer = ConnectLayer::new().max_per_host(4);
    let pipes = Pipes::default().max_streams(1);
    let clients = [http2(&layer, &pipes), http2(&layer, &pipes)];
    let calls: Vec<_> = clients
        .iter()
        .flat_map(|client| (0..2).map(|_| tokio::spawn(client.request(request("http://a/slow")))))
        .collect();
    settle().await;
    settle().await;
    assert_eq!((pipes.stage.inside.now(), layer.handle().snapshot().open), (4, 4));
    pipes.stage.open();
    for call in calls {
        call.await.unwrap().unwrap();
    }
}
