//! Custom listeners, and the capped listener, whose silent and idle connections do not lock out other clients.

use std::{io, sync::Mutex};

use buttress::{lifecycle::Listener, listener::LimitedListener};
use tokio::{io::DuplexStream, sync::mpsc};

use super::*;
use crate::support::net::until;

/// The maximum number of connections.
const CAP: usize = 4;

fn capped() -> (LimitedListener, SocketAddr) {
    let listener = LimitedListener::bind("127.0.0.1:0".parse().unwrap(), 128, CAP).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

async fn connect_and_send(addr: SocketAddr, bytes: &[u8]) -> Vec<TcpStream> {
    let mut sockets = Vec::new();
    for _ in 0..CAP {
        let mut tcp = connect(addr).await;
        tcp.write_all(bytes).await.unwrap();
        sockets.push(tcp);
    }
    sockets
}

/// Connects repeatedly until a response arrives. Returns the time.
async fn time_to_be_served(addr: SocketAddr) -> Duration {
    let began = Instant::now();
    loop {
        let mut tcp = connect(addr).await;
        let sent = tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        let mut read = Vec::new();
        let _ = soon(tcp.read_to_end(&mut read)).await;
        if sent.is_ok() && read.starts_with(b"HTTP/1.1 200") {
            return began.elapsed();
        }
        assert!(began.elapsed() < Duration::from_secs(9), "locked out");
        sleep(ms(20)).await;
    }
}

const BEFORE_A_HEAD: [&[u8]; 4] =
    [b"", b"P", b"GET / HTTP/1.1\r\nhost: x\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"];

#[tokio::test]
async fn silent_sockets_do_not_lock_out_others_under_axum_serve() {
    for sent in BEFORE_A_HEAD {
        let (listener, addr) = capped();
        tokio::spawn(async move { axum::serve(listener, app().0).await });
        let silent = connect_and_send(addr, sent).await;
        let time = time_to_be_served(addr).await;
        assert!(time < Duration::from_secs(3), "{time:?}");
        drop(silent);
    }
}

#[tokio::test]
async fn silent_sockets_end_within_the_head_timeout_under_axum_serve() {
    let (listener, addr) = capped();
    let listener = listener.head_timeout(ms(300)).unwrap();
    let connections = listener.handle();
    tokio::spawn(async move { axum::serve(listener, app().0).await });
    for sent in BEFORE_A_HEAD {
        for mut tcp in connect_and_send(addr, sent).await {
            let time = time_to_close(&mut tcp).await;
            assert!(time < ms(1500), "{time:?}");
        }
        until(|| connections.in_flight() == 0).await;
    }
    // The limit ends with the first head.
    let mut tcp = connect(addr).await;
    ask(&mut tcp).await;
    sleep(ms(900)).await;
    ask(&mut tcp).await;
}

#[tokio::test]
async fn silent_sockets_without_a_head_timeout_do_not_lock_out_others() {
    let (listener, addr) = capped();
    let listener = listener.without_head_timeout();
    tokio::spawn(async move { axum::serve(listener, app().0).await });
    let _silent = connect_and_send(addr, b"").await;
    assert!(time_to_be_served(addr).await < Duration::from_secs(3));
}

#[test]
fn head_timeout_of_zero_is_a_typed_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let error = capped().0.head_timeout(Duration::ZERO).unwrap_err();
        assert_eq!(error.field, "head_timeout");
    });
}

fn serve_capped(
    listener: LimitedListener,
    set: impl FnOnce(Server) -> Server,
) -> ConcurrencyLimitHandle {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let (app, calls) = app();
    tokio::spawn(set(lifecycle.server()).serve(listener, app));
    calls
}

#[tokio::test]
async fn idle_connections_do_not_lock_out_others_under_serve() {
    for protocol in ["http1", "http2"] {
        let (listener, addr) = capped();
        let connections = listener.handle();
        let calls = serve_capped(listener, |server| server);
        let mut idle = connect_and_send(addr, b"").await;
        let mut is_first = true;
        for tcp in &mut idle {
            if protocol == "http1" {
                ask(tcp).await;
            } else {
                tcp.write_all(&[PREFACE, &headers(1, false)].concat()).await.unwrap();
                let mut read = Vec::new();
                while !read.ends_with(b"hello") {
                    assert!(soon(tcp.read_buf(&mut read)).await.unwrap() > 0);
                }
            }
            if std::mem::take(&mut is_first) {
                sleep(ms(100)).await;
            }
        }
        assert_eq!(connections.in_flight() as usize, CAP);
        sleep(ms(1100)).await;
        // A new client is served at once, because the longest idle connection is closed.
        let mut visitor = connect(addr).await;
        ask(&mut visitor).await;
        let mut longest = idle.remove(0);
        assert!(time_to_close(&mut longest).await < ms(500));
        for tcp in &idle {
            let mut rest = [0; 64];
            // HTTP/2 sends a SETTINGS acknowledgement.
            assert!(!matches!(tcp.try_read(&mut rest), Ok(0)), "{protocol}: closed another one");
        }
        assert_eq!(calls.in_flight(), 0);
    }
}

