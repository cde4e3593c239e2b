//! What a probe sends, and how its answer is judged.

use std::{
    fmt,
    future::{Future, poll_fn},
    marker::PhantomData,
    pin::pin,
    task::Poll,
};

use bytes::Buf;
use http::{Request, Response, StatusCode, Uri};
use http_body::Body;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use crate::{ConfigError, call::Rejected};

/// Why a probe did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProbeFailure {
    /// The HTTP status was none of 200 to 299.
    Status(StatusCode),
    /// The service failed, becoming ready or answering.
    Error,
    /// The answer's body broke off.
    Body,
    /// The judging closure said no.
    Judged,
    /// There was no answer in time.
    TimedOut,
    /// The service, the request's closure or the judge panicked.
    Panicked,
    /// A layer of this crate further in refused the probe. That says nothing about what is probed, and
    /// counts neither as a failure nor as a success.
    Refused,
}

impl ProbeFailure {
    /// The failure in `snake_case`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Error => "error",
            Self::Body => "body",
            Self::Judged => "judged",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
            Self::Refused => "refused",
        }
    }
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status {}", status.as_u16()),
            Self::Error => f.write_str("the service failed"),
            Self::Body => f.write_str("the body broke off"),
            Self::Judged => f.write_str("judged unhealthy"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Panicked => f.write_str("panicked"),
            Self::Refused => f.write_str("refused by a layer further in"),
        }
    }
}

impl std::error::Error for ProbeFailure {}

/// How a service is probed.
///
/// Not to be implemented outside of this crate yet: [`HealthProbeLayer`](super::HealthProbeLayer) has a
/// constructor for each kind.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot probe `{S}`",
    label = "this probe does not fit the wrapped service",
    note = "`HealthProbeLayer::get` needs a `Service<http::Request<B>>` with `B: Default` that answers with `http::Response<_>`",
    note = "for other types use `HealthProbeLayer::new(|| request)`, the closure making exactly the service's request",
    note = "the service, its future and its answers must be `Send`"
)]
pub trait Probe<S>: Clone + Send + 'static {
    /// Probes once. Whatever is not done by `deadline` has failed.
    fn run(
        self,
        service: S,
        deadline: Instant,
    ) -> impl Future<Output = Result<(), ProbeFailure>> + Send;
}

// ===== HTTP =====

/// Sends `GET` with an empty body. Made by [`HealthProbeLayer::get`](super::HealthProbeLayer::get).
pub struct Get<B> {
    uri: Uri,
    body: PhantomData<fn() -> B>,
}

impl<B> Get<B> {
    pub(super) fn new(uri: &str) -> (Self, Option<ConfigError>) {
        let (uri, fault) = match parse(uri) {
            Ok(uri) => (uri, None),
            Err(fault) => (Uri::default(), Some(fault)),
        };
        (Self { uri, body: PhantomData }, fault)
    }
}

/// Origin form, `/healthz`, or absolute, `http://search:8080/healthz`.
fn parse(uri: &str) -> Result<Uri, ConfigError> {
    let fault = || {
        ConfigError::new("get", uri, "use a path like `/healthz`, or a full `http://host/healthz`")
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
    async fn run(self, service: S, deadline: Instant) -> Result<(), ProbeFailure> {
        let mut request = Request::new(B::default());
        *request.uri_mut() = self.uri;
        over_http(service, request, deadline).await
    }
}

/// Sends the HTTP request that a closure makes. Made by
/// [`HealthProbeLayer::request`](super::HealthProbeLayer::request).
#[derive(Clone)]
pub struct SendRequest<F>(pub(super) F);

impl<S, F, B, RB> Probe<S> for SendRequest<F>
where
    F: Fn() -> Request<B> + Clone + Send + 'static,
    S: Service<Request<B>, Response = Response<RB>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: Send + 'static,
    RB: Body + Send,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), ProbeFailure> {
        let request = (self.0)();
        over_http(service, request, deadline).await
    }
}

