//! The time limits of the stages of a connection: first byte, preface, head, idle time, ping.

use futures_util::SinkExt;

use super::*;
use crate::support::net::until;

const HEAD: Duration = ms(400);
const LONG: Duration = Duration::from_secs(60);

fn limits(server: Server) -> Server {
    server.head_timeout(HEAD).idle_timeout(LONG)
}

/// Asserts that a time is about the limit.
fn assert_about(time: Duration, limit: Duration, what: &str) {
    assert!(time + ms(50) >= limit && time < limit + ms(1500), "{what}: {time:?}, not {limit:?}");
}

#[tokio::test]
async fn connection_ends_if_its_first_head_is_not_complete_in_time() {
    let served = serve(limits).await;
    let open_block = [PREFACE, &headers(1, true)].concat();
    let half_frame = [PREFACE, &headers(1, false)[..12]].concat();
    let sent: [(&str, &[u8]); 7] = [
        ("nothing", b""),
        ("P", b"P"),
        ("half the preface", &PREFACE[..12]),
        ("the preface without SETTINGS", &PREFACE[..24]),
        ("half an HTTP/1 head", b"GET / HTTP/1.1\r\nhost: x\r\n"),
        ("a header block without its end", &open_block),
        ("half a HEADERS frame", &half_frame),
    ];
    for (what, bytes) in sent {
        let mut tcp = connect(served.addr).await;
        tcp.write_all(bytes).await.unwrap();
        assert_about(time_to_close(&mut tcp).await, HEAD, what);
    }
}

#[tokio::test]
async fn bytes_that_trickle_do_not_extend_the_time_of_a_head() {
    let served = serve(limits).await;
    for bytes in [&b"GET / HTTP/1.1\r\nhost: abcdefghijklmnopqrstuvwxyz"[..], &PREFACE[..24]] {
        let mut tcp = connect(served.addr).await;
        let began = Instant::now();
        for byte in bytes {
            if tcp.write_all(&[*byte]).await.is_err() || !is_open(&tcp).await {
                break;
            }
            sleep(ms(40)).await;
        }
        assert_about(began.elapsed(), HEAD, "trickled bytes");
    }
}

#[tokio::test]
async fn connection_ends_if_a_later_http1_head_is_not_complete_in_time() {
    let served = serve(limits).await;
    let mut tcp = connect(served.addr).await;
    for _ in 0..3 {
        ask(&mut tcp).await;
        sleep(HEAD / 2).await;
    }
    tcp.write_all(b"GET / HT").await.unwrap();
    assert_about(time_to_close(&mut tcp).await, HEAD, "half a later head");
    // The head of a request that follows a body is a new one.
    let mut tcp = connect(served.addr).await;
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nab").await.unwrap();
    soon(tcp.read(&mut [0; 1024])).await.unwrap();
    sleep(HEAD / 2).await;
    tcp.write_all(b"G").await.unwrap();
    assert_about(time_to_close(&mut tcp).await, HEAD, "half a head after a body");
}

/// The limit also holds while another stream of the connection has a call.
#[tokio::test]
async fn connection_ends_if_a_later_http2_header_block_is_not_complete_in_time() {
    let served = serve(limits).await;
    let mut tcp = connect(served.addr).await;
    tcp.write_all(&[PREFACE, &headers(1, false)].concat()).await.unwrap();
    sleep(2 * HEAD).await;
    tcp.write_all(&headers(3, true)).await.unwrap();
    assert_about(time_to_close(&mut tcp).await, HEAD, "a later header block");
}

#[tokio::test]
async fn http1_connection_stays_open_for_the_idle_time_and_then_ends() {
    let served = serve(|server| server.head_timeout(ms(200)).idle_timeout(ms(800))).await;
    let mut tcp = connect(served.addr).await;
    for _ in 0..4 {
        ask(&mut tcp).await;
        sleep(ms(500)).await;
    }
    // A body that arrives after its head is no head.
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n").await.unwrap();
    sleep(ms(500)).await;
    tcp.write_all(b"abc").await.unwrap();
    assert!(soon(tcp.read(&mut [0; 1024])).await.unwrap() > 0);
    assert_about(time_to_close(&mut tcp).await, ms(800), "idle");
}

