use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Buf;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

pin_project! {
    /// A response body whose first frame may have been read in advance. It returns that frame first.
    pub struct PeekedBody<B: Body> {
        first: FirstFrame<B::Data, B::Error>,
        #[pin]
        body: B,
    }
}

enum FirstFrame<D, E> {
    None,
    Data(D),
    /// Boxed, because it is rare and large: trailers, or an error.
    Other(Box<Result<Frame<D>, E>>),
    /// The body has ended. It must not be polled again.
    End,
}

/// The first frame of a body.
pub(crate) enum Peek<'a> {
    /// A message: the response has begun.
    Message,
    /// Trailers without a message before them.
    Trailers(&'a HeaderMap),
    /// The body failed.
    Error,
    /// The body is empty.
    End,
}

impl<B: Body> PeekedBody<B> {
    pub(crate) fn new(body: B) -> Self {
        Self { first: FirstFrame::None, body }
    }

    /// Polls the first frame and saves it.
    pub(crate) fn poll_peek(&mut self, cx: &mut Context<'_>) -> Poll<Peek<'_>>
    where
        B: Unpin,
    {
        if matches!(self.first, FirstFrame::None) {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => self.first = FirstFrame::End,
                Poll::Ready(Some(Ok(frame))) => {
                    self.first = match frame.into_data() {
                        Ok(data) => FirstFrame::Data(data),
                        Err(frame) => FirstFrame::Other(Box::new(Ok(frame))),
                    };
                }
                Poll::Ready(Some(Err(error))) => {
                    self.first = FirstFrame::Other(Box::new(Err(error)))
                }
            }
        }
        Poll::Ready(match &self.first {
            FirstFrame::None | FirstFrame::End => Peek::End,
            FirstFrame::Data(_) => Peek::Message,
            FirstFrame::Other(frame) => match &**frame {
                Ok(frame) => frame.trailers_ref().map_or(Peek::Message, Peek::Trailers),
                Err(_) => Peek::Error,
            },
        })
    }
}

impl<B: Body + Default> Default for PeekedBody<B> {
    /// Returns an empty body, as `tower_http`'s timeout, CORS and auth layers require for their responses.
    fn default() -> Self {
        Self::new(B::default())
    }
}

impl<B: Body> Body for PeekedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        match this.first {
            FirstFrame::None => return this.body.poll_frame(cx),
            FirstFrame::End => return Poll::Ready(None),
            FirstFrame::Data(_) | FirstFrame::Other(_) => {}
        }
        match std::mem::replace(this.first, FirstFrame::None) {
            FirstFrame::None | FirstFrame::End => Poll::Ready(None),
            FirstFrame::Data(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            FirstFrame::Other(frame) => Poll::Ready(Some(*frame)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self.first {
            FirstFrame::None => self.body.is_end_stream(),
            FirstFrame::End => true,
            FirstFrame::Data(_) | FirstFrame::Other(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        let rest = match self.first {
            FirstFrame::End => SizeHint::with_exact(0),
            _ => self.body.size_hint(),
        };
        let FirstFrame::Data(data) = &self.first else { return rest };
        let first = data.remaining() as u64;
        let mut hint = SizeHint::new();
        // Set the upper bound first, because `set_lower` panics above it.
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(first));
        }
        hint.set_lower(rest.lower().saturating_add(first));
        hint
    }
}

impl<B: Body> fmt::Debug for PeekedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeekedBody")
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, task::Waker};

    use bytes::Bytes;

    use super::*;

    /// A body that panics if it is polled after its end, like one over a stream that is not fused.
    struct EndsOnce(bool);

    impl Body for EndsOnce {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            assert!(!std::mem::replace(&mut self.0, true), "polled beyond its end");
            Poll::Ready(None)
        }
    }

    #[test]
    fn body_is_not_polled_after_a_peek_at_its_end() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut body = PeekedBody::new(EndsOnce(false));
        for _ in 0..2 {
            assert!(matches!(body.poll_peek(&mut cx), Poll::Ready(Peek::End)));
        }
        assert!(body.is_end_stream());
        assert_eq!(body.size_hint().exact(), Some(0));
        for _ in 0..2 {
            assert!(matches!(Pin::new(&mut body).poll_frame(&mut cx), Poll::Ready(None)));
        }
    }
}
