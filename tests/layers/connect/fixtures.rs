//! A server at the other end of an in-memory pipe. Without sockets the clock can be paused.

use std::{
    collections::HashMap,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    routing::{any, get},
};
use buttress::{
    BoxError,
    connect::{Client, ClientBuilder, ConnectLayer},
};
use bytes::Bytes;
use http::{Request, Uri};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::sync::Semaphore;
use tower::Service;

use crate::support::{
    net::{Gauge, Stage},
    pipe::Pipe,
};

/// A connector. Each connection leads to a server of its own. Counts the open connections.
#[derive(Clone, Debug, Default)]
pub struct Pipes {
    pub stage: Stage,
    pub open: Gauge,
    to: Arc<Mutex<HashMap<String, Gauge>>>,
    gate: Option<Arc<Semaphore>>,
    dawdles: bool,
    max_streams: Option<u32>,
}

impl Pipes {
    /// Each connect takes a permit of the gate, which has none at first.
    pub fn gated() -> Self {
        Self { gate: Some(Arc::new(Semaphore::new(0))), ..Self::default() }
    }

    /// Each connect takes up to 30 ms.
    pub fn dawdling() -> Self {
        Self { dawdles: true, ..Self::default() }
    }

    /// Sets the maximum number of streams of an HTTP/2 connection.
    pub fn max_streams(self, max: u32) -> Self {
        Self { max_streams: Some(max), ..self }
    }

    /// Returns the gauge of the open connections to one host.
    pub fn open_to(&self, host: &str) -> Gauge {
        self.to.lock().unwrap().entry(host.into()).or_default().clone()
    }

    pub fn let_in(&self, n: usize) {
        self.gate.as_ref().unwrap().add_permits(n);
    }

    fn router(&self) -> Router {
        let (plain, streaming) = (self.stage.clone(), self.stage.clone());
        Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/tenth", get(|| tokio::time::sleep(Duration::from_millis(100))))
            .route("/slow", any(move || plain.plain()))
            .route("/stream", any(move || streaming.streaming()))
            .route("/upgrade", any(upgrade))
    }
}

/// Upgrades the connection and echoes all bytes.
async fn upgrade(request: axum::extract::Request) -> http::Response<axum::body::Body> {
    tokio::spawn(async move {
        let io = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
        let (mut read, mut write) = tokio::io::split(io);
        let _ = tokio::io::copy(&mut read, &mut write).await;
    });
    http::Response::builder()
        .status(101)
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(axum::body::Body::empty())
        .unwrap()
}

impl Service<Uri> for Pipes {
    type Response = Pipe;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Pipe>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if let Some(gate) = &this.gate {
                gate.acquire().await.unwrap().forget();
            }
            if this.dawdles {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(..30))).await;
            }
            if uri.host() == Some("down") {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let service = TowerToHyperService::new(this.router());
            tokio::spawn(async move {
                let mut server = auto::Builder::new(TokioExecutor::new());
                if let Some(max) = this.max_streams {
                    server.http2().max_concurrent_streams(max);
                }
                let io = TokioIo::new(theirs);
                let _ = server.serve_connection_with_upgrades(io, service).await;
            });
            let to = this.open_to(uri.host().unwrap_or_default());
            Ok(Pipe::new(ours).counted_by(&this.open).counted_by(&to))
        })
    }
}

// ===== Calls =====

pub type Piped = Client<Pipes, Empty<Bytes>>;

pub fn client(layer: &ConnectLayer, pipes: &Pipes) -> Piped {
    Client::builder(layer.clone()).build(pipes.clone())
}

pub fn http2(layer: &ConnectLayer, pipes: &Pipes) -> Piped {
    ClientBuilder::http2_only(Client::builder(layer.clone())).build(pipes.clone())
}

pub fn request(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
}

/// Sends a request and reads the response to its end.
pub async fn ask(client: &Piped, uri: &str) -> Result<Bytes, BoxError> {
    let response = client.request(request(uri)).await?;
    assert!(response.status().is_success(), "{}", response.status());
    Ok(response.into_body().collect().await?.to_bytes())
}
