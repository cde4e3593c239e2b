//! Retries over reqwest and tonic.

use super::*;

// ===== reqwest =====

#[tokio::test]
async fn the_same_over_reqwest() {
    let (addr, heard, connections) = upstream().await;
    let reqwest = reqwest::Client::builder().no_proxy().build().unwrap();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new()
        .layer(retry())
        .layer(CircuitBreakerLayer::http())
        .layer(limit)
        .service(buttress::reqwest::HttpClient::new(reqwest));
    let put = request(Method::PUT, addr, "/503/2/1000", "hello");
    let response = soon(tokio::spawn(client.clone().oneshot(put))).await.unwrap().unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 3));
    assert_eq!(read(response).await, "hello");
    assert_eq!(heard.bodies(), vec![Bytes::from_static(b"hello"); 3]);
    let post = request(Method::POST, addr, "/503/99/1000", "hello");
    let response = soon(client.clone().oneshot(post)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read(response).await.len(), 1000);
    assert_eq!((heard.attempts(), connections.total(), handle.in_flight()), (4, 1, 0));
    let dead = request(Method::POST, closed_address().await, "/", "hello");
    let error = soon(client.oneshot(dead)).await.unwrap_err();
    assert_eq!(Attempts::find(&*error).unwrap().made, 3);
}

/// The retry layer wraps `reqwest::Client` itself. Discarded response bodies are drained here, too.
#[tokio::test]
async fn responses_of_reqwest_are_drained() {
    for (layer, expected) in [
        (retry(), 1..=1),
        // The control: without a drain.
        (retry().max_drain_bytes(0), 2..=20),
    ] {
        let (addr, heard, connections) = upstream().await;
        let reqwest = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{addr}/503/19/{}", 60 * KIB);
        let request = reqwest.get(url).build().unwrap();
        let client = ServiceBuilder::new().layer(layer.attempts(20).reqwest()).service(reqwest);
        let response = soon(client.oneshot(request)).await.unwrap();
        assert_eq!((response.status(), heard.attempts()), (StatusCode::OK, 20));
        let connections = connections.total();
        assert!(expected.contains(&connections), "{connections} connections");
    }
}

// ===== tonic =====

/// Serves [`Obedient`]. Returns its address and the gauge of its calls.
async fn grpc() -> (SocketAddr, net::Gauge) {
    let service = Obedient::default();
    let inside = service.inside.clone();
    let (incoming, addr) = incoming().await;
    let server = Server::builder().add_service(HealthServer::new(service));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    (addr, inside)
}

fn grpc_retry() -> RetryLayer {
    RetryLayer::grpc().backoff(Backoff::constant(Duration::from_millis(1))).without_budget()
}

#[tokio::test]
async fn retry_works_under_tonic_and_repeats_unavailable_in_the_head_and_in_the_trailers() {
    let (addr, inside) = grpc().await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let stack = ServiceBuilder::new()
        .layer(grpc_retry())
        .layer(CircuitBreakerLayer::new(Trip::consecutive(100)).respond())
        .layer(limit.respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    let head = soon(client.check(ask("14"))).await.unwrap_err();
    assert_eq!((head.code(), inside.total()), (Code::Unavailable, 3));
    let other = soon(client.check(ask("13"))).await.unwrap_err();
    assert_eq!((other.code(), inside.total()), (Code::Internal, 4));
    // A status in the trailers, without a message before them.
    let mut watch = soon(client.watch(ask("late 14"))).await.unwrap().into_inner();
    let trailers = soon(watch.message()).await.unwrap_err();
    assert_eq!((trailers.code(), inside.total()), (Code::Unavailable, 7));
    // The caller has received a message, so the call is not retried.
    let mut watch = soon(client.watch(ask("cut 14"))).await.unwrap().into_inner();
    soon(watch.message()).await.unwrap().unwrap();
    let trailers = soon(watch.message()).await.unwrap_err();
    assert_eq!((trailers.code(), inside.total()), (Code::Unavailable, 8));
    drop(watch);
    assert_eq!(handle.in_flight(), 0);
    until(|| inside.now() == 0).await;
}

#[tokio::test]
async fn an_open_circuit_ends_a_tonic_client_s_loop() {
    let (addr, inside) = grpc().await;
    let stack = ServiceBuilder::new()
        .layer(grpc_retry())
        .layer(CircuitBreakerLayer::new(Trip::consecutive(2)).respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    let refused = soon(client.check(ask("14"))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "circuit_open"));
    assert_eq!(inside.total(), 2);
}

#[tokio::test]
async fn retry_works_around_a_tonic_server() {
    let service = Obedient::default();
    let inside = service.inside.clone();
    let (incoming, addr) = incoming().await;
    let server = Server::builder().layer(grpc_retry()).add_service(HealthServer::new(service));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    let failed = soon(HealthClient::new(channel(addr)).check(ask("14"))).await.unwrap_err();
    assert_eq!((failed.code(), inside.total()), (Code::Unavailable, 3));
}
