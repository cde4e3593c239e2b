//! `Lifecycle::serve` and the capped listener over real sockets: each stage of a connection has a time limit, and
//! clients that keep to it are not affected.

mod listeners;
mod settings;
mod stages;
mod tls;
mod unread;
#[cfg(target_os = "linux")]
mod vanished;

use std::{net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{
    ConcurrencyLimitLayer, Health, Lifecycle, lifecycle::Server, limit::ConcurrencyLimitHandle,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::support::{
    ms,
    net::{self, soon},
    programs,
};

/// A server that runs for as long as the test.
pub struct Served {
    pub addr: SocketAddr,
    pub lifecycle: Lifecycle,
    /// The limit of all calls.
    pub calls: ConcurrencyLimitHandle,
}

/// Routes: `/` responds at once, `/events` sends one event and then nothing, `/rare` sends an event each 700 ms,
/// `/endless` sends as fast as the client reads, `/large` sends 4 MiB in chunks of 32 KiB.
fn app() -> (Router, ConcurrencyLimitHandle) {
    let limit = ConcurrencyLimitLayer::new(1000).respond();
    let calls = limit.handle();
    let event = || Ok::<_, std::io::Error>(Bytes::from_static(b"event"));
    let chunk = || Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 32 * 1024]));
    let rare = move |n: u32| async move {
        sleep(ms(if n == 0 { 0 } else { 700 })).await;
        (n < 3).then(|| (event(), n + 1))
    };
    let app = Router::new()
        .route("/", get(async || "hello").post(async |body: Bytes| format!("{}", body.len())))
        .route(
            "/events",
            get(async move || Body::from_stream(stream::iter([event()]).chain(stream::pending()))),
        )
        .route("/rare", get(async move || Body::from_stream(stream::unfold(0, rare))))
        .route("/endless", get(async move || Body::from_stream(stream::repeat_with(chunk))))
        .route("/large", get(async move || Body::from_stream(stream::repeat_with(chunk).take(128))))
        .layer(limit);
    (app, calls)
}

async fn serve(set: impl FnOnce(Server) -> Server) -> Served {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    lifecycle.ready();
    let (app, calls) = app();
    let (listener, addr) = net::listener().await;
    let server = set(lifecycle.server()).checked().unwrap();
    tokio::spawn(server.serve(listener, app));
    Served { addr, lifecycle, calls }
}

async fn connect(addr: SocketAddr) -> TcpStream {
    let tcp = soon(TcpStream::connect(addr)).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

/// Sends one request and reads its response. The connection stays open.
async fn ask(tcp: &mut TcpStream) -> String {
    soon(tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"hello") {
        let n = soon(tcp.read_buf(&mut read)).await.unwrap();
        assert!(n > 0, "closed after {:?}", String::from_utf8_lossy(&read));
    }
    String::from_utf8(read).unwrap()
}

/// The time until the server closes the connection. Discards what it sends.
async fn time_to_close(tcp: &mut TcpStream) -> Duration {
    let began = Instant::now();
    let mut buffer = vec![0; 64 * 1024];
    let closed = timeout(Duration::from_secs(20), async {
        while !matches!(tcp.read(&mut buffer).await, Ok(0) | Err(_)) {}
    });
    assert!(closed.await.is_ok(), "the connection is still open");
    began.elapsed()
}

async fn is_open(tcp: &TcpStream) -> bool {
    timeout(ms(10), tcp.peek(&mut [0])).await.is_err()
}

/// The preface of an HTTP/2 client with empty SETTINGS.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// `GET /` of stream 1: HPACK, static table, `:authority` is `x`.
const GET_BLOCK: &[u8] = &[0x82, 0x86, 0x84, 0x41, 0x01, b'x'];

/// A HEADERS frame with `GET /`, without its END_HEADERS flag if `is_open`.
fn headers(stream: u8, is_open: bool) -> Vec<u8> {
    let flags = if is_open { 1 } else { 5 };
    let mut frame = vec![0, 0, GET_BLOCK.len() as u8, 1, flags, 0, 0, 0, stream];
    frame.extend(GET_BLOCK);
    frame
}
