//! Connections of HTTP/1, and connections that are not of HTTP/1 or HTTP/2 yet.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    frames::{self, PREFACE},
    server::{AGES, GRACE, LARGE, Server, WHILE},
};
use crate::support::net::{raw::Client, soon, until};

const QUICK: &[u8] = b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n";

fn preface_and(frame: &[u8]) -> Vec<u8> {
    let settings = frames::frame(4, 0, 0, &[]);
    [PREFACE, &settings, frame].concat()
}

#[tokio::test]
async fn connection_without_a_call_is_closed_after_the_grace() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let sent = [
        b"".to_vec(),
        b"P".to_vec(),
        PREFACE[..12].to_vec(),
        PREFACE.to_vec(),
        // Never acknowledges the PING.
        preface_and(&[]),
        preface_and(&frames::half_a_header_block()),
        b"GET / HT".to_vec(),
        b"GET /quick HTTP/1.1\r\nhost:".to_vec(),
        b"POST /quick".to_vec(),
        QUICK.to_vec(),
        [QUICK, b"GET /quick HTTP/1.1\r\nho"].concat(),
    ];
    let mut clients = Vec::new();
    for bytes in &sent {
        let mut client = Client::connect(addr).await;
        client.send(bytes).await;
        if bytes.starts_with(QUICK) {
            client.receive("quick").await;
        }
        clients.push(client);
    }
    // Time in which the server reads all bytes.
    sleep(WHILE).await;
    let drained_at = Instant::now();
    lifecycle.drain();
    let mut closed = JoinSet::new();
    for (mut client, sent) in clients.into_iter().zip(sent) {
        closed.spawn(async move {
            // What the server of HTTP/2 sends first, and GOAWAY.
            let _ = soon(client.0.read_to_end(&mut Vec::new())).await;
            let time = drained_at.elapsed();
            assert!(
                time >= GRACE && time < 3 * GRACE,
                "{time:?} {:?}",
                String::from_utf8_lossy(&sent)
            );
        });
    }
    let drained = soon(task).await.unwrap();
    closed.join_all().await;
    assert_eq!((drained.cut_calls, drained.cut_connections, drained.rejected), (0, 0, 0));
    assert!(drained_at.elapsed() < 3 * GRACE);
}

#[tokio::test]
async fn idle_http1_connection_stays_open_during_the_delay_and_the_grace() {
    let Server { addr, lifecycle, task, .. } = Server::start(AGES).await;
    let (mut idle, mut used) = (Client::connect(addr).await, Client::connect(addr).await);
    for client in [&mut idle, &mut used] {
        client.send(QUICK).await;
        client.receive("quick").await;
    }
    lifecycle.drain();
    idle.is_open_for(WHILE).await;
    lifecycle.skip_delay();
    idle.is_open_for(WHILE).await;
    // A request that was on its way.
    used.send(QUICK).await;
    let response = used.receive("quick").await;
    assert!(
        response.starts_with("HTTP/1.1 200") && response.contains("connection: close"),
        "{response}"
    );
    used.is_closed().await;
    idle.is_closed().await;
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_connections, drained.rejected), (0, 0));
}

#[tokio::test]
async fn call_in_flight_is_served_to_its_end_after_the_grace() {
    let Server { addr, lifecycle, stage, task } = Server::start(Duration::ZERO).await;
    let (mut head, mut body) = (Client::connect(addr).await, Client::connect(addr).await);
    head.send(b"GET /work HTTP/1.1\r\nhost: x\r\n\r\n").await;
    body.send(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n").await;
    body.receive("hel\r\n").await;
    until(|| stage.inside.now() == 2).await;
    lifecycle.drain();
    sleep(4 * GRACE).await;
    stage.open();
    assert!(head.receive("hello").await.contains("connection: close"));
    head.is_closed().await;
    // The head of this response was sent before the drain, so the client has received no announcement of the end.
    body.receive("0\r\n\r\n").await;
    let ended_at = Instant::now();
    body.is_open_for(WHILE).await;
    body.is_closed().await;
    assert!(ended_at.elapsed() < 3 * GRACE);
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
}

/// The call has ended: hyper has taken all of the body into its buffer.
#[tokio::test]
async fn response_that_is_read_slowly_is_not_cut_off() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let mut client = Client::connect(addr).await;
    client.send(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let received = client.receive("\r\n\r\n").await;
    until(|| lifecycle.in_flight() == 0).await;
    lifecycle.drain();
    sleep(4 * GRACE).await;
    assert!(!task.is_finished());
    let mut body = received.split_once("\r\n\r\n").unwrap().1.as_bytes().to_vec();
    while body.len() < LARGE {
        let bytes = soon(client.0.read_buf(&mut body)).await.unwrap();
        assert!(bytes > 0, "cut off after {}", body.len());
    }
    client.is_closed().await;
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}
