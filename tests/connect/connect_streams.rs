//! HTTP/2 with all streams of a connection in use: another connection is opened, up to the cap, and calls beyond that
//! wait inside the client.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use buttress::{
    CircuitBreakerLayer, Trip,
    breaker::CircuitState,
    connect::{Client, ConnectLayer},
    outcome::RejectedKind,
};
use futures_util::future::join_all;
use http_body_util::BodyExt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    runtime::{Builder, Runtime},
    time::Instant,
};
use tower::{ServiceBuilder, ServiceExt};

use crate::{
    kit::{Pipes, ask, http2, refusal, request, settle},
    net::{self, soon, until},
};

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
    assert_eq!(refusal(&error).kind(), RejectedKind::Saturated);

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
    assert_eq!((refusal(&error).kind(), start.elapsed()), (RejectedKind::Saturated, SECOND));
    assert_eq!(handle.snapshot().waiting, 0);
    drop(streams);
    settle().await;
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(handle.snapshot().in_use, 0);
}

#[tokio::test(start_paused = true)]
async fn calls_wait_for_a_stream_in_order_and_a_cancelled_one_takes_none_along() {
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
async fn idle_connection_of_another_host_makes_room_for_another_connection() {
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

/// Over real sockets, through a circuit breaker: the wait for a stream is not attributed to the upstream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wait_for_a_stream_does_not_open_a_circuit() {
    let stage = net::Stage::default();
    let held = stage.clone();
    let app = axum::Router::new().route("/", axum::routing::get(move || held.plain()));
    let (listener, addr) = net::listener().await;
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let service = hyper_util::service::TowerToHyperService::new(app.clone());
            tokio::spawn(async move {
                let executor = hyper_util::rt::TokioExecutor::new();
                let mut server = hyper_util::server::conn::auto::Builder::new(executor);
                server.http2().max_concurrent_streams(1);
                let io = hyper_util::rt::TokioIo::new(tcp);
                let _ = server.serve_connection(io, service).await;
            });
        }
    });
    let layer = ConnectLayer::new().max_per_host(8).queue(100, SECOND / 5);
    let handle = layer.handle();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let circuit = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(breaker)
        .service(Client::builder(layer).http2_only().build_http());
    let start = Instant::now();
    let calls: Vec<_> =
        (0..20).map(|_| tokio::spawn(client.clone().oneshot(net::get(addr, "/")))).collect();
    until(|| stage.inside.now() == 8 && handle.snapshot().waiting == 12).await;
    until(|| handle.snapshot().saturated == 12).await;
    assert!(start.elapsed() < 2 * SECOND, "the calls waited for longer than the queue allows");
    stage.open();
    let mut answered = 0;
    for call in calls {
        match soon(call).await.unwrap() {
            Ok(response) => {
                answered += 1;
                response.into_body().collect().await.unwrap();
            }
            Err(error) => assert_eq!(refusal(&error).kind(), RejectedKind::Saturated),
        }
    }
    assert_eq!((answered, circuit.state()), (8, CircuitState::Closed));
    assert!(handle.snapshot().waits_for_stream >= 12, "{:?}", handle.snapshot());

    // Under load each call is served or rejected by the queue, over no more connections than the cap.
    let calls = (0..400).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            let response = client.oneshot(net::get(addr, "/")).await?;
            response.into_body().collect().await?;
            Ok::<_, buttress::BoxError>(())
        })
    });
    let calls: Vec<_> = calls.collect();
    for call in calls {
        if let Err(error) = soon(call).await.unwrap() {
            assert_eq!(refusal(&error).kind(), RejectedKind::Saturated);
        }
    }
    assert!(handle.snapshot().open <= 8 && stage.inside.peak() <= 8);
    until(|| handle.snapshot().in_use == 0).await;
}

/// A server in a runtime of its own that allows one stream per connection. `/slow` responds when the stage is open.
fn serve_one_stream_each(stage: &net::Stage) -> (SocketAddr, Runtime) {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (listener, addr) = runtime.block_on(net::listener());
    let stage = stage.clone();
    runtime.spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let stage = stage.clone();
            let router = Router::new()
                .route("/", get(|| async { "text" }))
                .route("/slow", get(move || stage.clone().plain()));
            tokio::spawn(async move {
                let mut server = auto::Builder::new(TokioExecutor::new());
                server.http2().max_concurrent_streams(1);
                let service = TowerToHyperService::new(router);
                let _ = server.serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    (addr, runtime)
}

#[test]
fn client_serves_calls_in_a_second_runtime_after_the_first_has_ended() {
    let (addr, _server) = serve_one_stream_each(&net::Stage::default());
    let layer = ConnectLayer::new().max_per_host(2);
    let client = Client::builder(layer.clone()).http2_only().build_http();
    for _ in 0..3 {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            for _ in 0..5 {
                let calls = (0..2).map(|_| client.request(request(&format!("http://{addr}/"))));
                for response in soon(join_all(calls)).await {
                    response.unwrap().into_body().collect().await.unwrap();
                }
            }
        });
        // The connections belong to this runtime and end with it.
        drop(runtime);
        assert_eq!(layer.handle().snapshot().in_use, 0);
    }
}

#[test]
fn dropped_client_and_runtime_release_streams_and_permits_of_calls_in_flight() {
    let (addr, _server) = serve_one_stream_each(&net::Stage::default());
    let layer = ConnectLayer::new().max_per_host(2);
    for drops_runtime in [false, true] {
        let client = Client::builder(layer.clone()).http2_only().build_http();
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let handle = layer.handle();
        runtime.block_on(async {
            let uri = format!("http://{addr}/slow");
            let calls: Vec<_> =
                (0..4).map(|_| tokio::spawn(client.request(request(&uri)))).collect();
            until(|| handle.snapshot().in_use == 2 && handle.snapshot().waiting == 2).await;
            drop(client);
            if !drops_runtime {
                calls.iter().for_each(|call| call.abort());
                until(|| handle.snapshot().open == 0).await;
            }
        });
        drop(runtime);
        let seen = layer.handle().snapshot();
        assert_eq!((seen.open, seen.in_use, seen.waiting), (0, 0, 0), "{drops_runtime}: {seen:?}");
    }
}
