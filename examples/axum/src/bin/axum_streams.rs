//! A concurrency limit for server-sent events and WebSockets. A full server rejects a WebSocket with 503 before the
//! upgrade, or closes it with code 1013 after the upgrade. A client that disconnects releases its permit.
//!
//! ```text
//! cargo run -p axum-examples --bin axum_streams
//! ```

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{
    Extension, Router,
    extract::{
        State,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{any, get},
};
use buttress::{
    BoxError, ConcurrencyLimitLayer,
    limit::{CallPermit, ConcurrencyLimitHandle, OwnedPermit},
};
use bytes::Bytes;
use futures_util::{SinkExt, Stream, StreamExt, stream};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error as WsError, Message as Said},
};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    // Ends the example also if a call hangs.
    tokio::time::timeout(Duration::from_secs(20), tour()).await?
}

// ===== Server =====

fn server(limit: ConcurrencyLimitLayer) -> Router {
    let places = limit.handle();
    let limited = Router::new()
        .route("/events", get(events))
        .route("/socket", any(socket))
        .layer(limit.upgrades().respond());
    // This route acquires permits of the same limit by hand. It is outside of the layer, which rejects before the
    // upgrade.
    let polite = Router::new().route("/polite", any(polite_socket)).with_state(places);
    limited.merge(polite)
}

/// The limit needs no code here: the permit is held until the end of the response body, which is the stream.
async fn events() -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let ticks = stream::unfold(0_u32, |n| async move {
        sleep(Duration::from_millis(20)).await;
        Some((Ok(Event::default().data(format!("tick {n}"))), n + 1))
    });
    // Without the comments of `KeepAlive`, the server does not detect that a browser has left a stream without events.
    Sse::new(ticks).keep_alive(KeepAlive::default())
}

/// Keeps the permit of the call for the WebSocket. The layer rejects the call before the upgrade if the limit is full.
async fn socket(upgrade: WebSocketUpgrade, Extension(held): Extension<CallPermit>) -> Response {
    let place = held.take();
    upgrade.on_upgrade(move |socket| echo(socket, place))
}

/// Always upgrades. If the limit is full, it closes the WebSocket with 1013 (try again later), because browsers do not
/// expose the status of a failed handshake to scripts.
async fn polite_socket(
    upgrade: WebSocketUpgrade,
    State(places): State<ConcurrencyLimitHandle>,
) -> Response {
    match places.try_acquire() {
        Ok(place) => upgrade.on_upgrade(move |socket| echo(socket, Some(place))),
        Err(refused) => upgrade.on_upgrade(async move |mut socket| {
            let frame = CloseFrame { code: 1013, reason: refused.kind().as_str().into() };
            let _ = socket.send(Message::Close(Some(frame))).await;
        }),
    }
    .into_response()
}

/// Holds the permit as long as the WebSocket is open.
async fn echo(mut socket: WebSocket, _place: Option<OwnedPermit>) {
    while let Some(Ok(message)) = socket.recv().await {
        if let Message::Text(_) = message {
            if socket.send(message).await.is_err() {
                return;
            }
        }
    }
}

// ===== Clients =====

async fn tour() -> Result<(), BoxError> {
    let limit = ConcurrencyLimitLayer::new(3);
    let places = limit.handle();
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    let app = server(limit);
    tokio::spawn(async move { axum::serve(listener, app).await });

    println!("Three permits; a browser acquires one for events and two for WebSockets:");
    let mut events = listen(addr).await?;
    check(events.status() == StatusCode::OK, "the events flow")?;
    let heard = events.frame().await.ok_or("no event")??;
    let heard = heard.into_data().map_err(|_| "no data")?;
    check(heard.starts_with(b"data: tick 0"), "the first event has arrived")?;
    let mut first = dial(addr, "socket").await?;
    let mut second = dial(addr, "polite").await?;
    check(says(&mut first).await? && says(&mut second).await?, "both sockets echo")?;
    check(places.in_flight() == 3, "3 permits are held")?;

    println!("Full:");
    let refused = listen(addr).await?;
    let later = refused.headers().contains_key("retry-after");
    check(
        refused.status() == StatusCode::SERVICE_UNAVAILABLE && later,
        "events: 503, Retry-After",
    )?;
    let told = match dial(addr, "socket").await {
        Err(WsError::Http(answer)) => answer.status() == StatusCode::SERVICE_UNAVAILABLE,
        _ => false,
    };
    check(told, "a WebSocket: 503 before the upgrade")?;
    let mut polite = dial(addr, "polite").await?;
    let code = match polite.next().await {
        Some(Ok(Said::Close(Some(frame)))) => u16::from(frame.code),
        _ => 0,
    };
    check(code == 1013, "or close code 1013 after the upgrade")?;
    check(places.snapshot().rejected_full == 3, "3 rejections were counted")?;

    println!("The browser closes the events:");
    drop(events);
    free(&places, 1).await?;
    let mut third = dial(addr, "socket").await?;
    check(says(&mut third).await?, "a WebSocket acquired the permit")?;

    println!("One WebSocket is closed properly, the connections of the others break:");
    first.send(Said::Close(None)).await?;
    drop((second, third));
    free(&places, 3).await?;
    check(places.in_flight() == 0, "all permits have been released")
}

async fn listen(addr: SocketAddr) -> Result<http::Response<Incoming>, BoxError> {
    let request = Request::get(format!("http://{addr}/events")).body(Empty::<Bytes>::new())?;
    Ok(Client::builder(TokioExecutor::new()).build_http().request(request).await?)
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn dial(addr: SocketAddr, path: &str) -> Result<Socket, WsError> {
    Ok(connect_async(format!("ws://{addr}/{path}")).await?.0)
}

/// Returns whether the server echoes a message.
async fn says(socket: &mut Socket) -> Result<bool, BoxError> {
    socket.send(Said::text("hello")).await?;
    Ok(socket.next().await.ok_or("closed")?? == Said::text("hello"))
}

/// Waits until this number of the three permits is available. The server detects a disconnected client with a delay.
async fn free(places: &ConcurrencyLimitHandle, wanted: u32) -> Result<(), BoxError> {
    for _ in 0..500 {
        if places.in_flight() + wanted <= 3 {
            return check(true, "the permit was released");
        }
        sleep(Duration::from_millis(10)).await;
    }
    check(false, "the permit was released")
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("  {} {claim}", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
