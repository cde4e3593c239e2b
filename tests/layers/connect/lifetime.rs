//! The age and the idle time of connections, and the events that end them.

use std::time::Duration;

use buttress::connect::{Client, ConnectLayer};
use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    time::{Instant, sleep},
};

use super::fixtures::{Pipes, ask, client, http2, request};
use crate::support::{pipe::Pipe, settle};

const SECOND: Duration = Duration::from_secs(1);

fn exact() -> ConnectLayer {
    ConnectLayer::new().jitter(0.0)
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_closed_at_its_maximum_idle_time() {
    for connect in [client, http2] {
        let layer = exact().max_idle(SECOND);
        let pipes = Pipes::default();
        let (client, handle) = (connect(&layer, &pipes), layer.handle());
        ask(&client, "http://a/").await.unwrap();
        // A call before the end of the idle time restarts the idle time.
        for _ in 0..10 {
            sleep(SECOND * 9 / 10).await;
            ask(&client, "http://a/").await.unwrap();
        }
        assert_eq!(pipes.open.now(), 1);
        sleep(SECOND + SECOND / 100).await;
        let seen = handle.snapshot();
        assert_eq!((seen.created, seen.reused, seen.closed, seen.open), (1, 10, 1, 0));
        assert_eq!((seen.closed_for_idleness, pipes.open.now()), (1, 0));
        ask(&client, "http://a/").await.unwrap();
        assert_eq!(handle.snapshot().created, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_is_closed_when_it_is_not_in_use() {
    for connect in [client, http2] {
        let layer = exact().max_age(10 * SECOND).max_idle(None);
        let pipes = Pipes::default();
        let (client, handle) = (connect(&layer, &pipes), layer.handle());
        ask(&client, "http://a/").await.unwrap();
        sleep(10 * SECOND + SECOND / 100).await;
        assert_eq!((handle.snapshot().closed_for_age, pipes.open.now()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_in_use_is_never_cut_for_its_age() {
    for connect in [client, http2] {
        let layer = exact().max_age(10 * SECOND).max_idle(SECOND);
        let pipes = Pipes::default();
        let (client, handle) = (connect(&layer, &pipes), layer.handle());
        let slow = tokio::spawn(client.request(request("http://a/slow")));
        sleep(100 * SECOND).await;
        assert_eq!((handle.snapshot().open, handle.snapshot().in_use), (1, 1));
        pipes.stage.gate.add_permits(1);
        let slow = slow.await.unwrap().unwrap();
        sleep(100 * SECOND).await;
        assert_eq!(slow.into_body().collect().await.unwrap().to_bytes(), "hello");
        settle().await;
        assert_eq!((handle.snapshot().closed_for_age, pipes.open.now()), (1, 0));
        // Half of this stream has been read.
        let mut stream = client.request(request("http://a/stream")).await.unwrap().into_body();
        assert_eq!(stream.frame().await.unwrap().unwrap().into_data().unwrap(), "hel");
        sleep(100 * SECOND).await;
        pipes.stage.gate.add_permits(1);
        assert_eq!(stream.collect().await.unwrap().to_bytes(), "lo");
        settle().await;
        assert_eq!((handle.snapshot().closed_for_age, pipes.open.now()), (2, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_that_is_never_idle_is_not_reused() {
    for connect in [client, http2] {
        let layer = exact().max_age(10 * SECOND).max_per_host(2).queue(100, 60 * SECOND);
        let pipes = Pipes::default();
        let (client, handle) = (connect(&layer, &pipes), layer.handle());
        let start = Instant::now();
        // There are more callers than connections, and each caller calls without a pause.
        let caller = || async {
            while start.elapsed() < 35 * SECOND {
                ask(&client, "http://a/tenth").await.unwrap();
            }
        };
        join_all((0..20).map(|_| caller())).await;
        let seen = handle.snapshot();
        assert!((3..=8).contains(&seen.created), "{seen:?}");
        assert_eq!(seen.saturated, 0);
    }
}

/// Otherwise one long stream would lock out every other call.
#[tokio::test(start_paused = true)]
async fn an_old_connection_takes_calls_while_the_caps_permit_no_other() {
    for caps in [(1, 9), (9, 1)] {
        let layer = exact().max_age(10 * SECOND).max_per_host(caps.0).max_total(caps.1);
        let pipes = Pipes::default();
        let (client, handle) = (http2(&layer, &pipes), layer.handle());
        let stream = tokio::spawn(client.request(request("http://a/slow")));
        sleep(11 * SECOND).await;
        let start = Instant::now();
        for _ in 0..20 {
            ask(&client, "http://a/").await.unwrap();
        }
        assert_eq!((handle.snapshot().created, start.elapsed()), (1, Duration::ZERO));
        // The connection is closed after its last call.
        pipes.stage.open();
        stream.await.unwrap().unwrap().into_body().collect().await.unwrap();
        settle().await;
        assert_eq!((handle.snapshot().open, handle.snapshot().closed_for_age), (0, 1));
        ask(&client, "http://a/").await.unwrap();
        assert_eq!(handle.snapshot().created, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn connections_opened_at_the_same_time_close_at_different_times() {
    let layer = ConnectLayer::new().max_age(100 * SECOND).max_idle(None).jitter(0.5);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let calls = (0..100).map(|_| tokio::spawn(client.request(request("http://a/slow"))));
    let calls: Vec<_> = calls.collect();
    settle().await;
    pipes.stage.open();
    for call in calls {
        call.await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    assert_eq!(handle.snapshot().open, 100);
    sleep(49 * SECOND).await;
    assert_eq!(handle.snapshot().open, 100);
    sleep(26 * SECOND).await;
    assert!((20..=80).contains(&handle.snapshot().open), "{}", handle.snapshot().open);
    sleep(26 * SECOND).await;
    assert_eq!(handle.snapshot().closed_for_age, 100);
}

#[tokio::test(start_paused = true)]
async fn recycled_connections_close_after_their_calls() {
    for connect in [client, http2] {
        let (layer, pipes) = (exact(), Pipes::default());
        let (client, handle) = (connect(&layer, &pipes), layer.handle());
        ask(&client, "http://idle/").await.unwrap();
        let slow = tokio::spawn(client.request(request("http://a/slow")));
        settle().await;
        handle.recycle();
        settle().await;
        assert_eq!(handle.snapshot().open, 1);
        pipes.stage.open();
        slow.await.unwrap().unwrap().into_body().collect().await.unwrap();
        settle().await;
        assert_eq!(handle.snapshot().open, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_recycled_before_its_first_call_serves_that_call() {
    let (layer, pipes) = (exact(), Pipes::gated());
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let first = tokio::spawn(client.request(request("http://a/")));
    settle().await;
    pipes.let_in(1);
    while handle.snapshot().open == 0 {
        tokio::task::yield_now().await;
        handle.recycle();
    }
    first.await.unwrap().unwrap().into_body().collect().await.unwrap();
    settle().await;
    assert_eq!(handle.snapshot().open, 0);
}

#[tokio::test(start_paused = true)]
async fn an_upgraded_connection_is_not_closed_for_its_age_or_idle_time() {
    let layer = exact().max_age(10 * SECOND).max_idle(SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    let mut request = request("http://a/upgrade");
    request.headers_mut().insert("connection", "upgrade".parse().unwrap());
    request.headers_mut().insert("upgrade", "echo".parse().unwrap());
    let mut response = client.request(request).await.unwrap();
    assert_eq!(response.status(), 101);
    let mut socket = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
    drop((response, client));
    for _ in 0..3 {
        sleep(100 * SECOND).await;
        socket.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        socket.read_exact(&mut echo).await.unwrap();
        assert_eq!((&echo, handle.snapshot().in_use), (b"hello", 1));
    }
    drop(socket);
    settle().await;
    assert_eq!((handle.snapshot().in_use, handle.snapshot().open, pipes.open.now()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn connections_of_other_clients_are_not_closed_for_their_age_or_idle_time() {
    let layer = exact().max_age(10 * SECOND).max_idle(SECOND);
    let pipes = Pipes::default();
    let connector = tower::Layer::layer(&layer, pipes.clone());
    let client = hyper_util::client::legacy::Client::builder(buttress::connect::Executor)
        .build::<_, http_body_util::Empty<bytes::Bytes>>(connector);
    let slow = tokio::spawn(client.request(request("http://a/slow")));
    sleep(100 * SECOND).await;
    pipes.stage.open();
    slow.await.unwrap().unwrap().into_body().collect().await.unwrap();
    assert_eq!((layer.handle().snapshot().open, layer.handle().snapshot().in_use), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn the_http2_connection_of_a_long_stream_stays_in_the_pool() {
    let layer = exact().max_per_host(1).max_idle(SECOND).queue(9, SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (http2(&layer, &pipes), layer.handle());
    let stream = client.request(request("http://a/stream")).await.unwrap();
    sleep(100 * SECOND).await;
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(handle.snapshot().created, 1);
    drop(stream);
}

/// As after a stall: the task of the connection has not run, so the connection is not closed yet.
#[tokio::test(start_paused = true)]
async fn a_connection_whose_time_ended_before_its_task_ran_is_not_used() {
    let layer = exact().max_idle(SECOND);
    let pipes = Pipes::default();
    let (client, handle) = (client(&layer, &pipes), layer.handle());
    for n in 1..5 {
        ask(&client, "http://a/").await.unwrap();
        settle().await;
        assert_eq!(handle.snapshot().created, n);
        // The clock advances, but no other task runs.
        assert!(tokio_test::task::spawn(tokio::time::advance(2 * SECOND)).poll().is_pending());
    }
    assert_eq!((handle.snapshot().reused, handle.snapshot().closed_for_idleness), (0, 3));
}

/// As behind a NAT that has dropped its mapping: the client observes no end of the connection and receives no response.
#[tokio::test(start_paused = true)]
async fn no_request_hangs_on_a_connection_that_a_nat_has_dropped() {
    const FORGOTTEN: Duration = Duration::from_secs(5);

    async fn answer(mut io: DuplexStream) {
        let mut seen = Instant::now();
        let mut request = [0; 1024];
        while io.read(&mut request).await.is_ok_and(|read| read > 0) {
            if seen.elapsed() < FORGOTTEN {
                io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.unwrap();
            }
            seen = Instant::now();
        }
    }
    let connect = |max_idle| {
        let connector = tower::service_fn(|_: http::Uri| {
            std::future::ready({
                let (ours, theirs) = tokio::io::duplex(1024);
                tokio::spawn(answer(theirs));
                Ok::<_, std::io::Error>(Pipe::new(ours))
            })
        });
        let layer = ConnectLayer::new().max_idle(max_idle);
        Client::builder(layer).build::<_, Empty<Bytes>>(connector)
    };
    let ask = |client: &Client<_, _>| {
        tokio::time::timeout(60 * SECOND, client.request(request("http://a/")))
    };

    let client = connect(Some(4 * SECOND));
    for silence in [1, 3, 4, 5, 6, 60, 1, 4, 5] {
        let response = ask(&client).await.expect("the request hangs").unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        sleep(silence * SECOND).await;
    }
    // The control: without an idle time, a request on such a connection hangs.
    let client = connect(None);
    drop(ask(&client).await.unwrap().unwrap().into_body().collect().await.unwrap());
    sleep(2 * FORGOTTEN).await;
    assert!(ask(&client).await.is_err());
}
