//! A Tower service around a [`reqwest::Client`] that speaks `http`'s types.
//!
//! The service of `reqwest::Client` takes reqwest's own request type, which no HTTP layer fits. [`HttpClient`] takes
//! any [`http::Request`] and returns an [`http::Response`], so every layer of this crate and of `tower-http` can wrap
//! it. Bodies stream both ways.
//!
//! ```no_run
//! use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, reqwest::HttpClient};
//! use http_body_util::{BodyExt, Empty};
//! use std::time::Duration;
//! use tower::{ServiceBuilder, ServiceExt};
//!
//! # async fn run() -> Result<(), buttress::BoxError> {
//! let client = ServiceBuilder::new()
//!     .layer(CircuitBreakerLayer::http())
//!     .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
//!     .service(HttpClient::new(reqwest::Client::new()));
//!
//! let request = http::Request::get("http://localhost:8080/").body(Empty::<bytes::Bytes>::new())?;
//! let response = client.oneshot(request).await?;
//! println!("{} {:?}", response.status(), response.into_body().collect().await?.to_bytes());
//! # Ok(())
//! # }
//! ```
//!
//! It takes bodies of any type that is `Send + 'static`, such as `axum::body::Body`, `tonic::body::Body` and
//! `http_body_util::combinators::UnsyncBoxBody`, and the type can differ between requests. `ready()` therefore needs a
//! type, as in `ServiceExt::<http::Request<Empty<Bytes>>>::ready(&mut client)`. `oneshot` on a clone needs none.
//!
//! # Timeouts, redirects, cookies
//!
//! The settings of the client stay in force. The client follows redirects itself, within one call of the outer layers.
//! It follows a redirect that repeats the request body (307, 308) only if the body is empty, because a streamed body
//! cannot be sent again.
//!
//! # Requests made with reqwest
//!
//! [`SendThrough`] sends a [`RequestBuilder`] through the layers and returns reqwest's own response:
//!
//! ```no_run
//! use buttress::{CircuitBreakerLayer, RetryLayer, reqwest::{HttpClient, SendThrough}};
//! use tower::ServiceBuilder;
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let http = HttpClient::from_builder(reqwest::Client::builder())?;
//! let layers = ServiceBuilder::new().layer(RetryLayer::http()).layer(CircuitBreakerLayer::http());
//! let client = layers.service(http.clone());
//!
//! let request = http.get_ref().get("http://localhost:8080/").bearer_auth("token");
//! let text = request.send_through(&client).await?.error_for_status()?.text().await?;
//! # let _ = text; Ok(()) }
//! ```
//!
//! # Stale connections
//!
//! reqwest does not reveal whether a connection was reused. A connection that breaks before the response is
//! [assumed to be reused](crate::breaker#connection-housekeeping).
//!
//! # Retries of reqwest
//!
//! By default, a `reqwest::Client` retries up to twice if an HTTP/2 server refused the stream or sent a GOAWAY,
//! provided that the request has no body or a body in memory. Inside of a [`RetryLayer`](crate::retry::RetryLayer)
//! these retries multiply with its attempts, and no breaker, limit or budget observes them.
//! [`HttpClient::from_builder`] switches them off. For a client that you build yourself, call
//! `ClientBuilder::retry(reqwest::retry::never())`.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
};

use ::reqwest::{
    Body, Client, ClientBuilder, Error, Request, RequestBuilder, Response, ResponseBuilderExt,
    retry,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use sync_wrapper::SyncWrapper;
use tower_service::Service;

use crate::{client_error::ClientError, error::BoxError};

/// A [`reqwest::Client`] as a service of `http`'s types. It is always ready. Clones share the connections of the
/// client.
///
/// The extensions of a response contain its URL, so `reqwest::Response::from` restores it.
///
/// # Errors
///
/// A request that cannot be sent as it is fails with reqwest's builder error ([`Error::is_builder`]), whose source
/// states the cause: its URI has no scheme and host, or its scheme is neither `http` nor `https`. Nothing was sent. All
/// other errors are those of the client.
///
/// # Cancellation
///
/// Dropping the future, or the response body before its end, cancels the exchange. An HTTP/1 connection is then
/// usually closed, and an HTTP/2 stream is reset.
#[derive(Clone)]
pub struct HttpClient {
    client: Client,
}

impl HttpClient {
    /// Returns a service that sends requests through this client.
    ///
    /// A client with reqwest's default settings [makes retries of its own](self#retries-of-reqwest).
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Builds the client with reqwest's [own retries](self#retries-of-reqwest) switched off.
    ///
    /// A policy set by [`ClientBuilder::retry`] is replaced.
    ///
    /// # Errors
    ///
    /// Returns the error of [`ClientBuilder::build`].
    pub fn from_builder(builder: ClientBuilder) -> Result<Self, Error> {
        builder.retry(retry::never()).build().map(Self::new)
    }

    /// Returns the client.
    #[must_use]
    pub fn get_ref(&self) -> &Client {
        &self.client
    }

    /// Returns the client.
    pub fn get_mut(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Returns the client.
    #[must_use]
    pub fn into_inner(self) -> Client {
        self.client
    }
}

/// Omits the client: its own `Debug` shows default headers and proxies.
impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").finish_non_exhaustive()
    }
}

