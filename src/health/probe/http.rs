//! Health probes by HTTP requests.

use std::{fmt, future::poll_fn, marker::PhantomData, pin::pin, sync::Arc};

use bytes::{BufMut, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, Uri, response::Parts};
use http_body::Body;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use super::{
    FailedProbe, Probe, ProbeFailure, StatusProbe, call, failure_of_error, failure_of_rejection,
    opaque_debug,
};
use crate::{
    drain::{MAX_RESPONSE_BYTES, MIN_FRAME, ReadEnd, poll_read},
    error::ConfigError,
    outcome::Rejected,
    redact,
    sealed::Sealed,
};

/// The rules for the status and the body of a response.
#[derive(Clone, Default)]
pub struct ExpectedResponse {
    status: Option<Arc<StatusRule>>,
    body: Option<Arc<BodyRule>>,
}

type StatusRule = dyn Fn(StatusCode) -> bool + Send + Sync;
type BodyRule = dyn Fn(&[u8]) -> bool + Send + Sync;

/// A probe over HTTP, which has rules for its response.
///
/// The trait is sealed.
pub trait HttpProbe: Sealed {
    /// Returns the rules for the response.
    fn expected(&mut self) -> &mut ExpectedResponse;
}

impl ExpectedResponse {
    pub(in super::super) fn set_status(
        &mut self,
        passes: impl Fn(StatusCode) -> bool + Send + Sync + 'static,
    ) {
        self.status = Some(Arc::new(passes));
    }

    pub(in super::super) fn set_body(
        &mut self,
        passes: impl Fn(&[u8]) -> bool + Send + Sync + 'static,
    ) {
        self.body = Some(Arc::new(passes));
    }

    fn accepts(&self, status: StatusCode) -> bool {
        self.status.as_ref().map_or(status.is_success(), |passes| passes(status))
    }
}

/// Sends `GET` with an empty body. Made by [`HealthProbeLayer::get`](super::super::layer::HealthProbeLayer::get).
pub struct Get<B> {
    uri: Uri,
    expected: ExpectedResponse,
    body: PhantomData<fn() -> B>,
}

impl<B> Get<B> {
    pub(in super::super) fn new(uri: &str) -> (Self, Option<ConfigError>) {
        let (uri, fault) = match parse(uri) {
            Ok(uri) => (uri, None),
            Err(fault) => (Uri::default(), Some(fault)),
        };
        (Self { uri, expected: ExpectedResponse::default(), body: PhantomData }, fault)
    }
}

impl<B> HttpProbe for Get<B> {
    fn expected(&mut self) -> &mut ExpectedResponse {
        &mut self.expected
    }
}

/// Parses a URI in origin form (`/healthz`) or in absolute form (`http://search:8080/healthz`).
pub(super) fn parse(uri: &str) -> Result<Uri, ConfigError> {
    let fault = || {
        let remedy = "use a path like `/healthz`, or a full `http://host/healthz`";
        ConfigError::new("get", redact::Value(uri), remedy)
    };
    let parsed: Uri = uri.parse().map_err(|_| fault())?;
    let origin = parsed.scheme().is_none() && uri.starts_with('/');
    let absolute = matches!(parsed.scheme_str(), Some("http" | "https"))
        && parsed.host().is_some_and(|host| !host.is_empty());
    if origin || absolute { Ok(parsed) } else { Err(fault()) }
}

impl<S, B, RB> Probe<S> for Get<B>
where
    S: Service<Request<B>, Response = Response<RB>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: Default + Send + 'static,
    RB: Body + Send,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), FailedProbe> {
        let mut request = Request::new(B::default());
        *request.uri_mut() = self.uri;
        probe_http(service, request, deadline, self.expected).await
    }
}

/// Sends the HTTP request that a closure makes. Made by
/// [`HealthProbeLayer::request`](super::super::layer::HealthProbeLayer::request).
#[derive(Clone)]
pub struct SendRequest<F> {
    make: F,
    expected: ExpectedResponse,
}

impl<F> SendRequest<F> {
    pub(in super::super) fn new(make: F) -> Self {
        Self { make, expected: ExpectedResponse::default() }
    }
}

impl<F> HttpProbe for SendRequest<F> {
    fn expected(&mut self) -> &mut ExpectedResponse {
        &mut self.expected
    }
}

