//! An untrusted client sends requests whose deadlines are too short for the upstream. The circuit to the upstream
//! stays closed, because a call that ends by the deadline of its caller is not a failure of the upstream.
//!
//! ```text
//! cargo run -p client-examples --bin deadline_attack
//! ```
//!
//! The example starts an upstream that responds after 30 to 40 ms, and a gateway in front of it: `buttress::server`
//! and `buttress::client` with their defaults, and a handler that passes the deadline of its request on. It sends five
//! requests with `grpc-timeout: 10m` (10 ms) and then a regular one. It exits with an error unless the regular
//! request is served.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use axum::{
    Extension, Router,
    http::StatusCode,
    routing::{any, get},
};
use buttress::{
    BoxError, Deadline,
    config::{ClientConfig, ServerConfig},
    stack::ClientHandle,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, time::sleep};

type Body = Full<Bytes>;

const ATTACKS: usize = 5;

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let upstream = upstream().await?;
    println!("upstream: listens on {upstream} and responds after 30 to 40 ms");
    let (gateway, handle) = gateway(upstream).await?;
    println!("gateway: listens on {gateway}, circuit is {:?}", handle.breaker().state());

    let client = Client::builder(TokioExecutor::new()).build_http();
    for n in 1..=ATTACKS {
        let request = Request::post(format!("http://{gateway}/"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("grpc-timeout", "10m");
        let (head, body) = send(&client, request.body(Body::default())?).await?.into_parts();
        let grpc_status = head.headers.get("grpc-status");
        println!(
            "attack {n}: status {}, grpc-status {}, {} bytes; circuit is {:?}",
            head.status,
            grpc_status.map_or("none", |status| status.to_str().unwrap_or("invalid")),
            body.len(),
            handle.breaker().state(),
        );
    }

    let request = Request::get(format!("http://{gateway}/")).body(Body::default())?;
    let (head, body) = send(&client, request).await?.into_parts();
    let is_served = head.status == StatusCode::OK && body == "hello";
    let opened = handle.snapshot().breaker_opened;
    println!("next visitor: status {}, {body:?}; circuit opened {opened} times", head.status);
    println!(
        "{}",
        if is_served { "the next visitor is served" } else { "the next visitor is NOT served" }
    );
    Ok(if is_served { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Sends a request and reads the response to its end.
async fn send(
    client: &Client<HttpConnector, Body>,
    request: Request<Body>,
) -> Result<Response<Bytes>, BoxError> {
    let (head, body) = client.request(request).await?.into_parts();
    Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
}

async fn upstream() -> Result<SocketAddr, BoxError> {
    let handler = async || {
        sleep(Duration::from_millis(fastrand::u64(30..=40))).await;
        "hello"
    };
    serve(Router::new().route("/", get(handler))).await
}

async fn gateway(upstream: SocketAddr) -> Result<(SocketAddr, ClientHandle), BoxError> {
    let client = buttress::client::<Body>(&ClientConfig::default())?;
    let handle = client.handle();
    let forward = async move |deadline: Option<Extension<Deadline>>| {
        let mut request = Request::new(Body::default());
        *request.uri_mut() =
            format!("http://{upstream}/").parse().map_err(|_| StatusCode::BAD_GATEWAY)?;
        if let Some(Extension(deadline)) = deadline {
            request.extensions_mut().insert(deadline);
        }
        let response = client.request(request).await.map_err(|_| StatusCode::BAD_GATEWAY)?;
        let body = response.into_body().collect().await.map_err(|_| StatusCode::BAD_GATEWAY)?;
        Ok::<_, StatusCode>(body.to_bytes())
    };
    let stack = buttress::server(&ServerConfig::default())?;
    let app = Router::new().route("/", any(forward)).layer(stack);
    Ok((serve(app).await?, handle))
}

async fn serve(app: Router) -> Result<SocketAddr, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(addr)
}
