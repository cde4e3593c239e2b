//! Response bodies: a body that releases the permit of its call, and the body of a response that a layer made itself.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::{permit::Permit, unread};
use crate::outcome::{Eos, Outcome};

// ===== The body of the inner service, or of a layer =====

pin_project! {
    /// The body of the inner service, or the body of a response that a layer made itself.
    ///
    /// The second variant needs no conversion into the body type of the inner service, so that type needs no further
    /// bounds.
    #[project = EitherBodyProj]
    pub(crate) enum EitherBody<B: Body> {
        Theirs { #[pin] body: B },
        // Boxed, so that it does not enlarge the responses of the inner service.
        Own { own: Option<Box<OwnBody<B::Data>>> },
    }
}

impl<B: Body> EitherBody<B> {
    /// Returns an empty body that has ended.
    pub(crate) const fn ended() -> Self {
        Self::Own { own: None }
    }

    /// Returns the body of a response that a layer made itself.
    pub(crate) fn own(data: Bytes) -> Self
    where
        B::Data: From<Bytes>,
    {
        Self::Own { own: (!data.is_empty()).then(|| Box::new(OwnBody::Data(B::Data::from(data)))) }
    }

    /// Returns the body of a response whose data a layer makes while the body is read.
    pub(crate) fn stream(stream: Box<dyn DataStream>) -> Self
    where
        B::Data: From<Bytes>,
    {
        Self::Own { own: Some(Box::new(OwnBody::Stream { stream, into: B::Data::from })) }
    }
}

impl<B: Body> Body for EitherBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        match self.project() {
            EitherBodyProj::Theirs { body } => body.poll_frame(cx),
            EitherBodyProj::Own { own } => {
                OwnBody::poll_data(own, cx).map(|data| data.map(|data| Ok(Frame::data(data))))
            }
        }
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        match self {
            Self::Theirs { body } => body.is_end_stream(),
            Self::Own { own } => own.is_none(),
        }
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Theirs { body } => body.size_hint(),
            Self::Own { own } => match own.as_deref() {
                None => SizeHint::with_exact(0),
                Some(OwnBody::Data(data)) => SizeHint::with_exact(data.remaining() as u64),
                Some(OwnBody::Stream { .. }) => SizeHint::default(),
            },
        }
    }
}

/// The data of a response that a layer made itself.
pub(crate) enum OwnBody<D> {
    Data(D),
    // The conversion is a function pointer, because the type of the data is not `'static`.
    Stream { stream: Box<dyn DataStream>, into: fn(Bytes) -> D },
}

impl<D> OwnBody<D> {
    #[cold]
    #[inline(never)]
    fn poll_data(own: &mut Option<Box<Self>>, cx: &mut Context<'_>) -> Poll<Option<D>> {
        if let Some(Self::Stream { stream, into }) = own.as_deref_mut() {
            match ready!(stream.poll_data(cx)) {
                Some(data) => return Poll::Ready(Some(into(data))),
                None => *own = None,
            }
        }
        Poll::Ready(match own.take().map(|own| *own) {
            Some(Self::Data(data)) => Some(data),
            _ => None,
        })
    }
}

/// Data that a layer makes while its response is read.
pub(crate) trait DataStream: Send + Sync {
    /// Returns the next data, or `None` at the end. Must not be called after the end.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>>;
}

/// A response body that can contain data of a layer: a [`TrackedBody`] or a `TimedBody`.
pub trait FromBytes {
    /// Returns a body that contains `data` and ends after it.
    fn from_bytes(data: Bytes) -> Self;
}

// ===== A body that is tracked to its end =====

pin_project! {
    /// A response body that releases the permit of its call: at its end, at an error, or when it is dropped.
    ///
    /// It forwards every frame, the trailers, the size hint and the end-of-stream flag of the inner body. `Default`
    /// returns an empty body, which an outer layer such as `tower_http::timeout` responds with.
    pub struct TrackedBody<B: Body> {
        #[pin]
        inner: EitherBody<B>,
        permit: Permit,
        eos: Eos,
    }
}

impl<B: Body> TrackedBody<B> {
    /// Returns a body that releases `permit` at its end.
    pub(crate) fn new(body: B, permit: Permit, eos: Eos) -> Self {
        let mut tracked = Self::untracked(body);
        tracked.track(permit, eos);
        tracked
    }

    /// Starts to track the body: `permit` is released at its end, or now if the body has ended.
    #[inline]
    pub(crate) fn track(&mut self, mut permit: Permit, mut eos: Eos) {
        if self.inner.is_end_stream() {
            permit.release_mut(eos.end(None));
        } else {
            permit.set_drop_outcome(eos.dropped());
            permit.watch_reader();
        }
        (self.permit, self.eos) = (permit, eos);
    }

    /// Returns a body that holds no permit.
    #[inline]
    pub(crate) fn untracked(body: B) -> Self {
        Self::released(EitherBody::Theirs { body })
    }

    /// Returns a body whose data a layer makes while it is read. It holds no permit.
    pub(crate) fn from_stream(stream: Box<dyn DataStream>) -> Self
    where
        B::Data: From<Bytes>,
    {
        Self::released(EitherBody::stream(stream))
    }

    #[inline]
    fn released(inner: EitherBody<B>) -> Self {
        Self { inner, permit: Permit::spent(), eos: Eos::Recorded }
    }
}

impl<B: Body<Data: From<Bytes>>> FromBytes for TrackedBody<B> {
    fn from_bytes(data: Bytes) -> Self {
        Self::released(EitherBody::own(data))
    }
}

impl<B: Body> Default for TrackedBody<B> {
    /// Returns an empty body that has ended: the body of a response that an outer layer makes.
    fn default() -> Self {
        Self::released(EitherBody::ended())
    }
}

impl<B: Body> Body for TrackedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        match this.eos {
            Eos::Recorded => return this.inner.poll_frame(cx),
            Eos::Unread => return unread::during(|| this.inner.poll_frame(cx)),
            _ => {}
        }
        // The frame is inspected in place, because it is large to move.
        let polled = this.permit.guard(|| this.inner.as_mut().poll_frame(cx));
        this.permit.body_polled(polled.is_pending());
        let length = || match &polled {
            Poll::Ready(Some(Ok(frame))) => Some(frame.data_ref().map_or(0, Buf::remaining)),
            Poll::Ready(_) => Some(0),
            Poll::Pending => None,
        };
        if this.permit.is_unread(length) {
            this.permit.release_mut(Outcome::cancelled());
            *this.eos = Eos::Unread;
            return polled;
        }
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.permit.release_mut(this.eos.end(Some(trailers)));
                } else if this.inner.is_end_stream() {
                    this.permit.release_mut(this.eos.end(None));
                }
            }
            Poll::Ready(Some(Err(_))) => this.permit.release_mut(this.eos.error()),
            Poll::Ready(None) => this.permit.release_mut(this.eos.end(None)),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B: Body> fmt::Debug for TrackedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrackedBody").field("permit", &self.permit).finish_non_exhaustive()
    }
}
