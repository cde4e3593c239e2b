//! The requests of health probes, and the classification of their results.

mod grpc;
mod http;
mod task;

pub(super) use self::task::Prober;
pub use self::{
    grpc::Grpc,
    http::{ExpectedResponse, Get, HttpProbe, SendRequest},
};
use std::{
    fmt,
    future::{Future, poll_fn},
};

use ::http::StatusCode;
use tokio::time::{Instant, timeout_at};
use tower_service::Service;

use crate::{
    error::Chain,
    outcome::{Outcome, Rejected, known},
    redact::MAX_ERROR,
    sealed::Sealed,
};

/// The reason why a probe did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProbeFailure {
    /// The HTTP status was not accepted: by default outside 200 to 299, else by the rule of
    /// [`expect_status`](super::layer::HealthProbeLayer::expect_status), for gRPC other than 200.
    Status(StatusCode),
    /// The gRPC status was not `OK`.
    GrpcStatus(u16),
    /// The gRPC health service reported a status other than `SERVING`.
    NotServing,
    /// The service returned an error, in `poll_ready` or as the result of the call.
    Error,
    /// The response body ended with an error, or a gRPC response had no status.
    Body,
    /// The closure of [`classify_probe`](super::layer::HealthProbeLayer::classify_probe) returned `false`, or the body
    /// was not the expected one.
    Classified,
    /// The probe exceeded its timeout.
    TimedOut,
    /// The service or a closure of the probe panicked.
    Panicked,
    /// An inner layer of this crate rejected the probe. The rejection contains no information about the upstream, so it
    /// counts neither as a failure nor as a success.
    Rejected,
}

impl ProbeFailure {
    /// Returns whether the upstream has declared itself unavailable, by HTTP 503 or `NOT_SERVING`: the immediate
    /// failure of Envoy's health checks.
    pub(super) fn is_immediate(self) -> bool {
        matches!(self, Self::Status(StatusCode::SERVICE_UNAVAILABLE) | Self::NotServing)
    }

    /// The names of all failures.
    pub(super) const LABELS: [&'static str; 9] = [
        "status",
        "grpc_status",
        "not_serving",
        "error",
        "body",
        "classified",
        "timed_out",
        "panicked",
        "rejected",
    ];

    /// Returns the position of the failure in [`LABELS`](Self::LABELS).
    pub(super) const fn index(&self) -> usize {
        match self {
            Self::Status(_) => 0,
            Self::GrpcStatus(_) => 1,
            Self::NotServing => 2,
            Self::Error => 3,
            Self::Body => 4,
            Self::Classified => 5,
            Self::TimedOut => 6,
            Self::Panicked => 7,
            Self::Rejected => 8,
        }
    }

    /// Returns the name of the failure in `snake_case`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        Self::LABELS[self.index()]
    }
}

impl fmt::Display for ProbeFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status {}", status.as_u16()),
            Self::GrpcStatus(code) => write!(f, "gRPC status {code}"),
            Self::NotServing => f.write_str("not serving"),
            Self::Error => f.write_str("the service failed"),
            Self::Body => f.write_str("the response body is incomplete"),
            Self::Classified => f.write_str("classified as unhealthy"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Panicked => f.write_str("panicked"),
            Self::Rejected => f.write_str("rejected by an inner layer"),
        }
    }
}

impl std::error::Error for ProbeFailure {}

/// A probe that did not pass, with its reason and the text of its error.
#[derive(Debug)]
pub struct FailedProbe {
    pub(super) reason: ProbeFailure,
    /// `None` if there was no error, or if its type is not known to this crate.
    pub(super) error: Option<Box<str>>,
    /// The probe ended by connection housekeeping, which carries no information about the upstream.
    pub(super) is_housekeeping: bool,
}

impl From<ProbeFailure> for FailedProbe {
    fn from(reason: ProbeFailure) -> Self {
        Self { reason, error: None, is_housekeeping: false }
    }
}

impl fmt::Display for FailedProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)?;
        self.error.iter().try_for_each(|error| write!(f, ": {error}"))
    }
}

/// A kind of health probe, for a service `S`.
///
/// The trait is sealed. [`HealthProbeLayer`](super::layer::HealthProbeLayer) has a constructor for each
/// kind.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot probe `{S}`",
    label = "this probe does not fit the wrapped service",
    note = "`HealthProbeLayer::get` needs a `Service<http::Request<B>>` with `B: Default` and the response `http::Response<_>`",
    note = "for other types, use `HealthProbeLayer::new(|| request)` with a closure that returns exactly the request type of the service",
    note = "the service, its future and its responses must be `Send`"
)]
pub trait Probe<S>: Sealed + Clone + Send + 'static {
    /// Sends one probe. It fails if it has not ended at `deadline`.
    fn run(
        self,
        service: S,
        deadline: Instant,
    ) -> impl Future<Output = Result<(), FailedProbe>> + Send;
}

