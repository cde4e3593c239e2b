//! A balancer that goes elsewhere: three upstreams under p2c, each with a breaker, one of them failing.
//!
//! ```text
//! cargo run --example breaker_balance
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
    // It ends by itself, whatever goes wrong.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let upstreams = [Upstream::start().await?, Upstream::start().await?, Upstream::start().await?];
    let client = Client::builder(TokioExecutor::new()).build_http();
    let mut circuits = Vec::new();
    let endpoints = upstreams.each_ref().map(|upstream| {
        let addr = upstream.addr;
        // One circuit for each endpoint: not ready while it is open, so that the balancer takes another.
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
    println!("  all are well:                 {:?}, {failed} failed", counts());

    dead.failing.store(true, SeqCst);
    let mut failed = 0;
    while circuits[0].state() != breaker::State::Open {
        failed += send(&mut balance, 1).await?;
    }
    println!("  the first fails, to the trip: {:?}, {failed} failed", counts());
    check(failed == 3, "three failures in a row open it")?;

    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  after the trip:               {after:?}, {failed} failed");
    check((after[0], failed) == (0, 0), "nothing reaches the dead one, and no caller notices")?;

    sleep(WAIT).await;
    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  once the wait is over:        {after:?}, {failed} failed");
    check((after[0], failed) == (1, 1), "but one probe")?;

    dead.failing.store(false, SeqCst);
    sleep(WAIT).await;
    let failed = send(&mut balance, 100).await?;
    let after = counts();
    println!("  well again:                   {after:?}, {failed} failed");
    check(after[0] > 10 && failed == 0, "a good probe brings it back")
}

/// Sends so many, one after the other; tells how many failed.
async fn send<S>(balance: &mut S, requests: usize) -> Result<usize, BoxError>
where
    S: Service<
            Request<Empty<Bytes>>,
            Response = http::Response<buttress::call::TrackedBody<hyper::body::Incoming>>,
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

/// The same request, sent there.
fn at<B>(addr: SocketAddr, mut request: Request<B>) -> Request<B> {
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority(addr.to_string())
        .path_and_query("/")
        .build()
        .expect("an address is an authority");
    request
}

// ===== An upstream that fails when it is told to =====

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
