//! What a probe sends, and how its answer is judged.

use std::{
    fmt,
    future::{Future, poll_fn},
};

use http::StatusCode;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use crate::{
    call::{Outcome, Rejected, known},
    error::Chain,
    redact::MAX_ERROR,
};

/// Why a probe did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProbeFailure {
    /// The HTTP status was none that is expected: of 200 to 299, unless something else was said.
    Status(StatusCode),
    /// The gRPC status was not `OK`.
    GrpcStatus(u16),
    /// The gRPC health service said that it is not serving.
    NotServing,
    /// The service failed, becoming ready or answering.
    Error,
    /// The answer's body broke off.
    Body,
    /// The judging closure said no, or the body is not the one expected.
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
    /// Returns whether the upstream has declared itself unavailable, by HTTP 503 or `NOT_SERVING`: the immediate
    /// failure of Envoy's health checks.
    pub(super) fn is_immediate(self) -> bool {
        matches!(self, Self::Status(StatusCode::SERVICE_UNAVAILABLE) | Self::NotServing)
    }

    /// The failure in `snake_case`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::GrpcStatus(_) => "grpc_status",
            Self::NotServing => "not_serving",
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
            Self::GrpcStatus(code) => write!(f, "gRPC status {code}"),
            Self::NotServing => f.write_str("not serving"),
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

/// A probe that did not pass: why, and, of an error that is known for one, what it says.
#[derive(Debug)]
pub struct Failed {
    pub(super) why: ProbeFailure,
    pub(super) error: Option<Box<str>>,
    /// The probe ended by connection housekeeping, which carries no information about the upstream.
    pub(super) is_housekeeping: bool,
}

impl From<ProbeFailure> for Failed {
    fn from(why: ProbeFailure) -> Self {
        Self { why, error: None, is_housekeeping: false }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.why.fmt(f)?;
        self.error.iter().try_for_each(|error| write!(f, ": {error}"))
    }
}

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
    fn run(self, service: S, deadline: Instant) -> impl Future<Output = Result<(), Failed>> + Send;
}

/// A probe by whose response the upstream can declare itself unavailable: by HTTP 503, or by gRPC's `NOT_SERVING`.
///
/// See [`immediate_failure`](super::HealthProbeLayer::immediate_failure). Do not implement it outside of this crate.
pub trait StatusProbe {}

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
    async fn run(self, service: S, deadline: Instant) -> Result<(), Failed> {
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
    async fn run(self, service: S, deadline: Instant) -> Result<(), Failed> {
        let request = (self.make)();
        let result = ask(service, request, deadline).await?;
        match (self.judge.0(result.as_ref()), result) {
            (true, _) => Ok(()),
            (false, Ok(_)) => Err(ProbeFailure::Judged.into()),
            (false, Err(error)) => Err(blame(&error)),
        }
    }
}

// ===== Anything else that can tell =====

/// Asks a closure, and not the wrapped service. Made by
/// [`HealthProbeLayer::check`](super::HealthProbeLayer::check).
#[derive(Clone)]
pub struct Run<F>(pub(super) F);

impl<S, F, Fut, E> Probe<S> for Run<F>
where
    F: Fn() -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<(), E>> + Send,
    E: 'static,
    S: Send,
{
    fn run(self, service: S, deadline: Instant) -> impl Future<Output = Result<(), Failed>> + Send {
        drop(service);
        let asked = (self.0)();
        async move {
            match timeout_at(deadline, asked).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(blame(&error)),
                Err(_) => Err(ProbeFailure::TimedOut.into()),
            }
        }
    }
}

// ===== All of them =====

/// Readies the service and calls it.
pub(super) async fn ask<S: Service<Req>, Req>(
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

pub(super) fn blame<E: 'static>(error: &E) -> Failed {
    let known = known(error);
    match known.and_then(Rejected::find) {
        Some(refused) => of_refused(refused).into(),
        None => {
            let text = known.map(|error| Chain(error).within(MAX_ERROR).into_boxed_str());
            let is_housekeeping =
                known.is_some_and(|error| Outcome::of_error(error).is_housekeeping());
            Failed { why: ProbeFailure::Error, error: text, is_housekeeping }
        }
    }
}

/// By a layer further in.
pub(super) fn of_refused(refused: &Rejected) -> ProbeFailure {
    if refused.is_timeout() { ProbeFailure::TimedOut } else { ProbeFailure::Refused }
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
pub(super) use opaque_debug;
opaque_debug!(Ask<F, J>, Judged<J>, Run<F>);
