//! The metrics of a server and of its client, on `/metrics` for Prometheus.
//!
//! ```text
//! cargo run -p axum-examples --bin metrics
//! ```

use std::time::Duration;

use axum::{Router, routing::get};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, RespondLayer, RetryLayer,
    observe::Registry,
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::net::TcpListener;
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let front = ConcurrencyLimitLayer::new(100).name("front");
    let breaker = CircuitBreakerLayer::http().name("search");
    let retry = RetryLayer::http().name("search");
    let registry = Registry::new();
    registry.watch(&front.handle())?;
    registry.watch(&breaker.handle())?;
    registry.watch(&retry.handle())?;

    let app = Router::new()
        .route("/search", get(async || StatusCode::SERVICE_UNAVAILABLE))
        .layer(front.respond())
        // Outside of the limit, because the metrics are needed most when the limit is full.
        .layer(registry.endpoints());
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, app).await });

    let bare: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let client = ServiceBuilder::new()
        .layer(RespondLayer::new())
        .layer(retry)
        .layer(breaker)
        .service(Client::builder(TokioExecutor::new()).build_http());
    for _ in 0..5 {
        let request = Request::get(format!("{url}/search")).body(Empty::<Bytes>::new())?;
        println!("search responds with {}", client.clone().oneshot(request).await?.status());
    }
    let page = bare.get(format!("{url}/metrics").parse()?).await?.into_body().collect().await?;
    let page = String::from_utf8(page.to_bytes().to_vec())?;
    println!("\n{page}");
    if page.contains("buttress_breaker_state{name=\"search\",state=\"open\"} 1") {
        return Ok(());
    }
    Err("the circuit should be open by now".into())
}
