//! A listener with a maximum number of connections, over TCP.

use std::net::SocketAddr;

use buttress::{
    ConfigError, Indicator, Outcome, limit::ConcurrencyLimitHandle, listener::LimitedListener,
    outcome::Reason,
};
use hyper_util::client::legacy::Client;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::*;

fn listener(limit: usize) -> (LimitedListener, SocketAddr, ConcurrencyLimitHandle) {
    let listener = LimitedListener::bind("127.0.0.1:0".parse().unwrap(), 128, limit).unwrap();
    let (addr, handle) = (listener.local_addr().unwrap(), listener.handle());
    (listener, addr, handle)
}

fn app() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

async fn open(addr: SocketAddr) -> TcpStream {
    soon(TcpStream::connect(addr)).await.unwrap()
}

/// Sends one request over a connection that stays open. Returns the response as text.
async fn ask(tcp: &mut TcpStream) -> String {
    soon(tcp.write_all(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"hello") && !heard.ends_with(b"close\r\n\r\n") {
        let read = soon(tcp.read_buf(&mut heard)).await.unwrap();
        assert!(read > 0, "{}", String::from_utf8_lossy(&heard));
    }
    String::from_utf8(heard).unwrap()
}

#[tokio::test]
async fn a_connection_beyond_the_limit_is_rejected_and_closed() {
    let (listener, addr, connections) = listener(2);
    tokio::spawn(async move { axum::serve(listener, app()).await });
    let (mut first, mut second) = (open(addr).await, open(addr).await);
    for tcp in [&mut first, &mut second] {
        assert!(ask(tcp).await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(connections.in_flight(), 2);
    let mut third = open(addr).await;
    let told = ask(&mut third).await;
    assert!(told.starts_with("HTTP/1.1 503") && told.contains("retry-after: 1\r\n"), "{told}");
    assert_eq!(soon(third.read(&mut [0])).await.unwrap(), 0, "not closed");
    assert_eq!((connections.snapshot().rejected_full, connections.in_flight()), (1, 2));
    // The end of a connection releases its slot for the next one.
    drop(first);
    until(|| connections.in_flight() == 1).await;
    assert!(ask(&mut open(addr).await).await.starts_with("HTTP/1.1 200"));
    // A raised limit admits further connections.
    until(|| connections.in_flight() == 1).await;
    connections.set_limit(3).unwrap();
    let mut more = [open(addr).await, open(addr).await];
    for tcp in &mut more {
        assert!(ask(tcp).await.starts_with("HTTP/1.1 200"));
    }
}

/// GOAWAY states that the request has not been processed, so the client may retry it.
#[tokio::test]
async fn an_http2_connection_beyond_the_limit_receives_goaway() {
    let (listener, addr, connections) = listener(1);
    tokio::spawn(async move { axum::serve(listener, app()).await });
    let mut first = open(addr).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
    let mut builder = Client::builder(TokioExecutor::new());
    let client: net::HyperClient = builder.http2_only(true).build_http();
    let error = soon(client.request(net::get(addr, "/"))).await.unwrap_err();
    let reason = Outcome::of_error(&error).reason();
    assert!(matches!(reason, Reason::GoAway | Reason::NeverSent), "{reason:?}: {error:?}");
    assert_eq!(connections.snapshot().rejected_full, 1);
}

#[tokio::test]
async fn a_limit_that_waits_leaves_new_connections_in_the_backlog() {
    let (listener, addr, connections) = listener(1);
    let listener = listener.wait_when_full();
    tokio::spawn(async move { axum::serve(listener, app()).await });
    let mut first = open(addr).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
    assert_eq!(connections.in_flight(), 1);
    let mut second = open(addr).await;
    let asks = tokio::spawn(async move { ask(&mut second).await });
    until(|| connections.snapshot().waiting == 1).await;
    assert!(!asks.is_finished());
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"), "the open connection was closed");
    drop(first);
    assert!(soon(asks).await.unwrap().starts_with("HTTP/1.1 200"));
    assert_eq!(connections.snapshot().rejected_full, 0);
}

/// A pending `accept` is not a connection: with one connection less than the limit the listener is not full.
#[tokio::test]
async fn a_limit_that_waits_counts_connections_only() {
    let (listener, addr, connections) = listener(2);
    let mut listener = listener.wait_when_full();
    assert!(timeout(Duration::from_millis(20), listener.accept()).await.is_err());
    assert_eq!(connections.in_flight(), 0);
    let _client = open(addr).await;
    let (_connection, _) = soon(listener.accept()).await;
    let mut next = tokio_test::task::spawn(listener.accept());
    assert!(next.poll().is_pending());
    assert_eq!((connections.in_flight(), connections.indicate()), (1, Ok(())));
}

/// 300 connections that send nothing do not disturb the open one, and are closed soon.
#[tokio::test]
async fn silent_connections_beyond_the_limit_are_closed_soon() {
    let (listener, addr, connections) = listener(1);
    tokio::spawn(async move { axum::serve(listener, app()).await });
    let mut first = open(addr).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(open(addr).await);
    }
    for tcp in &mut silent {
        // The client observes the close as the end of the stream or as a reset.
        assert!(matches!(soon(tcp.read(&mut [0])).await, Ok(0) | Err(_)));
    }
    assert_eq!(connections.snapshot().rejected_full, 300);
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn bare_hyper_accepts_connections_under_the_limit() {
    let (mut listener, addr, connections) = listener(1);
    tokio::spawn(async move {
        loop {
            let (connection, _) = listener.accept().await;
            connection.get_ref().set_nodelay(true).unwrap();
            let connection = connection.map(async |tcp| Ok::<_, BoxError>(tcp)).await.unwrap();
            let service = TowerToHyperService::new(app());
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(connection), service).await;
            });
        }
    });
    let mut first = open(addr).await;
    assert!(ask(&mut first).await.starts_with("HTTP/1.1 200"));
    assert!(ask(&mut open(addr).await).await.starts_with("HTTP/1.1 503"));
    drop(first);
    until(|| connections.in_flight() == 0).await;
    assert!(ask(&mut open(addr).await).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_limit_of_no_connections_is_a_typed_error() {
    let error = LimitedListener::bind("127.0.0.1:0".parse().unwrap(), 1, 0).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    let fault = error.get_ref().unwrap().downcast_ref::<ConfigError>().unwrap();
    assert_eq!(fault.field, "limit");
}
