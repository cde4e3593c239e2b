//! Callers that set deadlines which the upstream cannot keep, through the ready-made server and client. The upstream
//! is healthy, so that the circuit has to stay closed for all other callers.

use std::{net::SocketAddr, time::Duration};

use axum::{Extension, Router, http::StatusCode, routing::any};
use buttress::{
    BoxError, Deadline, DeadlineLayer, breaker::CircuitBreakerHandle, config::ServerConfig,
};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use tokio::{
    task::JoinSet,
    time::{Instant, interval, sleep},
};

use super::{
    report::Report,
    stacks::{Body, config},
};
use crate::support::{
    alone,
    net::{self, HyperClient, serve, soon},
};

const DEADLINE_HEADER: &str = "x-request-timeout-ms";

#[tokio::test]
async fn visitor_is_served_after_five_grpc_timeouts_of_10_ms() {
    visitor_is_served_after_five(Attack::GrpcTimeout).await;
}

#[tokio::test]
async fn visitor_is_served_after_five_deadline_headers_of_20_ms() {
    visitor_is_served_after_five(Attack::Header).await;
}

async fn visitor_is_served_after_five(attack: Attack) {
    let (addr, circuit) = site().await;
    let (client, report) = (net::client(), Report::default());
    for _ in 0..5 {
        attack.send(&client, addr).await;
    }
    visit(&client, addr, &report).await;
    println!("{report}");
    report.assert_all_good(1, &[circuit]);
}

#[tokio::test]
async fn every_visitor_is_served_beside_25_calls_with_short_deadlines() {
    let _alone = alone().await;
    const VISITORS: usize = 500;
    const EVERY: Duration = Duration::from_millis(10);
    // The calls of one burst end together, without a success between them.
    const BURSTS: usize = 5;
    const BURST_SIZE: usize = 5;

    let (addr, circuit) = site().await;
    let (client, report) = (net::client(), Report::default());
    let attacker = client.clone();
    let attacks = async move {
        for burst in 0..BURSTS {
            sleep(EVERY * VISITORS as u32 / (BURSTS as u32 + 1)).await;
            let attack = [Attack::GrpcTimeout, Attack::Header][burst % 2];
            let mut calls = JoinSet::new();
            for _ in 0..BURST_SIZE {
                let client = attacker.clone();
                calls.spawn(async move { attack.send(&client, addr).await });
            }
            calls.join_all().await;
        }
    };
    let visitors = async {
        let (mut ticks, mut visits) = (interval(EVERY), JoinSet::new());
        for _ in 0..VISITORS {
            ticks.tick().await;
            let (client, report) = (client.clone(), report.clone());
            visits.spawn(async move { visit(&client, addr, &report).await });
        }
        visits.join_all().await;
    };
    let start = Instant::now();
    tokio::join!(attacks, visitors);
    println!("{report}; {:?}", start.elapsed());
    report.assert_all_good(VISITORS, &[circuit]);
}

// ===== The site =====

/// The ready-made server. Its handler passes the deadline of the request on to the ready-made client, which calls an
/// upstream that responds after 30 to 40 ms.
async fn site() -> (SocketAddr, CircuitBreakerHandle) {
    let upstream = serve(Router::new().route(
        "/",
        any(async || {
            sleep(Duration::from_millis(fastrand::u64(30..=40))).await;
            "ok"
        }),
    ))
    .await;
    let client = buttress::client::<Body>(&config(false)).unwrap();
    let circuit = client.handle().breaker();
    let handler = async move |deadline: Option<Extension<Deadline>>| {
        let mut request =
            Request::get(format!("http://{upstream}/")).body(Body::default()).unwrap();
        if let Some(Extension(deadline)) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let Ok(response) = client.request(request).await else {
            return Err(StatusCode::BAD_GATEWAY);
        };
        let body = response.into_body().collect().await.map_err(|_| StatusCode::BAD_GATEWAY)?;
        Ok(body.to_bytes())
    };
    let app = Router::new()
        .route("/", any(handler))
        .layer(DeadlineLayer::new().header(DEADLINE_HEADER).respond())
        .layer(buttress::server(&ServerConfig::default()).unwrap());
    (serve(app).await, circuit)
}

type Client = HyperClient<Full<Bytes>>;

/// A regular request, which has no deadline.
async fn visit(client: &Client, addr: SocketAddr, report: &Report) {
    let request = Request::get(format!("http://{addr}/")).body(Full::default()).unwrap();
    match read(client, request).await {
        Ok((StatusCode::OK, body)) if body == "ok" => report.record_good(),
        Ok((status, body)) => report.record_error(&*BoxError::from(format!("{status}: {body:?}"))),
        Err(error) => report.record_error(&*error),
    }
}

async fn read(
    client: &Client,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), BoxError> {
    let response = soon(client.request(request)).await?;
    let status = response.status();
    Ok((status, response.into_body().collect().await?.to_bytes()))
}

#[derive(Clone, Copy, Debug)]
enum Attack {
    GrpcTimeout,
    Header,
}

impl Attack {
    /// Sends a request whose deadline ends before the upstream responds.
    async fn send(self, client: &Client, addr: SocketAddr) {
        let uri = format!("http://{addr}/");
        let request = match self {
            Self::GrpcTimeout => Request::post(uri)
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("grpc-timeout", "10m"),
            Self::Header => Request::get(uri).header(DEADLINE_HEADER, "20"),
        };
        let (_, body) = read(client, request.body(Full::default()).unwrap()).await.unwrap();
        assert_ne!(body, "ok", "the deadline of {self:?} did not end the call");
    }
}
