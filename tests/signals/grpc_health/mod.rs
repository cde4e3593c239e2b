//! Servers with the service `grpc.health.v1` of a registry. From then on each limit of the process exempts health calls.

mod limit;

use std::time::Duration;

use buttress::{
    ConcurrencyLimitLayer, Health, HealthProbeLayer,
    health::{ProbeFailure, ProbeState},
};
use bytes::Bytes;
use http_body_util::Full;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::task::JoinSet;
use tonic::transport::{Endpoint, Server, server::TcpIncoming};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::Layer;

use crate::support::net::{ask, client, soon};

#[tokio::test]
async fn a_tonic_server_serves_both_kinds_of_probe_from_one_registry() {
    let health = Health::new();
    let db = health.reporter("db").unwrap();
    let limit = ConcurrencyLimitLayer::new(1).respond();
    let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = incoming.local_addr().unwrap();
    let mut server = JoinSet::new();
    let serve = Server::builder()
        .accept_http1(true)
        .layer(health.endpoints())
        .layer(limit)
        .add_service(health.grpc().into_server())
        .serve_with_incoming(incoming);
    server.spawn(async move { serve.await.unwrap() });

    let url = format!("http://{addr}");
    let channel = Endpoint::new(url).unwrap().connect_lazy();
    let mut grpc_client = HealthClient::new(channel);
    for (passes, status, serving) in
        [(false, 503, ServingStatus::NotServing), (true, 200, ServingStatus::Serving)]
    {
        if passes {
            db.pass();
        }
        assert_eq!(ask(&client(), addr, "/readyz").await.unwrap().0, status);
        let answer = soon(grpc_client.check(HealthCheckRequest::default())).await.unwrap();
        assert_eq!(answer.into_inner().status(), serving);
    }
    let asked = HealthCheckRequest { service: "db".to_owned() };
    let mut watch = soon(grpc_client.watch(asked)).await.unwrap().into_inner();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status(), ServingStatus::Serving);
    db.fail();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn a_grpc_service_is_probed_by_its_health_service() {
    for by_tonic in [true, false] {
        let theirs = Health::new();
        let db = theirs.reporter("db").unwrap();
        db.pass();
        let incoming = TcpIncoming::bind(([127, 0, 0, 1], 0).into()).unwrap();
        let addr = incoming.local_addr().unwrap();
        let grpc = theirs.grpc().service("shop.Orders").into_server();
        let serve = Server::builder().add_service(grpc).serve_with_incoming(incoming);
        let mut server = JoinSet::new();
        server.spawn(async move { serve.await.unwrap() });

        let every = Duration::from_millis(20);
        let state = if by_tonic {
            let body = |bytes| tonic::body::Body::new(Full::new(bytes));
            let probe =
                HealthProbeLayer::grpc("/", "shop.Orders", body).every(every).thresholds(1, 9);
            let url = format!("http://{addr}");
            let channel = Endpoint::new(url).unwrap().connect_lazy();
            let state = probe.handle();
            drop(probe.layer(channel));
            state
        } else {
            let origin = format!("http://{addr}");
            let probe =
                HealthProbeLayer::grpc(&origin, "db", Full::new).every(every).thresholds(1, 9);
            let client: Client<HttpConnector, Full<Bytes>> =
                Client::builder(TokioExecutor::new()).http2_only(true).build_http();
            let state = probe.handle();
            drop(probe.layer(client));
            state
        };
        assert_eq!(soon(state.changed()).await, ProbeState::Up, "{by_tonic}");
        db.fail();
        assert_eq!(soon(state.changed()).await, ProbeState::Down);
        assert_eq!(state.snapshot().last.unwrap().result, Err(ProbeFailure::NotServing));
        assert_eq!(state.snapshot().consecutive_failures, 1, "an immediate failure");
        db.pass();
        assert_eq!(soon(state.changed()).await, ProbeState::Up);
    }
}
