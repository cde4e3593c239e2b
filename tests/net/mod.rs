//! What the end-to-end tests share: servers on loopback, and eyes of their own on what is in flight.
#![allow(dead_code)] // Every test file takes what it needs.

pub mod balancer;

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};

/// How long anything here may take before the test has failed.
const PATIENCE: Duration = Duration::from_secs(10);

// ===== Waiting, with an end =====

/// `future`, which must be done soon.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

/// Waits until `holds`: for what another task or the other side of a connection does.
#[track_caller]
pub fn until(mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "never held: {at}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

// ===== What is in flight =====

/// Counts what is inside, and the most there ever was. Knows nothing of the layers' own gauges.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<(AtomicUsize, AtomicUsize, AtomicUsize)>);

impl Gauge {
    pub fn enter(&self) -> Inside {
        self.0.2.fetch_add(1, Ordering::SeqCst);
        let now = self.0.0.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.1.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }

    pub fn now(&self) -> usize {
        self.0.0.load(Ordering::SeqCst)
    }

    pub fn peak(&self) -> usize {
        self.0.1.load(Ordering::SeqCst)
    }

    /// How many have ever come in.
    pub fn total(&self) -> usize {
        self.0.2.load(Ordering::SeqCst)
    }
}

#[derive(Debug)]
pub struct Inside(Gauge);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

// ===== Handlers that end when they are told to =====

/// What every handler of a test shares: who is inside, and a gate that lets calls come to their end.
#[derive(Clone, Debug)]
pub struct Stage {
    pub inside: Gauge,
    pub gate: Arc<Semaphore>,
}

impl Default for Stage {
    fn default() -> Self {
        Self { inside: Gauge::default(), gate: Arc::new(Semaphore::new(0)) }
    }
}

impl Stage {
    /// Lets every call end, now and later.
    pub fn open(&self) {
        self.gate.add_permits(1_000_000);
    }

    async fn pass(&self) {
        self.gate.acquire().await.expect("the gate is never closed").forget();
    }

    /// Answers `hello` once the gate lets it.
    pub async fn plain(self) -> &'static str {
        let _inside = self.inside.enter();
        self.pass().await;
        "hello"
    }

    /// A head and one chunk at once, the second chunk once the gate lets it; inside to the end.
    pub async fn streaming(self) -> Body {
        self.chunks([Ok("hel"), Ok("lo")])
    }

    /// One chunk, then an error: the connection is cut under the answer.
    pub async fn breaking_off(self) -> Body {
        self.chunks([Ok("hel"), Err("cut off")])
    }

    /// The first at once, every other once the gate lets it.
    fn chunks<const N: usize>(self, chunks: [Result<&'static str, &'static str>; N]) -> Body {
        let start = (self.inside.enter(), chunks.into_iter(), true);
        let chunks = stream::unfold(start, move |(inside, mut chunks, first)| {
            let stage = self.clone();
            async move {
                let chunk = chunks.next()?;
                if !first {
                    stage.pass().await;
                }
                Some((
                    chunk.map(|chunk| Bytes::from_static(chunk.as_bytes())),
                    (inside, chunks, false),
                ))
            }
        });
        // Compression polls once more after the end.
        Body::from_stream(chunks.fuse())
    }
}

// ===== Both ends =====

pub async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// An address where nobody listens.
pub async fn nobody() -> SocketAddr {
    listener().await.1
}

/// Serves `router` with `axum::serve` for as long as the test's runtime lives.
pub async fn serve(router: Router) -> SocketAddr {
    let (listener, addr) = listener().await;
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    addr
}

pub type HyperClient<B = Empty<Bytes>> = Client<HttpConnector, B>;

pub fn client<B>() -> HyperClient<B>
where
    B: http_body::Body + Send,
    B::Data: Send,
{
    Client::builder(TokioExecutor::new()).build_http()
}

pub fn get(addr: SocketAddr, path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://{addr}{path}")).body(Empty::new()).unwrap()
}

/// An answer that has been read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Starts one request for each path, all at once, each read to its end.
pub fn send_all(
    addr: SocketAddr,
    paths: impl IntoIterator<Item = &'static str>,
) -> JoinSet<Answer> {
    let client = client::<Empty<Bytes>>();
    let mut calls = JoinSet::new();
    for path in paths {
        let client = client.clone();
        calls.spawn(async move {
            let (head, body) = client.request(get(addr, path)).await.unwrap().into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            Answer { status: head.status, headers: head.headers, body }
        });
    }
    calls
}

/// The next `n` answers.
pub async fn answers(calls: &mut JoinSet<Answer>, n: usize) -> Vec<Answer> {
    let mut answers = Vec::with_capacity(n);
    for _ in 0..n {
        answers.push(soon(calls.join_next()).await.expect("another answer").unwrap());
    }
    answers
}

// ===== Upstreams that misbehave below HTTP =====

/// Takes connections, reads the start of a request, writes `answer`, and closes.
pub async fn closes_after(answer: &'static [u8]) -> SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (listener, addr) = listener().await;
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let _ = tcp.read(&mut [0; 1024]).await;
                let _ = tcp.write_all(answer).await;
            });
        }
    });
    addr
}

/// Half of an answer: the length says ten bytes, five come.
pub const HALF: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";

/// Takes connections and says nothing, ever.
pub async fn never_answers() -> (SocketAddr, Gauge) {
    use tokio::io::AsyncReadExt;
    let ((listener, addr), connected) = (listener().await, Gauge::default());
    let gauge = connected.clone();
    tokio::spawn(async move {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let inside = gauge.enter();
            tokio::spawn(async move {
                let _inside = inside;
                while !matches!(tcp.read(&mut [0; 1024]).await, Ok(0) | Err(_)) {}
            });
        }
    });
    (addr, connected)
}

/// Serves `router` and counts the connections it is called over.
pub async fn serve_counting(router: Router) -> (SocketAddr, Gauge) {
    use axum::serve::ListenerExt;
    let ((listener, addr), connections) = (listener().await, Gauge::default());
    let gauge = connections.clone();
    let listener = listener.tap_io(move |_| drop(gauge.enter()));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (addr, connections)
}
