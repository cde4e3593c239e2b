//! A server from the view of Kubernetes: its start, failures of its two dependencies, and its drain.
//!
//! The dependency "search" is critical. A health probe in its client reports its state. The dependency "cache" is
//! degrading, and a health check of the registry calls it. The example prints the responses that `curl` would receive.
//!
//! cargo run -p axum-examples --bin kubernetes

use std::{error::Error, io, net::SocketAddr, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    http::{Request, StatusCode},
    routing::get,
};
use buttress::{
    ConcurrencyLimitLayer, Health, HealthProbeLayer, Lifecycle, health::Check, lifecycle::Drain,
};
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tower::{ServiceBuilder, ServiceExt};

type Fails = Box<dyn Error + Send + Sync>;
type Get = Client<HttpConnector, Empty<bytes::Bytes>>;

const EVERY: Duration = Duration::from_millis(100);

fn http() -> Get {
    Client::builder(TokioExecutor::new()).build_http()
}

// ===== Dependencies =====

/// Starts a dependency. Aborting its task closes its listener and all its connections.
async fn dependency(at: Option<SocketAddr>) -> io::Result<(SocketAddr, JoinHandle<()>)> {
    let listener = TcpListener::bind(at.unwrap_or_else(|| ([127, 0, 0, 1], 0).into())).await?;
    let addr = listener.local_addr()?;
    let app = Router::new().route("/healthz", get(async || "ok")).route("/", get(async || "found"));
    let lifecycle = Lifecycle::without_signals(&Health::new()).map_err(io::Error::other)?;
    Ok((
        addr,
        tokio::spawn(async move {
            lifecycle.serve(listener, app).await;
        }),
    ))
}

// ===== Server =====

struct Server {
    addr: SocketAddr,
    lifecycle: Lifecycle,
    task: JoinHandle<buttress::lifecycle::Drained>,
}

async fn server(search: SocketAddr, cache: SocketAddr) -> Result<Server, Fails> {
    let health = Health::new();
    // Comes first, so that a SIGTERM during the start is not lost.
    let lifecycle = Lifecycle::new(&health)?
        .drain_delay(Duration::from_millis(500))
        .drain_timeout(Duration::from_secs(5));
    health.add(
        Check::new("cache", move || async move { TcpStream::connect(cache).await.map(drop) })
            .degrading()
            .every(EVERY)
            .thresholds(1, 2),
    )?;
    let probe = HealthProbeLayer::get(&format!("http://{search}/healthz"))
        .every(EVERY)
        .thresholds(2, 3)
        .report_to(&health, "search")
        .checked()?;
    let client = ServiceBuilder::new().layer(probe).service(http());
    let find = async move || {
        let request =
            Request::get(format!("http://{search}/")).body(Empty::new()).map_err(fails)?;
        let response = client.oneshot(request).await.map_err(fails)?;
        Ok::<_, (StatusCode, String)>(Body::new(response.into_body()))
    };
    let events = async |Extension(drain): Extension<Drain>| {
        let ticks = stream::once(async { "hello, " }).chain(stream::pending());
        let told = ticks.take_until(Box::pin(drain.stopping()));
        Body::from_stream(told.chain(stream::once(async { "bye" })).map(Ok::<_, io::Error>))
    };
    let app = Router::new()
        .route("/find", get(find))
        .route("/events", get(events))
        .layer(ConcurrencyLimitLayer::new(100).respond())
        .layer(health.endpoints().with_reasons());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    // For a proxy that closes its idle connections after 60 s. `Lifecycle::serve` would use the defaults.
    let running = lifecycle.server().idle_timeout(Duration::from_secs(75)).checked()?;
    let task = tokio::spawn(async move { running.serve(listener, app).await.unwrap_or_default() });
    Ok(Server { addr, lifecycle, task })
}

fn fails(error: impl Into<Fails>) -> (StatusCode, String) {
    (StatusCode::BAD_GATEWAY, error.into().to_string())
}

// ===== Requests =====

struct Curl {
    addr: SocketAddr,
    began: Instant,
}

impl Curl {
    async fn get(&self, path: &str) -> Result<(u16, String), Fails> {
        let request = Request::get(format!("http://{}{path}", self.addr)).body(Empty::new())?;
        let response = timeout(Duration::from_secs(5), http().request(request)).await??;
        let status = response.status().as_u16();
        let body = timeout(Duration::from_secs(5), response.into_body().collect()).await??;
        Ok((status, String::from_utf8(body.to_bytes().to_vec())?))
    }

    /// Requests three paths and prints the responses. Returns an error if a status is not the expected one.
    async fn sees(&self, what: &str, ready: u16, found: u16) -> Result<(), Fails> {
        println!("\n{:5.1} s  {what}", self.began.elapsed().as_secs_f64());
        let mut seen = Vec::new();
        for path in ["/livez", "/readyz?verbose", "/find"] {
            let (status, body) = self.get(path).await?;
            println!(
                "  curl {path:16} {status}  {}",
                body.trim_end().replace('\n', "\n                             ")
            );
            seen.push(status);
        }
        if seen != [200, ready, found] {
            return Err(format!("{what}: {seen:?}, expected {:?}", [200, ready, found]).into());
        }
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Fails> {
    let (search_at, search) = dependency(None).await?;
    let (cache_at, cache) = dependency(None).await?;
    let Server { addr, lifecycle, task } = server(search_at, cache_at).await?;
    let curl = Curl { addr, began: Instant::now() };

    sleep(2 * EVERY).await;
    curl.sees("starting: live, but not ready", 503, 200).await?;
    lifecycle.ready();
    curl.sees("ready", 200, 200).await?;

    search.abort();
    sleep(8 * EVERY).await;
    curl.sees("the search has failed: calls to it are rejected at once", 503, 502).await?;
    let (_, search) = dependency(Some(search_at)).await?;
    sleep(6 * EVERY).await;
    curl.sees("the search has recovered", 200, 200).await?;

    cache.abort();
    sleep(6 * EVERY).await;
    curl.sees("the cache has failed, which only degrades the service", 200, 200).await?;

    let began = Instant::now();
    let events = tokio::spawn(async move { Curl { addr, began }.get("/events").await });
    while lifecycle.in_flight() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    // A SIGTERM has the same effect.
    lifecycle.drain();
    sleep(EVERY).await;
    curl.sees("draining: not ready, but still serving", 503, 200).await?;
    let (_, told) = events.await??;
    println!(
        "\n{:5.1} s  stopping: an open stream ended with `{told}`",
        curl.began.elapsed().as_secs_f64()
    );
    // The server accepts the connections that are in its backlog, and then closes its listener.
    sleep(EVERY).await;
    if curl.get("/readyz").await.is_ok() {
        return Err("the listener is still open".into());
    }
    println!("  curl /readyz          connection refused");
    let drained = task.await?;
    println!("\n{:5.1} s  ended: {drained:?}", curl.began.elapsed().as_secs_f64());
    search.abort();
    match (drained.cut_calls, &*told) {
        (0, "hello, bye") => Ok(()),
        _ => Err("a call was cut".into()),
    }
}
