//! The settings of a server: defaults, invalid values, durations without end, and the hook for settings of hyper.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use super::*;

fn server() -> Server {
    Lifecycle::without_signals(&Health::new()).unwrap().server()
}

#[tokio::test]
async fn defaults_are_as_documented() {
    let settings = "head_timeout: 30s, idle_timeout: 660s, write_timeout: Some(60s), \
                    http2_ping: Some((20s, 20s)), max_concurrent_streams: 200, \
                    tcp_user_timeout: Some(45s), fault: None";
    assert!(format!("{:?}", server()).contains(settings), "{:?}", server());
}

#[tokio::test]
async fn invalid_setting_is_a_typed_error_and_nothing_is_served() {
    let second = Duration::from_secs(1);
    let zero = Duration::ZERO;
    let invalid = [
        ("head_timeout", server().head_timeout(zero)),
        ("idle_timeout", server().idle_timeout(zero)),
        ("write_timeout", server().write_timeout(zero)),
        ("http2_ping.interval", server().http2_ping(zero, second)),
        ("http2_ping.timeout", server().http2_ping(second, zero)),
        ("max_concurrent_streams", server().max_concurrent_streams(0)),
        ("tcp_user_timeout", server().tcp_user_timeout(second)),
        #[cfg(any(target_os = "linux", target_os = "android"))]
        ("write_timeout", server().write_timeout(46 * second)),
        #[cfg(any(target_os = "linux", target_os = "android"))]
        ("write_timeout", server().write_timeout(5 * second).tcp_user_timeout(4 * second)),
    ];
    for (field, server) in invalid {
        let (listener, addr) = net::listener().await;
        // A later valid setting does not hide the first invalid one.
        let error = server.head_timeout(second).serve(listener, Router::new()).await.unwrap_err();
        assert_eq!(error.field, field);
        assert!(TcpStream::connect(addr).await.is_err(), "the listener is closed");
    }
}

#[tokio::test]
async fn durations_without_end_do_not_overflow() {
    let max = Duration::MAX;
    let served = serve(|server| {
        server
            .head_timeout(max)
            .idle_timeout(max)
            .write_timeout(max)
            .http2_ping(max, max)
            .tcp_user_timeout(max)
            .max_concurrent_streams(u32::MAX)
    });
    let served = served.await;
    ask(&mut connect(served.addr).await).await;
    let (mut send, connection) =
        soon(h2::client::handshake(connect(served.addr).await)).await.unwrap();
    tokio::spawn(connection);
    let (response, _) = send.send_request(net::get(served.addr, "/").map(drop), true).unwrap();
    assert_eq!(soon(response).await.unwrap().status(), 200);
}

#[tokio::test]
async fn hook_changes_settings_of_hyper() {
    let has_run = Arc::new(AtomicBool::new(false));
    let ran = has_run.clone();
    let served = serve(|server| {
        server
            .configure(|hyper| {
                hyper.http1().max_headers(2);
            })
            .configure(move |_| ran.store(true, SeqCst))
    });
    let served = served.await;
    let mut tcp = connect(served.addr).await;
    ask(&mut tcp).await;
    assert!(has_run.load(SeqCst));
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\na: b\r\nc: d\r\n\r\n").await.unwrap();
    let mut read = String::new();
    soon(tcp.read_to_string(&mut read)).await.unwrap();
    assert!(read.starts_with("HTTP/1.1 431"), "{read}");
}