impl From<Client> for HttpClient {
    fn from(client: Client) -> Self {
        Self::new(client)
    }
}

impl<B> Service<http::Request<B>> for HttpClient
where
    B: http_body::Body + Send + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = SendFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<B>) -> SendFuture {
        if request.uri().scheme().is_none() {
            // reqwest would parse `http:80`, a host and a port, as a URL with a scheme. `/` makes it reject the
            // request.
            *request.uri_mut() = http::Uri::default();
        }
        let state = match Request::try_from(request.map(outgoing)) {
            Ok(request) => SendState::Sent { pending: self.client.call(request) },
            Err(error) => SendState::Unsendable { error: Some(error) },
        };
        SendFuture { state }
    }
}

/// Converts a body. An ended body becomes an empty one, which reqwest can send again after a redirect.
fn outgoing<B>(body: B) -> Body
where
    B: http_body::Body + Send + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    if body.is_end_stream() { Body::default() } else { Body::wrap(Outgoing::new(body)) }
}

pin_project! {
    /// Makes a body `Sync`, as `reqwest::Body` requires.
    ///
    /// [`SyncWrapper`] gives access to the wrapped body by `&mut` only. `size_hint` and `is_end_stream` take `&self`,
    /// so their values are stored after each poll.
    struct Outgoing<B> {
        #[pin]
        body: SyncWrapper<B>,
        size_hint: SizeHint,
        is_end_stream: bool,
    }
}

impl<B: http_body::Body> Outgoing<B> {
    fn new(body: B) -> Self {
        let (size_hint, is_end_stream) = (body.size_hint(), body.is_end_stream());
        Self { body: SyncWrapper::new(body), size_hint, is_end_stream }
    }
}

impl<B: http_body::Body> http_body::Body for Outgoing<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let mut body = this.body.get_pin_mut();
        let polled = body.as_mut().poll_frame(cx);
        (*this.size_hint, *this.is_end_stream) = (body.size_hint(), body.is_end_stream());
        polled
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::clone(&self.size_hint)
    }

    fn is_end_stream(&self) -> bool {
        self.is_end_stream
    }
}

pin_project! {
    /// The future of an [`HttpClient`]'s call.
    pub struct SendFuture {
        #[pin]
        state: SendState,
    }
}

pin_project! {
    #[project = SendStateProj]
    enum SendState {
        Sent { #[pin] pending: <Client as Service<Request>>::Future },
        Unsendable { error: Option<Error> },
    }
}

/// Omits the request: reqwest's own `Debug` shows its URL and headers.
impl fmt::Debug for SendFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            SendState::Sent { .. } => "SendFuture(sent)",
            SendState::Unsendable { .. } => "SendFuture(unsendable)",
        })
    }
}

impl Future for SendFuture {
    type Output = Result<http::Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            SendStateProj::Sent { pending } => Poll::Ready(ready!(pending.poll(cx)).map(with_url)),
            SendStateProj::Unsendable { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => unreachable!("polled after completion"),
            },
        }
    }
}

/// Converts the response and stores its URL in the extensions, which reqwest's own conversion drops.
fn with_url(response: Response) -> http::Response<Body> {
    let mut builder = http::Response::builder().url(response.url().clone());
    let mut response = http::Response::<Body>::from(response);
    if let Some(url) = builder.extensions_mut() {
        response.extensions_mut().extend(std::mem::take(url));
    }
    response
}

// ===== Requests made with reqwest =====

/// Sends reqwest's own requests through layers.
///
/// Implemented for [`RequestBuilder`] and [`Request`]. The settings of the request, such as its timeout, stay in force.
/// The timeout applies to each attempt.
pub trait SendThrough: Sized {
    /// Converts the request into a request of the `http` crate, without sending it.
    ///
    /// # Errors
    ///
    /// The error of a builder whose request cannot be built.
    fn into_http(self) -> Result<http::Request<Body>, Error>;

    /// Sends the request through a service, such as layers around an [`HttpClient`], and returns reqwest's response.
    ///
    /// It waits until a clone of the service is ready, and calls the clone.
    ///
    /// # Errors
    ///
    /// A [`ClientError`]. Its source is the error of the service, or reqwest's builder error if the request cannot be
    /// built.
    ///
    /// # Cancellation
    ///
    /// Dropping the future drops the call.
    fn send_through<S, B>(
        self,
        service: &S,
    ) -> impl Future<Output = Result<Response, ClientError>> + Send
    where
        S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send,
        S::Error: Into<BoxError>,
        S::Future: Send,
        B: http_body::Body + Send + 'static,
        B::Data: Into<Bytes>,
        B::Error: Into<BoxError>,
    {
        let (request, mut service) = (self.into_http(), service.clone());
        async move {
            let failed = |error: S::Error| ClientError::new(error.into());
            let request = request.map_err(|error| ClientError::new(error.into()))?;
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(failed)?;
            let response = service.call(request).await.map_err(failed)?;
            Ok(Response::from(response.map(outgoing)))
        }
    }
}

impl SendThrough for RequestBuilder {
    fn into_http(self) -> Result<http::Request<Body>, Error> {
        self.build()?.try_into()
    }
}

impl SendThrough for Request {
    fn into_http(self) -> Result<http::Request<Body>, Error> {
        self.try_into()
    }
}