#[tokio::test]
async fn connections_with_calls_are_not_closed_for_others() {
    let (listener, addr) = capped();
    let calls = serve_capped(listener, |server| server);
    let streams = connect_and_send(addr, b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await;
    until(|| calls.in_flight() as usize == CAP).await;
    sleep(ms(1200)).await;
    let mut visitor = connect(addr).await;
    visitor.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut read = String::new();
    soon(visitor.read_to_string(&mut read)).await.unwrap();
    assert!(read.starts_with("HTTP/1.1 503"), "{read}");
    assert_eq!(calls.in_flight() as usize, CAP);
    drop(streams);
}

#[tokio::test]
async fn listener_that_waits_when_full_reclaims_idle_connections_too() {
    let (listener, addr) = capped();
    serve_capped(listener.wait_when_full(), |server| server);
    let mut idle = connect_and_send(addr, b"").await;
    for tcp in &mut idle {
        ask(tcp).await;
    }
    sleep(ms(1100)).await;
    ask(&mut connect(addr).await).await;
}

#[cfg(unix)]
#[tokio::test]
async fn unix_sockets_are_served() {
    let path = std::env::temp_dir().join(format!("buttress-serve-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let server = lifecycle.server().head_timeout(ms(300));
    tokio::spawn(async move { server.serve(listener, app().0).await });
    let mut client = soon(tokio::net::UnixStream::connect(&path)).await.unwrap();
    client.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut read = String::new();
    soon(client.read_to_string(&mut read)).await.unwrap();
    assert!(read.ends_with("hello"), "{read}");
    let mut silent = soon(tokio::net::UnixStream::connect(&path)).await.unwrap();
    assert_eq!(soon(silent.read(&mut [0])).await.unwrap(), 0);
    std::fs::remove_file(&path).unwrap();
}

/// In-memory connections, some of which cannot be accepted.
struct Pipes(mpsc::Receiver<io::Result<DuplexStream>>);

impl Listener for Pipes {
    type Io = DuplexStream;
    type Addr = &'static str;

    async fn accept(&mut self) -> io::Result<(DuplexStream, &'static str)> {
        match self.0.recv().await {
            Some(accepted) => Ok((accepted?, "pipe")),
            None => std::future::pending().await,
        }
    }
}

/// On a paused clock, so that the limits are exact.
#[tokio::test(start_paused = true)]
async fn custom_listener_is_served_and_its_errors_do_not_end_the_server() {
    let (pipes, accepted) = mpsc::channel(16);
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let peers = std::sync::Arc::new(Mutex::new(Vec::new()));
    let (server, seen) = (lifecycle.clone(), peers.clone());
    let service = app().0;
    tokio::spawn(async move {
        server
            .serve_each(Pipes(accepted), move |peer| {
                seen.lock().unwrap().push(peer);
                service.clone()
            })
            .await
    });
    let began = Instant::now();
    for error in [io::ErrorKind::ConnectionReset.into(), io::Error::other("no descriptors")] {
        pipes.send(Err(error)).await.unwrap();
    }
    for (sent, seconds) in
        [("", 30), ("GET / HT", 30), ("PRI * H", 30), ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", 660)]
    {
        let (mut client, io) = tokio::io::duplex(1024);
        pipes.send(Ok(io)).await.unwrap();
        client.write_all(sent.as_bytes()).await.unwrap();
        while peers.lock().unwrap().is_empty() {
            sleep(ms(1)).await;
        }
        let accepted = Instant::now();
        client.read_to_end(&mut Vec::new()).await.unwrap();
        let time = accepted.elapsed();
        assert!(time.as_millis().abs_diff(seconds * 1000) < 10, "{sent:?}: {time:?}");
        assert_eq!(std::mem::take(&mut *peers.lock().unwrap()), ["pipe"]);
    }
    // One second of pause, because only one of the errors was not of one connection.
    assert_eq!(began.elapsed().as_secs(), 1 + 3 * 30 + 660);
}
