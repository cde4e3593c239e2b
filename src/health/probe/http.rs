//! Health probes by HTTP requests.

use std::{
    fmt,
    future::poll_fn,
    marker::PhantomData,
    pin::pin,
    sync::Arc,
    task::{Poll, ready},
};

use bytes::{Buf, BufMut, BytesMut};
use http::{HeaderMap, Request, Response, StatusCode, Uri, response::Parts};
use http_body::Body;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use super::{Failed, Probe, ProbeFailure, StatusProbe, ask, blame, of_refused, opaque_debug};
use crate::{error::ConfigError, outcome::Rejected, redact};

/// Maximum number of bytes that are read of a response body.
const MOST_BODY: usize = 64 * 1024;

/// The rules for the status and the body of a response.
#[derive(Clone, Default)]
pub struct Expected {
    status: Option<Arc<FitsStatus>>,
    body: Option<Arc<FitsBody>>,
}

type FitsStatus = dyn Fn(StatusCode) -> bool + Send + Sync;
type FitsBody = dyn Fn(&[u8]) -> bool + Send + Sync;

/// A probe over HTTP, which has rules for its response.
pub trait HttpProbe: Sized {
    #[doc(hidden)]
    fn expected(&mut self) -> &mut Expected;
}

impl Expected {
    pub(crate) fn set_status(&mut self, fits: impl Fn(StatusCode) -> bool + Send + Sync + 'static) {
        self.status = Some(Arc::new(fits));
    }

    pub(crate) fn set_body(&mut self, fits: impl Fn(&[u8]) -> bool + Send + Sync + 'static) {
        self.body = Some(Arc::new(fits));
    }

    fn has(&self, status: StatusCode) -> bool {
        self.status.as_ref().map_or(status.is_success(), |fits| fits(status))
    }
}

/// Sends `GET` with an empty body. Made by [`HealthProbeLayer::get`](super::super::layer::HealthProbeLayer::get).
pub struct Get<B> {
    uri: Uri,
    expected: Expected,
    body: PhantomData<fn() -> B>,
}

impl<B> Get<B> {
    pub(crate) fn new(uri: &str) -> (Self, Option<ConfigError>) {
        let (uri, fault) = match parse(uri) {
            Ok(uri) => (uri, None),
            Err(fault) => (Uri::default(), Some(fault)),
        };
        (Self { uri, expected: Expected::default(), body: PhantomData }, fault)
    }
}

impl<B> HttpProbe for Get<B> {
    fn expected(&mut self) -> &mut Expected {
        &mut self.expected
    }
}

/// Parses a URI in origin form (`/healthz`) or in absolute form (`http://search:8080/healthz`).
pub(crate) fn parse(uri: &str) -> Result<Uri, ConfigError> {
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
    async fn run(self, service: S, deadline: Instant) -> Result<(), Failed> {
        let mut request = Request::new(B::default());
        *request.uri_mut() = self.uri;
        over_http(service, request, deadline, self.expected).await
    }
}

/// Sends the HTTP request that a closure makes. Made by
/// [`HealthProbeLayer::request`](super::super::layer::HealthProbeLayer::request).
#[derive(Clone)]
pub struct SendRequest<F> {
    make: F,
    expected: Expected,
}

impl<F> SendRequest<F> {
    pub(crate) fn new(make: F) -> Self {
        Self { make, expected: Expected::default() }
    }
}

impl<F> HttpProbe for SendRequest<F> {
    fn expected(&mut self) -> &mut Expected {
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
    async fn run(self, service: S, deadline: Instant) -> Result<(), Failed> {
        let request = (self.make)();
        over_http(service, request, deadline, self.expected).await
    }
}

impl<B> StatusProbe for Get<B> {}

impl<F> StatusProbe for SendRequest<F> {}

async fn over_http<S, B, RB>(
    service: S,
    request: Request<B>,
    deadline: Instant,
    expected: Expected,
) -> Result<(), Failed>
where
    S: Service<Request<B>, Response = Response<RB>>,
    S::Error: 'static,
    RB: Body,
{
    let (head, body) = answer(service, request, deadline).await?;
    let verdict = match head.status {
        status if expected.has(status) => Ok(()),
        status => Err(ProbeFailure::Status(status)),
    };
    // The body is read to its end, so that the connection can be reused.
    let read = timeout_at(deadline, read(body, expected.body.is_some())).await;
    let verdict = match (read, expected.body) {
        (Ok(Err(broken)), _) => verdict.and(Err(broken)),
        // Without a rule for the body, the head determines the result, even if the body does not end in time.
        (_, None) => verdict,
        // With a rule, a body that does not end in time is a failure.
        (Err(_), Some(_)) => verdict.and(Err(ProbeFailure::TimedOut)),
        (Ok(Ok(read)), Some(fits)) => {
            let fits = read.whole && fits(&read.data);
            verdict.and(if fits { Ok(()) } else { Err(ProbeFailure::Classified) })
        }
    };
    verdict.map_err(Failed::from)
}

/// Calls the service, and returns the head and the body of the response. A rejection by an inner layer is a failure.
pub(crate) async fn answer<S, B, RB>(
    service: S,
    request: Request<B>,
    deadline: Instant,
) -> Result<(Parts, RB), Failed>
where
    S: Service<Request<B>, Response = Response<RB>>,
    S::Error: 'static,
{
    match ask(service, request, deadline).await? {
        Ok(response) => match response.extensions().get::<Rejected>() {
            Some(refused) => Err(of_refused(refused).into()),
            None => Ok(response.into_parts()),
        },
        Err(error) => Err(blame(&error)),
    }
}

pub(crate) struct Read {
    pub(crate) data: BytesMut,
    pub(crate) trailers: Option<HeaderMap>,
    /// The body was read to its end, and not only to the maximum.
    whole: bool,
}

/// Reads a body to its end or to [`MOST_BODY`] bytes. Stores its data if `keep` is set.
pub(crate) async fn read<B: Body>(body: B, keep: bool) -> Result<Read, ProbeFailure> {
    let mut body = pin!(body);
    let mut read = Read { data: BytesMut::new(), trailers: None, whole: false };
    let mut seen = 0usize;
    poll_fn(move |cx| {
        loop {
            match ready!(body.as_mut().poll_frame(cx)) {
                None => {
                    read.whole = true;
                    break;
                }
                Some(Err(_)) => return Poll::Ready(Err(ProbeFailure::Body)),
                Some(Ok(frame)) => {
                    // An empty frame counts as one byte, because an upstream can send them without end.
                    let size = frame.data_ref().map_or(0, Buf::remaining);
                    seen = seen.saturating_add(size.max(1));
                    if seen > MOST_BODY {
                        break;
                    }
                    match frame.into_data() {
                        Ok(data) if keep => read.data.put(data),
                        Ok(_) => {}
                        Err(frame) => read.trailers = frame.into_trailers().ok(),
                    }
                }
            }
        }
        let done = Read { data: read.data.split(), trailers: read.trailers.take(), ..read };
        Poll::Ready(Ok(done))
    })
    .await
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

impl fmt::Debug for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Expected")
    }
}
opaque_debug!(SendRequest<F>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_to_send_it() {
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
