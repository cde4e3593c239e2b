use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{
    settings::timed_out,
    stall::{Over, Stall},
    watch::Watch,
};
use crate::{
    BoxError,
    call::{Form, Phase, RejectedKind, grpc},
};

pin_project! {
    /// A response body that ends when its producer falls silent, or its time is up.
    ///
    /// It fails with a [`Rejected`](crate::Rejected), boxed; a gRPC answer under
    /// [`respond`](super::TimeoutLayer::respond) ends with a status of `DEADLINE_EXCEEDED` instead. What it
    /// wraps is dropped at once. Every frame, the trailers, the size hint and the end-of-stream flag pass through.
    pub struct TimedBody<B: Body> {
        // None once it was cut.
        #[pin]
        inner: Option<B>,
        // No bound of the body's: one on its error would not hold inside of a task, where that is a `BoxError`.
        boxed: fn(B::Error) -> BoxError,
        stall: Stall,
        begun: bool,
        watch: Watch,
    }
}

impl<B: Body<Error: Into<BoxError>>> TimedBody<B> {
    pub(super) fn new(inner: B, mut watch: Watch) -> Self {
        if !inner.is_end_stream() {
            watch.begin();
        }
        Self { inner: Some(inner), boxed: Into::into, stall: Stall::new(), begun: false, watch }
    }
}

impl<B: Body> Body for TimedBody<B> {
    type Data = B::Data;
    type Error = BoxError;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let mut this = self.project();
        let Some(mut inner) = this.inner.as_mut().as_pin_mut() else { return Poll::Ready(None) };
        let phase = match inner.as_mut().poll_frame(cx) {
            Poll::Ready(next) => {
                *this.begun = true;
                this.stall.over();
                match this.watch.end {
                    // Its last frame is not too late; but one that always has another is no longer read.
                    Some((end, phase))
                        if matches!(&next, Some(Ok(frame)) if frame.is_data())
                            && !inner.is_end_stream()
                            && end <= Instant::now() =>
                    {
                        phase
                    }
                    _ => return Poll::Ready(next.map(|frame| frame.map_err(this.boxed))),
                }
            }
            Poll::Pending => {
                let silence = if *this.begun { Phase::Idle } else { Phase::FirstFrame };
                let (limit, end) = (this.watch.timeouts.get(silence), this.watch.end);
                match this.stall.poll(limit, end.map(|(at, _)| at), cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Over::Silence) => silence,
                    Poll::Ready(Over::End) => end.map_or(silence, |(_, phase)| phase),
                }
            }
        };
        // With it goes whatever a layer further in holds for it.
        this.inner.set(None);
        let rejected = timed_out(this.watch.far, this.watch.by, phase);
        Poll::Ready(Some(match this.watch.form {
            Form::Grpc => Ok(Frame::trailers(status(rejected.kind()))),
            _ => Err(Box::new(rejected)),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

fn status(kind: RejectedKind) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(grpc::STATUS, HeaderValue::from(grpc::DEADLINE_EXCEEDED));
    trailers.insert(grpc::MESSAGE, HeaderValue::from_static(kind.as_str()));
    trailers
}

impl<B: Body> fmt::Debug for TimedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimedBody").field("timeouts", &self.watch.timeouts).finish_non_exhaustive()
    }
}
