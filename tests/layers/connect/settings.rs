//! HTTP/2 connections that the server changes while they are open: later SETTINGS, GOAWAY, 421.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    routing::{any, get, post},
};
use buttress::connect::{Client, ConnectLayer};
use bytes::Bytes;
use http::{StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep},
};
use tower::Service;

use super::fixtures::request;
use crate::support::{
    net::{Stage, soon},
    pipe::Pipe,
    settle,
};

const SECOND: Duration = Duration::from_secs(1);

// ===== A server whose frames the test controls =====

/// Connects to a server of its own, whose SETTINGS the test replaces.
#[derive(Clone)]
struct Wires {
    stage: Stage,
    /// The maximum in the first SETTINGS.
    max_streams: u32,
    /// The first SETTINGS arrive once this is true.
    sends_settings: watch::Sender<bool>,
    /// Bytes arrive in pieces of this size.
    piece: usize,
    /// Negotiated by ALPN, for `https`.
    is_http2: Arc<Mutex<bool>>,
    alpn: bool,
    fails: Arc<Mutex<bool>>,
    dawdles: Duration,
    wires: Arc<Mutex<Vec<WireHandle>>>,
}

#[derive(Clone)]
struct WireHandle {
    frames: mpsc::UnboundedSender<Vec<u8>>,
    goaway: Arc<Notify>,
    /// Cuts the connection.
    cut: Arc<Notify>,
}

impl Wires {
    fn new(max_streams: u32) -> Self {
        Self {
            stage: Stage::default(),
            max_streams,
            sends_settings: watch::Sender::new(true),
            piece: usize::MAX,
            is_http2: Arc::new(Mutex::new(true)),
            alpn: false,
            fails: Arc::default(),
            dawdles: Duration::ZERO,
            wires: Arc::default(),
        }
    }

    fn wire(&self, nth: usize) -> WireHandle {
        self.wires.lock().unwrap()[nth].clone()
    }

    fn count(&self) -> usize {
        self.wires.lock().unwrap().len()
    }

    fn client(&self, layer: &ConnectLayer) -> Wired {
        let builder = Client::builder(layer.clone());
        if self.alpn {
            builder.build(self.clone())
        } else {
            builder.http2_only().build(self.clone())
        }
    }

    fn router(&self) -> Router {
        let (plain, streaming) = (self.stage.clone(), self.stage.clone());
        Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/second", get(|| sleep(SECOND)))
            .route("/echo", post(|body: Bytes| async { body }))
            .route("/slow", any(move || plain.plain()))
            .route("/stream", any(move || streaming.streaming()))
            .route("/misdirected", any(|| async { StatusCode::MISDIRECTED_REQUEST }))
    }
}

impl WireHandle {
    fn set_max_streams(&self, max: u32) {
        self.frames.send(settings(max)).unwrap();
    }
}

fn settings(max: u32) -> Vec<u8> {
    [&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3][..], &max.to_be_bytes()].concat()
}

type Wired = Client<Wires, Empty<Bytes>>;

async fn frame(from: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 9];
    from.read_exact(&mut frame).await?;
    let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]) as usize;
    frame.resize(9 + length, 0);
    from.read_exact(&mut frame[9..]).await?;
    Ok(frame)
}

const SETTINGS: u8 = 4;

