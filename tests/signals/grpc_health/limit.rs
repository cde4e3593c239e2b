//! gRPC health calls under a concurrency limit, over real sockets.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, routing::post};
use buttress::{ConcurrencyLimitLayer, Health, health::Check, limit::ConcurrencyLimitHandle};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::task::JoinHandle;
use tonic::{
    Code, Status, Streaming,
    service::Routes,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use crate::support::net::{Stage, listener, soon, until};

/// A tonic server with the health service of `health`, and a method that responds once the stage opens.
async fn serve(
    health: &Health,
    limit: ConcurrencyLimitLayer,
) -> (SocketAddr, Stage, ConcurrencyLimitHandle) {
    let (stage, handle) = (Stage::default(), limit.handle());
    let (listener, addr) = listener().await;
    let hang = stage.clone();
    let orders: Router = Routes::new(health.grpc().into_server())
        .into_axum_router()
        .route("/shop.Orders/Hang", post(move || hang.clone().plain()));
    let server = Server::builder().layer(limit.respond()).add_routes(Routes::from(orders));
    tokio::spawn(async move { server.serve_with_incoming(TcpIncoming::from(listener)).await });
    (addr, stage, handle)
}

/// A client with a connection of its own.
fn client(addr: SocketAddr) -> HealthClient<Channel> {
    HealthClient::new(Endpoint::from_shared(format!("http://{addr}")).unwrap().connect_lazy())
}

fn ask(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

async fn check(addr: SocketAddr, service: &str) -> Result<ServingStatus, Status> {
    let response = soon(client(addr).check(ask(service))).await?;
    Ok(response.into_inner().status())
}

async fn watch(
    client: &mut HealthClient<Channel>,
) -> Result<Streaming<HealthCheckResponse>, Status> {
    let mut stream = soon(client.watch(ask("liveness"))).await?.into_inner();
    let first = soon(stream.message()).await?.expect("the first status");
    assert_eq!(first.status(), ServingStatus::Serving);
    Ok(stream)
}

/// Calls the method of the application.
fn order(
    addr: SocketAddr,
) -> JoinHandle<Result<Response<Incoming>, hyper_util::client::legacy::Error>> {
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = Request::post(format!("http://{addr}/shop.Orders/Hang"))
        .header("content-type", "application/grpc")
        .body(Empty::<Bytes>::new())
        .unwrap();
    tokio::spawn(client.request(request))
}

#[tokio::test]
async fn health_checks_are_served_while_watchers_and_hung_calls_fill_the_limit() {
    let health = Health::new();
    health.add(Check::new("db", || async { Ok::<_, String>(()) })).unwrap();
    let (addr, stage, handle) = serve(&health, ConcurrencyLimitLayer::new(4)).await;

    let mut watchers = Vec::new();
    for _ in 0..4 {
        watchers.push(watch(&mut client(addr)).await.unwrap());
    }
    assert_eq!(handle.in_flight(), 0, "watchers take no permits");
    let calls: Vec<_> = (0..4).map(|_| order(addr)).collect();
    until(|| stage.inside.now() == 4).await;

    assert_eq!(check(addr, "liveness").await.unwrap(), ServingStatus::Serving);
    until(|| health.is_ready()).await;
    assert_eq!(check(addr, "readiness").await.unwrap(), ServingStatus::Serving);
    assert_eq!(check(addr, "db").await.unwrap(), ServingStatus::Serving);
    watchers.push(watch(&mut client(addr)).await.unwrap());

    // A fifth call of the application is rejected.
    let rejected = order(addr).await.unwrap().unwrap();
    assert_eq!(rejected.headers()["grpc-status"], "14");
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.in_flight, snapshot.exempt_in_flight, snapshot.exempt), (4, 5, 8));
    assert_eq!(snapshot.rejected_full, 1);

    stage.open();
    for call in calls {
        assert!(soon(call).await.unwrap().unwrap().status().is_success());
    }
    drop(watchers);
    until(|| (handle.in_flight(), handle.snapshot().exempt_in_flight) == (0, 0)).await;
}

#[tokio::test]
async fn sixty_fifth_health_watcher_takes_a_permit() {
    let health = Health::new();
    let (addr, _, handle) = serve(&health, ConcurrencyLimitLayer::new(1)).await;
    let mut client = client(addr);
    let mut watchers = Vec::new();
    for _ in 0..64 {
        watchers.push(watch(&mut client).await.unwrap());
    }
    assert_eq!((handle.in_flight(), handle.snapshot().exempt_in_flight), (0, 64));

    let last = watch(&mut client).await.unwrap();
    assert_eq!((handle.in_flight(), handle.snapshot().exempt_in_flight), (1, 64));
    let rejected = watch(&mut client).await.unwrap_err();
    assert_eq!((rejected.code(), rejected.message()), (Code::Unavailable, "limit_reached"));
    assert_eq!(check(addr, "liveness").await.unwrap(), ServingStatus::Serving);

    // The end of a stream releases its exemption for another one.
    drop(watchers.pop());
    until(|| handle.snapshot().exempt_in_flight == 63).await;
    watchers.push(watch(&mut client).await.unwrap());
    assert_eq!((handle.in_flight(), handle.snapshot().exempt_in_flight), (1, 64));
    drop((last, watchers));
    until(|| (handle.in_flight(), handle.snapshot().exempt_in_flight) == (0, 0)).await;
}

#[tokio::test]
async fn health_calls_take_permits_where_the_exemption_is_off_or_the_form_differs() {
    let health = Health::new();
    let limit = ConcurrencyLimitLayer::new(1).exempt_grpc_health(false);
    let (addr, stage, handle) = serve(&health, limit).await;
    let call = order(addr);
    until(|| stage.inside.now() == 1).await;
    assert_eq!(check(addr, "liveness").await.unwrap_err().code(), Code::Unavailable);

    handle.set_exempt_grpc_health(true);
    assert_eq!(check(addr, "liveness").await.unwrap(), ServingStatus::Serving);
    // Neither another method nor another path nor another content type is a health call.
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    for (method, path, content_type) in [
        ("GET", "/grpc.health.v1.Health/Check", "application/grpc"),
        ("POST", "/grpc.health.v1.Health/Check", "application/json"),
        ("POST", "/grpc.health.v1.Health/Check/", "application/grpc"),
        ("POST", "/grpc.health.v1.Health/../Check", "application/grpc"),
        ("POST", "/grpc.health.v1.Health/check", "application/grpc"),
        ("POST", "/grpc.health.v1.Health/Check/../../shop.Orders/Hang", "application/grpc"),
    ] {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{addr}{path}"))
            .header("content-type", content_type)
            .body(Empty::<Bytes>::new())
            .unwrap();
        soon(client.request(request)).await.unwrap();
    }
    assert_eq!(handle.snapshot().rejected_full, 7, "all but the exempt check");
    stage.open();
    soon(call).await.unwrap().unwrap();
    tokio::time::timeout(Duration::from_secs(10), until(|| handle.in_flight() == 0)).await.unwrap();
}
