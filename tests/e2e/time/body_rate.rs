//! The minimum rate of request bodies over real sockets, under `axum::serve`.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::ws::WebSocketUpgrade,
    routing::{any, post},
};
use buttress::{
    config::ServerConfig,
    stack::{ServerHandle, ServerStack},
};
use futures_util::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};
use tokio_tungstenite::connect_async;

use crate::support::{
    ms,
    net::{self, soon, until},
};

/// Counts the bytes of its request, or returns the error as text.
async fn upload(body: Body) -> String {
    match body.collect().await {
        Ok(body) => body.to_bytes().len().to_string(),
        Err(error) => error.to_string(),
    }
}

async fn serve(toml: &str) -> (SocketAddr, ServerHandle) {
    let config = ServerConfig::from_toml(toml).unwrap();
    let stack: ServerStack = buttress::server(&config).unwrap();
    let handle = stack.handle();
    let echo = |upgrade: WebSocketUpgrade| async move {
        upgrade.on_upgrade(async move |mut socket| {
            while let Some(Ok(message)) = socket.recv().await {
                let _ = socket.send(message).await;
            }
        })
    };
    let app = Router::new()
        .route("/upload", post(upload))
        // Responds before it has read its request.
        .route("/echo", post(|body: Body| async move { body }))
        .route("/socket", any(echo))
        .layer(stack);
    (net::serve(app).await, handle)
}

const FAST: &str = "timeout_min_body_rate = 5000\ntimeout_body_grace = '200ms'\nlimit_max = 1";

/// Sends a head, and then one byte per `gap` until the server closes the connection. Returns what the server sent.
async fn trickle(at: SocketAddr, path: &str, headers: &str, gap: Duration) -> String {
    let (mut read, mut write) = TcpStream::connect(at).await.unwrap().into_split();
    let head =
        format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n{headers}\r\n");
    write.write_all(head.as_bytes()).await.unwrap();
    let writes = tokio::spawn(async move {
        while write.write_all(b"x").await.is_ok() {
            sleep(gap).await;
        }
    });
    let mut response = Vec::new();
    let _ = soon(read.read_to_end(&mut response)).await;
    writes.abort();
    String::from_utf8_lossy(&response).into_owned()
}

#[tokio::test]
async fn trickled_upload_releases_the_permit_of_a_server_stack() {
    let (at, handle) = serve(FAST).await;
    // An upgrade and gRPC over HTTP/1 do not evade the rate.
    for headers in
        ["", "connection: upgrade\r\nupgrade: x\r\n", "content-type: application/grpc\r\n"]
    {
        let start = Instant::now();
        let response = trickle(at, "/upload", headers, ms(20)).await;
        assert!(start.elapsed() < ms(5000), "{:?}", start.elapsed());
        assert!(response.contains("minimum rate"), "{response}");
        until(|| handle.snapshot().in_flight == 0).await;
    }
    assert_eq!(handle.snapshot().timeouts, 3);
}

#[tokio::test]
async fn trickled_echo_releases_the_permit_after_the_response_head() {
    let (at, handle) = serve(FAST).await;
    let response = trickle(at, "/echo", "", ms(20)).await;
    assert!(response.starts_with("HTTP/1.1 200 OK"), "{response}");
    until(|| handle.snapshot().in_flight == 0).await;
    assert_eq!(handle.snapshot().timeouts, 1);
}

#[tokio::test]
async fn trickled_upload_is_not_ended_by_a_streaming_server() {
    let (at, handle) = serve("streaming = true\nlimit_max = 1").await;
    let upload = tokio::spawn(async move { trickle(at, "/upload", "", ms(500)).await });
    until(|| handle.snapshot().in_flight == 1).await;
    sleep(ms(6500)).await;
    assert_eq!((handle.snapshot().in_flight, handle.snapshot().timeouts), (1, 0));
    upload.abort();
}

#[tokio::test]
async fn steady_upload_and_web_socket_are_not_ended() {
    let (at, handle) = serve("timeout_min_body_rate = 500\ntimeout_body_grace = '200ms'").await;
    let (mut socket, _) = connect_async(format!("ws://{at}/socket")).await.unwrap();

    let mut tcp = TcpStream::connect(at).await.unwrap();
    let head =
        "POST /upload HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2000\r\n\r\n";
    tcp.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..20 {
        tcp.write_all(&[b'x'; 100]).await.unwrap();
        sleep(ms(60)).await;
    }
    let mut response = String::new();
    soon(tcp.read_to_string(&mut response)).await.unwrap();
    assert!(response.ends_with("\r\n2000"), "{response}");

    // Silent all the time.
    soon(socket.send("hello".into())).await.unwrap();
    let echoed = soon(socket.next()).await.unwrap().unwrap();
    assert_eq!(echoed.into_text().unwrap().as_str(), "hello");
    assert_eq!(handle.snapshot().timeouts, 0);
}