/// Any 2xx passes.
async fn over_http<S, B, RB>(
    service: S,
    request: Request<B>,
    deadline: Instant,
) -> Result<(), ProbeFailure>
where
    S: Service<Request<B>, Response = Response<RB>>,
    S::Error: 'static,
    RB: Body,
{
    let response = match ask(service, request, deadline).await? {
        Ok(response) => response,
        Err(error) => return Err(blame(&error)),
    };
    let verdict = if let Some(refused) = response.extensions().get::<Rejected>() {
        Err(of_refused(refused))
    } else if response.status().is_success() {
        Ok(())
    } else {
        Err(ProbeFailure::Status(response.status()))
    };
    // Read to its end, so that the connection can be used again; one that takes too long is dropped,
    // and what the head said counts.
    match timeout_at(deadline, drain(response.into_body())).await {
        Ok(Err(broken)) => verdict.and(Err(broken)),
        Ok(Ok(())) | Err(_) => verdict,
    }
}

/// More of an answer than this is not read.
const MOST_BODY: usize = 64 * 1024;

async fn drain<B: Body>(body: B) -> Result<(), ProbeFailure> {
    let mut body = pin!(body);
    let mut read = 0usize;
    poll_fn(|cx| {
        loop {
            match std::task::ready!(body.as_mut().poll_frame(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(_)) => return Poll::Ready(Err(ProbeFailure::Body)),
                Some(Ok(frame)) => {
                    // An empty frame counts too: there may be no end to them.
                    let size = frame.data_ref().map_or(0, Buf::remaining);
                    read = read.saturating_add(size.max(1));
                    if read > MOST_BODY {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
    })
    .await
}

// ===== Anything else =====

/// Sends what a closure makes, judged by another. Made by
/// [`HealthProbeLayer::new`](super::HealthProbeLayer::new).
#[derive(Clone)]
pub struct Ask<F, J = AnyAnswer> {
    pub(super) make: F,
    pub(super) judge: J,
}

/// Every answer that is no error passes.
#[derive(Clone, Copy, Debug)]
pub struct AnyAnswer;

impl<S, F, Req> Probe<S> for Ask<F>
where
    F: Fn() -> Req + Clone + Send + 'static,
    S: Service<Req> + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Send + 'static,
    Req: Send + 'static,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), ProbeFailure> {
        let request = (self.make)();
        match ask(service, request, deadline).await? {
            Ok(_) => Ok(()),
            Err(error) => Err(blame(&error)),
        }
    }
}

/// The judge of the user's own.
#[derive(Clone)]
pub struct Judged<J>(pub(super) J);

impl<S, F, J, Req> Probe<S> for Ask<F, Judged<J>>
where
    F: Fn() -> Req + Clone + Send + 'static,
    J: for<'a> Fn(Result<&'a S::Response, &'a S::Error>) -> bool + Clone + Send + 'static,
    S: Service<Req> + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Send + 'static,
    Req: Send + 'static,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), ProbeFailure> {
        let request = (self.make)();
        let result = ask(service, request, deadline).await?;
        match (self.judge.0(result.as_ref()), result) {
            (true, _) => Ok(()),
            (false, Ok(_)) => Err(ProbeFailure::Judged),
            (false, Err(error)) => Err(blame(&error)),
        }
    }
}

// ===== All of them =====

/// Readies the service and calls it.
async fn ask<S: Service<Req>, Req>(
    mut service: S,
    request: Req,
    deadline: Instant,
) -> Result<Result<S::Response, S::Error>, ProbeFailure> {
    let call = async {
        poll_fn(|cx| service.poll_ready(cx)).await?;
        service.call(request).await
    };
    timeout_at(deadline, call).await.map_err(|_| ProbeFailure::TimedOut)
}

fn blame<E: 'static>(error: &E) -> ProbeFailure {
    match Rejected::find_in_any(error) {
        Some(refused) => of_refused(refused),
        None => ProbeFailure::Error,
    }
}

/// By a layer further in.
fn of_refused(refused: &Rejected) -> ProbeFailure {
    if refused.is_timeout() { ProbeFailure::TimedOut } else { ProbeFailure::Refused }
}

impl<B> Clone for Get<B> {
    fn clone(&self) -> Self {
        Self { uri: self.uri.clone(), body: PhantomData }
    }
}

impl<B> fmt::Debug for Get<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Get").field(&self.uri.path()).finish()
    }
}

macro_rules! opaque_debug {
    ($($name:ident<$($p:ident),*>),*) => {$(
        impl<$($p),*> fmt::Debug for $name<$($p),*> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )*};
}
opaque_debug!(SendRequest<F>, Ask<F, J>, Judged<J>);

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
