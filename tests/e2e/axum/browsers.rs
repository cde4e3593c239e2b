//! Rejections of a user's middleware, and the effect of rejections on browsers, over a real server on TCP.

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    extract::{
        FromRequestParts, Request,
        ws::{CloseFrame, Message, WebSocketUpgrade},
    },
    middleware::{Next, from_fn},
    response::Response,
    routing::{get, post},
};
use buttress::{ConcurrencyLimitLayer, Rejected, outcome::RejectedKind};
use futures_util::StreamExt;
use http::StatusCode;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::{connect_async, tungstenite};

use crate::support::net::{Stage, client, serve, soon, until};

/// The middleware of the documentation of `Respond`.
async fn for_browsers(request: Request, next: Next) -> Response {
    let accept = request.headers().get("accept").cloned();
    let (parts, body) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts.clone(), &()).await;
    let response = next.run(Request::from_parts(parts, body)).await;
    let Some(rejected) = response.extensions().get::<Rejected>().cloned() else { return response };
    if let Ok(upgrade) = upgrade {
        return upgrade.on_upgrade(async move |mut socket| {
            let (code, reason) = rejected.websocket_close();
            let close = CloseFrame { code, reason: reason.into() };
            let _ = socket.send(Message::Close(Some(close))).await;
        });
    }
    match accept {
        Some(accept) if accept == "text/event-stream" => rejected.into_event_stream(),
        _ => response,
    }
}

async fn socket(upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(async |mut socket| {
        let _ = socket.send(Message::text("hello")).await;
    })
}

#[tokio::test]
async fn rejected_event_source_and_web_socket_can_connect_again() {
    let stage = Stage::default();
    let plain = stage.clone();
    let app = Router::new()
        .route("/", get(|| plain.plain()))
        .route("/socket", get(socket))
        .layer(ConcurrencyLimitLayer::new(1).retry_after(Duration::from_millis(2500)).respond())
        .layer(from_fn(for_browsers));
    let at = serve(app).await;

    // A call with a permit reaches the handler, which completes the handshake.
    let (mut web_socket, _) = soon(connect_async(format!("ws://{at}/socket"))).await.unwrap();
    assert_eq!(soon(web_socket.next()).await.unwrap().unwrap().to_text().unwrap(), "hello");
    drop(web_socket);

    let first = tokio::spawn(client().request(crate::support::net::get(at, "/")));
    until(|| stage.inside.now() == 1).await;
    let get = |accept: &str| {
        let request = Request::get(format!("http://{at}/")).header("accept", accept);
        client().request(request.body(Body::empty()).unwrap())
    };
    let events = soon(get("text/event-stream")).await.unwrap();
    assert_eq!(events.status(), StatusCode::OK);
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    assert_eq!(events.headers()["cache-control"], "no-store");
    // The body ends after this line. The browser connects again after the stated milliseconds.
    assert_eq!(soon(events.into_body().collect()).await.unwrap().to_bytes(), "retry: 2500\n\n");
    assert_eq!(soon(get("text/html")).await.unwrap().status(), StatusCode::SERVICE_UNAVAILABLE);

    let (mut web_socket, _) = soon(connect_async(format!("ws://{at}/socket"))).await.unwrap();
    let tungstenite::Message::Close(Some(close)) = soon(web_socket.next()).await.unwrap().unwrap()
    else {
        panic!("no close frame")
    };
    assert_eq!((u16::from(close.code), close.reason.as_str()), (1013, "limit_reached"));

    stage.open();
    assert_eq!(soon(first).await.unwrap().unwrap().status(), StatusCode::OK);
}

// ===== Middleware and handler of a user =====

fn over_quota() -> Rejected {
    Rejected::new(RejectedKind::Quota).with_retry_after(Duration::from_secs(30))
}

async fn quota(request: Request, next: Next) -> Response {
    if request.headers().contains_key("x-over") {
        return over_quota().respond_to(request);
    }
    next.run(request).await
}

fn app() -> Router {
    Router::new()
        .route("/", post(|| async { "hello" }).get(|| async { Err::<&str, _>(over_quota()) }))
        .layer(from_fn(quota))
}

#[tokio::test]
async fn middleware_of_the_user_rejects_as_the_layers_do() {
    let at = serve(app()).await;
    let send = |headers: &'static [(&str, &str)]| async move {
        let mut request = Request::post(format!("http://{at}/")).header("x-over", "1");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        soon(client().request(request.body(Body::empty()).unwrap())).await.unwrap()
    };
    let json = send(&[]).await;
    assert_eq!(json.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(json.headers()["retry-after"], "30");
    assert_eq!(json.headers()["cache-control"], "no-store");
    assert_eq!(json.headers()["content-type"], "application/problem+json");
    let html = send(&[("accept", "text/html")]).await;
    assert!(html.into_body().collect().await.unwrap().to_bytes().is_empty());
    let grpc = send(&[("content-type", "application/grpc")]).await;
    assert_eq!(grpc.headers()["grpc-status"], "8");
    assert_eq!(grpc.headers()["grpc-retry-pushback-ms"], "30000");
}

#[tokio::test]
async fn handler_returns_a_rejection_as_its_error() {
    let at = serve(app()).await;
    let response = soon(client().request(crate::support::net::get(at, "/"))).await.unwrap();
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()["retry-after"], "30");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(br#""reason":"quota_exceeded"}"#), "{body:?}");
    // A response to HEAD has no body.
    let head = Request::head(format!("http://{at}/")).body(Body::empty()).unwrap();
    let head = soon(client().request(head)).await.unwrap();
    assert_eq!(head.status(), StatusCode::TOO_MANY_REQUESTS);
}

/// The client is still sending its request, and the middleware reads nothing of it.
#[tokio::test]
async fn rejection_of_a_middleware_reaches_a_client_that_still_uploads() {
    let at = serve(app()).await;
    let mut tcp = soon(tokio::net::TcpStream::connect(at)).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: x\r\nx-over: 1\r\ncontent-length: 4194304\r\n\r\n";
    tcp.write_all(head.as_bytes()).await.unwrap();
    let chunk = vec![b'x'; 64 * 1024];
    for _ in 0..64 {
        soon(tcp.write_all(&chunk)).await.unwrap();
    }
    let mut response = [0; 1024];
    let read = soon(tcp.read(&mut response)).await.unwrap();
    assert!(response[..read].starts_with(b"HTTP/1.1 429"), "{:?}", &response[..read]);
    // The connection is usable for the next request.
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut next = Vec::new();
    soon(tcp.read_to_end(&mut next)).await.unwrap();
    assert!(String::from_utf8_lossy(&next).contains("200 OK"), "{next:?}");
}
