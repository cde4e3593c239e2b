//! reqwest's client with layers around it, and bodies that stream in both directions.
//!
//! ```text
//! cargo run -p reqwest-examples --bin reqwest_client
//! ```

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::StatusCode,
    routing::{get, post},
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, RetryLayer,
    reqwest::{HttpClient, SendThrough},
    retry::Attempts,
};
use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body::Frame;
use http_body_util::{BodyExt, Empty, StreamBody};
use tokio::{net::TcpListener, time::sleep};
use tower::{ServiceBuilder, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let url = upstream().await?;
    let limit = ConcurrencyLimitLayer::new(1);
    let places = limit.handle();
    let http = HttpClient::from_builder(reqwest::Client::builder().no_proxy())?;
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(limit)
        .service(http.clone());

    println!("A request body that is sent while the response body arrives:");
    let words = stream::unfold(["one ", "two ", "three"].into_iter(), |mut words| async move {
        sleep(Duration::from_millis(50)).await;
        Some((Ok::<_, BoxError>(Frame::data(Bytes::from(words.next()?))), words))
    });
    let upload = Request::post(format!("{url}/echo")).body(StreamBody::new(words))?;
    let mut echo = client.clone().oneshot(upload).await?;
    println!("  {} is here, {} call in flight", echo.status(), places.in_flight());
    check(places.in_flight() == 1, "the permit is held while the response streams")?;

    let get = |path| Request::get(format!("{url}{path}")).body(Empty::<Bytes>::new());
    let refused = client.clone().oneshot(get("/")?).await.unwrap_err();
    println!("  another call meanwhile: {}", Rejected::find(&*refused).ok_or("not a rejection")?);

    let mut heard = Vec::new();
    while let Some(frame) = echo.body_mut().frame().await {
        if let Ok(data) = frame?.into_data() {
            println!("  received {:?}", String::from_utf8_lossy(&data));
            heard.extend_from_slice(&data);
        }
    }
    check(heard == b"one two three", "every word was echoed")?;
    check(places.in_flight() == 0, "the permit was released")?;

    println!("An upstream that fails twice:");
    let response = client.clone().oneshot(get("/third-time-lucky")?).await?;
    println!("  {} after {} attempts", response.status(), Attempts::of(&response).made);
    check(response.status() == 200, "the third attempt succeeded")?;

    println!("A request and a response of reqwest:");
    let request = http.get_ref().post(format!("{url}/echo")).body("through the layers");
    let text = request.send_through(&client).await?.error_for_status()?.text().await?;
    println!("  {text:?}");
    check(text == "through the layers", "the response is reqwest's own")
}

// ===== Upstream =====

async fn upstream() -> Result<String, BoxError> {
    static HITS: AtomicUsize = AtomicUsize::new(0);
    let third_time_lucky = || async {
        if HITS.fetch_add(1, SeqCst) < 2 { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
    };
    let app = Router::new()
        .route("/", get(|| async {}))
        .route("/echo", post(|body: Body| async { body }))
        .route("/third-time-lucky", get(third_time_lucky));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(url)
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
