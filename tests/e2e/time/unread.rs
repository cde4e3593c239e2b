//! Responses that their clients do not read, over real sockets, under `axum::serve`.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{
    config::ServerConfig,
    stack::{ServerHandle, ServerStack},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::sleep,
};

use crate::support::{
    ms,
    net::{self, soon, until},
};

const CHUNK: usize = 64 * 1024;
const CHUNKS: usize = 800;

/// 50 MB.
async fn large() -> Body {
    let chunk = || Ok::<_, Infallible>(Bytes::from_static(&[b'x'; CHUNK]));
    Body::from_stream(stream::iter((0..CHUNKS).map(move |_| chunk())))
}

/// One event at once, and one after 1.5 s.
async fn events() -> Body {
    let first = stream::iter(["data: 1\n\n"]);
    let second = stream::once(async {
        sleep(ms(1500)).await;
        "data: 2\n\n"
    });
    Body::from_stream(first.chain(second).map(Ok::<_, Infallible>))
}

async fn serve(max: u32, toml: &str) -> (SocketAddr, ServerHandle) {
    let toml = format!("limit_max = {max}\nlimit_queue = 0\n{toml}");
    let config = ServerConfig::from_toml(&toml).unwrap();
    let stack: ServerStack = buttress::server(&config).unwrap();
    let handle = stack.handle();
    let app = Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/large", get(large))
        .route("/events", get(events))
        .layer(stack);
    (net::serve(app).await, handle)
}

/// Sends a request, over a connection with a small receive buffer.
async fn connect(at: SocketAddr, path: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(32 * 1024).unwrap();
    let mut tcp = soon(socket.connect(at)).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    tcp
}

async fn status(at: SocketAddr) -> StatusCode {
    soon(net::client().request(net::get(at, "/"))).await.unwrap().status()
}

#[tokio::test]
async fn unread_response_releases_its_permit_and_cannot_be_read_on() {
    let (at, handle) = serve(2, "limit_max_unread = '300ms'").await;
    let mut unread = vec![connect(at, "/large").await, connect(at, "/large").await];
    until(|| handle.snapshot().in_flight == 2).await;
    sleep(ms(100)).await;
    assert_eq!(status(at).await, StatusCode::SERVICE_UNAVAILABLE);
    until(|| handle.snapshot().unread == 2).await;
    assert_eq!(status(at).await, StatusCode::OK, "the permits are free");
    // The connections remain.
    assert_eq!(handle.snapshot().in_flight, 2);

    // A client that reads on does not evade the limit: its response ends before the last chunk.
    let mut response = Vec::new();
    let _ = soon(unread[0].read_to_end(&mut response)).await;
    assert!(response.starts_with(b"HTTP/1.1 200 OK"));
    assert!(response.len() < CHUNK * CHUNKS && !response.ends_with(b"\r\n0\r\n\r\n"));
    until(|| handle.snapshot().in_flight == 1).await;
    assert_eq!(handle.snapshot().timeouts, 1);
    drop(unread);
    until(|| handle.snapshot().in_flight == 0).await;
    assert_eq!(status(at).await, StatusCode::OK);
}

#[tokio::test]
async fn response_that_is_read_slowly_but_steadily_is_not_ended() {
    let (at, handle) = serve(1, "limit_max_unread = '700ms'").await;
    let mut tcp = connect(at, "/large").await;
    let (mut buffer, mut read) = (vec![0; 1024 * 1024], 0);
    while let n @ 1.. = soon(tcp.read(&mut buffer)).await.unwrap() {
        read += n;
        // About 20 MB per second, for more than twice the maximum.
        sleep(Duration::from_nanos(n as u64 * 50)).await;
    }
    assert!(read > CHUNK * CHUNKS, "{read}");
    assert_eq!((handle.snapshot().unread, handle.snapshot().timeouts), (0, 0));
}

#[tokio::test]
async fn idle_event_stream_that_is_read_stays_open() {
    let (at, handle) = serve(1, "limit_max_unread = '200ms'").await;
    let response = soon(net::client().request(net::get(at, "/events"))).await.unwrap();
    let body = soon(response.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(body, "data: 1\n\ndata: 2\n\n");
    assert_eq!((handle.snapshot().unread, handle.snapshot().in_flight), (0, 0));
}

#[tokio::test]
async fn http2_client_without_a_window_releases_its_permits() {
    let (at, handle) = serve(4, "limit_max_unread = '300ms'").await;
    let tcp = TokioIo::new(TcpStream::connect(at).await.unwrap());
    let mut client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut client, connection) =
        soon(client.initial_stream_window_size(0).handshake(tcp)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut responses = Vec::new();
    for path in ["/large", "/large", "/large", "/events"] {
        let request = Request::get(format!("http://{at}{path}")).body(Empty::<Bytes>::new());
        responses.push(soon(client.send_request(request.unwrap())).await.unwrap());
    }
    assert_eq!(status(at).await, StatusCode::SERVICE_UNAVAILABLE);
    until(|| handle.snapshot().unread == 4).await;
    assert_eq!(status(at).await, StatusCode::OK);
    drop((responses, client));
    connection.abort();
    until(|| handle.snapshot().in_flight == 0).await;
    assert_eq!(handle.snapshot().unread, 4);
}

#[tokio::test]
async fn unread_responses_hold_their_permits_on_a_streaming_server_and_without_max_unread() {
    for toml in ["streaming = true", "limit_max_unread = 'off'"] {
        let (at, handle) = serve(1, toml).await;
        assert_eq!(handle.config().limit.max_unread, None);
        let unread = connect(at, "/large").await;
        until(|| handle.snapshot().in_flight == 1).await;
        sleep(ms(500)).await;
        assert_eq!(status(at).await, StatusCode::SERVICE_UNAVAILABLE);

        // The setting is live, for responses that begin from then on.
        let mut config = handle.config();
        config.limit.max_unread = Some(ms(200));
        assert_eq!(handle.update(&config).unwrap(), Vec::<&str>::new());
        drop(unread);
        until(|| handle.snapshot().in_flight == 0).await;
        let _unread = connect(at, "/large").await;
        until(|| handle.snapshot().unread == 1).await;
        assert_eq!(status(at).await, StatusCode::OK);
    }
}
