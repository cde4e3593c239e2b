//! A p2c balancer over three upstreams, each with a circuit breaker. The balancer avoids the upstream that fails.
//!
//! ```text
//! cargo run -p client-examples --bin breaker_balance
//! ```

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use buttress::{BoxError, CircuitBreakerLayer, Trip, breaker};
use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, time::sleep};
use tower::{
    Service, ServiceBuilder, ServiceExt,
    balance::p2c::Balance,
    discover::ServiceList,
    load::{CompleteOnResponse, PendingRequests},
};

const WAIT: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let upstreams = [Upstream::start().await?, Upstream::start().await?, Upstream::start().await?];
    let client = Client::builder(TokioExecutor::new()).build_http();
    let mut circuits = Vec::new();
    let endpoints = upstreams.each_ref().map(|upstream| {
        let addr = upstream.addr;
        // Each endpoint has a circuit. With backpressure it is not ready while the circuit is open, so that the
        // balancer selects another endpoint.
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(3)).open_for(WAIT).backpressure();
        circuits.push(breaker.handle());
        let endpoint = ServiceBuilder::new()
            .layer(breaker)
            .map_request(move |request| at(addr, request))
            .service(client.clone());
        PendingRequests::new(endpoint, CompleteOnResponse::default())
    });
    let mut balance = Balance::new(ServiceList::new(endpoints));
    let dead = &upstreams[0];
    let counts = || upstreams.each_ref().map(|upstream| upstream.requests.swap(0, SeqCst));

    println!("Requests to each of three upstreams:");
    let failed = send(&mut balance, 60).await?;
    println!("  all succeed:                  {:?}, {failed} failed", counts());

    dead.failing.store(true, SeqCst);
    let mut failed = 0;
    while circuits[0].state() != breaker::CircuitState::Open {
        failed += send(&mut balance, 1).await?;
    }
    println!("  first fails, until it trips:  {:?}, {failed} failed", counts());
    check(failed == 3, "three failures in a row open the circuit")?;

    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  after the trip:               {after:?}, {failed} failed");
    check(
        (after[0], failed) == (0, 0),
        "no request reaches the failing upstream, and no call fails",
    )?;

    sleep(WAIT).await;
    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  half-open:                    {after:?}, {failed} failed");
    check((after[0], failed) == (1, 1), "one half-open probe reaches it")?;

    dead.failing.store(false, SeqCst);
    sleep(WAIT).await;
    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  recovered:                    {after:?}, {failed} failed");
    check(after[0] > 10 && failed == 0, "a successful probe closes the circuit")
}

/// Sends requests one after the other. Returns the number of failed calls.
async fn send<S>(balance: &mut S, requests: usize) -> Result<usize, BoxError>
where
    S: Service<
            Request<Empty<Bytes>>,
            Response = http::Response<buttress::permit::TrackedBody<hyper::body::Incoming>>,
            Error = BoxError,
        >,
{
    let mut failed = 0;
    for _ in 0..requests {
        let response = balance.ready().await?.call(Request::new(Empty::new())).await?;
        failed += usize::from(!response.status().is_success());
        response.into_body().collect().await?;
    }
    Ok(failed)
}

fn check(holds: bool, what: &str) -> Result<(), BoxError> {
    if holds { Ok(()) } else { Err(format!("not so: {what}").into()) }
}

/// Returns the request with this address in its URI.
fn at<B>(addr: SocketAddr, mut request: Request<B>) -> Request<B> {
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority(addr.to_string())
        .path_and_query("/")
        .build()
        .expect("an address is an authority");
    request
}

// ===== Upstream =====

#[derive(Clone)]
struct Upstream {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
    failing: Arc<AtomicBool>,
}

impl Upstream {
    async fn start() -> Result<Self, BoxError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let upstream = Self { addr, requests: Arc::default(), failing: Arc::default() };
        let app = Router::new().route("/", get(Self::answer)).with_state(upstream.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(upstream)
    }

    async fn answer(State(this): State<Self>) -> StatusCode {
        this.requests.fetch_add(1, SeqCst);
        if this.failing.load(SeqCst) { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK }
    }
}
