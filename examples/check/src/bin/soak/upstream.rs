//! A healthy upstream that closes its connections as a matter of routine, while calls arrive.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use buttress::BoxError;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use hyper::server::conn::{http1, http2};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use crate::verdict::Verdict;

/// Time in which the upstream responds.
const RESPONSE_TIME: Duration = Duration::from_millis(30);
/// Size of the body at `/large`. It is larger than the buffers of all sockets on the way to a slow reader.
const LARGE_BODY_CHUNKS: usize = 512;
const CHUNK: &[u8] = &[b'x'; 16 * 1024];
/// Mean number of requests on open connections for each one that ends its connection.
const REQUESTS_PER_CLOSE: u32 = 20;

pub struct Upstream {
    pub addr: SocketAddr,
    closed: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Upstream {
    pub async fn start(is_http2: bool) -> Result<Self, BoxError> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (addr, closed) = (listener.local_addr()?, Arc::new(AtomicU64::new(0)));
        let counter = closed.clone();
        let task = tokio::spawn(async move {
            let (app, mut connections) = (routes(), JoinSet::new());
            loop {
                let Ok((tcp, _)) = listener.accept().await else { return };
                let _ = tcp.set_nodelay(true);
                let (app, closed) = (app.clone(), counter.clone());
                connections.spawn(async move {
                    // A connection fails if the client closes it.
                    if is_http2 {
                        serve_http2(tcp, app, &closed).await;
                    } else {
                        serve_http1(tcp, app, closed).await;
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self { addr, closed, task })
    }

    pub fn judge(&self, protocol: &str, verdict: &mut Verdict) {
        let what = format!("{protocol} upstream: connections closed while calls arrived");
        verdict.happened(&what, self.closed.load(SeqCst));
    }

    /// Ends the upstream with all its connections.
    pub fn end(self) {
        self.task.abort();
    }
}

fn routes() -> Router {
    let hello = async || {
        sleep(RESPONSE_TIME).await;
        "hello"
    };
    let large = async || {
        let chunks = stream::iter(0..LARGE_BODY_CHUNKS);
        Body::from_stream(chunks.map(|_| Ok::<_, io::Error>(CHUNK)))
    };
    Router::new()
        .route("/", get(hello))
        .route("/grpc", post(grpc))
        .route("/large", get(large))
        .route("/upload", post(async |body: Bytes| body.len().to_string()))
}

/// An empty gRPC response with status OK.
async fn grpc() -> Response {
    sleep(RESPONSE_TIME).await;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, "application/grpc".parse().expect("a header value"));
    headers.insert("grpc-status", "0".parse().expect("a header value"));
    headers.into_response()
}

async fn serve_http1(tcp: TcpStream, app: Router, closed: Arc<AtomicU64>) {
    let io = ClosesOnReuse { tcp, has_responded: false, closed };
    let service = TowerToHyperService::new(app);
    let _ = http1::Builder::new().serve_connection(TokioIo::new(io), service).await;
}

/// Sends GOAWAY after a while. Open streams finish.
async fn serve_http2(tcp: TcpStream, app: Router, closed: &AtomicU64) {
    let service = TowerToHyperService::new(app);
    let builder = http2::Builder::new(TokioExecutor::new());
    let mut connection = pin!(builder.serve_connection(TokioIo::new(tcp), service));
    let age = Duration::from_millis(fastrand::u64(50..300));
    if tokio::time::timeout(age, connection.as_mut()).await.is_err() {
        closed.fetch_add(1, SeqCst);
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
}

/// Closes some connections when the next request arrives, like a server whose keep-alive time has just ended.
struct ClosesOnReuse {
    tcp: TcpStream,
    has_responded: bool,
    closed: Arc<AtomicU64>,
}

impl AsyncRead for ClosesOnReuse {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.tcp).poll_read(cx, buf))?;
        let has_arrived = buf.filled().len() > before;
        if has_arrived
            && std::mem::take(&mut this.has_responded)
            && fastrand::u32(..REQUESTS_PER_CLOSE) == 0
        {
            // Without the bytes this is the end of the stream, and the server closes the connection.
            buf.set_filled(before);
            this.closed.fetch_add(1, SeqCst);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClosesOnReuse {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.has_responded = true;
        Pin::new(&mut this.tcp).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(cx)
    }
}
