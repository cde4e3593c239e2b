//! grpcio as the server. It sends GOAWAY when a connection is one second old.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use buttress::{BoxError, CircuitBreakerLayer, RetryLayer, breaker::CircuitBreakerHandle};
use http::Uri;
use tokio::task::JoinSet;
use tonic::{body::Body, client::GrpcService};
use tonic_health::pb::{health_check_response::ServingStatus, health_client::HealthClient};
use tower::ServiceBuilder;
use tower_http::map_request_body::MapRequestBodyLayer;

use super::{CALLS, report::Report, scripts::Script, stacks};
use crate::support::{
    alone,
    programs::skip,
    rpc::{ask, channel},
};

/// Number of calls in flight.
const CONCURRENCY: usize = 50;
/// Minimum number of connections. Below that the test has not met the end of enough connections.
const MIN_CONNECTIONS: usize = 4;

const GRPCIO: &str = "grpcio in target/peers-venv";

#[tokio::test]
async fn ready_made_client_loses_no_call_when_grpcio_ends_connections_by_age() {
    let Some(server) = Script::grpcio() else { return skip(GRPCIO) };
    let client = buttress::client::<Body>(&stacks::config(true)).unwrap();
    let circuit = client.handle().breaker();
    calls_through_ends_of_connections(client, circuit, server.addr()).await;
}

#[tokio::test]
async fn hand_built_stack_loses_no_call_when_grpcio_ends_connections_by_age() {
    let Some(server) = Script::grpcio() else { return skip(GRPCIO) };
    let breaker = CircuitBreakerLayer::http();
    let circuit = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(RetryLayer::grpc())
        .layer(breaker)
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(channel(server.addr()));
    calls_through_ends_of_connections(client, circuit, server.addr()).await;
}

async fn calls_through_ends_of_connections<S>(
    client: S,
    circuit: CircuitBreakerHandle,
    addr: SocketAddr,
) where
    S: GrpcService<Body, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static,
    S::ResponseBody:
        http_body::Body<Data = bytes::Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    let _alone = alone().await;
    let origin: Uri = format!("http://{addr}").parse().unwrap();
    let (report, peers) = (Report::default(), Arc::new(Mutex::new(HashSet::new())));
    let mut lanes = JoinSet::new();
    for _ in 0..CONCURRENCY {
        let mut client = HealthClient::with_origin(client.clone(), origin.clone());
        let (report, peers) = (report.clone(), peers.clone());
        lanes.spawn(async move {
            for _ in 0..CALLS / CONCURRENCY {
                match client.check(ask("")).await {
                    Ok(response) => {
                        assert_eq!(response.get_ref().status(), ServingStatus::Serving);
                        let peer = response.metadata().get("peer").cloned();
                        peers.lock().unwrap_or_else(PoisonError::into_inner).insert(peer);
                        if let Some(attempts) = response.extensions().get() {
                            report.record_attempts(attempts);
                        }
                        report.record_good();
                    }
                    Err(status) => report.record_error(&status),
                }
            }
        });
    }
    lanes.join_all().await;
    let connections = peers.lock().unwrap_or_else(PoisonError::into_inner).len();
    println!("{report}; {connections} connections");
    report.assert_all_good(CALLS, &[circuit]);
    assert!(connections >= MIN_CONNECTIONS, "only {connections} connections");
}
