//! HTTP/2 over sockets with all streams of a connection in use, and clients that outlive their runtime.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, routing::get};
use buttress::{
    CircuitBreakerLayer, Trip,
    breaker::CircuitState,
    connect::{Client, ConnectLayer},
    outcome::RejectedKind,
};
use bytes::Bytes;
use futures_util::future::join_all;
use http::Request;
use http_body_util::{BodyExt, Empty};
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

use crate::support::{
    net::{self, soon, until},
    rejection,
};

const SECOND: Duration = Duration::from_secs(1);

fn request(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
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
            Err(error) => assert_eq!(rejection(&error).kind(), RejectedKind::Saturated),
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
            assert_eq!(rejection(&error).kind(), RejectedKind::Saturated);
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
