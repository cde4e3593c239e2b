//! A server with all layers, whose handlers fail in many ways.

use std::{
    future::pending,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Path, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use buttress::{
    BoxError, ConcurrencyLimitLayer, DeadlineLayer, Health, Lifecycle, TimeoutLayer,
    lifecycle::Drained, limit::ConcurrencyLimitHandle,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::{net::TcpListener, task::JoinHandle, time::sleep};
use tower::ServiceBuilder;

use crate::verdict::{Verdict, panics};

/// The initial limit of calls in flight, and the maximum limit that the example sets.
pub const LIMIT: usize = 24;
pub const LARGEST: usize = 48;

#[derive(Clone)]
pub struct Server {
    pub addr: SocketAddr,
    pub limit: ConcurrencyLimitHandle,
    /// While set, every response is a 503.
    pub is_sick: Arc<AtomicBool>,
    inside: Arc<Inside>,
    lifecycle: Lifecycle,
    task: Arc<JoinHandle<Drained>>,
}

/// A count of the running handlers, independent of the limit.
#[derive(Default)]
struct Inside {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Server {
    pub async fn start() -> Result<Self, BoxError> {
        let (health, ms) = (Health::new(), Duration::from_millis);
        let lifecycle =
            Lifecycle::without_signals(&health)?.drain_delay(ms(0)).drain_timeout(ms(5000));
        let limit = ConcurrencyLimitLayer::new(LIMIT).queue(LIMIT, ms(30));
        let handle = limit.handle();
        let (inside, is_sick) = (Arc::new(Inside::default()), Arc::new(AtomicBool::new(false)));
        let stack = ServiceBuilder::new()
            .layer(health.endpoints())
            .layer(DeadlineLayer::new().default_of(ms(300)).respond().checked()?)
            .layer(limit.checked()?.respond())
            .layer(
                TimeoutLayer::server().head(ms(200)).response_idle(ms(200)).respond().checked()?,
            );
        let eye = from_fn_with_state((inside.clone(), is_sick.clone()), look);
        let app = routes().layer(eye).layer(stack);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        lifecycle.ready();
        let serving = lifecycle.clone();
        let task = Arc::new(tokio::spawn(async move { serving.serve(listener, app).await }));
        Ok(Self { addr, limit: handle, is_sick, inside, lifecycle, task })
    }

    /// Restores the initial settings.
    pub fn restore(&self) -> Result<(), BoxError> {
        self.is_sick.store(false, SeqCst);
        Ok(self.limit.set_limit(LIMIT)?)
    }

    fn gauges(&self) -> [(&'static str, usize); 4] {
        let limit = self.limit.snapshot();
        [
            ("running handlers", self.inside.now.load(SeqCst)),
            ("permits of the limit held", limit.in_flight as usize),
            ("callers in the queue of the limit", limit.waiting as usize),
            ("calls in flight by the count of the lifecycle", self.lifecycle.in_flight()),
        ]
    }

    pub fn is_quiet(&self) -> bool {
        self.gauges().iter().all(|(_, value)| *value == 0)
    }

    pub fn judge(&self, verdict: &mut Verdict) {
        for (what, value) in self.gauges() {
            verdict.zero(&format!("server: {what}"), value);
        }
        verdict.places("server", &self.limit, LIMIT);
        let most = self.inside.most.load(SeqCst);
        verdict
            .that(most <= LARGEST, format!("server: {most} handlers at once, maximum {LARGEST}"));
        let refused = self.limit.snapshot();
        verdict.happened("server: rejections", refused.rejected_full + refused.rejected_waited);
    }

    pub async fn end(self) -> Result<Drained, BoxError> {
        self.lifecycle.drain();
        let task = Arc::into_inner(self.task).ok_or("the task of the server is still shared")?;
        Ok(task.await?)
    }
}

async fn look(
    State((inside, is_sick)): State<(Arc<Inside>, Arc<AtomicBool>)>,
    request: Request,
    next: Next,
) -> Response {
    struct Leaves(Arc<Inside>);
    impl Drop for Leaves {
        fn drop(&mut self) {
            self.0.now.fetch_sub(1, SeqCst);
        }
    }
    inside.most.fetch_max(inside.now.fetch_add(1, SeqCst) + 1, SeqCst);
    let _leaves = Leaves(inside);
    match is_sick.load(SeqCst) {
        true => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        false => next.run(request).await,
    }
}

// ===== Routes =====

fn routes() -> Router {
    let slow = async |Path(ms): Path<u64>| sleep(Duration::from_millis(ms)).await;
    let breaks_off = async || frames(2, stream::once(async { Err("cut") }));
    let panics_later = async || frames(2, stream::once(async { panics() }));
    Router::new()
        .route("/", any(async || "hello"))
        .route("/echo", post(async |body: Bytes| body).put(async |body: Bytes| body))
        .route("/slow/{ms}", get(slow))
        .route("/stream/{frames}", get(async |Path(n): Path<u8>| frames(n, stream::empty())))
        .route("/fails", any(async || StatusCode::SERVICE_UNAVAILABLE))
        .route("/throttles", any(async || (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")])))
        .route("/hangs", any(async || pending::<()>().await))
        .route("/silent/{frames}", get(async |Path(n): Path<u8>| frames(n, stream::pending())))
        .route("/breaks_off", get(breaks_off))
        .route("/panics", any(async || -> StatusCode { panics() }))
        .route("/panics_later", get(panics_later))
}

type Frame = Result<&'static [u8], &'static str>;

/// Returns a body of `n` frames, with a pause before each, followed by the given end.
fn frames(n: u8, end: impl Stream<Item = Frame> + Send + 'static) -> Body {
    let frames = stream::iter(0..n).then(|_| async {
        sleep(Duration::from_millis(1)).await;
        Ok(&[b'x'; 4096][..])
    });
    Body::from_stream(frames.chain(end))
}