#[tokio::test]
async fn idle_http2_connection_receives_goaway_and_ends() {
    let idle = ms(600);
    let served = serve(|server| server.head_timeout(HEAD).idle_timeout(idle)).await;
    let (mut send, mut connection) =
        soon(h2::client::handshake(connect(served.addr).await)).await.unwrap();
    // The client sends a PING each 100 ms, which does not count as use of the connection.
    let mut pings = connection.ping_pong().unwrap();
    let pinging = tokio::spawn(async move {
        while pings.ping(h2::Ping::opaque()).await.is_ok() {
            sleep(ms(100)).await;
        }
    });
    let driven = tokio::spawn(connection);
    // A call in flight keeps the connection open for longer than the idle time.
    let request = net::get(served.addr, "/rare").map(drop);
    let (response, _) = send.send_request(request, true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    let mut events = 0;
    while let Some(event) = soon(body.data()).await {
        events += event.unwrap().len() / "event".len();
    }
    assert_eq!(events, 3);
    drop(body);
    let began = Instant::now();
    let error = soon(async {
        loop {
            match send.clone().ready().await {
                Ok(_) => sleep(ms(5)).await,
                Err(error) => break error,
            }
        }
    });
    let error = error.await;
    assert!(error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR), "{error}");
    assert_about(began.elapsed(), idle, "idle HTTP/2");
    drop(send);
    soon(driven).await.unwrap().unwrap();
    pinging.abort();
}

/// gRPC channels do this: they connect before their first call.
#[tokio::test]
async fn http2_connection_may_wait_for_its_first_call_for_the_idle_time() {
    let served = serve(|server| server.head_timeout(ms(200)).idle_timeout(ms(900))).await;
    let mut tcp = connect(served.addr).await;
    tcp.write_all(PREFACE).await.unwrap();
    assert_about(time_to_close(&mut tcp).await, ms(900), "before the first call");
}

#[tokio::test]
async fn http2_client_that_acknowledges_no_ping_loses_its_connection_and_permit() {
    let served = serve(|server| server.http2_ping(ms(200), ms(200))).await;
    let mut tcp = connect(served.addr).await;
    // `/events` instead of `/`: a literal path.
    let block = [&[0x82, 0x86, 0x04, 7][..], b"/events", &[0x41, 1, b'x']].concat();
    let head = [0, 0, block.len() as u8, 1, 5, 0, 0, 0, 1];
    tcp.write_all(&[PREFACE, &head, &block].concat()).await.unwrap();
    until(|| served.calls.in_flight() == 1).await;
    assert_about(time_to_close(&mut tcp).await, ms(400), "unanswered ping");
    until(|| served.calls.in_flight() == 0 && served.lifecycle.in_flight() == 0).await;
}

#[tokio::test]
async fn event_streams_and_websockets_outlast_all_limits() {
    use axum::extract::ws::{Message, WebSocketUpgrade};
    use tokio_tungstenite::{connect_async, tungstenite::Message as Received};

    let short = ms(150);
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let server = lifecycle.server().head_timeout(short).idle_timeout(short).write_timeout(short);
    let echo = async |upgrade: WebSocketUpgrade| {
        upgrade.on_upgrade(async |mut socket| {
            while let Some(Ok(Message::Text(text))) = socket.recv().await {
                socket.send(Message::Text(text)).await.unwrap();
            }
        })
    };
    let (app, calls) = app();
    let app = app.route("/socket", axum::routing::any(echo));
    let (listener, addr) = net::listener().await;
    tokio::spawn(server.serve(listener, app));
    let (mut socket, _) = soon(connect_async(format!("ws://{addr}/socket"))).await.unwrap();
    let mut events = connect(addr).await;
    events.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    until(|| calls.in_flight() == 1).await;
    sleep(10 * short).await;
    assert_eq!(calls.in_flight(), 1, "the event stream ended");
    for _ in 0..2 {
        soon(socket.send(Received::text("still here"))).await.unwrap();
        let received = soon(socket.next()).await.unwrap().unwrap();
        assert_eq!(received, Received::text("still here"));
        sleep(5 * short).await;
    }
}

/// A tunnel is in use although its call has ended (RFC 9113 §8.5).
#[tokio::test]
async fn http2_tunnel_outlasts_the_idle_time_of_its_connection() {
    use http::{Method, Request, Response};
    use hyper::body::Incoming;
    use hyper_util::rt::TokioIo;

    let idle = ms(200);
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let server = lifecycle.server().idle_timeout(idle);
    let echo = tower::service_fn(async |request: Request<Incoming>| {
        let upgrade = hyper::upgrade::on(request);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgrade.await.unwrap()));
            tokio::io::copy(&mut read, &mut write).await
        });
        Ok::<_, std::convert::Infallible>(Response::new(String::new()))
    });
    let (listener, addr) = net::listener().await;
    tokio::spawn(server.serve(listener, echo));
    let (mut send, connection) = soon(h2::client::handshake(connect(addr).await)).await.unwrap();
    let driven = tokio::spawn(connection);
    let request = Request::builder().method(Method::CONNECT).uri("x:1").body(()).unwrap();
    let (response, mut tunnel) = send.send_request(request, false).unwrap();
    let mut received = soon(response).await.unwrap().into_body();
    for _ in 0..2 {
        sleep(4 * idle).await;
        tunnel.send_data("ping".into(), false).unwrap();
        assert_eq!(soon(received.data()).await.unwrap().unwrap(), "ping");
    }
    tunnel.send_data(Bytes::new(), true).unwrap();
    drop((tunnel, received, send));
    soon(driven).await.unwrap().unwrap();
}
