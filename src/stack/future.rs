use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::Response;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::{client_error::ClientError, error::BoxError};

pin_project! {
    /// The future of a call of a ready-made client.
    #[must_use = "futures do nothing unless polled"]
    pub struct ClientFuture<F> {
        #[pin]
        future: F,
    }
}

impl<F> ClientFuture<F> {
    pub(super) fn new(future: F) -> Self {
        Self { future }
    }
}

/// The response of a ready-made client around a service with the response `R`.
pub(super) type ClientResponse<R> = Response<ClientBody<<R as HasBody>::Body>>;

impl<F, B> Future for ClientFuture<F>
where
    F: Future<Output = Result<Response<B>, BoxError>>,
{
    type Output = Result<Response<ClientBody<B>>, ClientError>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match ready!(self.project().future.poll(cx)) {
            Ok(response) => Ok(response.map(|body| ClientBody { body })),
            Err(error) => Err(ClientError::new(error)),
        })
    }
}

impl<F> fmt::Debug for ClientFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientFuture").finish_non_exhaustive()
    }
}

/// Names the body of a response type. Implemented for [`Response`].
pub trait HasBody {
    /// The body.
    type Body;
}

impl<B> HasBody for Response<B> {
    type Body = B;
}

pin_project! {
    /// The response body of a ready-made client. Its error is a [`ClientError`].
    pub struct ClientBody<B> {
        #[pin]
        body: B,
    }
}

impl<B> Body for ClientBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = ClientError;

    #[inline]
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, ClientError>>> {
        let polled = self.project().body.poll_frame(cx);
        polled.map(|frame| frame.map(|frame| frame.map_err(|error| ClientError::new(error.into()))))
    }

    #[inline]
    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    #[inline]
    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl<B> fmt::Debug for ClientBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBody").finish_non_exhaustive()
    }
}