impl Service<Uri> for Wires {
    type Response = Pipe;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Pipe>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if !this.dawdles.is_zero() {
                sleep(this.dawdles).await;
            }
            if *this.fails.lock().unwrap() {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let (near, far) = tokio::io::duplex(64 * 1024);
            let (frames, mut injected) = mpsc::unbounded_channel::<Vec<u8>>();
            let (goaway, cut) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
            let handle = WireHandle { frames, goaway: goaway.clone(), cut: cut.clone() };
            this.wires.lock().unwrap().push(handle);
            let service = TowerToHyperService::new(this.router());
            let is_http2 = *this.is_http2.lock().unwrap();
            tokio::spawn(async move {
                let io = TokioIo::new(far);
                if !is_http2 {
                    let server = hyper::server::conn::http1::Builder::new();
                    let _ = server.serve_connection(io, service).await;
                    return;
                }
                let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                server.max_concurrent_streams(1000);
                let mut serving = std::pin::pin!(server.serve_connection(io, service));
                tokio::select! {
                    _ = serving.as_mut() => return,
                    () = goaway.notified() => serving.as_mut().graceful_shutdown(),
                }
                let _ = serving.await;
            });
            let (mut from_client, mut to_client) = tokio::io::split(theirs);
            let (mut from_server, mut to_server) = tokio::io::split(near);
            let alpn = this.alpn && is_http2;
            if !is_http2 {
                tokio::spawn(async move {
                    let up = tokio::io::copy(&mut from_client, &mut to_server);
                    let down = tokio::io::copy(&mut from_server, &mut to_client);
                    tokio::select! { _ = up => {}, _ = down => {}, () = cut.notified() => {} }
                });
                return Ok(Pipe::new(ours).negotiated_http2(alpn));
            }
            tokio::spawn(async move {
                // The server has not sent the injected SETTINGS, so their acknowledgements are left out.
                let up = async {
                    let mut preface = [0; 24];
                    from_client.read_exact(&mut preface).await?;
                    to_server.write_all(&preface).await?;
                    let mut acks = 0;
                    loop {
                        let frame = frame(&mut from_client).await?;
                        if frame[3] == SETTINGS && frame[4] & 1 == 1 {
                            acks += 1;
                            if acks > 1 {
                                continue;
                            }
                        }
                        to_server.write_all(&frame).await?;
                    }
                    #[expect(unreachable_code)]
                    io::Result::Ok(())
                };
                let down = async {
                    let mut is_first = true;
                    let (sender, mut server_frames) = mpsc::channel(16);
                    tokio::spawn(async move {
                        while let Ok(frame) = frame(&mut from_server).await {
                            if sender.send(frame).await.is_err() {
                                return;
                            }
                        }
                    });
                    loop {
                        let mut next = tokio::select! {
                            biased;
                            Some(frame) = injected.recv(), if !is_first => frame,
                            frame = server_frames.recv() => match frame {
                                Some(frame) => frame,
                                None => return io::Result::Ok(()),
                            },
                        };
                        if std::mem::take(&mut is_first) {
                            assert_eq!(next[3], SETTINGS);
                            next = settings(this.max_streams);
                            let mut sends = this.sends_settings.subscribe();
                            sends.wait_for(|sends| *sends).await.unwrap();
                        }
                        for piece in next.chunks(this.piece) {
                            to_client.write_all(piece).await?;
                            if this.piece < 100 {
                                tokio::task::yield_now().await;
                            }
                        }
                    }
                };
                tokio::select! { _ = up => {}, _ = down => {}, () = cut.notified() => {} }
            });
            Ok(Pipe::new(ours).negotiated_http2(alpn))
        })
    }
}

async fn ask(client: &Wired, uri: &str) -> Result<Bytes, buttress::BoxError> {
    let response = client.request(request(uri)).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}

async fn pause() {
    for _ in 0..10 {
        settle().await;
    }
    sleep(Duration::from_millis(1)).await;
}

// ===== Later SETTINGS =====

