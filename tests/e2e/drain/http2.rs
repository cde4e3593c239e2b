//! Connections of HTTP/2.

use std::time::Duration;

use buttress::lifecycle::LifecyclePhase;
use tokio::time::{Instant, sleep};

use super::{
    frames::{Client, Event, MAX_STREAM},
    server::{AGES, GRACE, LARGE, Server, WHILE, lifecycle},
};
use crate::support::net::{soon, until};

#[tokio::test]
async fn http2_client_receives_goaway_when_draining_begins_and_its_calls_are_served() {
    let Server { addr, lifecycle, stage, task } = Server::start(AGES).await;
    let mut client = Client::connect(addr).await;
    let stream = client.get("/quick").await.unwrap();
    client.response(stream).await;
    lifecycle.drain();
    assert_eq!(client.event().await, Event::GoAway(MAX_STREAM));
    assert_eq!(client.event().await, Event::Ping);
    // Streams that were on their way.
    let (quick, work) = (client.get("/quick").await.unwrap(), client.get("/work").await.unwrap());
    client.response(quick).await;
    until(|| stage.inside.now() == 1).await;
    client.acknowledge().await;
    assert_eq!(client.event().await, Event::GoAway(work));
    // A stream above the last one is ignored.
    client.get("/quick").await.unwrap();
    client.silent_for(WHILE).await;
    assert_eq!((lifecycle.phase(), stage.inside.now()), (LifecyclePhase::Draining, 1));
    stage.open();
    client.response(work).await;
    assert_eq!(client.event().await, Event::Closed);
    lifecycle.skip_delay();
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_connections, drained.rejected), (0, 0));
}

/// Otherwise a client that connects again at once would do so for as long as it is routed here.
#[tokio::test]
async fn http2_connection_made_during_the_delay_receives_goaway_at_stopping() {
    let Server { addr, lifecycle, task, .. } = Server::start(AGES).await;
    lifecycle.drain();
    let (mut used, mut unused) = (Client::connect(addr).await, Client::connect(addr).await);
    for _ in 0..3 {
        let stream = used.get("/quick").await.unwrap();
        used.response(stream).await;
    }
    used.silent_for(WHILE).await;
    unused.silent_for(WHILE).await;
    lifecycle.skip_delay();
    for client in [&mut used, &mut unused] {
        assert_eq!(client.event().await, Event::GoAway(MAX_STREAM));
        assert_eq!(client.event().await, Event::Ping);
        let stream = client.get("/quick").await.unwrap();
        client.response(stream).await;
        client.acknowledge().await;
        assert_eq!(client.event().await, Event::GoAway(stream));
        assert_eq!(client.event().await, Event::Closed);
    }
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_connections, drained.rejected), (0, 0));
}

#[tokio::test]
async fn http2_client_that_never_acknowledges_ping_is_served_for_the_grace_and_then_rejected() {
    let Server { addr, lifecycle, stage, task } = Server::start(Duration::ZERO).await;
    let mut client = Client::connect(addr).await;
    let work = client.get("/work").await.unwrap();
    until(|| stage.inside.now() == 1).await;
    lifecycle.drain();
    assert_eq!(client.event().await, Event::GoAway(MAX_STREAM));
    assert_eq!(client.event().await, Event::Ping);
    let stream = client.get("/quick").await.unwrap();
    client.response(stream).await;
    sleep(2 * GRACE).await;
    let stream = client.get("/quick").await.unwrap();
    assert_eq!(client.event().await, Event::Head(stream, false));
    assert!(matches!(client.event().await, Event::Data(..)));
    assert_eq!(client.event().await, Event::EndOfStream(stream));
    // A call in flight is served to its end. Then the connection is idle.
    sleep(3 * GRACE).await;
    stage.open();
    client.response(work).await;
    let ended_at = Instant::now();
    assert_eq!(client.event().await, Event::Closed);
    assert!(ended_at.elapsed() < 3 * GRACE);
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections, drained.rejected), (0, 0, 1));
}

