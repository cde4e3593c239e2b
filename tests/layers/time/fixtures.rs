//! Bodies with timed frames, and helpers.

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use buttress::{BoxError, Rejected, outcome::RejectedKind, timeout::TimeoutPhase};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty};
use tokio::time::{Instant, Sleep, sleep_until};

pub use crate::support::{ms, secs};

/// A body that yields a frame at each of these times after its creation. Then it ends or stays pending.
#[derive(Debug)]
pub struct Paced {
    frames: VecDeque<Instant>,
    ends: bool,
    timer: Pin<Box<Sleep>>,
    dropped: Arc<AtomicUsize>,
}

impl Paced {
    pub fn at(times: impl IntoIterator<Item = Duration>) -> Self {
        let now = Instant::now();
        let frames = times.into_iter().map(|time| now + time).collect();
        let timer = Box::pin(sleep_until(now));
        Self { frames, ends: true, timer, dropped: Arc::default() }
    }

    /// Returns a body with this number of frames, one after each `gap`.
    pub fn every(gap: Duration, frames: u32) -> Self {
        Self::at((1..=frames).map(|nth| gap * nth))
    }

    /// Keeps the body pending after its last frame.
    pub fn then_silent(mut self) -> Self {
        self.ends = false;
        self
    }

    /// Returns a counter that increases when the body is dropped.
    pub fn dropped(&self) -> Arc<AtomicUsize> {
        self.dropped.clone()
    }
}

impl Drop for Paced {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, SeqCst);
    }
}

impl Body for Paced {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(&at) = self.frames.front() else {
            return if self.ends { Poll::Ready(None) } else { Poll::Pending };
        };
        if Instant::now() < at {
            self.timer.as_mut().reset(at);
            ready!(self.timer.as_mut().poll(cx));
        }
        self.frames.pop_front();
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"frame")))))
    }

    fn is_end_stream(&self) -> bool {
        self.ends && self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A request without a body.
pub type Nothing = Empty<Bytes>;

pub fn request() -> Request<Nothing> {
    Request::new(Nothing::new())
}

// ===== Results =====

#[track_caller]
pub fn phase_of(error: &BoxError) -> TimeoutPhase {
    match Rejected::find(&**error).map(Rejected::kind) {
        Some(RejectedKind::TimedOut(phase)) => phase,
        other => panic!("not a timeout: {other:?} {error}"),
    }
}

/// Reads a body to its end. Returns the number of frames and the result.
pub async fn drain<B>(mut body: B) -> (usize, Result<(), B::Error>)
where
    B: Body + Unpin,
{
    let mut frames = 0;
    loop {
        match body.frame().await {
            Some(Ok(_)) => frames += 1,
            Some(Err(error)) => return (frames, Err(error)),
            None => return (frames, Ok(())),
        }
    }
}

/// Returns the service of a closure, for requests with any body.
pub fn serve<B, RB, F>(
    answer: impl Fn(Request<B>) -> F + Clone + Send + Sync + 'static,
) -> impl tower::Service<Request<B>, Response = Response<RB>, Error = BoxError, Future = F>
+ Clone
+ Send
+ Sync
+ 'static
where
    B: 'static,
    RB: 'static,
    F: Future<Output = Result<Response<RB>, BoxError>> + Send + 'static,
{
    tower::service_fn(answer)
}
