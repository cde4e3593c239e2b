//! A Tower service around a [`reqwest::Client`] that speaks `http`'s types.
//!
//! reqwest's own service takes its own request type, which no layer for HTTP fits. [`HttpClient`] takes any
//! [`http::Request`] and gives an [`http::Response`], so that every layer of this crate and of `tower-http`
//! goes around it as around hyper's client. Bodies stream both ways.
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
//! It takes bodies of any type, request by request. Therefore `ready()` needs to be told which, as in
//! `ServiceExt::<http::Request<Empty<Bytes>>>::ready(&mut client)`; `oneshot` on a clone does not.
//!
//! # Timeouts, redirects, cookies
//!
//! Whatever the client was built with holds. A redirect is followed inside, within one call of the layers
//! around it; one that would need a request body again (307, 308) is followed only if that body was empty,
//! since a streamed one is gone.
//!
//! # Stale connections
//!
//! reqwest does not reveal whether a connection was reused. A connection that breaks before the response is
//! [assumed to be reused](crate::breaker#connection-housekeeping).

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use ::reqwest::{Body, Client, Error, Request};
use bytes::Bytes;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::BoxError;

/// A [`reqwest::Client`] as a service of `http`'s types. Always ready; clones share the
/// client's connections.
///
/// # Errors
///
/// A request that cannot be sent as it is (its URI has no scheme and host, or is neither `http` nor `https`)
/// fails with reqwest's builder error, [`Error::is_builder`], whose source says
/// what is wrong; nothing was sent. All else is what the client gives.
///
/// # Cancellation
///
/// Dropping the future, or the response body before its end, gives up the exchange and its connection.
#[derive(Clone)]
pub struct HttpClient {
    client: Client,
}

impl HttpClient {
    /// Sends requests through this client.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The client.
    #[must_use]
    pub fn get_ref(&self) -> &Client {
        &self.client
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
    B: http_body::Body + Send + Sync + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    type Response = http::Response<Body>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<B>) -> ResponseFuture {
        if request.uri().scheme().is_none() {
            // `http:80`, a host and a port, would be read as a URL. `/` is none, and said to be none.
            *request.uri_mut() = http::Uri::default();
        }
        let state = match Request::try_from(request.map(outgoing)) {
            Ok(request) => State::Sent { pending: self.client.call(request) },
            Err(error) => State::Unsendable { error: Some(error) },
        };
        ResponseFuture { state }
    }
}

/// An empty body is one that reqwest can send again, after a redirect.
fn outgoing<B>(body: B) -> Body
where
    B: http_body::Body + Send + Sync + 'static,
    B::Data: Into<Bytes>,
    B::Error: Into<BoxError>,
{
    if body.is_end_stream() { Body::default() } else { Body::wrap(body) }
}

pin_project! {
    /// The future of an [`HttpClient`]'s call.
    pub struct ResponseFuture {
        #[pin]
        state: State,
    }
}

pin_project! {
    #[project = StateProj]
    enum State {
        Sent { #[pin] pending: <Client as Service<Request>>::Future },
        Unsendable { error: Option<Error> },
    }
}

/// Omits the request: reqwest's own `Debug` shows its URL and headers.
impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            State::Sent { .. } => "ResponseFuture(sent)",
            State::Unsendable { .. } => "ResponseFuture(unsendable)",
        })
    }
}

impl Future for ResponseFuture {
    type Output = Result<http::Response<Body>, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Sent { pending } => Poll::Ready(ready!(pending.poll(cx)).map(Into::into)),
            StateProj::Unsendable { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => unreachable!("polled after completion"),
            },
        }
    }
}