/// The server acknowledges the PING frames of the client, so it writes in every grace.
#[tokio::test]
async fn http2_client_that_sends_pings_and_acknowledges_none_is_closed() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let mut client = Client::connect(addr).await;
    let stream = client.get("/quick").await.unwrap();
    client.response(stream).await;
    let drained_at = Instant::now();
    lifecycle.drain();
    while client.ping().await {
        assert!(drained_at.elapsed() < 8 * GRACE, "the connection is still open");
        sleep(GRACE / 10).await;
    }
    let time = drained_at.elapsed();
    assert!(time >= 4 * GRACE, "{time:?}");
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}

#[tokio::test]
async fn http2_client_that_never_stops_sending_calls_is_cut_at_the_end() {
    let longest = 3 * GRACE;
    let Server { addr, lifecycle, task, .. } =
        Server::of(lifecycle(Duration::ZERO).drain_timeout(longest)).await;
    let mut client = Client::connect(addr).await;
    client.get("/endless").await.unwrap();
    until(|| lifecycle.in_flight() == 1).await;
    let drained_at = Instant::now();
    lifecycle.drain();
    while !task.is_finished() && client.get("/quick").await.is_some() {
        assert!(drained_at.elapsed() < 3 * longest);
        sleep(Duration::from_millis(1)).await;
    }
    let drained = soon(task).await.unwrap();
    let time = drained_at.elapsed();
    assert!(time >= longest && time < 2 * longest, "{time:?}");
    assert_eq!((drained.cut_calls, drained.cut_connections), (1, 1));
    assert!(drained.rejected > 0);
}

/// The call has ended: h2 has taken all of the body, and waits for the window.
#[tokio::test]
async fn http2_response_that_waits_for_the_window_is_not_cut_off() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let window = u32::try_from(LARGE / 64).unwrap();
    let mut client = Client::with_window(addr, window).await;
    let stream = client.get("/large").await.unwrap();
    assert_eq!(client.event().await, Event::Head(stream, true));
    until(|| lifecycle.in_flight() == 0).await;
    lifecycle.drain();
    let mut length = 0;
    let began = Instant::now();
    while length < LARGE {
        match client.event().await {
            Event::Data(_, bytes) => {
                length += bytes;
                client.update_window(stream, u32::try_from(bytes).unwrap()).await;
                // Slows the transfer down, so that it takes several times the grace.
                if began.elapsed() < 4 * GRACE {
                    sleep(Duration::from_millis(10)).await;
                }
            }
            // The PING is not acknowledged.
            Event::GoAway(MAX_STREAM) | Event::Ping => {}
            other => panic!("{other:?} after {length}"),
        }
    }
    assert!(began.elapsed() >= 3 * GRACE);
    assert_eq!(client.event().await, Event::EndOfStream(stream));
    assert_eq!(client.event().await, Event::Closed);
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}

/// The client is alive, as it has acknowledged the PING.
#[tokio::test]
async fn http2_client_that_pauses_reading_is_not_cut_off() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let window = u32::try_from(LARGE / 64).unwrap();
    let mut client = Client::with_window(addr, window).await;
    let stream = client.get("/large").await.unwrap();
    assert_eq!(client.event().await, Event::Head(stream, true));
    until(|| lifecycle.in_flight() == 0).await;
    lifecycle.drain();
    let (mut length, mut is_acknowledged) = (0, false);
    while length < LARGE {
        match client.event().await {
            Event::Data(_, bytes) => {
                length += bytes;
                if is_acknowledged {
                    client.update_window(stream, u32::try_from(bytes).unwrap()).await;
                }
            }
            Event::Ping => {
                client.acknowledge().await;
                is_acknowledged = true;
                sleep(4 * GRACE).await;
                client.update_window(stream, u32::try_from(length).unwrap()).await;
            }
            Event::GoAway(_) => {}
            other => panic!("{other:?} after {length}"),
        }
    }
    assert_eq!(client.event().await, Event::EndOfStream(stream));
    assert_eq!(client.event().await, Event::Closed);
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}
