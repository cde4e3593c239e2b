use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{Outcome, Reason, grpc, permit::Permit};

pin_project! {
    /// A response body that ends its call's permit: at its end, at an error, or when it is dropped.
    ///
    /// Every frame, the trailers, the size hint and the end-of-stream flag pass through. A refusal's
    /// own small body is a variant of it, so that nothing is asked of the user's body type.
    pub struct TrackedBody<B: Body> {
        #[pin]
        inner: Inner<B>,
        permit: Permit,
        eos: Eos,
    }
}

pin_project! {
    #[project = InnerProj]
    enum Inner<B: Body> {
        Body { #[pin] body: B },
        Answer { data: Option<B::Data> },
    }
}

/// Judges an answer by its trailers, if it has any.
#[cfg(feature = "tower-http")]
type JudgeTrailers = dyn FnOnce(Option<&HeaderMap>) -> Outcome + Send + Sync;

/// What decides the outcome once the body has come to its end.
pub(crate) enum Eos {
    /// It has ended already: nobody is asked, or told, any more.
    Told,
    /// Nothing more: the head has said it all.
    Plain(Outcome),
    /// The gRPC status in the trailers.
    Grpc,
    /// A classifier that wants to see the trailers.
    #[cfg(feature = "tower-http")]
    Custom(Box<JudgeTrailers>),
}

impl Eos {
    fn end(&mut self, trailers: Option<&HeaderMap>) -> Outcome {
        match std::mem::replace(self, Self::Told) {
            Self::Told => Outcome::success(),
            Self::Plain(outcome) => outcome,
            Self::Grpc => grpc::end(trailers),
            #[cfg(feature = "tower-http")]
            Self::Custom(judge) => judge(trailers),
        }
    }

    /// The outcome of a body that breaks off.
    fn error(&mut self) -> Outcome {
        match std::mem::replace(self, Self::Told) {
            Self::Plain(outcome) if !outcome.is_success() => outcome,
            _ => Outcome::failure().because(Reason::Body),
        }
    }

    /// What is known when the head is here, and what a drop means from then on.
    ///
    /// A good plain answer that nobody reads is a success; a stream whose status is yet to come is
    /// cancelled.
    pub(crate) fn so_far(&self) -> Outcome {
        match self {
            Self::Plain(outcome) => *outcome,
            _ => Outcome::cancelled(),
        }
    }
}

impl<B: Body> TrackedBody<B> {
    /// Follows `body` to its end, and ends `permit` there.
    pub(crate) fn new(body: B, mut permit: Permit, mut eos: Eos) -> Self {
        if body.is_end_stream() {
            permit.end(eos.end(None));
        } else {
            permit.end_dropped_as(eos.so_far());
        }
        Self { inner: Inner::Body { body }, permit, eos }
    }

    /// A body whose call has ended already.
    pub(crate) fn untracked(body: B) -> Self {
        Self { inner: Inner::Body { body }, permit: Permit::hollow(), eos: Eos::Told }
    }

    /// The body of an answer of our own.
    pub(crate) fn answer(data: Bytes) -> Self
    where
        B::Data: From<Bytes>,
    {
        let data = (!data.is_empty()).then(|| B::Data::from(data));
        Self { inner: Inner::Answer { data }, permit: Permit::hollow(), eos: Eos::Told }
    }
}

impl<B: Body> Default for TrackedBody<B> {
    /// Nothing, and at its end: what a layer further out answers with, such as tower-http's timeout.
    fn default() -> Self {
        Self { inner: Inner::Answer { data: None }, permit: Permit::hollow(), eos: Eos::Told }
    }
}

impl<B: Body> Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let mut body = match this.inner.as_mut().project() {
            InnerProj::Body { body } if matches!(this.eos, Eos::Told) => {
                return body.poll_frame(cx);
            }
            InnerProj::Body { body } => body,
            InnerProj::Answer { data } => {
                return Poll::Ready(data.take().map(|data| Ok(Frame::data(data))));
            }
        };
        let next = ready!(this.permit.guard(|| body.as_mut().poll_frame(cx)));
        match &next {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.permit.end(this.eos.end(Some(trailers)));
                } else if body.is_end_stream() {
                    this.permit.end(this.eos.end(None));
                }
            }
            Some(Err(_)) => this.permit.end(this.eos.error()),
            None => this.permit.end(this.eos.end(None)),
        }
        Poll::Ready(next)
    }

    fn is_end_stream(&self) -> bool {
        match &self.inner {
            Inner::Body { body } => body.is_end_stream(),
            Inner::Answer { data } => data.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.inner {
            Inner::Body { body } => body.size_hint(),
            Inner::Answer { data } => {
                SizeHint::with_exact(data.as_ref().map_or(0, |data| data.remaining() as u64))
            }
        }
    }
}

impl<B: Body> fmt::Debug for TrackedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackedBody").field("permit", &self.permit).finish_non_exhaustive()
    }
}
