//! When a drain begins and when it ends.

use std::{
    future::pending,
    io::{Read, Write},
    net::SocketAddr,
    time::Duration,
};

use axum::{Router, extract::Request, routing::post};
use buttress::{ConcurrencyLimitLayer, Health, Lifecycle, TimeoutLayer, lifecycle::LifecyclePhase};
use tokio::{task::spawn_blocking, time::Instant};

use super::{
    UPLOAD,
    raw::{connect, read_response, upload},
    servers::{REJECTS, Rejects, SERVED, Served, serve, start},
};
use crate::support::{
    net::{listener, soon},
    programs::{block_for, block_until},
};

const MIB: usize = 1024 * 1024;

fn head(length: usize, headers: &str) -> String {
    format!("POST / HTTP/1.1\r\nhost: here\r\n{headers}content-length: {length}\r\n\r\n")
}

/// Sends a head that expects `100 Continue`, and returns all that the server sends until it closes the connection.
async fn expect_continue(addr: SocketAddr) -> String {
    let exchange = move || {
        let mut tcp = connect(addr);
        let headers = "expect: 100-Continue\r\nconnection: close\r\n";
        tcp.write_all(head(MIB, headers).as_bytes()).unwrap();
        let mut response = String::new();
        tcp.read_to_string(&mut response).unwrap();
        response
    };
    spawn_blocking(exchange).await.unwrap()
}

