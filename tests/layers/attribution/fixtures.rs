//! A scripted upstream on the paused clock, and request bodies that are slow in different ways.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use buttress::{CircuitBreakerLayer, breaker::CircuitState};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use tokio::{
    sync::oneshot,
    time::{Sleep, sleep},
};
use tower::Service;

use crate::support::Oops;
pub use crate::support::{ms, secs};

pub type TestBody = UnsyncBoxBody<Bytes, Oops>;

// ===== The upstream =====

/// How an upstream treats a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Upstream {
    /// Reads the request, and responds this long after its end.
    Responds(Duration),
    /// Reads the request and never responds.
    Hangs,
    /// Does not read the request, and never responds.
    ReadsNothing,
}

/// The service of an [`Upstream`]. Like a real transport it reads the request body in a task of its own.
#[derive(Clone, Debug)]
pub struct UpstreamService {
    upstream: Upstream,
    calls: Arc<AtomicUsize>,
}

impl UpstreamService {
    pub fn new(upstream: Upstream) -> Self {
        Self { upstream, calls: Arc::default() }
    }

    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl<B> Service<Request<B>> for UpstreamService
where
    B: Body<Data = Bytes, Error: Send> + Send + 'static,
{
    type Response = Response<Full<Bytes>>;
    type Error = Oops;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Oops>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let upstream = self.upstream;
        let (sent, is_sent) = oneshot::channel();
        let mut body = Box::pin(request.into_body());
        let reading = tokio::spawn(async move {
            if upstream == Upstream::ReadsNothing {
                std::future::pending::<()>().await;
            }
            while body.frame().await.is_some_and(|frame| frame.is_ok()) {}
            drop(body);
            let _ = sent.send(());
        });
        let reading = AbortOnDrop(reading);
        Box::pin(async move {
            let _reading = reading;
            let _ = is_sent.await;
            match upstream {
                Upstream::Responds(after) => sleep(after).await,
                Upstream::Hangs | Upstream::ReadsNothing => std::future::pending().await,
            }
            Ok(Response::new(Full::from("ok")))
        })
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub async fn make_half_open(breaker: &CircuitBreakerLayer) {
    breaker.handle().half_open();
    assert_eq!(breaker.handle().state(), CircuitState::HalfOpen);
}

// ===== Requests =====

/// A `POST` whose body is ready at once.
pub fn post() -> Request<TestBody> {
    let body = Full::from("x").map_err(|never: Infallible| match never {});
    Request::post("/").body(body.boxed_unsync()).unwrap()
}

pub fn get() -> Request<TestBody> {
    Request::new(Empty::new().map_err(|never: Infallible| match never {}).boxed_unsync())
}

/// A `PUT` whose body has its only frame after this long.
pub fn upload(takes: Duration) -> Request<TestBody> {
    Request::put("/").body(SlowBody::new(takes, 1).boxed_unsync()).unwrap()
}

/// A `PUT` whose body has this many frames, one after each `every`.
pub fn trickle(every: Duration, frames: usize) -> Request<TestBody> {
    Request::put("/").body(SlowBody::new(every, frames).boxed_unsync()).unwrap()
}

struct SlowBody {
    every: Duration,
    frames: usize,
    timer: Pin<Box<Sleep>>,
}

impl SlowBody {
    fn new(every: Duration, frames: usize) -> Self {
        Self { every, frames, timer: Box::pin(sleep(every)) }
    }
}

impl Body for SlowBody {
    type Data = Bytes;
    type Error = Oops;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Oops>>> {
        if self.frames == 0 {
            return Poll::Ready(None);
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.frames -= 1;
        let every = self.every;
        self.timer = Box::pin(sleep(every));
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"piece")))))
    }

    fn is_end_stream(&self) -> bool {
        self.frames == 0
    }
}
