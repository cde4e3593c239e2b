//! A server and its client during an outage, with metrics for Prometheus and the live page.
//!
//! ```text
//! cargo run --example observed --features full
//! cargo run --example observed --features full -- 300    # for 300 s instead of 60 s
//! ```
//!
//! The server `checkout` calls the upstream `search`, which becomes slow, then fails, and then recovers. Open the two
//! URLs that the example prints. At the end it prints the decisions of the layers, and fails if the circuit did not
//! open and close.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use buttress::{
    BoxError, Health,
    breaker::CircuitState,
    config::{ClientConfig, ServerConfig},
    health::Check,
    observe::{Decisions, Registry},
    stack::StackClient,
};
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

type Body = Empty<bytes::Bytes>;
type Search = Arc<StackClient<Body>>;

/// The calls of the load in one second.
const CALLS_PER_SECOND: u32 = 40;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let seconds = match std::env::args().nth(1) {
        Some(seconds) => {
            seconds.parse().map_err(|_| format!("{seconds} is not a number of seconds"))?
        }
        None => 60,
    };
    let length = Duration::from_secs(seconds);

    // The upstream, and the stack of its client. All settings have defaults; this circuit stays open for a shorter time.
    let config = ClientConfig::load("search").toml("breaker_open_for = '5s'").finish()?;
    let upstream = serve(Router::new().route("/", get(move || search(length)))).await?;
    let client: Search = Arc::new(buttress::client(&config)?);

    // The stack of the server: at most 30 calls at once, and 10 that wait.
    let settings = "limit_max = 30\nlimit_queue = 10";
    let server = buttress::server(&ServerConfig::load("checkout").toml(settings).finish()?)?;
    let health = Health::new();
    let handle = client.handle();
    let is_open = move || match handle.snapshot().breaker {
        Some(CircuitState::Open) => Err("the circuit is open".to_owned()),
        _ => Ok(()),
    };
    health.add(Check::watch("search", is_open).degrading())?;

    // The registry that the two URLs read.
    let registry = Registry::new();
    registry.watch(&client.handle())?;
    registry.watch(&server.handle())?;
    registry.watch(&health)?;
    tokio::spawn(registry.run());
    let decisions = tokio::spawn(print_decisions(registry.decisions()));

    let app = Router::new()
        .route("/", get(checkout))
        .with_state((client, format!("http://{upstream}/")))
        .layer(server)
        // Outside of the stack, because they are needed most when the stack rejects calls.
        .layer(registry.endpoints())
        .layer(registry.dashboard().title("checkout").loopback().layer()?);
    let address = serve(app).await?;
    println!("live page  http://{address}/buttress/");
    println!("metrics    http://{address}/metrics\n");

    let statuses = load(format!("http://{address}/"), length).await?;
    println!("\nresponses by status: {statuses:?}");
    decisions.abort();
    let last = registry.status();
    let happened: Vec<_> = last.decisions.iter().map(|decision| decision.event).collect();
    match happened.contains(&"circuit opened") && happened.contains(&"circuit closed") {
        true => Ok(()),
        false => Err(format!("the circuit should have opened and closed: {happened:?}").into()),
    }
}

// ===== Servers =====

/// Serves an application on a free port of the loopback interface.
async fn serve(app: Router) -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    // The live page is only for peers on this machine, so it needs the address of the peer.
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(address)
}

/// The upstream: fast, then slow, then failing, then fast again.
async fn search(length: Duration) -> StatusCode {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let start = *START.get_or_init(Instant::now);
    match start.elapsed().as_secs_f64() / length.as_secs_f64() {
        0.2..0.35 => {
            sleep(Duration::from_millis(900)).await;
            StatusCode::OK
        }
        0.35..0.6 => StatusCode::SERVICE_UNAVAILABLE,
        _ => {
            sleep(Duration::from_millis(15)).await;
            StatusCode::OK
        }
    }
}

/// The route of the server, which calls the upstream.
async fn checkout(State((client, url)): State<(Search, String)>) -> Result<String, StatusCode> {
    let request = Request::get(url).body(Body::new()).map_err(|_| StatusCode::BAD_REQUEST)?;
    match client.request(request).await {
        Ok(response) if response.status().is_success() => Ok("done".to_owned()),
        _ => Err(StatusCode::BAD_GATEWAY),
    }
}

// ===== Load =====

/// Calls a URL at a constant rate. Returns the number of responses by status.
async fn load(url: String, length: Duration) -> Result<BTreeMap<u16, u32>, BoxError> {
    let client: Client<_, Body> = Client::builder(TokioExecutor::new()).build_http();
    let mut ticks = interval(Duration::from_secs(1) / CALLS_PER_SECOND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut calls, mut statuses, end) = (JoinSet::new(), BTreeMap::new(), Instant::now() + length);
    while Instant::now() < end {
        ticks.tick().await;
        let (client, request) = (client.clone(), Request::get(&url).body(Body::new())?);
        calls.spawn(async move {
            let response = client.request(request).await?;
            let status = response.status().as_u16();
            response.into_body().collect().await?;
            Ok::<_, BoxError>(status)
        });
        while let Some(ended) = calls.try_join_next() {
            *statuses.entry(ended??).or_default() += 1;
        }
    }
    let rest = async {
        while let Some(ended) = calls.join_next().await {
            *statuses.entry(ended??).or_default() += 1;
        }
        Ok::<_, BoxError>(())
    };
    timeout(Duration::from_secs(10), rest).await??;
    Ok(statuses)
}

/// Prints the decisions of all layers.
async fn print_decisions(mut decisions: Decisions) {
    let start = SystemTime::now();
    while let Some(decision) = decisions.next().await {
        let at = decision.at.duration_since(start).unwrap_or_default();
        let name = decision.name.as_deref().unwrap_or_default();
        let reason = decision.reason.as_deref().unwrap_or("-");
        println!(
            "{:5.1} s  {name} {}: {} ×{}, {reason}. {}",
            at.as_secs_f64(),
            decision.layer,
            decision.event,
            decision.count,
            decision.why
        );
    }
}
