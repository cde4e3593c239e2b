//! The parts of every case: virtual time or the wall clock, and calls.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::timeout;
use tower::{Service, ServiceExt};

pub type Body = Empty<Bytes>;

pub const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

// ===== Time =====

/// The clock that a candidate reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The paused clock of tokio: minutes pass in an instant, and every run is the same.
    Virtual,
    /// The system clock, which cannot be paused. The run takes its real time.
    Wall,
}

/// Runs a future to its end, always with the same seed.
pub fn play<T>(clock: Clock, scene: impl Future<Output = T>) -> T {
    fastrand::seed(7);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(clock == Clock::Virtual)
        .build();
    runtime.expect("a runtime can be built").block_on(scene)
}

// ===== Calls =====

/// The rejection of a call by a layer.
#[derive(Debug)]
pub struct Rejection;

pub type Asked = Pin<Box<dyn Future<Output = Result<Response<Body>, Rejection>> + Send>>;

/// Makes one call of a service with its layers.
pub type Call = Arc<dyn Fn() -> Asked + Send + Sync>;

/// A candidate: puts its layers around an upstream.
pub type Client = fn(Upstream) -> Call;

pub fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::new());
    *response.status_mut() = status;
    response
}

/// Makes each call on a new clone of the service.
pub fn called<S, B>(service: S) -> Call
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send,
{
    let service = Mutex::new(service);
    Arc::new(move || {
        let service = service.lock().expect("not poisoned").clone();
        Box::pin(async move {
            let response = service.oneshot(Request::new(Body::new())).await;
            response.map(|response| response.map(|_| Body::new())).map_err(|_| Rejection)
        })
    })
}

/// The innermost service, around which the layers are put.
#[derive(Clone)]
pub struct Upstream(pub Call);

impl Upstream {
    pub fn new<F>(answer: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        Self(Arc::new(move || {
            let answer = answer();
            Box::pin(async move { Ok(answer.await) })
        }))
    }

    /// Returns this upstream with a timeout, after which it responds with 504 as a gateway does.
    pub fn within(self, longest: Duration) -> Self {
        Self::new(move || {
            let call = self.0();
            async move {
                match timeout(longest, call).await {
                    Ok(Ok(response)) => response,
                    _ => status(StatusCode::GATEWAY_TIMEOUT),
                }
            }
        })
    }
}

impl<B> Service<Request<B>> for Upstream {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<B>) -> Answering {
        Answering(self.0())
    }
}

/// The response of a tier. A rejection in a lower tier is a 503 of this tier.
pub struct Answering(Asked);

impl Future for Answering {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(|answer| {
            Ok(answer.unwrap_or_else(|Rejection| status(StatusCode::SERVICE_UNAVAILABLE)))
        })
    }
}
