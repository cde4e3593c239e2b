//! The server under test.

use std::{net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{Health, Lifecycle, lifecycle::Drained};
use bytes::Bytes;
use futures_util::stream;
use tokio::task::JoinHandle;

use crate::support::net::{Stage, listener};

/// Shorter than the default, and longer than the scheduling delays of a busy machine.
pub const GRACE: Duration = Duration::from_millis(300);
/// Longer than a test waits.
pub const AGES: Duration = Duration::from_secs(600);
/// Time for which a test observes that something does not happen.
pub const WHILE: Duration = Duration::from_millis(50);
/// Length of the body of `/large`: more than the buffers of sockets on loopback.
pub const LARGE: usize = 16 << 20;

pub struct Server {
    pub addr: SocketAddr,
    pub lifecycle: Lifecycle,
    /// The calls of `/work` and `/stream`.
    pub stage: Stage,
    pub task: JoinHandle<Drained>,
}

pub fn lifecycle(delay: Duration) -> Lifecycle {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    lifecycle.drain_delay(delay).grace(GRACE).drain_timeout(AGES)
}

impl Server {
    pub async fn start(delay: Duration) -> Self {
        Self::of(lifecycle(delay)).await
    }

    pub async fn of(lifecycle: Lifecycle) -> Self {
        let stage = Stage::default();
        let (work, chunks) = (stage.clone(), stage.clone());
        let app = Router::new()
            .route("/quick", get(async || "quick"))
            .route("/work", get(move || work.clone().plain()))
            .route("/stream", get(move || chunks.clone().streaming()))
            .route("/large", get(async || Bytes::from(vec![0; LARGE])))
            .route(
                "/endless",
                get(async || Body::from_stream(stream::pending::<Result<Bytes, String>>())),
            );
        Self::serve(lifecycle, stage, app).await
    }

    pub async fn serve(lifecycle: Lifecycle, stage: Stage, app: Router) -> Self {
        let ((listener, addr), server) = (listener().await, lifecycle.clone());
        let task = tokio::spawn(async move { server.serve(listener, app).await });
        Self { addr, lifecycle, stage, task }
    }
}
