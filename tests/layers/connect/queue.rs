//! Callers that wait for a connection, and callers that are cancelled while they wait or connect.

use std::{sync::Arc, time::Duration};

use buttress::{BoxError, Outcome, connect::ConnectLayer, outcome::Reason};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use tokio::time::Instant;
use tower::{Layer, Service, ServiceExt};

use super::fixtures::{Pipes, ask, client, http2, request};
use crate::support::{rejection, settle};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn first_caller_connects_first() {
    let layer = ConnectLayer::new().max_per_host(1);
    let pipes = Pipes::default();
    let connector = layer.layer(pipes.clone());
    let connect = || connector.clone().oneshot("http://a/".parse().unwrap());
    let first = connect().await.unwrap();
    let (order, mut came) = tokio::sync::mpsc::unbounded_channel();
    for n in 0..5 {
        let (connect, order) = (connect(), order.clone());
        tokio::spawn(async move {
            let io = connect.await.unwrap();
            order.send(n).unwrap();
            drop(io);
        });
        settle().await;
    }
    drop(first);
    for n in 0..5 {
        assert_eq!(came.recv().await, Some(n));
    }
    assert_eq!(pipes.open.peak(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_in_length_and_in_time() {
    let layer = ConnectLayer::new().max_per_host(1).queue(2, SECOND).name("search");
    let (connector, handle) = (layer.layer(Pipes::default()), layer.handle());
    let connect = || connector.clone().oneshot("http://a/".parse().unwrap());
    let _first = connect().await.unwrap();
    let waiting = [tokio::spawn(connect()), tokio::spawn(connect())];
    settle().await;
    let start = Instant::now();
    let error = connect().await.unwrap_err();
    assert_eq!((rejection(&error).name(), start.elapsed()), (Some("search"), Duration::ZERO));
    assert_eq!((handle.snapshot().waiting, handle.snapshot().saturated), (2, 1));
    for waiting in waiting {
        let error = waiting.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("no connection became free"), "{error}");
    }
    let seen = handle.snapshot();
    assert_eq!((seen.waits, seen.waiting, seen.saturated), (2, 0, 3));
    assert!((2 * SECOND..3 * SECOND).contains(&seen.waited), "{:?}", seen.waited);
}

#[tokio::test(start_paused = true)]
async fn cancelled_calls_release_their_permits_and_queue_entries() {
    let layer = ConnectLayer::new().max_per_host(2).max_total(2);
    let pipes = Pipes::gated();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    for _ in 0..50 {
        let calls: Vec<_> =
            (0..5).map(|_| tokio::spawn(client.request(request("http://a/")))).collect();
        settle().await;
        assert_eq!((handle.snapshot().connecting, handle.snapshot().waiting), (2, 3));
        // Cancels calls that wait, calls that connect, and a call that has just acquired a permit.
        for n in [3, 0, 2, 4, 1] {
            calls[n].abort();
            if n % 2 == 0 {
                settle().await;
            }
        }
        settle().await;
        let seen = handle.snapshot();
        assert_eq!((seen.connecting, seen.waiting, seen.open, seen.in_use), (0, 0, 0, 0));
    }
    pipes.let_in(2);
    let both = [request("http://a/slow"), request("http://a/slow")];
    let both = both.map(|request| tokio::spawn(client.request(request)));
    settle().await;
    assert_eq!(handle.snapshot().in_use, 2);
    // The calls are cancelled before their response heads, which closes their connections.
    both.iter().for_each(tokio::task::JoinHandle::abort);
    settle().await;
    let seen = handle.snapshot();
    assert_eq!((seen.in_use, seen.open, pipes.open.now()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn no_queue_entry_remains_for_a_call_that_was_served() {
    let layer = ConnectLayer::new().max_per_host(1).queue(8, 3600 * SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    // Each call but the first finds the connection in use, queues for a connection of its own, and is then served by
    // the connection of an earlier call. The queue entry that it leaves behind must not fill the queue.
    for _ in 0..100 {
        let calls = (0..8).map(|_| ask(&client, "http://a/"));
        for answer in futures_util::future::join_all(calls).await {
            answer.unwrap();
        }
        settle().await;
        assert_eq!(handle.snapshot().waiting, 0);
    }
    assert_eq!((handle.snapshot().created, handle.snapshot().saturated), (1, 0));
}

/// The same under a client that another crate builds, where each call queues for a connection of its own.
#[tokio::test(start_paused = true)]
async fn connect_that_hyper_continues_in_the_background_leaves_the_queue() {
    let layer = ConnectLayer::new().max_per_host(1).queue(7, 3600 * SECOND);
    let client = hyper_util::client::legacy::Client::builder(buttress::connect::Executor)
        .build::<_, Empty<Bytes>>(layer.layer(Pipes::default()));
    for _ in 0..100 {
        let calls = (0..8).map(|_| async {
            let response = client.request(request("http://a/")).await.unwrap();
            response.into_body().collect().await.unwrap();
        });
        futures_util::future::join_all(calls).await;
        settle().await;
        assert_eq!(layer.handle().snapshot().waiting, 0);
    }
    let seen = layer.handle().snapshot();
    assert_eq!((seen.created, seen.saturated), (1, 0));
    assert!(seen.waits >= 100, "{seen:?}");
}

/// hyper-util's pool fails every caller that waits for an HTTP/2 connection when the caller that makes the connection
/// is cancelled.
#[tokio::test(start_paused = true)]
async fn call_cancelled_while_connecting_does_not_fail_other_calls() {
    for layer in [ConnectLayer::new(), ConnectLayer::new().max_per_host(1).queue(22, SECOND)] {
        let pipes = Pipes::gated();
        let client = http2(&layer, &pipes);
        for goes_again in [false, true] {
            let mut goes: Vec<_> =
                (0..3).map(|_| tokio::spawn(client.request(request("http://a/")))).collect();
            settle().await;
            let stay: Vec<_> = (0..20)
                .map(|_| {
                    tokio::spawn({
                        let client = client.clone();
                        async move { ask(&client, "http://a/").await }
                    })
                })
                .collect();
            for one in goes.drain(..) {
                settle().await;
                one.abort();
            }
            settle().await;
            // One of the remaining calls connects. Under a cap, the other 19 are in the queue, which was full before
            // the others were cancelled.
            let has_cap = layer.handle().snapshot().max_per_host.is_some();
            assert_eq!(layer.handle().snapshot().waiting, if has_cap { 19 } else { 0 });
            pipes.let_in(1);
            for one in stay {
                one.await.unwrap().unwrap();
            }
            assert_eq!(layer.handle().snapshot().open, 1);
            // The second round begins after this connection has been closed.
            layer.handle().recycle();
            settle().await;
            assert_eq!(layer.handle().snapshot().created, 1 + u64::from(goes_again));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_not_polled_does_not_block_other_connects() {
    let (layer, pipes) = (ConnectLayer::new(), Pipes::default());
    let (client, start) = (http2(&layer, &pipes), Instant::now());
    let not_yet = client.request(request("http://a/"));
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    not_yet.await.unwrap();
    assert_eq!(layer.handle().snapshot().created, 1);
}

/// If a connection cannot be made, all waiting calls fail within the time of one connect, not one after another.
#[tokio::test(start_paused = true)]
async fn waiting_calls_fail_together_when_no_connection_can_be_made() {
    let (layer, pipes) = (ConnectLayer::new().connect_timeout(SECOND), Pipes::gated());
    let client = http2(&layer, &pipes);
    let start = Instant::now();
    let calls = (0..20).map(|_| ask(&client, "http://a/"));
    assert!(futures_util::future::join_all(calls).await.iter().all(Result::is_err));
    assert!(start.elapsed() <= 2 * SECOND, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_connect_timeout_is_reported_and_releases_its_permits() {
    let layer = ConnectLayer::new().max_per_host(1).connect_timeout(SECOND);
    let pipes = Pipes::gated();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let start = Instant::now();
    let error = ask(&client, "http://a/").await.unwrap_err();
    assert!((SECOND..SECOND + SECOND / 100).contains(&start.elapsed()));
    assert_eq!(Outcome::of_error(&*error).reason(), Reason::ConnectTimeout);
    let seen = handle.snapshot();
    assert_eq!((seen.timed_out, seen.failed, seen.connecting, seen.open), (1, 0, 0, 0));
    pipes.let_in(1);
    ask(&client, "http://a/").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_connect_timeout_begins_with_the_permit() {
    let layer = ConnectLayer::new().max_per_host(1).connect_timeout(SECOND);
    let connector = layer.queue(9, 60 * SECOND).layer(Pipes::default());
    let connect = || connector.clone().oneshot("http://a/".parse().unwrap());
    let first = connect().await.unwrap();
    let second = tokio::spawn(connect());
    tokio::time::sleep(30 * SECOND).await;
    drop(first);
    second.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_failed_connect_releases_its_permits() {
    let layer = ConnectLayer::new().max_per_host(1);
    let (client, handle) = (client(&layer, &Pipes::default()), layer.handle());
    for _ in 0..3 {
        let error = ask(&client, "http://down/").await.unwrap_err();
        assert_eq!(Outcome::of_error(&*error).reason(), Reason::ConnectRefused);
    }
    let seen = handle.snapshot();
    assert_eq!((seen.failed, seen.created, seen.connecting, seen.open), (3, 0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_connector_that_panics_releases_its_permits() {
    let layer = ConnectLayer::new().max_per_host(1);
    let handle = layer.handle();
    let connector = layer.layer(tower::service_fn(|uri: http::Uri| async move {
        assert_ne!(uri.path(), "/panic", "on purpose");
        Ok::<_, BoxError>(uri)
    }));
    let connect = |path| connector.clone().oneshot(format!("http://a/{path}").parse().unwrap());
    assert!(tokio::spawn(connect("panic")).await.is_err());
    assert_eq!((handle.snapshot().connecting, handle.snapshot().open), (0, 0));
    connect("").await.unwrap();
}

/// A connector that panics if an instance is called that was not polled ready.
#[tokio::test(start_paused = true)]
async fn the_connector_that_was_ready_is_the_one_that_is_called() {
    #[derive(Default)]
    struct Strict {
        ready: bool,
    }
    impl Clone for Strict {
        fn clone(&self) -> Self {
            Self::default()
        }
    }
    impl Service<http::Uri> for Strict {
        type Response = Arc<()>;
        type Error = BoxError;
        type Future = std::future::Ready<Result<Arc<()>, BoxError>>;

        fn poll_ready(
            &mut self,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Result<(), BoxError>> {
            self.ready = true;
            std::task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Uri) -> Self::Future {
            assert!(std::mem::take(&mut self.ready), "called without being polled ready");
            std::future::ready(Ok(Arc::default()))
        }
    }
    let mut connector = ConnectLayer::new().max_per_host(1).layer(Strict::default());
    let uri: http::Uri = "http://a/".parse().unwrap();
    let first = connector.ready().await.unwrap().call(uri.clone()).await.unwrap();
    // Also for a queued call: the wait is part of the future, which owns the instance that was polled ready.
    let second = tokio::spawn(connector.ready().await.unwrap().call(uri.clone()));
    settle().await;
    drop(first);
    second.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn unread_and_dropped_responses_leave_no_connection_in_use() {
    let layer = ConnectLayer::new();
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let response = client.request(request("http://a/stream")).await.unwrap();
    assert_eq!(handle.snapshot().in_use, 1);
    drop(response);
    settle().await;
    assert_eq!((handle.snapshot().in_use, handle.snapshot().open), (0, 0));
    pipes.stage.open();
    let response = client.request(request("http://a/stream")).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    assert_eq!((handle.snapshot().in_use, handle.snapshot().open), (0, 1));
    drop((client, layer));
    settle().await;
    assert_eq!((handle.snapshot().open, pipes.open.now()), (0, 0));
}
