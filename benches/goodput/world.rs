//! What every case is made of: time that is virtual or the wall's, and calls.

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

/// Whose clock a candidate goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Tokio's, paused: minutes in an instant, and the same in every run.
    Virtual,
    /// It reads the clock of the system itself, which cannot be paused: played as long as it lasts.
    Wall,
}

/// Plays this to its end, from the same seed each time.
pub fn play<T>(clock: Clock, scene: impl Future<Output = T>) -> T {
    fastrand::seed(7);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(clock == Clock::Virtual)
        .build();
    runtime.expect("a runtime can be built").block_on(scene)
}

// ===== Calls =====

/// A layer did not let it through.
#[derive(Debug)]
pub struct Refused;

pub type Asked = Pin<Box<dyn Future<Output = Result<Response<Body>, Refused>> + Send>>;

/// One call of a service, whatever layers are around it.
pub type Call = Arc<dyn Fn() -> Asked + Send + Sync>;

/// A candidate: its layers around an upstream.
pub type Client = fn(Upstream) -> Call;

pub fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::new());
    *response.status_mut() = status;
    response
}

/// Each call is one of a fresh clone.
pub fn called<S, B>(service: S) -> Call
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send,
{
    let service = Mutex::new(service);
    Arc::new(move || {
        let service = service.lock().expect("nobody panics").clone();
        Box::pin(async move {
            let response = service.oneshot(Request::new(Body::new())).await;
            response.map(|response| response.map(|_| Body::new())).map_err(|_| Refused)
        })
    })
}

/// A call as what layers are put around.
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

    /// One that gives up after so long, and says so as a gateway does.
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

/// The answer of a tier; what is refused beneath is this tier's 503.
pub struct Answering(Asked);

impl Future for Answering {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx).map(|answer| {
            Ok(answer.unwrap_or_else(|Refused| status(StatusCode::SERVICE_UNAVAILABLE)))
        })
    }
}
