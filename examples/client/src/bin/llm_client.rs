//! A client of a large language model, by the preset `llm`: a rate limit, a streamed response, and a stream that
//! stalls.
//!
//! ```text
//! cargo run -p client-examples --bin llm_client
//! ```

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use buttress::{
    Attempts, Rejected,
    config::{ClientConfig, ConfigPreset},
};
use bytes::Bytes;
use futures_util::stream;
use http::Request;
use http_body_util::{BodyExt, Full};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

type Error = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), Error> {
    let url = upstream().await?;
    // The preset allows 60 s of silence within a stream. This example uses less.
    let config = ClientConfig::load("llm")
        .preset(ConfigPreset::Llm)
        .toml("timeout_response_idle = '300ms'")
        .env()
        .finish()?;
    let client = buttress::client(&config)?;
    let ask = |prompt: &'static str| {
        // The key makes retries safe after other failures than 429 and 529, too.
        let request = Request::post(&url).header("idempotency-key", prompt);
        request.body(Full::new(Bytes::from_static(prompt.as_bytes())))
    };

    println!("A provider that responds once with 429 and `Retry-After: 1`, and then streams:");
    let start = Instant::now();
    let mut response = client.request(ask("what is tower?")?).await?;
    let attempts = Attempts::of(&response).made;
    println!("  {} after {attempts} attempts and {:.1?}", response.status(), start.elapsed());
    check(attempts == 2 && start.elapsed() >= Duration::from_secs(1), "the hint was followed")?;
    let (mut frames, mut text) = (0, Vec::new());
    while let Some(frame) = response.body_mut().frame().await {
        if let Ok(data) = frame?.into_data() {
            frames += 1;
            text.extend_from_slice(&data);
        }
    }
    println!("  {:?} in {frames} frames", String::from_utf8_lossy(&text));
    check(text == b"a library of services", "every frame arrived")?;

    println!("A stream that stalls:");
    let response = client.request(ask("stall")?).await?;
    let error = response.into_body().collect().await.unwrap_err();
    let rejected = Rejected::find(&error).ok_or("not a rejection")?;
    println!("  {rejected}");
    check(rejected.is_timeout(), "the timeout for silence ended it")?;
    let snapshot = client.handle().snapshot();
    println!(
        "  {} calls, {} failed, {} retries",
        snapshot.total, snapshot.failures, snapshot.retries
    );
    Ok(())
}

fn check(holds: bool, claim: &str) -> Result<(), Error> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}

// ===== Provider =====

async fn upstream() -> Result<String, Error> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/v1/messages", listener.local_addr()?);
    let app = Router::new().route("/v1/messages", post(complete));
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(url)
}

async fn complete(prompt: String) -> Response {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    if CALLS.fetch_add(1, SeqCst) == 0 {
        return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response();
    }
    let stalls = prompt == "stall";
    let words = ["a ", "library ", "of ", "services"].into_iter();
    let frames = stream::unfold(words, move |mut words| async move {
        sleep(Duration::from_millis(50)).await;
        let word = words.next()?;
        if stalls && word == "of " {
            std::future::pending::<()>().await;
        }
        Some((Ok::<_, Infallible>(word), words))
    });
    Body::from_stream(frames).into_response()
}
