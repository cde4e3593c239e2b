//! The order of the phases.

use std::time::Duration;

use axum::{Router, routing::get};
use buttress::lifecycle::LifecyclePhase;
use tokio::time::{Instant, sleep};

use super::server::{AGES, GRACE, Server, WHILE, lifecycle};
use crate::support::net::{listener, raw::Client, soon, until};

const QUICK: &[u8] = b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test]
async fn drain_without_connections_ends_at_once() {
    for is_ready in [false, true] {
        let Server { lifecycle, task, .. } = Server::start(Duration::ZERO).await;
        if is_ready {
            lifecycle.ready();
        }
        let drained_at = Instant::now();
        // Repeated, as by a `preStop` hook.
        lifecycle.drain();
        lifecycle.drain();
        let drained = soon(task).await.unwrap();
        assert_eq!((drained.cut_calls, drained.cut_connections, drained.rejected), (0, 0, 0));
        assert!(drained_at.elapsed() < GRACE);
    }
}

#[tokio::test]
async fn third_signal_ends_the_grace() {
    let Server { addr, lifecycle, task, .. } = Server::of(lifecycle(AGES).grace(AGES)).await;
    let mut client = Client::connect(addr).await;
    client.send(QUICK).await;
    client.receive("quick").await;
    lifecycle.drain();
    lifecycle.skip_delay();
    client.is_open_for(WHILE).await;
    lifecycle.skip_delay();
    client.is_closed().await;
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 1));
}

#[tokio::test]
async fn grace_ends_with_the_drain_timeout() {
    let Server { addr, lifecycle, task, .. } =
        Server::of(lifecycle(Duration::ZERO).grace(AGES).drain_timeout(GRACE)).await;
    let mut client = Client::connect(addr).await;
    client.send(QUICK).await;
    client.receive("quick").await;
    lifecycle.drain();
    assert_eq!(soon(task).await.unwrap().cut_connections, 1);
    client.is_closed().await;
}

/// The end of the grace is a step within *stopping*.
#[tokio::test]
async fn phase_does_not_change_at_the_end_of_the_grace() {
    let lifecycle = lifecycle(Duration::ZERO).drain_timeout(2 * GRACE);
    lifecycle.drain();
    let began = Instant::now();
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
    assert_eq!(soon(lifecycle.changed()).await, LifecyclePhase::Stopped);
    assert!(began.elapsed() >= 2 * GRACE);
}

/// axum closes the connection, so the test uses a server without a graceful shutdown.
#[tokio::test]
async fn layer_serves_calls_in_the_grace_and_rejects_later_ones() {
    for grace in [Duration::ZERO, GRACE] {
        let lifecycle = lifecycle(Duration::ZERO).grace(grace);
        let app = Router::new().route("/quick", get(async || "quick")).layer(lifecycle.layer());
        let (listener, addr) = listener().await;
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        lifecycle.drain();
        if !grace.is_zero() {
            let mut client = Client::connect(addr).await;
            client.send(QUICK).await;
            assert!(client.receive("quick").await.contains("connection: close"));
            assert_eq!(lifecycle.rejected(), 0);
            sleep(2 * grace).await;
        }
        let mut client = Client::connect(addr).await;
        client.send(QUICK).await;
        let response = client.receive("\r\n\r\n").await;
        assert!(response.starts_with("HTTP/1.1 503") && response.contains("connection: close"));
        assert_eq!(lifecycle.rejected(), 1);
        until(|| lifecycle.in_flight() == 0).await;
    }
}
