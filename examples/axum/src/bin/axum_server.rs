//! An axum server with one concurrency limit for all routes, whose permits are held until the end of each stream, and a
//! circuit breaker around a route that fails.
//!
//! ```text
//! cargo run -p axum-examples --bin axum_server
//! ```

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{Router, body::Body, http::StatusCode, routing::get};
use buttress::{BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Trip, breaker::CircuitState};
use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let limit = ConcurrencyLimitLayer::new(2).queue(4, Duration::from_secs(5));
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(3)).open_for(Duration::from_millis(300));
    let (places, circuit) = (limit.handle(), breaker.handle());

    let app = Router::new()
        .route("/stream", get(streaming))
        .route("/shaky", get(shaky).layer(breaker.respond()))
        .layer(limit.respond());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, app).await });

    println!("A limit of 2 with a queue of 4, and 20 clients that request a stream at once:");
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        clients.spawn(fetch(format!("{url}/stream")));
    }
    let (mut whole, mut shed) = (0, 0);
    while let Some(answer) = clients.join_next().await {
        match answer?? {
            (StatusCode::OK, body) if body == "tick tick tick " => whole += 1,
            (StatusCode::SERVICE_UNAVAILABLE, _) => shed += 1,
            other => return Err(format!("unexpected: {other:?}").into()),
        }
    }
    let most = MOST_STREAMS.load(SeqCst);
    println!(
        "  {whole} complete streams, {shed} responses 503 with Retry-After, at most {most} at once"
    );
    check(most == 2, "never more than 2 streams at once")?;
    check(whole >= 6 && whole + shed == 20, "2 got a permit, 4 waited, the others were rejected")?;
    check(places.in_flight() == 0, "all permits have been released")?;

    println!("A breaker that opens after 3 failures, around a route that fails:");
    let mut statuses = Vec::new();
    for _ in 0..6 {
        statuses.push(fetch(format!("{url}/shaky")).await?.0.as_u16());
    }
    println!("  responses: {statuses:?}, circuit: {:?}", circuit.state());
    check(statuses == [500, 500, 500, 503, 503, 503], "the last 3 never reached the handler")?;

    SHAKY_IS_WELL.store(true, SeqCst);
    while circuit.state() == CircuitState::Open {
        circuit.changed().await;
    }
    let (status, _) = fetch(format!("{url}/shaky")).await?;
    println!("  later, as a half-open probe: {status}, circuit: {:?}", circuit.state());
    check(circuit.state() == CircuitState::Closed, "a successful probe closed the circuit")
}

// ===== Routes =====

static STREAMS: AtomicUsize = AtomicUsize::new(0);
static MOST_STREAMS: AtomicUsize = AtomicUsize::new(0);

/// Three words, 100 ms apart.
async fn streaming() -> Body {
    MOST_STREAMS.fetch_max(STREAMS.fetch_add(1, SeqCst) + 1, SeqCst);
    Body::from_stream(stream::unfold(0, |words| async move {
        if words == 3 {
            STREAMS.fetch_sub(1, SeqCst);
            return None;
        }
        sleep(Duration::from_millis(100)).await;
        Some((Ok::<_, BoxError>("tick "), words + 1))
    }))
}

static SHAKY_IS_WELL: AtomicBool = AtomicBool::new(false);

async fn shaky() -> StatusCode {
    if SHAKY_IS_WELL.load(SeqCst) { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
}

// ===== Client =====

async fn fetch(url: String) -> Result<(StatusCode, Bytes), BoxError> {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let response = client.request(Request::get(url).body(Empty::<Bytes>::new())?).await?;
    let status = response.status();
    if status == StatusCode::SERVICE_UNAVAILABLE && !response.headers().contains_key("retry-after")
    {
        return Err("a rejection without Retry-After".into());
    }
    Ok((status, response.into_body().collect().await?.to_bytes()))
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
