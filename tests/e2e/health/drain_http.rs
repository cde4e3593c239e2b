//! A server that drains, over HTTP/1 and HTTP/2. Calls that arrive before the end of the delay are served, later calls
//! are not accepted, and the server ends.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Extension, Router, body::Body, extract::ConnectInfo, routing::get};
use buttress::{
    Health, Lifecycle,
    lifecycle::{Drain, Drained, LifecyclePhase},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::StatusCode;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use crate::support::net::{
    Gauge, HyperClient, Stage, ask, client as http1, get as request, listener, soon, until,
};

fn http2() -> HyperClient {
    Client::builder(TokioExecutor::new()).http2_only(true).build_http()
}

/// Streams one event at once, and one more at *stopping*.
fn events(open: Gauge, drain: &Drain) -> Body {
    let inside = open.enter();
    let ticks = stream::once(async { "tick " }).chain(stream::pending());
    let bye = stream::once(async move {
        let _inside = inside;
        "bye"
    });
    let stopping = Box::pin(drain.stopping());
    Body::from_stream(ticks.take_until(stopping).chain(bye).map(Ok::<_, std::io::Error>))
}

struct Server {
    addr: SocketAddr,
    health: Health,
    lifecycle: Lifecycle,
    stage: Stage,
    streams: Gauge,
    quick: Arc<AtomicUsize>,
    task: JoinHandle<Drained>,
}

async fn server(delay: Duration, longest: Duration) -> Server {
    let health = Health::new();
    let lifecycle =
        Lifecycle::without_signals(&health).unwrap().drain_delay(delay).drain_timeout(longest);
    let (stage, streams, quick) =
        (Stage::default(), Gauge::default(), Arc::<AtomicUsize>::default());
    let (work, open, hits) = (stage.clone(), streams.clone(), quick.clone());
    let app = Router::new()
        .route("/work", get(move || work.clone().plain()))
        .route(
            "/quick",
            get(move || {
                hits.fetch_add(1, SeqCst);
                async { "quick" }
            }),
        )
        .route("/events", get(async move |Extension(drain): Extension<Drain>| events(open, &drain)))
        .route("/deaf", get(async || Body::from_stream(stream::pending::<Result<Bytes, String>>())))
        .route("/peer", get(async |ConnectInfo(peer): ConnectInfo<SocketAddr>| peer.to_string()))
        .layer(health.endpoints());
    let (listener, addr) = listener().await;
    let server = lifecycle.clone();
    let task = tokio::spawn(async move {
        server
            .serve_each(listener, move |peer| app.clone().layer(Extension(ConnectInfo(peer))))
            .await
    });
    lifecycle.ready();
    Server { addr, health, lifecycle, stage, streams, quick, task }
}

/// Opens a connection and sends one request over it. The connection is idle afterwards.
async fn idle(addr: SocketAddr) -> TcpStream {
    let mut tcp = TcpStream::connect(addr).await.unwrap();
    tcp.write_all(b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"quick") {
        let mut some = [0; 256];
        let read = soon(tcp.read(&mut some)).await.unwrap();
        assert!(read > 0, "closed too early");
        answer.extend_from_slice(&some[..read]);
    }
    tcp
}

async fn is_closed(mut tcp: TcpStream) {
    let read = soon(tcp.read(&mut [0; 16])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "the server wrote to an idle connection");
}

async fn nothing_is_lost(client: impl Fn() -> HyperClient) {
    let (delay, longest) = (Duration::from_millis(800), Duration::from_secs(20));
    let Server { addr, health, lifecycle, stage, streams, quick, task } =
        server(delay, longest).await;

    let mut calls = JoinSet::new();
    // Several calls share a connection if the protocol allows it.
    let clients: Vec<_> = (0..20).map(|_| client()).collect();
    for n in 0..200 {
        let client = clients[n % clients.len()].clone();
        calls.spawn(async move { ask(&client, addr, "/work").await });
    }
    let mut open = JoinSet::new();
    for client in &clients {
        let client = client.clone();
        open.spawn(async move { ask(&client, addr, "/events").await });
    }
    let mut idles = Vec::new();
    for _ in 0..10 {
        idles.push(idle(addr).await);
    }
    // Connections without any request.
    for _ in 0..3 {
        idles.push(TcpStream::connect(addr).await.unwrap());
    }
    until(|| stage.inside.now() == 200 && streams.now() == 20).await;
    assert_eq!(soon(ask(&http1(), addr, "/readyz")).await.unwrap().0, 200);
    assert_eq!(lifecycle.in_flight(), 220);

    let began = Instant::now();
    lifecycle.drain();
    until(|| lifecycle.phase() == LifecyclePhase::Draining).await;
    assert!(!health.is_ready());
    assert_eq!(soon(ask(&client(), addr, "/readyz")).await.unwrap().0, 503);
    assert_eq!(soon(ask(&client(), addr, "/livez")).await.unwrap().0, 200);
    // Calls are still served, over new connections and over existing ones.
    let new = soon(http1().request(request(addr, "/quick"))).await.unwrap();
    assert_eq!(
        (new.status().as_u16(), &new.headers()["connection"]),
        (200, &"close".parse().unwrap())
    );
    assert_eq!(soon(ask(&clients[0], addr, "/quick")).await.unwrap().1, "quick");
    assert!(soon(ask(&http1(), addr, "/peer")).await.unwrap().1.starts_with(b"127.0.0.1:"));

    // Clients that call without a pause. Each call is served until the delay ends.
    let mut load = JoinSet::new();
    for n in 0..8 {
        let (client, lifecycle) = (if n < 4 { http1() } else { http2() }, lifecycle.clone());
        load.spawn(async move {
            for answered in 0..100_000 {
                match ask(&client, addr, "/quick").await {
                    Ok((StatusCode::OK, _)) => {}
                    Ok((status, _)) => {
                        assert_eq!(status, 503);
                        assert!(
                            lifecycle.phase() >= LifecyclePhase::Stopping,
                            "rejected before the delay was over"
                        );
                        return answered;
                    }
                    Err(error) => {
                        assert!(
                            lifecycle.phase() >= LifecyclePhase::Stopping,
                            "lost before the delay was over: {error}"
                        );
                        return answered;
                    }
                }
            }
            panic!("the delay never ended")
        });
    }
    let before = quick.load(SeqCst);
    // Half of the calls in flight end within the delay, the other half after it.
    stage.gate.add_permits(100);
    let mut answered = 0;
    while answered < 100 {
        assert_eq!(
            soon(calls.join_next()).await.unwrap().unwrap().unwrap(),
            (StatusCode::OK, "hello".into())
        );
        answered += 1;
    }
    soon(lifecycle.stopping()).await;
    assert!(began.elapsed() >= delay);
    let mut load_answered = 0;
    while let Some(n) = soon(load.join_next()).await {
        load_answered += n.unwrap();
    }
    assert!(load_answered > 0 && quick.load(SeqCst) >= before);

    // Streams end with their last event instead of being cut. Idle connections are closed.
    while let Some(stream) = soon(open.join_next()).await {
        assert_eq!(stream.unwrap().unwrap(), (StatusCode::OK, "tick bye".into()));
    }
    for tcp in idles {
        is_closed(tcp).await;
    }
    let served = quick.load(SeqCst);
    for _ in 0..20 {
        assert!(soon(ask(&client(), addr, "/quick")).await.is_err(), "accepted after the delay");
    }
    assert_eq!(quick.load(SeqCst), served, "accepted after the delay");

    assert!(!task.is_finished(), "the server ended before its calls");
    stage.gate.add_permits(100);
    while let Some(call) = soon(calls.join_next()).await {
        assert_eq!(call.unwrap().unwrap(), (StatusCode::OK, "hello".into()));
    }
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
    assert!(began.elapsed() < longest);
    assert_eq!((lifecycle.in_flight(), stage.inside.total(), streams.total()), (0, 200, 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_over_http1_loses_no_call_and_accepts_none_after_the_delay() {
    nothing_is_lost(http1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_over_http2_loses_no_call_and_accepts_none_after_the_delay() {
    nothing_is_lost(http2).await;
}

#[tokio::test]
async fn endless_call_is_ended_at_the_drain_timeout_and_counted() {
    for client in [http1, http2] {
        let longest = Duration::from_millis(300);
        let Server { addr, lifecycle, stage, task, .. } = server(Duration::ZERO, longest).await;
        let mut calls = JoinSet::new();
        for path in ["/work", "/work", "/work", "/deaf", "/deaf"] {
            let client = client();
            calls.spawn(async move { ask(&client, addr, path).await });
        }
        until(|| stage.inside.now() == 3 && lifecycle.in_flight() == 5).await;
        let began = Instant::now();
        lifecycle.drain();
        let drained = soon(task).await.unwrap();
        assert_eq!((drained.cut_calls, drained.cut_connections), (5, 5));
        assert!(began.elapsed() >= longest);
        while let Some(call) = soon(calls.join_next()).await {
            assert!(call.unwrap().is_err(), "the client did not see the cut");
        }
        until(|| lifecycle.in_flight() == 0 && stage.inside.now() == 0).await;
    }
}

#[tokio::test]
async fn http2_connection_receives_goaway_and_its_calls_end() {
    let longest = Duration::from_secs(20);
    let Server { addr, lifecycle, stage, task, .. } = server(Duration::ZERO, longest).await;
    let tcp = TcpStream::connect(addr).await.unwrap();
    let (mut send, connection) = soon(h2::client::handshake(tcp)).await.unwrap();
    let connection = tokio::spawn(connection);
    let (response, _) = send.send_request(request(addr, "/work").map(drop), true).unwrap();
    until(|| stage.inside.now() == 1).await;
    lifecycle.drain();
    let told = soon(async {
        loop {
            match send.ready().await {
                Ok(again) => send = again,
                Err(error) => break error,
            }
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(told.is_go_away() && told.is_remote(), "{told}");
    assert_eq!(told.reason(), Some(h2::Reason::NO_ERROR));
    stage.open();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "hello");
    drop(body);
    soon(connection).await.unwrap().unwrap();
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}

#[tokio::test]
async fn a_server_that_is_dropped_cuts_everything_at_once() {
    let Server { addr, lifecycle, stage, task, .. } =
        server(Duration::from_secs(60), Duration::from_secs(60)).await;
    let call = tokio::spawn(async move { ask(&http1(), addr, "/work").await });
    until(|| stage.inside.now() == 1).await;
    task.abort();
    assert!(soon(call).await.unwrap().is_err());
    until(|| lifecycle.in_flight() == 0).await;
}

/// A `Connection` header of the service does not prevent the close.
#[tokio::test]
async fn a_drain_closes_connections_after_any_response() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let says = |how: &'static str| get(async move || ([("connection", how)], "here"));
    let app = Router::new().route("/keep", says("keep-alive")).route("/hop", says("x-hop"));
    let ((listener, addr), server) = (listener().await, lifecycle.clone());
    let task = tokio::spawn(async move { server.serve(listener, app).await });
    lifecycle.drain();
    for path in ["/keep", "/hop"] {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        tcp.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut said = String::new();
        soon(tcp.read_to_string(&mut said)).await.unwrap();
        assert!(said.ends_with("here") && said.contains("close"), "{said}");
    }
    lifecycle.skip_delay();
    assert_eq!(soon(task).await.unwrap().cut_connections, 0);
}

#[tokio::test]
async fn a_handler_that_panics_costs_its_own_connection_and_no_more() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap().drain_delay(Duration::ZERO);
    let app = Router::new()
        .route("/", get(async || "well"))
        .route("/panic", get(async || -> &str { panic!("on request") }));
    let ((listener, addr), server) = (listener().await, lifecycle.clone());
    let task = tokio::spawn(async move { server.serve(listener, app).await });
    for client in [http1(), http2()] {
        assert!(soon(ask(&client, addr, "/panic")).await.is_err());
        assert_eq!(soon(ask(&client, addr, "/")).await.unwrap().1, "well");
    }
    until(|| lifecycle.in_flight() == 0).await;
    lifecycle.drain();
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_does_not_delay_the_end_of_the_process() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let lifecycle = lifecycle.drain_delay(Duration::ZERO).drain_timeout(Duration::from_millis(100));
    let (go, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Arc::new(std::sync::Mutex::new(blocked));
    let (blocks, mut blocking) = tokio::sync::mpsc::unbounded_channel();
    let app = Router::new().route(
        "/",
        get(async move || {
            let _ = blocks.send(());
            let _ = blocked.lock().unwrap().recv();
        }),
    );
    let ((listener, addr), server) = (listener().await, lifecycle.clone());
    let task = tokio::spawn(async move { server.serve(listener, app).await });
    let call = tokio::spawn(async move { ask(&http1(), addr, "/").await });
    // Not within `soon`, because a timer may not fire here: the handler may block the thread that drives tokio's
    // timers. Another thread takes over only after an event from outside of the runtime's threads, such as the drain.
    blocking.recv().await.unwrap();
    assert_eq!(lifecycle.in_flight(), 1);
    lifecycle.drain();
    let drained = soon(task).await;
    drop(go);
    let drained = drained.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (1, 1));
    // The handler may still write its response after it has been unblocked.
    let _ = soon(call).await.unwrap();
}

/// The server does not track an upgraded connection. It waits for the guard instead.
#[tokio::test]
async fn a_websocket_with_a_guard_sends_its_close_message() {
    use axum::extract::ws::{CloseFrame, Message, WebSocketUpgrade};
    use tokio_tungstenite::{connect_async, tungstenite::Message as Said};

    let longest = Duration::from_secs(20);
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let lifecycle = lifecycle.drain_delay(Duration::ZERO).drain_timeout(longest);
    let socket = async |upgrade: WebSocketUpgrade, Extension(drain): Extension<Drain>| {
        let guard = drain.guard();
        upgrade.on_upgrade(async move |mut socket| {
            drain.stopping().await;
            let heard = socket.recv().await;
            let bye = CloseFrame { code: 1001, reason: "going away".into() };
            let _ = socket.send(Message::Close(Some(bye))).await;
            drop((guard, heard));
        })
    };
    let app = Router::new().route("/socket", axum::routing::any(socket));
    let ((listener, addr), server) = (listener().await, lifecycle.clone());
    let task = tokio::spawn(async move { server.serve(listener, app).await });
    let (mut socket, _) = soon(connect_async(format!("ws://{addr}/socket"))).await.unwrap();
    until(|| lifecycle.in_flight() == 1).await;
    let began = Instant::now();
    lifecycle.drain();
    sleep(Duration::from_millis(50)).await;
    assert!(!task.is_finished(), "the server ended before the socket");
    soon(futures_util::SinkExt::send(&mut socket, Said::text("the last word"))).await.unwrap();
    let Said::Close(Some(bye)) = soon(socket.next()).await.unwrap().unwrap() else {
        panic!("no close frame")
    };
    assert_eq!(bye.reason, "going away");
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
    assert!(began.elapsed() < longest);
}

/// On a paused clock, which advances while no data is received.
#[tokio::test(start_paused = true)]
async fn silent_connections_are_closed() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let ((listener, addr), server) = (listener().await, lifecycle.clone());
    let _task = tokio::spawn(async move { server.serve(listener, Router::new()).await });
    for (word, closed_after) in [("", 30), ("GET", 30), ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", 660)]
    {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        tcp.write_all(word.as_bytes()).await.unwrap();
        // A paused clock advances whenever all tasks are idle, so the server has to accept the connection before that.
        for _ in 0..500 {
            tokio::task::yield_now().await;
        }
        let (began, mut said) = (Instant::now(), Vec::new());
        let read = timeout(Duration::from_secs(3600), tcp.read_to_end(&mut said)).await;
        assert!(read.is_ok(), "the connection is open after {word:?}");
        assert_eq!(began.elapsed().as_secs(), closed_after, "{word:?}");
        assert_eq!(said.starts_with(b"HTTP/1.1 404"), word.len() > 3);
    }
}

#[tokio::test]
async fn websockets_are_served_over_http2() {
    let Server { addr, .. } = server(Duration::ZERO, Duration::ZERO).await;
    let tcp = TcpStream::connect(addr).await.unwrap();
    let (send, connection) = soon(h2::client::handshake(tcp)).await.unwrap();
    tokio::spawn(connection);
    until(|| send.is_extended_connect_protocol_enabled()).await;
}

/// Without a grace. `e2e::drain` has the test with one.
#[tokio::test]
async fn layer_rejects_calls_under_a_server_without_graceful_shutdown() {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    let lifecycle = lifecycle.drain_delay(Duration::ZERO).grace(Duration::ZERO);
    let app = Router::new().route("/", get(async || "well")).layer(lifecycle.layer());
    let addr = crate::support::net::serve(app).await;
    let client = http1();
    assert_eq!(soon(ask(&client, addr, "/")).await.unwrap().0, 200);
    lifecycle.drain();
    soon(lifecycle.stopping()).await;
    let refused = soon(client.request(request(addr, "/"))).await.unwrap();
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["connection"]),
        (503, &"close".parse().unwrap())
    );
}

/// The parts alone: a connection of hyper under the stop signal and the layer of a `Lifecycle`.
#[tokio::test]
async fn bare_hyper_drains_with_the_stop_signal_and_the_layer() {
    use hyper_util::{
        rt::TokioIo, server::graceful::GracefulShutdown, service::TowerToHyperService,
    };
    use tower::Layer;

    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap().drain_delay(Duration::ZERO);
    let stage = Stage::default();
    let work = stage.clone();
    let app = Router::new().route("/work", get(move || work.clone().plain()));
    let service = TowerToHyperService::new(lifecycle.layer().layer(app));
    let ((listener, addr), end) = (listener().await, lifecycle.clone());
    let server = tokio::spawn(async move {
        let graceful = GracefulShutdown::new();
        let stopping = end.stopping();
        let server = async {
            let mut stopping = std::pin::pin!(stopping);
            loop {
                let (stream, _) = tokio::select! {
                    () = &mut stopping => break,
                    accepted = listener.accept() => accepted?,
                };
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service.clone());
                tokio::spawn(graceful.watch(connection));
            }
            graceful.shutdown().await;
            Ok::<_, std::io::Error>(())
        };
        end.run(server).await
    });
    let call = tokio::spawn(async move { ask(&http1(), addr, "/work").await });
    until(|| stage.inside.now() == 1).await;
    lifecycle.drain();
    soon(lifecycle.stopping()).await;
    sleep(Duration::from_millis(20)).await;
    assert!(!server.is_finished());
    stage.open();
    assert_eq!(soon(call).await.unwrap().unwrap().1, "hello");
    assert_eq!(soon(server).await.unwrap().unwrap().cut_calls, 0);
}
