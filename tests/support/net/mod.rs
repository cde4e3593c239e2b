//! Shared by the end-to-end tests: servers on loopback, and gauges of the calls in flight that do not depend on the
//! gauges of the layers.

pub mod balancer;
pub mod raw;

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
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Semaphore,
    task::JoinSet,
};

/// Maximum time of a wait. A longer wait fails the test.
const PATIENCE: Duration = Duration::from_secs(10);

// ===== Bounded waits =====

/// Waits for a future, for at most [`PATIENCE`].
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

/// Waits until a condition holds that another task or the peer fulfils, for at most [`PATIENCE`].
#[track_caller]
pub fn until(mut holds: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let at = std::panic::Location::caller();
    async move {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while !holds() {
            assert!(tokio::time::Instant::now() < deadline, "did not hold in time: {at}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

// ===== Calls in flight =====

/// Counts the entries that are inside, their peak, and their total. Independent of the gauges of the layers.
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

    /// Returns the number of all entries since the start.
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

// ===== Handlers with a gate =====

/// State shared by the handlers of a test: a gauge of the calls in them, and a gate that each call passes before it
/// ends. A call takes one permit of the gate.
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
    /// Opens the gate for all current and later calls.
    pub fn open(&self) {
        self.gate.add_permits(1_000_000);
    }

    async fn pass(&self) {
        self.gate.acquire().await.expect("the gate is never closed").forget();
    }

    /// Responds with `hello` after the gate.
    pub async fn plain(self) -> &'static str {
        let _inside = self.inside.enter();
        self.pass().await;
        "hello"
    }

    /// Sends the head and one chunk immediately, and the second chunk after the gate. The call is inside until its body
    /// ends.
    pub async fn streaming(self) -> Body {
        self.chunks([Ok("hel"), Ok("lo")])
    }

    /// Sends one chunk, and an error after the gate: the connection closes before the end of the response.
    pub async fn breaking_off(self) -> Body {
        self.chunks([Ok("hel"), Err("cut off")])
    }

    /// Sends the first chunk immediately. Each other chunk passes the gate.
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
        // The compression layer polls once more after the end.
        Body::from_stream(chunks.fuse())
    }
}

// ===== Servers and clients =====

pub async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// Returns a loopback address that refuses connections.
///
/// The socket stays bound for as long as the process, so that no other test gets the port.
pub async fn closed_address() -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let addr = socket.local_addr().unwrap();
    std::mem::forget(socket);
    addr
}

/// Serves `router` with `axum::serve` until the runtime of the test ends.
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

/// Sends a `GET` and reads the response to its end.
pub async fn ask(
    client: &HyperClient,
    addr: SocketAddr,
    path: &str,
) -> Result<(StatusCode, Bytes), String> {
    let response = client.request(get(addr, path)).await.map_err(|error| error.to_string())?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|error| error.to_string())?;
    Ok((status, body.to_bytes()))
}

/// A response whose body has been read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Sends one request for each path at the same time, and reads each response to its end.
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

/// Returns the next `n` responses.
pub async fn answers(calls: &mut JoinSet<Answer>, n: usize) -> Vec<Answer> {
    let mut answers = Vec::with_capacity(n);
    for _ in 0..n {
        answers.push(soon(calls.join_next()).await.expect("another response").unwrap());
    }
    answers
}

// ===== Upstreams that misbehave below HTTP =====

/// Accepts connections, reads the start of a request, writes `answer`, and closes the connection.
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

/// Half of a response: `content-length` is 10, and the body has 5 bytes.
pub const HALF: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello";

/// Accepts connections and never responds. The gauge counts the open connections.
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

/// Serves `router`. The total of the gauge is the number of accepted connections.
pub async fn serve_counting(router: Router) -> (SocketAddr, Gauge) {
    use axum::serve::ListenerExt;
    let ((listener, addr), connections) = (listener().await, Gauge::default());
    let gauge = connections.clone();
    let listener = listener.tap_io(move |_| drop(gauge.enter()));
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (addr, connections)
}