/// A probe with responses by which the upstream declares itself unavailable: HTTP 503, or `NOT_SERVING` of gRPC.
///
/// See [`immediate_failure`](super::layer::HealthProbeLayer::immediate_failure). The trait is sealed.
pub trait StatusProbe: Sealed {}

// ===== Services of any types =====

/// Sends the request that a closure makes, and classifies the result by `classify`. Made by
/// [`HealthProbeLayer::new`](super::layer::HealthProbeLayer::new).
#[derive(Clone)]
pub struct CallProbe<F, C = AnyResponse> {
    pub(super) make: F,
    pub(super) classify: C,
}

/// The default classification: every response passes, and every error fails.
#[derive(Clone, Copy, Debug)]
pub struct AnyResponse;

impl<S, F, Req> Probe<S> for CallProbe<F>
where
    F: Fn() -> Req + Clone + Send + 'static,
    S: Service<Req> + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Send + 'static,
    Req: Send + 'static,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), FailedProbe> {
        let request = (self.make)();
        match call(service, request, deadline).await? {
            Ok(_) => Ok(()),
            Err(error) => Err(failure_of_error(&error)),
        }
    }
}

/// A classification by a closure of the user.
#[derive(Clone)]
pub struct ClassifiedProbe<C>(pub(super) C);

impl<S, F, C, Req> Probe<S> for CallProbe<F, ClassifiedProbe<C>>
where
    F: Fn() -> Req + Clone + Send + 'static,
    C: for<'a> Fn(Result<&'a S::Response, &'a S::Error>) -> bool + Clone + Send + 'static,
    S: Service<Req> + Send + 'static,
    S::Future: Send,
    S::Response: Send,
    S::Error: Send + 'static,
    Req: Send + 'static,
{
    async fn run(self, service: S, deadline: Instant) -> Result<(), FailedProbe> {
        let request = (self.make)();
        let result = call(service, request, deadline).await?;
        match (self.classify.0(result.as_ref()), result) {
            (true, _) => Ok(()),
            (false, Ok(_)) => Err(ProbeFailure::Classified.into()),
            (false, Err(error)) => Err(failure_of_error(&error)),
        }
    }
}

// ===== Closures =====

/// Runs a closure and does not call the wrapped service. Made by
/// [`HealthProbeLayer::check`](super::layer::HealthProbeLayer::check).
#[derive(Clone)]
pub struct FnProbe<F>(pub(super) F);

impl<S, F, Fut, E> Probe<S> for FnProbe<F>
where
    F: Fn() -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<(), E>> + Send,
    E: 'static,
    S: Send,
{
    fn run(
        self,
        service: S,
        deadline: Instant,
    ) -> impl Future<Output = Result<(), FailedProbe>> + Send {
        drop(service);
        let check = (self.0)();
        async move {
            match timeout_at(deadline, check).await {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(failure_of_error(&error)),
                Err(_) => Err(ProbeFailure::TimedOut.into()),
            }
        }
    }
}

// ===== All kinds =====

/// Waits until the service is ready, and calls it. Fails with [`ProbeFailure::TimedOut`] at `deadline`.
async fn call<S: Service<Req>, Req>(
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

/// Returns the failure of a probe that ended with this error.
fn failure_of_error<E: 'static>(error: &E) -> FailedProbe {
    let known = known(error);
    match known.and_then(Rejected::find) {
        Some(rejected) => failure_of_rejection(rejected).into(),
        None => {
            let text = known.map(|error| Chain(error).within(MAX_ERROR).into_boxed_str());
            let is_housekeeping =
                known.is_some_and(|error| Outcome::of_error(error).is_housekeeping());
            FailedProbe { reason: ProbeFailure::Error, error: text, is_housekeeping }
        }
    }
}

/// Returns the failure of a probe that an inner layer rejected. A rejection by a timeout layer is a timeout.
fn failure_of_rejection(rejected: &Rejected) -> ProbeFailure {
    if rejected.is_timeout() { ProbeFailure::TimedOut } else { ProbeFailure::Rejected }
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
use opaque_debug;
opaque_debug!(CallProbe<F, C>, ClassifiedProbe<C>, FnProbe<F>);

impl<F, C> Sealed for CallProbe<F, C> {}
impl<F> Sealed for FnProbe<F> {}
