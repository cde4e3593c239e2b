//! How a request body tells its call that it has been sent.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{
    settings::{State, timed_out},
    stall::Stall,
};
use crate::{
    BoxError,
    call::{Far, LayerKind, Phase},
};

/// Where a request body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    Sending,
    /// To its end, or as far as anybody wanted it.
    Sent,
    /// Its producer fell silent.
    Stalled,
    /// The answer is here: whatever the body still does is none of its call's business.
    Answered,
}

/// What a call and its request body know of each other. One small allocation for a request that has a body.
pub struct Sending {
    stage: AtomicU8,
    call: Mutex<Option<Waker>>,
}

impl Sending {
    fn new() -> Arc<Self> {
        Arc::new(Self { stage: AtomicU8::new(Stage::Sending as u8), call: Mutex::default() })
    }

    pub(super) fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            0 => Stage::Sending,
            1 => Stage::Sent,
            2 => Stage::Stalled,
            _ => Stage::Answered,
        }
    }

    /// The first end counts.
    pub(super) fn end(&self, stage: Stage) {
        let (from, to) = (Stage::Sending as u8, stage as u8);
        if self.stage.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            let call = self.call.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(call) = call {
                call.wake();
            }
        }
    }

    /// Wakes the call when it is no longer being sent.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Stage {
        if self.stage() == Stage::Sending {
            let mut call = self.call.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut *call {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
        }
        // Looked at only after the waker is in place: an end in between is not missed.
        self.stage()
    }
}

impl fmt::Debug for Sending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sending").field(&self.stage()).finish()
    }
}

/// Says that the body was sent when it is dropped, wherever it had got to.
struct Tells(Option<Arc<Sending>>);

impl Drop for Tells {
    fn drop(&mut self) {
        if let Some(sending) = &self.0 {
            sending.end(Stage::Sent);
        }
    }
}

pin_project! {
    /// A request body whose end, and whose silence, its call hears of.
    ///
    /// Every frame, the trailers, the size hint and the end-of-stream flag pass through.
    pub struct SendingBody<B> {
        #[pin]
        inner: B,
        tells: Tells,
        limit: Option<Duration>,
        stall: Stall,
        by: LayerKind,
        far: Far<State>,
    }
}

impl<B: Body> SendingBody<B> {
    /// Nobody listens where there is nothing to hear of.
    pub(super) fn new(
        inner: B,
        listens: bool,
        limit: Option<Duration>,
        by: LayerKind,
        far: Far<State>,
    ) -> (Self, Option<Arc<Sending>>) {
        let sending = (listens && !inner.is_end_stream()).then(Sending::new);
        let tells = Tells(sending.clone());
        (Self { inner, tells, limit, stall: Stall::new(), by, far }, sending)
    }
}

impl<B> Body for SendingBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let mut this = self.project();
        if let Poll::Ready(next) = this.inner.as_mut().poll_frame(cx) {
            this.stall.over();
            let last = !matches!(next, Some(Ok(_))) || this.inner.is_end_stream();
            if last {
                *this.tells = Tells(None);
            }
            return Poll::Ready(next.map(|frame| frame.map_err(Into::into)));
        }
        let sending = this.tells.0.as_ref().is_some_and(|told| told.stage() == Stage::Sending);
        let limit = this.limit.filter(|_| sending);
        ready!(this.stall.poll(limit, None, cx));
        let rejected = timed_out(*this.far, *this.by, Phase::Sending);
        *this.limit = None;
        if let Some(sending) = this.tells.0.take() {
            sending.end(Stage::Stalled);
        }
        Poll::Ready(Some(Err(Box::new(rejected))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> fmt::Debug for SendingBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendingBody").field("limit", &self.limit).finish_non_exhaustive()
    }
}