impl<S, F, B, RB> Probe<S> for SendRequest<F>
where
    F: Fn() -> Request<B> + Clone + Send + 'static,
    S: Service<Request<B>, Response = Response<RB>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: Send + 'static,
    RB: Body + Send,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), FailedProbe> {
        let request = (self.make)();
        probe_http(service, request, deadline, self.expected).await
    }
}

impl<B> Sealed for Get<B> {}

impl<F> Sealed for SendRequest<F> {}

impl<B> StatusProbe for Get<B> {}

impl<F> StatusProbe for SendRequest<F> {}

async fn probe_http<S, B, RB>(
    service: S,
    request: Request<B>,
    deadline: Instant,
    expected: ExpectedResponse,
) -> Result<(), FailedProbe>
where
    S: Service<Request<B>, Response = Response<RB>>,
    S::Error: 'static,
    RB: Body,
{
    let (head, body) = call_http(service, request, deadline).await?;
    let result = match head.status {
        status if expected.accepts(status) => Ok(()),
        status => Err(ProbeFailure::Status(status)),
    };
    // The body is read to its end, so that the connection can be reused.
    let read = timeout_at(deadline, read(body, expected.body.is_some())).await;
    let result = match (read, expected.body) {
        (Ok(Err(failure)), _) => result.and(Err(failure)),
        // Without a rule for the body, the head determines the result, even if the body does not end in time.
        (_, None) => result,
        // With a rule, a body that does not end in time is a failure.
        (Err(_), Some(_)) => result.and(Err(ProbeFailure::TimedOut)),
        (Ok(Ok(read)), Some(passes)) => {
            let passes = read.is_whole && passes(&read.data);
            result.and(if passes { Ok(()) } else { Err(ProbeFailure::Classified) })
        }
    };
    result.map_err(FailedProbe::from)
}

/// Calls the service, and returns the head and the body of the response. A rejection by an inner layer is a failure.
pub(super) async fn call_http<S, B, RB>(
    service: S,
    request: Request<B>,
    deadline: Instant,
) -> Result<(Parts, RB), FailedProbe>
where
    S: Service<Request<B>, Response = Response<RB>>,
    S::Error: 'static,
{
    match call(service, request, deadline).await? {
        Ok(response) => match response.extensions().get::<Rejected>() {
            Some(rejected) => Err(failure_of_rejection(rejected).into()),
            None => Ok(response.into_parts()),
        },
        Err(error) => Err(failure_of_error(&error)),
    }
}

#[derive(Default)]
pub(super) struct ReadBody {
    pub(super) data: BytesMut,
    pub(super) trailers: Option<HeaderMap>,
    /// The body was read to its end, and not only to the maximum.
    is_whole: bool,
}

/// Reads a body to its end or to [`MAX_RESPONSE_BYTES`]. Stores its data if `stores_data` is set.
pub(super) async fn read<B: Body>(body: B, stores_data: bool) -> Result<ReadBody, ProbeFailure> {
    let (mut body, mut length, mut read) = (pin!(body), 0, ReadBody::default());
    let end = poll_fn(|cx| {
        poll_read(body.as_mut(), &mut length, (MIN_FRAME, MAX_RESPONSE_BYTES), cx, |frame| {
            match frame.into_data() {
                Ok(data) if stores_data => read.data.put(data),
                Ok(_) => {}
                Err(frame) => read.trailers = frame.into_trailers().ok(),
            }
        })
    });
    match end.await {
        ReadEnd::Error => Err(ProbeFailure::Body),
        end => {
            read.is_whole = end == ReadEnd::End;
            Ok(read)
        }
    }
}

impl<B> Clone for Get<B> {
    fn clone(&self) -> Self {
        Self { uri: self.uri.clone(), expected: self.expected.clone(), body: PhantomData }
    }
}

impl<B> fmt::Debug for Get<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Get").field(&redact::debug(&self.uri, redact::MAX_VALUE)).finish()
    }
}

impl fmt::Debug for ExpectedResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExpectedResponse")
    }
}
opaque_debug!(SendRequest<F>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_is_a_path_or_a_full_http_uri() {
        for good in ["/healthz", "/", "/a?b=c", "http://search:8080/healthz", "https://[::1]/x"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in
            ["", "healthz", "*", "search:8080", "ftp://search/", "/a b", "http://", "http:///x"]
        {
            assert_eq!(parse(bad).unwrap_err().field, "get", "{bad}");
        }
    }
}
