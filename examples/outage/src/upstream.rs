//! A small upstream that follows the script: one unbounded queue with a few workers.
//!
//! Like a thread pool or a database, it works on a queued request even if the caller has given up. The queue outlives
//! the listener, because it represents the systems behind the server.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use crate::script::{self, BLIPS, Clock, FAST, Phase, SLOW, WORKERS};

pub struct Upstream {
    pub addr: SocketAddr,
    pub meter: Arc<Meter>,
    /// The tasks of the upstream, aborted on drop.
    tasks: JoinSet<io::Result<()>>,
}

/// The counts of the upstream.
#[derive(Debug, Default)]
pub struct Meter {
    reached: [AtomicUsize; Phase::ALL.len()],
    held: AtomicUsize,
    most_held: AtomicUsize,
}

impl Meter {
    /// Returns the number of requests that arrived in a phase, without health probes.
    pub fn reached(&self, phase: Phase) -> usize {
        self.reached[phase as usize].load(Ordering::Relaxed)
    }

    /// Returns the number of requests in the queue or in work.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub fn most_held(&self) -> usize {
        self.most_held.load(Ordering::Relaxed)
    }
}

/// A request in the queue.
type Job = oneshot::Sender<()>;

#[derive(Clone)]
struct Server {
    clock: Clock,
    meter: Arc<Meter>,
    queue: mpsc::UnboundedSender<Job>,
    blips: Arc<Mutex<fastrand::Rng>>,
}

impl Upstream {
    pub async fn start(clock: Clock) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let meter = Arc::new(Meter::default());
        let (queue, jobs) = mpsc::unbounded_channel();
        let blips = Arc::new(Mutex::new(fastrand::Rng::with_seed(7)));
        let server = Server { clock, meter: meter.clone(), queue, blips };
        let app = Router::new()
            .route("/", get(answer))
            .route("/healthz", get(healthz))
            .with_state(server);
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, addr, app, clock));
        tasks.spawn(work(jobs, clock, meter.clone()));
        Ok(Self { addr, meter, tasks })
    }

    /// Stops the upstream. Returns an error if one of its tasks failed.
    pub async fn stop(mut self) -> io::Result<()> {
        while let Some(ended) = self.tasks.try_join_next() {
            ended.map_err(io::Error::other)??;
        }
        self.tasks.shutdown().await;
        Ok(())
    }
}

// ===== Responses =====

async fn answer(State(server): State<Server>) -> Response {
    let phase = server.clock.phase();
    server.meter.reached[phase as usize].fetch_add(1, Ordering::Relaxed);
    if phase.is_outage() {
        return unavailable();
    }
    if phase.is_healthy()
        && server.blips.lock().unwrap_or_else(PoisonError::into_inner).u32(..BLIPS) == 0
    {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let (done, worked) = oneshot::channel();
    let held = server.meter.held.fetch_add(1, Ordering::Relaxed) + 1;
    server.meter.most_held.fetch_max(held, Ordering::Relaxed);
    if server.queue.send(done).is_err() || worked.await.is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    "hello\n".into_response()
}

async fn healthz(State(server): State<Server>) -> Response {
    if server.clock.phase().is_outage() { unavailable() } else { "ok\n".into_response() }
}

fn unavailable() -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")]).into_response()
}

// ===== Work =====

async fn work(
    mut jobs: mpsc::UnboundedReceiver<Job>,
    clock: Clock,
    meter: Arc<Meter>,
) -> io::Result<()> {
    let mut workers = JoinSet::new();
    loop {
        tokio::select! {
            Some(job) = jobs.recv(), if workers.len() < WORKERS => {
                let takes = if clock.phase().is_healthy() { FAST } else { SLOW };
                let meter = meter.clone();
                workers.spawn(async move {
                    tokio::time::sleep(takes).await;
                    meter.held.fetch_sub(1, Ordering::Relaxed);
                    // The caller may have given up.
                    let _ = job.send(());
                });
            }
            Some(_) = workers.join_next() => {}
            else => return Ok(()),
        }
    }
}

// ===== Connections =====

async fn serve(
    listener: TcpListener,
    addr: SocketAddr,
    app: Router,
    clock: Clock,
) -> io::Result<()> {
    accept(listener, &app, clock, Phase::Refusing.begins()).await;
    let closed = reserve(addr).await?;
    clock.wait_until(Phase::Refusing.ends()).await;
    let listener = closed.listen(1024)?;
    // Accepts until it is stopped, because the last calls may end after the script.
    accept(listener, &app, clock, script::length() * 2).await;
    Ok(())
}

/// Serves connections until a moment of the script, and then drops the listener and every connection.
async fn accept(listener: TcpListener, app: &Router, clock: Clock, until: Duration) {
    let mut connections = JoinSet::new();
    let end = clock.wait_until(until);
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let app = TowerToHyperService::new(app.clone());
                connections.spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), app),
                );
            }
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// Binds the port without listening on it, so that connections are refused. If the port were free, a client could
/// connect from it, because it is in the ephemeral range.
async fn reserve(addr: SocketAddr) -> io::Result<TcpSocket> {
    let mut tries = 0;
    loop {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        match socket.bind(addr) {
            Ok(()) => return Ok(socket),
            Err(error) if tries == 100 => return Err(error),
            Err(_) => tries += 1,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
