//! A gRPC greeter with a retry and a circuit breaker around the client, and a concurrency limit around the server.
//! Client and service are written by hand, so that the example needs no `protoc`. Generated code works with the same
//! layers.
//!
//! ```text
//! cargo run -p tonic-examples --bin tonic_greeter
//! ```

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{Router, body::Body, routing::post};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, RetryLayer, breaker::CircuitState,
};
use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use http::{Request, uri::PathAndQuery};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tonic::{
    Code, Status, Streaming,
    client::GrpcService,
    service::Routes,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tower::{ServiceBuilder, service_fn};
use tower_http::map_request_body::MapRequestBodyLayer;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let limit = ConcurrencyLimitLayer::new(1);
    let places = limit.handle();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let server = Server::builder().layer(limit.respond()).add_routes(service());
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

    // `.respond()` makes a rejection a response, because tonic would map an error to `Unknown`. The retry replaces the
    // request body by one that it can replay, and `MapRequestBodyLayer` converts that to the body type of the channel.
    let breaker = CircuitBreakerLayer::grpc();
    let circuit = breaker.handle();
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::grpc())
        .layer(breaker.respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(Endpoint::from_shared(url)?.connect_lazy());
    let mut greeter = Greeter(tonic::client::Grpc::new(stack));

    println!("A server that is UNAVAILABLE twice:");
    let answer = greeter.hello("third time lucky").await?;
    println!("  {:?} after {} calls", answer.text, CALLS.load(SeqCst));
    check(CALLS.load(SeqCst) == 3, "both failures were retried")?;

    println!("A server whose only permit is held by a stream:");
    let mut count = greeter.count().await?;
    println!("  received {:?}, {} call in flight", next(&mut count).await?, places.in_flight());
    check(places.in_flight() == 1, "the stream holds its permit")?;
    let start = Instant::now();
    let mut patient = greeter.clone();
    let waiting = tokio::spawn(async move { patient.hello("me too").await });
    while places.snapshot().rejected_full == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    drop(count);
    let answer = waiting.await??;
    println!("  the stream is dropped; {:?} after {:.1?}", answer.text, start.elapsed());
    check(start.elapsed() >= Duration::from_secs(1), "the retry followed the hint of the server")?;

    println!("A server that keeps failing:");
    while circuit.state() == CircuitState::Closed {
        greeter.hello("fail").await.unwrap_err();
    }
    let before = CALLS.load(SeqCst);
    let refused = greeter.hello("anybody there?").await.unwrap_err();
    println!("  {:?}: {}", refused.code(), refused.message());
    check(refused.code() == Code::Unavailable, "an open circuit is UNAVAILABLE")?;
    check(CALLS.load(SeqCst) == before, "nothing was sent")
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}

// ===== Generated code, written by hand =====

#[derive(Clone, PartialEq, prost::Message)]
struct Hello {
    #[prost(string, tag = "1")]
    text: String,
}

type Codec = ProstCodec<Hello, Hello>;

#[derive(Clone)]
struct Greeter<S>(tonic::client::Grpc<S>);

impl<S, B> Greeter<S>
where
    S: GrpcService<tonic::body::Body, ResponseBody = B>,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    async fn hello(&mut self, text: &str) -> Result<Hello, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static("/greeter.Greeter/Hello");
        let request = tonic::Request::new(Hello { text: text.into() });
        Ok(self.0.unary(request, path, Codec::default()).await?.into_inner())
    }

    async fn count(&mut self) -> Result<Streaming<Hello>, Status> {
        self.ready().await?;
        let path = PathAndQuery::from_static("/greeter.Greeter/Count");
        let request = tonic::Request::new(Hello::default());
        Ok(self.0.server_streaming(request, path, Codec::default()).await?.into_inner())
    }

    async fn ready(&mut self) -> Result<(), Status> {
        self.0.ready().await.map_err(|error| Status::from_error(error.into()))
    }
}

async fn next(stream: &mut Streaming<Hello>) -> Result<String, BoxError> {
    Ok(stream.message().await?.ok_or("the stream ended")?.text)
}

fn service() -> Routes {
    let grpc = || tonic::server::Grpc::new(Codec::default());
    let unary =
        move |request: Request<Body>| async move { grpc().unary(service_fn(hello), request).await };
    let streaming = move |request: Request<Body>| async move {
        grpc().server_streaming(service_fn(count), request).await
    };
    Routes::from(
        Router::new()
            .route("/greeter.Greeter/Hello", post(unary))
            .route("/greeter.Greeter/Count", post(streaming)),
    )
}

// ===== Service =====

static CALLS: AtomicUsize = AtomicUsize::new(0);

async fn hello(request: tonic::Request<Hello>) -> Result<tonic::Response<Hello>, Status> {
    let Hello { text } = request.into_inner();
    match (CALLS.fetch_add(1, SeqCst), &*text) {
        (0 | 1, _) => Err(Status::unavailable("still starting")),
        (_, "fail") => Err(Status::internal("as asked for")),
        _ => Ok(tonic::Response::new(Hello { text: format!("hello, {text}") })),
    }
}

/// Streams numbers without end.
async fn count(
    _: tonic::Request<Hello>,
) -> Result<tonic::Response<BoxStream<'static, Result<Hello, Status>>>, Status> {
    let numbers = stream::unfold(1, |n| async move {
        sleep(Duration::from_millis(50)).await;
        Some((Ok(Hello { text: n.to_string() }), n + 1))
    });
    Ok(tonic::Response::new(numbers.boxed()))
}
