//! Server-sent events and WebSockets, over real sockets.

use axum::{
    Extension,
    extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    response::{IntoResponse, Response},
    routing::any,
};
use buttress::limit::{CallPermit, OwnedPermit};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error as WsError, Message as Said},
};

use super::*;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn echo(mut socket: WebSocket, inside: net::Inside, _place: Option<OwnedPermit>) {
    while let Some(Ok(message)) = socket.recv().await {
        if socket.send(message).await.is_err() {
            break;
        }
    }
    drop(inside);
}

/// Serves WebSockets and streams under one limit of two. The handler of `/polite` acquires its permit itself.
async fn sockets() -> (std::net::SocketAddr, Stage, ConcurrencyLimitHandle) {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(2);
    let places = limit.handle();
    let (inside, by_hand) = (stage.inside.clone(), (stage.inside.clone(), places.clone()));
    let socket = move |upgrade: WebSocketUpgrade, Extension(held): Extension<CallPermit>| {
        let (place, inside) = (held.take(), inside.enter());
        async move { upgrade.on_upgrade(move |socket| echo(socket, inside, place)) }
    };
    let polite = move |upgrade: WebSocketUpgrade| async move {
        let answer: Response = match by_hand.1.try_acquire() {
            Ok(place) => {
                let inside = by_hand.0.enter();
                upgrade.on_upgrade(move |socket| echo(socket, inside, Some(place)))
            }
            Err(refused) => upgrade.on_upgrade(async move |mut socket| {
                let frame = CloseFrame { code: 1013, reason: refused.kind().as_str().into() };
                let _ = socket.send(Message::Close(Some(frame))).await;
            }),
        }
        .into_response();
        answer
    };
    let app = routes(&stage)
        .route("/socket", any(socket))
        .layer(limit.upgrades().respond())
        .route("/polite", any(polite));
    (serve(app).await, stage, places)
}

async fn dial(addr: std::net::SocketAddr, path: &str) -> Result<Socket, WsError> {
    Ok(soon(connect_async(format!("ws://{addr}/{path}"))).await?.0)
}

async fn echoes(socket: &mut Socket) {
    soon(socket.send(Said::text("hello"))).await.unwrap();
    assert_eq!(soon(socket.next()).await.unwrap().unwrap(), Said::text("hello"));
}

#[tokio::test]
async fn a_socket_holds_its_permit_to_its_end() {
    let (addr, stage, places) = sockets().await;
    let mut first = dial(addr, "socket").await.unwrap();
    let mut second = dial(addr, "polite").await.unwrap();
    echoes(&mut first).await;
    echoes(&mut second).await;
    assert_eq!((places.in_flight(), stage.inside.now()), (2, 2));

    // The first socket is closed, the second one breaks off.
    soon(first.close(None)).await.unwrap();
    drop(second);
    all_free(&stage, &places).await;
    assert_eq!(stage.inside.peak(), 2);
}

#[tokio::test]
async fn a_full_limit_rejects_a_socket_before_its_upgrade_or_closes_it_after() {
    let (addr, stage, places) = sockets().await;
    let _sockets = [dial(addr, "socket").await.unwrap(), dial(addr, "socket").await.unwrap()];
    let Err(WsError::Http(refused)) = dial(addr, "socket").await else { panic!("upgraded") };
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(refused.headers()["retry-after"], "1");
    let mut closed = dial(addr, "polite").await.unwrap();
    let Some(Ok(Said::Close(Some(frame)))) = soon(closed.next()).await else { panic!("open") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1013, "limit_reached"));
    assert_eq!((places.snapshot().rejected_full, stage.inside.total()), (2, 2));
    // The limit is full for streams as well.
    let answer = answers(&mut send_all(addr, ["/stream"]), 1).await.remove(0);
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn a_failed_upgrade_releases_its_permit() {
    let (addr, stage, places) = sockets().await;
    stage.open();
    // The requests are not handshakes: the extractor responds, and no handler takes the permit.
    for path in ["/socket", "/polite"] {
        let answer = answers(&mut send_all(addr, [path]), 1).await.remove(0);
        assert!(answer.status.is_client_error(), "{}", answer.status);
    }
    all_free(&stage, &places).await;
}

#[tokio::test]
async fn an_event_stream_releases_its_permit_when_the_browser_disconnects() {
    let (addr, stage, places) = sockets().await;
    let browser = client();
    let mut streams = Vec::new();
    for _ in 0..2 {
        let response = soon(browser.request(net::get(addr, "/stream"))).await.unwrap();
        streams.push(response);
    }
    assert_eq!((places.in_flight(), stage.inside.now()), (2, 2));
    drop(streams);
    drop(browser);
    all_free(&stage, &places).await;
    let mut socket = dial(addr, "socket").await.unwrap();
    echoes(&mut socket).await;
}
