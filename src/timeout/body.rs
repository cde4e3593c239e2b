use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::{
    idle::{Expired, IdleTimer},
    settings::{drop_by, timed_out},
    timers::{BodyTimers, CallTimers, EndCause, ends_by_deadline},
    upload::Upload,
};
use crate::{
    error::BoxError,
    outcome::{Rejected, RejectedKind, TimeoutPhase, grpc},
    permit::{EitherBody, FromBytes, unread},
    respond::ResponseFormat,
    time::has_passed,
};

pin_project! {
    /// A response body that ends when a timeout expires.
    ///
    /// It then fails with a boxed [`Rejected`](crate::outcome::Rejected). A gRPC response of a layer with
    /// [`respond`](super::layer::TimeoutLayer::respond) ends with the trailers of `DEADLINE_EXCEEDED` instead. The
    /// inner body is dropped at once. Every frame, the trailers, the size hint and the end-of-stream flag are
    /// forwarded.
    pub struct TimedBody<B: Body> {
        #[pin]
        inner: EitherBody<B>,
        // A function pointer instead of a bound on the struct. A bound `B::Error: Into<BoxError>` on the struct cannot
        // be proved inside of a spawned task if the error is itself a `BoxError`.
        box_error: fn(B::Error) -> BoxError,
        idle: IdleTimer,
        // `None` for a response that this crate made.
        timers: Option<BodyTimers>,
    }
}

impl<B: Body<Error: Into<BoxError>>> TimedBody<B> {
    #[inline]
    pub(super) fn untimed(body: B) -> Self {
        Self::of(EitherBody::Theirs { body })
    }

    #[inline]
    fn of(inner: EitherBody<B>) -> Self {
        Self { inner, box_error: Into::into, idle: IdleTimer::new(), timers: None }
    }

    /// Starts to time the body.
    #[inline]
    pub(super) fn time(&mut self, timers: CallTimers, upload: &mut Option<Arc<Upload>>) {
        self.timers = Some(timers.into_body(self.inner.is_end_stream(), upload));
    }
}

impl<B: Body<Data: From<Bytes>, Error: Into<BoxError>>> FromBytes for TimedBody<B> {
    fn from_bytes(data: Bytes) -> Self {
        Self::of(EitherBody::own(data))
    }
}

impl<B: Body<Error: Into<BoxError>>> Default for TimedBody<B> {
    /// Returns an empty body, as an outer layer such as tower-http's timeout needs for its own responses.
    fn default() -> Self {
        Self::of(EitherBody::ended())
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
        if unread::take() {
            if let Some(timers) = this.timers.take() {
                // The inner body is dropped as if its caller had hung up.
                this.inner.set(EitherBody::ended());
                let rejected = timed_out(timers.slot, timers.by, TimeoutPhase::Unread, None, None);
                return Poll::Ready(Some(timers.end(rejected)));
            }
        }
        if let Some(timers) = this.timers {
            timers.begin_response(cx);
        }
        // The error is converted first, so that the frame is inspected in place and is not moved afterwards.
        let polled = this.inner.as_mut().poll_frame(cx).map_err(this.box_error);
        let Some(timers) = this.timers else { return polled };
        let (phase, limit) = match &polled {
            Poll::Ready(next) => {
                timers.begun = true;
                this.idle.end_wait();
                let is_late = match next {
                    // The last frame is not late. A body that always has a further frame is cut off at the end.
                    Some(Ok(frame)) if frame.is_data() => {
                        !this.inner.is_end_stream() && has_passed(timers.end)
                    }
                    None => false,
                    Some(last) => {
                        let has_deadline = timers.end_of.source().is_some();
                        has_deadline && is_cut_off(last, timers.end_of, timers.end)
                    }
                };
                if !is_late {
                    return polled;
                }
                (timers.end_of.phase(), None)
            }
            Poll::Pending => {
                let (limit, silence) = match timers.begun {
                    false => (timers.first_frame, TimeoutPhase::FirstFrame),
                    true => (timers.idle, TimeoutPhase::Idle),
                };
                match ready!(this.idle.poll(limit.time(), timers.end, cx)) {
                    Expired::Silence => (silence, limit.time()),
                    Expired::End => (timers.end_of.phase(), None),
                }
            }
        };
        // Dropping the inner body releases what inner layers hold for the call.
        drop_by(phase, None, timers.end_of.source(), || this.inner.set(EitherBody::ended()));
        let rejected = timed_out(timers.slot, timers.by, phase, timers.end_of.source(), limit);
        Poll::Ready(Some(timers.end(rejected)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Returns whether the client or the peer has cut off the body at the deadline.
#[cold]
fn is_cut_off<D>(
    last: &Result<Frame<D>, BoxError>,
    end_of: EndCause,
    end: Option<Instant>,
) -> bool {
    let is_cancelled = match last {
        Ok(frame) => {
            let code = |trailers| grpc::code(trailers) == Some(grpc::CANCELLED);
            frame.trailers_ref().is_some_and(code)
        }
        Err(error) => Rejected::find(&**error).is_none(),
    };
    is_cancelled && ends_by_deadline(end_of, end)
}

impl BodyTimers {
    /// Returns the last item of a body that has timed out.
    fn end<D>(&self, rejected: Rejected) -> Result<Frame<D>, BoxError> {
        match self.form {
            ResponseFormat::Grpc => Ok(Frame::trailers(status(rejected.kind()))),
            _ => Err(Box::new(rejected)),
        }
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
        f.debug_struct("TimedBody").field("timers", &self.timers).finish_non_exhaustive()
    }
}
