//! The recommended client, built in one call with settings from the environment, against a server that sometimes fails.
//!
//! ```text
//! cargo run -p client-examples --bin client_from_env
//! SEARCH_HTTP_CLIENT_PRESET=internal SEARCH_HTTP_CLIENT_MAX_CONNECTIONS=4 cargo run -p client-examples --bin client_from_env
//! ```

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::get};
use buttress::{
    BoxError,
    config::{ClientConfig, ConfigPreset, ServerConfig},
};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use tokio::{net::TcpListener, task::JoinSet};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

async fn tour() -> Result<(), BoxError> {
    let at = upstream().await?;
    // The environment takes precedence over the values here.
    let config = ClientConfig::load("search")
        .preset(ConfigPreset::Internal)
        .toml(&format!("connect_max_total = 8\ncheck_health_uri = 'http://{at}/healthz'"))
        .env()
        .finish()?;
    println!("{}", config.explain());
    let client = buttress::client(&config)?;
    let handle = client.handle();

    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let request = Request::get(format!("http://{at}/")).body(Empty::<Bytes>::new())?;
        let client = client.clone();
        calls.spawn(async move {
            let (head, body) = client.request(request).await?.into_parts();
            body.collect().await?;
            Ok::<_, BoxError>(head.status)
        });
    }
    let answers = calls.join_all().await;
    let is_good =
        |answer: &&Result<StatusCode, _>| answer.as_ref().is_ok_and(StatusCode::is_success);
    let good = answers.iter().filter(is_good).count();
    println!("{good} of {} calls succeeded", answers.len());
    println!("{:#?}", handle.snapshot());

    let check = client.check_health().await;
    println!("health: {:?} in {:?}", check.status, check.took);

    // Changes settings of the client in use. `update` returns the settings that need a new client.
    let mut next = handle.config();
    next.timeout.head = Some(Duration::from_secs(2));
    next.connect.max_total = Some(2);
    next.breaker.window = Duration::from_secs(60);
    println!("needs a new client: {:?}", handle.update(&next)?);
    Ok(())
}

/// Starts a server whose every tenth response is a 503.
async fn upstream() -> Result<SocketAddr, BoxError> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let answer = async || {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if CALLS.fetch_add(1, SeqCst) % 10 == 9 {
            (StatusCode::SERVICE_UNAVAILABLE, "later")
        } else {
            (StatusCode::OK, "hello")
        }
    };
    let app = Router::new()
        .route("/", get(answer))
        .route("/healthz", get(|| async {}))
        .layer(buttress::server(&ServerConfig::default())?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(at)
}
