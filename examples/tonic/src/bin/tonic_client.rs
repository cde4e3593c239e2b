//! The recommended client for gRPC under a generated client: a retry, an open circuit, a full limit and a timeout.
//!
//! The generated client is that of `grpc.health.v1` (crate `tonic-health`), so this needs no `protoc`.
//!
//! ```text
//! cargo run -p tonic-examples --bin tonic_client
//! ```

use std::{
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use buttress::{BoxError, config::ClientConfig};
use futures_util::{Stream, stream};
use tokio::net::TcpListener;
use tonic::{
    Code, Request, Response, Status,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let settings = "
        retry_backoff = '10ms'
        breaker_failures = 4
        limit_max = 1
        limit_queue = 0
        connect_timeout = '100ms'
        timeout_head = '100ms'
    ";
    let config = ClientConfig::load("search").toml(settings).env().finish()?;
    let channel = Endpoint::from_shared(upstream().await?)?.connect_lazy();
    let service = buttress::grpc(&config, channel)?;
    let handle = service.handle();
    let mut client = HealthClient::new(service);

    println!("A server that is UNAVAILABLE twice:");
    client.check(ask("starting")).await?;
    println!("  {} retries", handle.snapshot().retries);
    check(handle.snapshot().retries == 2, "both failures were retried")?;

    println!("A limit of one call, and a stream that holds its permit:");
    let mut watch = client.watch(ask("")).await?.into_inner();
    watch.message().await?;
    let status = client.check(ask("")).await.unwrap_err();
    println!("  {:?}: {}", status.code(), status.message());
    check(status.code() == Code::Unavailable, "a full limit is UNAVAILABLE")?;
    drop(watch);

    println!("A server that does not respond:");
    let status = client.check(ask("hang")).await.unwrap_err();
    println!("  {:?}: {}", status.code(), status.message());
    check(status.code() == Code::DeadlineExceeded, "a timeout is DEADLINE_EXCEEDED")?;

    println!("A server that keeps failing:");
    client.check(ask("broken")).await.unwrap_err();
    let before = CALLS.load(SeqCst);
    let status = client.check(ask("")).await.unwrap_err();
    println!("  {:?}: {}", status.code(), status.message());
    check(status.message() == "circuit_open", "the circuit is open")?;
    check(CALLS.load(SeqCst) == before, "nothing was sent")
}

fn ask(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}

// ===== Server =====

static CALLS: AtomicUsize = AtomicUsize::new(0);

struct Upstream;

type Messages = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Health for Upstream {
    type WatchStream = Messages;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let call = CALLS.fetch_add(1, SeqCst);
        match &*request.into_inner().service {
            "starting" if call < 2 => Err(Status::unavailable("starting")),
            "broken" => Err(Status::unavailable("broken")),
            "hang" => std::future::pending().await,
            _ => Ok(Response::new(HealthCheckResponse { status: 1 })),
        }
    }

    /// One message, and then silence.
    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Messages>, Status> {
        let message = HealthCheckResponse { status: 1 };
        let rest = stream::pending();
        Ok(Response::new(Box::pin(stream::StreamExt::chain(stream::iter([Ok(message)]), rest))))
    }
}

async fn upstream() -> Result<String, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = Server::builder().add_service(HealthServer::new(Upstream));
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    Ok(url)
}
