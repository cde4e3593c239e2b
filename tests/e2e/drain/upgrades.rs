//! WebSockets whose handshake is in progress when the process drains.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Extension, Router,
    extract::ws::{Message, WebSocketUpgrade},
    response::Response,
    routing::any,
};
use buttress::{Lifecycle, lifecycle::Drain};
use futures_util::{SinkExt, StreamExt};
use tokio::{task::JoinHandle, time::sleep};
use tokio_tungstenite::{connect_async, tungstenite::Message as Sent};

use super::server::{AGES, GRACE, Server, lifecycle};
use crate::support::net::{Stage, listener, raw, soon, until};

/// Responds when the gate opens; then echoes all messages.
fn echo(stage: Stage) -> Router {
    let upgrade =
        async move |upgrade: WebSocketUpgrade, Extension(drain): Extension<Drain>| -> Response {
            let guard = drain.guard();
            stage.clone().plain().await;
            upgrade.on_upgrade(async move |mut socket| {
                let _guard = guard;
                while let Some(Ok(message)) = socket.recv().await {
                    if !matches!(message, Message::Text(_)) || socket.send(message).await.is_err() {
                        return;
                    }
                }
            })
        };
    Router::new().route("/", any(upgrade))
}

async fn server(lifecycle: Lifecycle) -> Server {
    let stage = Stage::default();
    Server::serve(lifecycle, stage.clone(), echo(stage)).await
}

/// Connects, and sends one message back and forth.
fn client(addr: SocketAddr) -> JoinHandle<()> {
    tokio::spawn(async move {
        let (mut socket, response) = connect_async(format!("ws://{addr}/")).await.unwrap();
        let connection: Vec<_> = response.headers().get_all("connection").iter().collect();
        assert!(
            connection.len() == 1 && connection[0].as_bytes().eq_ignore_ascii_case(b"upgrade"),
            "{connection:?}"
        );
        socket.send(Sent::text("hello")).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap(), Sent::text("hello"));
        socket.close(None).await.unwrap();
    })
}

#[tokio::test]
async fn upgrade_in_progress_completes_during_the_delay() {
    let Server { addr, lifecycle, stage, task } = server(lifecycle(AGES)).await;
    let client = client(addr);
    until(|| stage.inside.now() == 1).await;
    lifecycle.drain();
    stage.open();
    soon(client).await.unwrap();
    lifecycle.skip_delay();
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}

#[tokio::test]
async fn upgrade_in_progress_completes_at_stopping() {
    for after in [Duration::ZERO, 3 * GRACE] {
        let Server { addr, lifecycle, stage, task } = server(lifecycle(Duration::ZERO)).await;
        let client = client(addr);
        until(|| stage.inside.now() == 1).await;
        lifecycle.drain();
        sleep(after).await;
        stage.open();
        soon(client).await.unwrap();
        let drained = soon(task).await.unwrap();
        assert_eq!((drained.cut_calls, drained.cut_connections, drained.rejected), (0, 0, 0));
    }
}

#[tokio::test]
async fn upgrade_that_arrives_in_the_grace_completes() {
    let Server { addr, lifecycle, stage, task } = server(lifecycle(Duration::ZERO)).await;
    stage.open();
    let mut tcp = raw::Client::connect(addr).await;
    // The server has accepted the connection.
    sleep(Duration::from_millis(20)).await;
    lifecycle.drain();
    tcp.send(
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )
    .await;
    let head = tcp.receive("\r\n\r\n").await.to_lowercase();
    assert!(head.starts_with("http/1.1 101") && head.contains("connection: upgrade\r\n"), "{head}");
    // A close frame, masked with zeroes.
    tcp.send(&[0x88, 0x80, 0, 0, 0, 0]).await;
    soon(task).await.unwrap();
}

/// A request to upgrade that is served without an upgrade.
#[tokio::test]
async fn connection_is_closed_after_a_rejected_upgrade() {
    for delay in [AGES, Duration::ZERO] {
        let stage = Stage::default();
        let work = stage.clone();
        let app = Router::new().route("/", any(move || work.clone().plain()));
        let Server { addr, lifecycle, stage, task } =
            Server::serve(lifecycle(delay), stage, app).await;
        let mut tcp = raw::Client::connect(addr).await;
        tcp.send(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n").await;
        until(|| stage.inside.now() == 1).await;
        lifecycle.drain();
        stage.open();
        assert!(tcp.receive("hello").await.contains("connection: close"));
        tcp.is_closed().await;
        lifecycle.skip_delay();
        soon(task).await.unwrap();
    }
}

/// As far as the layer can influence it: at *stopping* axum itself announces the close.
#[tokio::test]
async fn upgrade_in_progress_completes_during_the_delay_of_axum_serve() {
    let (lifecycle, stage) = (lifecycle(AGES), Stage::default());
    let app = echo(stage.clone()).layer(lifecycle.layer());
    let (listener, addr) = listener().await;
    let server = axum::serve(listener, app).with_graceful_shutdown(lifecycle.stopping());
    let running = lifecycle.clone();
    let task = tokio::spawn(async move { running.run(async { server.await }).await.unwrap() });
    let client = client(addr);
    until(|| stage.inside.now() == 1).await;
    lifecycle.drain();
    stage.open();
    soon(client).await.unwrap();
    lifecycle.skip_delay();
    assert_eq!(soon(task).await.unwrap().cut_calls, 0);
}

/// The stream of a WebSocket over HTTP/2 (RFC 8441) outlasts its call.
#[tokio::test]
async fn websocket_over_http2_is_not_idle() {
    let socket = async |upgrade: WebSocketUpgrade, Extension(drain): Extension<Drain>| {
        let guard = drain.guard();
        upgrade.on_upgrade(async move |mut socket| {
            drain.stopping().await;
            sleep(4 * GRACE).await;
            let _ = socket.send(Message::Text("bye".into())).await;
            drop(guard);
        })
    };
    let app = Router::new().route("/", any(socket));
    let Server { addr, lifecycle, task, .. } =
        Server::serve(lifecycle(Duration::ZERO), Stage::default(), app).await;
    let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
    let (mut send, connection) = soon(h2::client::handshake(tcp)).await.unwrap();
    tokio::spawn(connection);
    until(|| send.is_extended_connect_protocol_enabled()).await;
    let request = http::Request::connect(format!("http://{addr}/"))
        .header("sec-websocket-version", "13")
        .extension(h2::ext::Protocol::from_static("websocket"))
        .body(())
        .unwrap();
    let (response, _open) = send.send_request(request, false).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    until(|| lifecycle.in_flight() == 1).await;
    lifecycle.drain();
    // A text frame.
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), &b"\x81\x03bye"[..]);
    drop((body, _open, send));
    assert_eq!(soon(task).await.unwrap().cut_calls, 0);
}
