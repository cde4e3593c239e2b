//! hyper-util's client with a retry, a circuit breaker and a concurrency limit.
//!
//! ```text
//! cargo run -p client-examples --bin hyper_client
//! ```

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{Router, http::StatusCode, response::IntoResponse, routing::any};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, RetryLayer, Trip,
    breaker::CircuitState, retry::Attempts,
};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, time::Instant};
use tower::{Service, ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let url = upstream().await?;
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(5)).open_for(Duration::from_millis(300));
    let circuit = breaker.handle();
    let mut client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(Client::builder(TokioExecutor::new()).build_http());
    let request = |method: Method| {
        Request::builder().method(method).uri(&url).body(Full::new(Bytes::from_static(b"hello")))
    };

    println!("An upstream that responds with 503 and `Retry-After: 1` once, and then succeeds:");
    fail_next(1);
    let start = Instant::now();
    let response = client.ready().await?.call(request(Method::PUT)?).await?;
    let (attempts, took) = (Attempts::of(&response), start.elapsed());
    println!("  PUT: {} after {} attempts and {took:.1?}", response.status(), attempts.made);
    check(response.status() == 200 && attempts.made == 2, "PUT was retried")?;
    check(took >= Duration::from_secs(1), "not before the time of the hint")?;
    let body = response.into_body().collect().await?.to_bytes();
    check(body == "hello", "with the whole body")?;

    println!("The same for a POST, which may have had an effect:");
    fail_next(1);
    let response = client.ready().await?.call(request(Method::POST)?).await?;
    println!("  POST: {} ({})", response.status(), Attempts::of(&response).stop);
    check(response.status() == 503, "POST was not retried")?;

    println!("An upstream that keeps failing:");
    fail_next(usize::MAX);
    while circuit.state() == CircuitState::Closed {
        client.ready().await?.call(request(Method::POST)?).await?;
    }
    let (before, start) = (HITS.load(SeqCst), Instant::now());
    let refused = client.ready().await?.call(request(Method::GET)?).await.unwrap_err();
    println!("  GET: {refused}, in {:.0?}", start.elapsed());
    let rejected = Rejected::find(&*refused).ok_or("not a rejection by a layer")?;
    println!("  because: {rejected}");
    check(HITS.load(SeqCst) == before, "an open circuit ends the retries, and nothing was sent")?;

    println!("The upstream recovers:");
    fail_next(0);
    while circuit.state() == CircuitState::Open {
        circuit.changed().await;
    }
    let response = client.ready().await?.call(request(Method::GET)?).await?;
    println!("  GET: {}", response.status());
    response.into_body().collect().await?;
    check(circuit.state() == CircuitState::Closed, "a successful probe closed the circuit")
}

// ===== Upstream =====

static HITS: AtomicUsize = AtomicUsize::new(0);
static FAILURES_LEFT: AtomicUsize = AtomicUsize::new(0);

fn fail_next(calls: usize) {
    FAILURES_LEFT.store(calls, SeqCst);
}

/// Starts an upstream that echoes, or responds with 503 while `FAILURES_LEFT` is not zero.
async fn upstream() -> Result<String, BoxError> {
    let echo = any(|body: Bytes| async move {
        HITS.fetch_add(1, SeqCst);
        match FAILURES_LEFT.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => (StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "1")]).into_response(),
            Err(_) => body.into_response(),
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/", echo)).await });
    Ok(url)
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