/// RFC 9110 §10.1.1: a final status in place of `100 Continue` means that the client need not send the body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_that_expects_100_continue_gets_only_the_rejection() {
    // In the other cases the handler has polled the body.
    let polled = [Rejects::TimedOut, Rejects::DeadlineDuringUpload, Rejects::ServerStack];
    for rejects in REJECTS.into_iter().filter(|rejects| !polled.contains(rejects)) {
        for served in SERVED {
            let server = start(served, rejects).await;
            let response = expect_continue(server.addr).await;
            assert!(response.starts_with("HTTP/1.1 50"), "{rejects:?} {served:?}: {response}");
            assert!(!response.contains("100 Continue"), "{rejects:?} {served:?}: {response}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timeout_does_not_invite_a_body_that_the_handler_has_not_polled() {
    let hang = async |request: Request| {
        pending::<()>().await;
        drop(request);
    };
    let timeout = TimeoutLayer::server().head(Duration::from_millis(30)).respond();
    for served in SERVED {
        let router = Router::new().route("/", post(hang)).layer(timeout.clone());
        let response = expect_continue(serve(served, router).await).await;
        assert!(response.starts_with("HTTP/1.1 503"), "{served:?}: {response}");
        assert!(!response.contains("100 Continue"), "{served:?}: {response}");
    }
}

/// The client sends one byte each 20 ms.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_upload_is_rejected_at_once_and_drained_for_a_second() {
    for served in SERVED {
        let server = start(served, Rejects::LimitFull).await;
        let exchange = move || {
            let mut tcp = connect(server.addr);
            tcp.write_all(head(UPLOAD, "").as_bytes()).unwrap();
            let began = Instant::now();
            assert_eq!(read_response(&mut tcp).unwrap(), 503);
            let rejected = began.elapsed();
            tcp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            // A write to a closed connection fails, and a read returns 0.
            while tcp.write_all(b"x").is_ok() && !matches!(tcp.read(&mut [0]), Ok(0)) {
                assert!(began.elapsed() < Duration::from_secs(5), "the drain goes on");
            }
            (rejected, began.elapsed())
        };
        let (rejected, closed) = spawn_blocking(exchange).await.unwrap();
        assert!(rejected < Duration::from_millis(500), "{served:?}: {rejected:?}");
        assert!(closed > Duration::from_millis(900), "{served:?}: {closed:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_ends_after_16_mib() {
    for served in SERVED {
        let server = start(served, Rejects::LimitFull).await;
        let exchange = move || {
            let mut tcp = connect(server.addr);
            tcp.write_all(head(256 * MIB, "").as_bytes()).unwrap();
            assert_eq!(read_response(&mut tcp).unwrap(), 503);
            (0..256).take_while(|_| tcp.write_all(&vec![0; MIB]).is_ok()).count()
        };
        let written = spawn_blocking(exchange).await.unwrap();
        // The buffers of both sockets take some more.
        assert!(written < 48, "{served:?}: the server read {written} MiB");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_is_used_again_after_a_drain() {
    for served in SERVED {
        let server = start(served, Rejects::LimitFull).await;
        let exchange = move || {
            let mut tcp = connect(server.addr);
            for _ in 0..3 {
                tcp.write_all(head(UPLOAD, "").as_bytes()).unwrap();
                tcp.write_all(&vec![0; UPLOAD]).unwrap();
                assert_eq!(read_response(&mut tcp).unwrap(), 503);
            }
        };
        spawn_blocking(exchange).await.unwrap();
    }
}

/// A drain holds no permit: the next call is admitted while the body of a rejected one is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_holds_no_permit() {
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let permit = handle.try_acquire().unwrap();
    let router = Router::new().route("/", post(async || ())).layer(limit.respond());
    let addr = serve(Served::Axum, router).await;
    let exchange = move || {
        let mut slow = connect(addr);
        slow.write_all(head(UPLOAD, "").as_bytes()).unwrap();
        assert_eq!(read_response(&mut slow).unwrap(), 503);
        drop(permit);
        assert_eq!(upload(addr, 0, "").unwrap(), 200);
        drop(slow);
    };
    spawn_blocking(exchange).await.unwrap();
    assert_eq!(handle.in_flight(), 0);
}

/// The rejection is sent while the server is ready, or in the delay before it stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_during_a_drain_does_not_cut_the_connection() {
    for is_draining in [false, true] {
        let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
        let lifecycle = lifecycle.drain_delay(Duration::from_millis(200));
        let limit = ConcurrencyLimitLayer::new(1);
        let _permit = limit.handle().try_acquire().unwrap();
        let router = Router::new().route("/", post(async || ())).layer(limit.respond());
        let (listener, addr) = listener().await;
        lifecycle.ready();
        let server = lifecycle.clone();
        let server = tokio::spawn(async move { server.serve(listener, router).await });
        let upload = move || {
            let mut tcp = connect(addr);
            if is_draining {
                lifecycle.drain();
                block_until(|| lifecycle.phase() == LifecyclePhase::Draining);
            }
            tcp.write_all(head(9 * MIB, "").as_bytes())?;
            // The response has arrived.
            tcp.peek(&mut [0])?;
            lifecycle.drain();
            for _ in 0..9 {
                tcp.write_all(&vec![0; MIB])?;
                block_for(Duration::from_millis(50));
            }
            assert!(lifecycle.phase() >= LifecyclePhase::Stopping);
            read_response(&mut tcp)
        };
        let status = spawn_blocking(upload).await.unwrap();
        assert!(matches!(status, Ok(503)), "draining: {is_draining}: {status:?}");
        let drained = soon(server).await.unwrap();
        assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
    }
}

/// The server waits for a drain no longer than for a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_of_a_body_delays_the_end_of_the_server_by_a_second_or_less() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap().drain_delay(Duration::ZERO);
    let limit = ConcurrencyLimitLayer::new(1);
    let _permit = limit.handle().try_acquire().unwrap();
    let router = Router::new().route("/", post(async || ())).layer(limit.respond());
    let (listener, addr) = listener().await;
    lifecycle.ready();
    let server = lifecycle.clone();
    let server = tokio::spawn(async move { server.serve(listener, router).await });
    let rejected = move || {
        let mut tcp = connect(addr);
        tcp.write_all(head(UPLOAD, "").as_bytes()).unwrap();
        assert_eq!(read_response(&mut tcp).unwrap(), 503);
        tcp
    };
    let _tcp = spawn_blocking(rejected).await.unwrap();
    let began = Instant::now();
    lifecycle.drain();
    let drained = soon(server).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(2500), "{:?}", began.elapsed());
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
}