/// APNs allows 1 stream until the first request is authenticated, and 1000 afterwards.
#[tokio::test(start_paused = true)]
async fn maximum_that_the_server_raises_later_is_used() {
    for first in [0, 1] {
        let wires = Wires::new(first);
        let layer = ConnectLayer::new();
        let client = wires.client(&layer);
        let warm = tokio::spawn(client.request(request("http://a/")));
        pause().await;
        wires.wire(0).set_max_streams(100);
        soon(warm).await.unwrap().unwrap().into_body().collect().await.unwrap();
        pause().await;
        let calls: Vec<_> =
            (0..50).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
        pause().await;
        assert_eq!(wires.stage.inside.now(), 50, "{:?}", layer.handle().snapshot());
        assert_eq!(wires.count(), 1, "first {first}");
        wires.stage.open();
        for call in calls {
            call.await.unwrap().unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn raised_maximum_lets_queued_calls_through() {
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_per_host(1);
    let client = wires.client(&layer);
    let _held = client.request(request("http://a/stream")).await.unwrap();
    let waits = tokio::spawn(client.request(request("http://a/")));
    pause().await;
    assert_eq!(layer.handle().snapshot().waiting, 1);
    wires.wire(0).set_max_streams(2);
    let start = Instant::now();
    soon(waits).await.unwrap().unwrap();
    assert!(start.elapsed() < SECOND);
}

#[tokio::test(start_paused = true)]
async fn maximum_that_the_server_lowers_later_opens_another_connection() {
    for lowered in [1, 0] {
        let wires = Wires::new(100);
        let layer = ConnectLayer::new();
        let client = wires.client(&layer);
        let _held = client.request(request("http://a/stream")).await.unwrap();
        wires.wire(0).set_max_streams(lowered);
        pause().await;
        let start = Instant::now();
        soon(ask(&client, "http://a/")).await.unwrap();
        assert!(start.elapsed() < SECOND);
        assert_eq!(wires.count(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn settings_frame_in_pieces_or_late_is_read() {
    let mut wires = Wires::new(3);
    wires.piece = 1;
    let (sends, layer) = (wires.sends_settings.clone(), ConnectLayer::new().max_per_host(4));
    sends.send_replace(false);
    let client = wires.client(&layer);
    let calls: Vec<_> =
        (0..12).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
    sleep(SECOND).await;
    assert_eq!(wires.count(), 1);
    sends.send_replace(true);
    sleep(SECOND).await;
    assert_eq!((wires.stage.inside.now(), wires.count()), (12, 4));
    wires.stage.open();
    for call in calls {
        call.await.unwrap().unwrap();
    }
}

/// Without SETTINGS the peer has no limit, and calls are sent.
#[tokio::test(start_paused = true)]
async fn connection_without_settings_is_closed_after_its_cancelled_calls() {
    let wires = Wires::new(3);
    wires.sends_settings.send_replace(false);
    let layer = ConnectLayer::new().max_per_host(4).connect_timeout(SECOND);
    let client = wires.client(&layer);
    let calls: Vec<_> =
        (0..12).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
    sleep(2 * SECOND).await;
    calls.iter().for_each(|call| call.abort());
    sleep(20 * SECOND).await;
    let seen = layer.handle().snapshot();
    assert_eq!((seen.open, seen.waiting, seen.in_use), (0, 0, 0), "{seen:?}");
}

// ===== Connections that take no more calls =====

#[tokio::test(start_paused = true)]
async fn connection_that_drains_after_goaway_takes_no_calls_and_no_permits() {
    for per_host in [2, 8] {
        let wires = Wires::new(3);
        let layer = ConnectLayer::new().max_per_host(per_host).connect_timeout(SECOND);
        let client = wires.client(&layer);
        let _held = client.request(request("http://a/stream")).await.unwrap();
        wires.wire(0).goaway.notify_one();
        pause().await;
        let calls: Vec<_> =
            (0..6).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
        sleep(SECOND / 2).await;
        let seen = layer.handle().snapshot();
        // One connection drains; the others have three streams each.
        let expected = 3 * (per_host - 1).min(2);
        assert_eq!(
            (wires.stage.inside.now() - 1, seen.waiting),
            (expected, 6 - expected),
            "{seen:?} {}",
            wires.count()
        );
        wires.stage.open();
        for call in calls {
            soon(call).await.unwrap().unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn calls_use_a_new_connection_and_not_a_recycled_one() {
    let wires = Wires::new(100);
    let layer = ConnectLayer::new().max_per_host(2);
    let (client, handle) = (wires.client(&layer), layer.handle());
    ask(&client, "http://a/").await.unwrap();
    // At each time some call is in flight.
    let load = tokio::spawn({
        let client = client.clone();
        async move {
            let mut before = tokio::spawn(client.request(request("http://a/second")));
            loop {
                sleep(SECOND / 2).await;
                let next = tokio::spawn(client.request(request("http://a/second")));
                std::mem::replace(&mut before, next).await.unwrap().unwrap();
            }
        }
    });
    sleep(3 * SECOND).await;
    assert_eq!(wires.count(), 1);
    handle.recycle();
    sleep(10 * SECOND).await;
    assert!(!load.is_finished());
    let seen = handle.snapshot();
    assert_eq!((seen.created, seen.open), (2, 1), "the old connection is closed: {seen:?}");
}

#[tokio::test(start_paused = true)]
async fn recycled_connection_takes_no_permits_while_no_permit_is_free() {
    let wires = Wires::new(100);
    let layer = ConnectLayer::new().max_per_host(2);
    let (client, handle) = (wires.client(&layer), layer.handle());
    let held = client.request(request("http://a/stream")).await.unwrap();
    let in_flight = tokio::spawn(client.request(request("http://a/second")));
    pause().await;
    handle.recycle();
    in_flight.await.unwrap().unwrap();
    let start = Instant::now();
    for nth in 0..3 {
        ask(&client, "http://a/")
            .await
            .unwrap_or_else(|e| panic!("{nth} {:?}: {e}", start.elapsed()));
    }
    assert!(start.elapsed() < SECOND);
    drop(held);
    pause().await;
    assert_eq!(handle.snapshot().open, 1);
}

#[tokio::test(start_paused = true)]
async fn misdirected_connection_is_closed_for_another_at_once() {
    for per_host in [1, 2] {
        let wires = Wires::new(100);
        let layer = ConnectLayer::new().max_per_host(per_host);
        let (client, handle) = (wires.client(&layer), layer.handle());
        ask(&client, "http://a/").await.unwrap();
        let start = Instant::now();
        ask(&client, "http://a/misdirected").await.unwrap();
        ask(&client, "http://a/").await.unwrap();
        ask(&client, "http://a/").await.unwrap();
        assert!(start.elapsed() < SECOND / 10, "{:?}", start.elapsed());
        assert_eq!((wires.count(), handle.snapshot().open), (2, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn misdirected_connection_with_an_open_stream_takes_no_more_calls() {
    let wires = Wires::new(2);
    let layer = ConnectLayer::new().max_per_host(2);
    let (client, handle) = (wires.client(&layer), layer.handle());
    let _held = client.request(request("http://a/stream")).await.unwrap();
    ask(&client, "http://a/misdirected").await.unwrap();
    let calls: Vec<_> =
        (0..3).map(|_| tokio::spawn(client.request(request("http://a/slow")))).collect();
    sleep(SECOND).await;
    let seen = handle.snapshot();
    assert_eq!((wires.stage.inside.now() - 1, seen.waiting), (2, 1), "{seen:?}");
    wires.stage.open();
    for call in calls {
        soon(call).await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn call_waits_in_the_queue_and_not_inside_a_recycled_connection() {
    let wires = Wires::new(1);
    let layer = ConnectLayer::new();
    let (client, handle) = (wires.client(&layer), layer.handle());
    let mut held = Vec::new();
    for _ in 0..64 {
        held.push(client.request(request("http://a/stream")).await.unwrap());
    }
    handle.recycle();
    pause().await;
    let call = tokio::spawn(client.request(request("http://a/")));
    sleep(SECOND).await;
    let seen = handle.snapshot();
    assert!(call.is_finished() || seen.waiting == 1, "{seen:?}");
    held.pop();
    soon(call).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn calls_prefer_a_connection_that_is_not_to_be_closed() {
    let wires = Wires::new(100);
    let layer = ConnectLayer::new().max_per_host(2);
    let (client, handle) = (wires.client(&layer), layer.handle());
    let held = client.request(request("http://a/stream")).await.unwrap();
    handle.recycle();
    pause().await;
    ask(&client, "http://a/").await.unwrap();
    assert_eq!(wires.count(), 2);
    // At each time some call is in flight.
    let mut before = tokio::spawn(client.request(request("http://a/second")));
    sleep(SECOND / 2).await;
    drop(held);
    for _ in 0..9 {
        let next = tokio::spawn(client.request(request("http://a/second")));
        std::mem::replace(&mut before, next).await.unwrap().unwrap();
        sleep(SECOND / 2).await;
    }
    let seen = handle.snapshot();
    assert_eq!((seen.created, seen.open), (2, 1), "the old connection is closed: {seen:?}");
}

/// Two hosts wait for the last permit of the total: it does not pass back and forth between them.
#[tokio::test(start_paused = true)]
async fn calls_of_two_hosts_that_wait_for_the_same_permit_acquire_it_in_order() {
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_total(3).max_idle(60 * SECOND);
    let client = wires.client(&layer);
    let stream =
        |host: &str| tokio::spawn(client.request(request(&format!("http://{host}/stream"))));
    let _held = (stream("a").await.unwrap().unwrap(), stream("b").await.unwrap().unwrap());
    let last = stream("c").await.unwrap().unwrap();
    let waits = [stream("a"), stream("b")];
    pause().await;
    assert_eq!(layer.handle().snapshot().waiting, 2);
    drop(last);
    let [one, other] = waits;
    let one = soon(one).await.unwrap().unwrap();
    drop((_held, one));
    soon(other).await.unwrap().unwrap();
}

/// Whatever happens to connections and calls, each call ends, and nothing stays behind.
#[tokio::test(start_paused = true)]
async fn no_call_hangs_and_no_stream_is_lost_in_any_schedule() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut wires = Wires::new(random.u32(1..4));
        wires.alpn = random.bool();
        *wires.is_http2.lock().unwrap() = !wires.alpn || random.bool();
        let scheme = if wires.alpn { "https" } else { "http" };
        wires.dawdles = Duration::from_millis(random.u64(..20));
        let mut layer = ConnectLayer::new().max_idle(2 * SECOND).queue(100, 2 * SECOND);
        if random.bool() {
            layer = layer.max_per_host(random.usize(1..4));
        }
        if random.bool() {
            layer = layer.max_total(random.usize(2..6));
        }
        let (client, handle) = (wires.client(&layer), layer.handle());
        wires.stage.open();
        let calls: Vec<_> = (0..150)
            .map(|_| {
                let (client, mut random) = (client.clone(), random.fork());
                let host = random.choice(["a", "a", "a", "b", "c"]).unwrap();
                let path = random.choice(["", "second", "stream", "slow", "misdirected"]).unwrap();
                tokio::spawn(async move {
                    sleep(Duration::from_millis(random.u64(..4000))).await;
                    let uri = format!("{scheme}://{host}/{path}");
                    let call = ask(&client, &uri);
                    let max = if random.bool() { random.u64(..1500) } else { 30_000 };
                    let max = Duration::from_millis(max);
                    let ended = tokio::time::timeout(max, call).await;
                    assert!(ended.is_ok() || max < 2 * SECOND, "stuck");
                })
            })
            .collect();
        for _ in 0..40 {
            sleep(Duration::from_millis(random.u64(..200))).await;
            let nth = match wires.count() {
                0 => continue,
                made => wires.wire(random.usize(made.saturating_sub(5)..made)),
            };
            if wires.alpn && random.u8(..8) == 0 {
                let mut is_http2 = wires.is_http2.lock().unwrap();
                *is_http2 = !*is_http2;
            }
            match random.u8(..8) {
                0 => nth.cut.notify_one(),
                1 => nth.goaway.notify_one(),
                2 => handle.recycle(),
                3 => *wires.fails.lock().unwrap() = random.bool(),
                _ => drop(nth.frames.send(settings(random.u32(1..4)))),
            }
        }
        *wires.fails.lock().unwrap() = false;
        for call in calls {
            call.await.unwrap_or_else(|e| panic!("seed {seed}: {e} {:?}", handle.snapshot()));
        }
        for _ in 0..20 {
            let start = Instant::now();
            ask(&client, &format!("{scheme}://a/")).await.unwrap();
            assert!(start.elapsed() < SECOND, "seed {seed}: {:?}", start.elapsed());
        }
        sleep(20 * SECOND).await;
        let seen = handle.snapshot();
        let left = (seen.open, seen.in_use, seen.waiting, seen.connecting);
        assert_eq!(left, (0, 0, 0, 0), "seed {seed}: {seen:?}");
    }
}

/// A call that is to open the first connection of its host, and waits for a permit of the total.
#[tokio::test(start_paused = true)]
async fn wait_for_the_permit_of_a_first_connection_does_not_open_a_circuit() {
    use buttress::{CircuitBreakerLayer, Trip, breaker::CircuitState};
    use tower::{ServiceBuilder, ServiceExt};
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_total(1).queue(100, 60 * SECOND);
    let client = wires.client(&layer);
    let _held = client.request(request("http://b/stream")).await.unwrap();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let circuit = breaker.handle();
    let client = ServiceBuilder::new().layer(breaker).service(client);
    let call = client.clone().oneshot(request("http://a/"));
    tokio::time::timeout(3 * SECOND, call).await.unwrap_err();
    assert_eq!(layer.handle().snapshot().waiting, 0);
    assert_eq!(circuit.state(), CircuitState::Closed);
}

// ===== Several clients of one layer =====

#[tokio::test(start_paused = true)]
async fn queue_of_one_client_does_not_block_calls_of_another() {
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_per_host(2).max_idle(60 * SECOND);
    let (one, other) = (wires.client(&layer), wires.client(&layer));
    ask(&other, "http://a/").await.unwrap();
    let _held = one.request(request("http://a/stream")).await.unwrap();
    let waits = tokio::spawn(one.request(request("http://a/")));
    pause().await;
    assert_eq!(layer.handle().snapshot().waiting, 1);
    let start = Instant::now();
    ask(&other, "http://a/").await.unwrap();
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    waits.abort();
}

// ===== Versions of HTTP that TLS negotiates =====

#[tokio::test(start_paused = true)]
async fn negotiated_http2_opens_more_connections_from_the_first_calls_on() {
    for cap in [8, 1000] {
        let mut wires = Wires::new(1);
        wires.alpn = true;
        wires.dawdles = SECOND / 10;
        let layer = ConnectLayer::new().max_per_host(cap);
        let (client, handle) = (wires.client(&layer), layer.handle());
        let calls: Vec<_> =
            (0..8).map(|_| tokio::spawn(client.request(request("https://a/slow")))).collect();
        sleep(3 * SECOND).await;
        let seen = handle.snapshot();
        assert_eq!(
            wires.stage.inside.now() + seen.waiting,
            8,
            "none waits unnamed: {} {seen:?}",
            wires.stage.inside.now()
        );
        wires.stage.open();
        for call in calls {
            soon(call).await.unwrap().unwrap();
        }
    }
}

/// The first call connects, and then the others do concurrently.
#[tokio::test(start_paused = true)]
async fn negotiated_http1_connects_concurrently_after_the_first_connect() {
    for cap in [8, 1000] {
        let mut wires = Wires::new(1);
        (wires.alpn, wires.dawdles) = (true, SECOND / 10);
        *wires.is_http2.lock().unwrap() = false;
        let layer = ConnectLayer::new().max_per_host(cap).queue(0, SECOND);
        let (client, handle) = (wires.client(&layer), layer.handle());
        let calls: Vec<_> =
            (0..8).map(|_| tokio::spawn(client.request(request("https://a/slow")))).collect();
        sleep(SECOND / 20).await;
        assert_eq!((handle.snapshot().connecting, handle.snapshot().waiting), (1, 0));
        sleep(SECOND / 5).await;
        assert_eq!((wires.stage.inside.now(), wires.count()), (8, 8));
        wires.stage.open();
        for call in calls {
            soon(call).await.unwrap().unwrap().into_body().collect().await.unwrap();
        }
        // The version is known: the next calls use the idle connections at once.
        ask(&client, "https://a/").await.unwrap();
        assert_eq!(wires.count(), 8);
    }
}

#[tokio::test(start_paused = true)]
async fn call_that_stops_connecting_or_fails_is_replaced_by_the_next() {
    for (fails, http2) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut wires = Wires::new(1);
        (wires.alpn, wires.dawdles) = (true, SECOND / 10);
        *wires.is_http2.lock().unwrap() = http2;
        let layer = ConnectLayer::new().max_per_host(8);
        let (client, handle) = (wires.client(&layer), layer.handle());
        *wires.fails.lock().unwrap() = fails;
        let first = tokio::spawn(client.request(request("https://a/slow")));
        pause().await;
        let calls: Vec<_> =
            (0..8).map(|_| tokio::spawn(client.request(request("https://a/slow")))).collect();
        sleep(SECOND / 20).await;
        if fails {
            first.await.unwrap().unwrap_err();
            *wires.fails.lock().unwrap() = false;
        } else {
            first.abort();
        }
        sleep(3 * SECOND).await;
        let seen = handle.snapshot();
        assert_eq!((wires.stage.inside.now(), seen.open, seen.waiting), (8, 8, 0), "{seen:?}");
        wires.stage.open();
        for call in calls {
            soon(call).await.unwrap().unwrap();
        }
    }
}

/// Each waits for the first connect, and then connects itself.
#[tokio::test(start_paused = true)]
async fn calls_to_a_host_that_does_not_respond_fail_after_two_connect_timeouts() {
    let mut wires = Wires::new(1);
    (wires.alpn, wires.dawdles) = (true, 60 * SECOND);
    let layer = ConnectLayer::new().max_per_host(8).connect_timeout(SECOND);
    let (client, handle) = (wires.client(&layer), layer.handle());
    let start = Instant::now();
    let calls: Vec<_> =
        (0..8).map(|_| tokio::spawn(client.request(request("https://a/")))).collect();
    for call in calls {
        call.await.unwrap().unwrap_err();
        assert!(start.elapsed() <= 2 * SECOND + SECOND / 10, "{:?}", start.elapsed());
    }
    assert_eq!((handle.snapshot().timed_out, handle.snapshot().connecting), (8, 0));
}

/// A call that waits for the connect of another call counts against the upstream if its timeout is over.
#[tokio::test(start_paused = true)]
async fn connect_that_hangs_opens_a_circuit_for_every_call() {
    use buttress::{CircuitBreakerLayer, TimeoutLayer, Trip, breaker::CircuitState};
    use tower::{ServiceBuilder, ServiceExt};
    let mut wires = Wires::new(1);
    (wires.alpn, wires.dawdles) = (true, 60 * SECOND);
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(8));
    let circuit = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(breaker)
        .layer(TimeoutLayer::http().as_is().head(SECOND))
        .service(wires.client(&ConnectLayer::new()));
    let calls: Vec<_> =
        (0..8).map(|_| tokio::spawn(client.clone().oneshot(request("https://a/")))).collect();
    for call in calls {
        assert!(call.await.unwrap().is_err());
    }
    assert_eq!(circuit.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn server_that_negotiates_http1_after_http2_is_served() {
    let mut wires = Wires::new(1);
    wires.alpn = true;
    let layer = ConnectLayer::new().max_per_host(4);
    let (client, handle) = (wires.client(&layer), layer.handle());
    ask(&client, "https://a/").await.unwrap();
    *wires.is_http2.lock().unwrap() = false;
    let held = client.request(request("https://a/stream")).await.unwrap();
    let calls: Vec<_> =
        (0..9).map(|_| tokio::spawn(client.request(request("https://a/slow")))).collect();
    sleep(SECOND / 2).await;
    // The HTTP/2 connection is in use. The other permits are for HTTP/1.
    let seen = handle.snapshot();
    assert_eq!((wires.stage.inside.now() - 1, seen.waiting), (3, 6), "{seen:?}");
    wires.stage.open();
    for call in calls {
        soon(call).await.unwrap().unwrap().into_body().collect().await.unwrap();
    }
    drop(held);
    sleep(20 * SECOND).await;
    let seen = handle.snapshot();
    assert_eq!((seen.open, seen.waiting, seen.in_use), (0, 0, 0), "{seen:?}");
}

/// The calls use as many HTTP/1 connections as the cap allows, and reuse them.
#[tokio::test(start_paused = true)]
async fn connections_of_a_host_that_changed_to_http1_are_reused() {
    let mut wires = Wires::new(1);
    wires.alpn = true;
    let layer = ConnectLayer::new().max_per_host(4);
    let (client, handle) = (wires.client(&layer), layer.handle());
    ask(&client, "https://a/").await.unwrap();
    *wires.is_http2.lock().unwrap() = false;
    wires.wire(0).goaway.notify_one();
    wires.wire(0).cut.notify_one();
    for _ in 0..3 {
        let start = Instant::now();
        let calls = (0..12).map(|_| {
            let client = client.clone();
            tokio::spawn(async move { ask(&client, "https://a/second").await })
        });
        for call in calls.collect::<Vec<_>>() {
            soon(call).await.unwrap().unwrap();
        }
        assert!(start.elapsed() < 3 * SECOND + SECOND / 10, "{:?}", start.elapsed());
    }
    let seen = handle.snapshot();
    assert_eq!((seen.created, seen.open, seen.waiting), (5, 4, 0), "{seen:?}");
}

// ===== Additional connections that fail =====

#[tokio::test(start_paused = true)]
async fn failed_additional_connection_does_not_fail_a_call_that_a_stream_could_serve() {
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_per_host(4);
    let client = wires.client(&layer);
    let held = client.request(request("http://a/stream")).await.unwrap();
    *wires.fails.lock().unwrap() = true;
    let call = tokio::spawn(client.request(request("http://a/")));
    pause().await;
    drop(held);
    soon(call).await.unwrap().unwrap();
}

/// The request is sent unchanged, and a connect that failed is not repeated by the same call.
#[tokio::test(start_paused = true)]
async fn call_whose_additional_connection_failed_sends_its_request_over_a_stream() {
    use buttress::{CircuitBreakerLayer, Trip, breaker::CircuitState};
    use http_body_util::Full;
    use tower::{ServiceBuilder, ServiceExt};
    let wires = Wires::new(1);
    let layer = ConnectLayer::new().max_per_host(4);
    let handle = layer.handle();
    let client = Client::builder(layer).http2_only().build::<_, Full<Bytes>>(wires.clone());
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let circuit = breaker.handle();
    let stack = ServiceBuilder::new().layer(breaker).service(client.clone());
    let post = |body: &'static str| {
        http::Request::post("http://a/echo").header("kept", "1").body(Full::from(body)).unwrap()
    };
    for closes in [false, true] {
        let held = http::Request::get("http://a/stream").body(Full::default()).unwrap();
        let held = client.request(held).await.unwrap();
        *wires.fails.lock().unwrap() = true;
        let failed = handle.snapshot().failed;
        let calls = ["one", "other"].map(|body| tokio::spawn(stack.clone().oneshot(post(body))));
        pause().await;
        sleep(SECOND).await;
        let seen = handle.snapshot();
        assert_eq!((seen.failed - failed, seen.waiting, seen.connecting), (2, 2, 0), "{seen:?}");
        *wires.fails.lock().unwrap() = false;
        if closes {
            // Without a connection that takes calls, the call opens one.
            wires.wire(0).cut.notify_one();
        }
        drop(held);
        for (call, body) in calls.into_iter().zip(["one", "other"]) {
            let response = soon(call).await.unwrap().unwrap();
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), body);
        }
    }
    assert_eq!(circuit.state(), CircuitState::Closed);
}
