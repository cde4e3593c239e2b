use tower::ServiceBuilder;
use tower_layer::Stack;

#[cfg(feature = "breaker")]
use crate::breaker::CircuitBreakerLayer;
#[cfg(feature = "timeout")]
use crate::deadline::DeadlineLayer;
#[cfg(feature = "health")]
use crate::health::HealthProbeLayer;
#[cfg(feature = "limit")]
use crate::limit::ConcurrencyLimitLayer;
use crate::respond::RespondLayer;
#[cfg(feature = "timeout")]
use crate::timeout::TimeoutLayer;
#[cfg(feature = "retry")]
use crate::{
    hedge::HedgeLayer,
    retry::{AttemptHeadersLayer, RetryLayer},
};

/// Methods of tower's [`ServiceBuilder`] for the layers of this crate.
///
/// Each does the same as [`ServiceBuilder::layer`] with the same layer. The methods are listed in the order of the
/// layers of a client, outermost first. `retries`, `timeouts` and `concurrency` are not named `retry`, `timeout` and
/// `concurrency_limit`, because these methods of `ServiceBuilder` add tower's own layers.
///
/// ```
/// use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, RetryLayer, ServiceBuilderExt};
/// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
/// use tower::ServiceBuilder;
/// # type Body = http_body_util::Empty<bytes::Bytes>;
///
/// let client = ServiceBuilder::new()
///     .retries(RetryLayer::http())
///     .circuit_breaker(CircuitBreakerLayer::http())
///     .concurrency(ConcurrencyLimitLayer::new(50))
///     .service(Client::builder(TokioExecutor::new()).build_http());
/// # let _: &tower::util::Oneshot<_, http::Request<Body>> =
/// #     &tower::ServiceExt::oneshot(client, http::Request::new(Body::new()));
/// ```
pub trait ServiceBuilderExt<L>: Sized {
    /// Adds a layer.
    fn add<T>(self, layer: T) -> ServiceBuilder<Stack<T, L>>;

    /// Responds to the calls that inner layers reject.
    fn respond(self) -> ServiceBuilder<Stack<RespondLayer, L>> {
        self.add(RespondLayer::new())
    }

    /// Gives each call a deadline.
    #[cfg(feature = "timeout")]
    #[cfg_attr(docsrs, doc(cfg(feature = "timeout")))]
    fn deadline<R>(self, layer: DeadlineLayer<R>) -> ServiceBuilder<Stack<DeadlineLayer<R>, L>> {
        self.add(layer)
    }

    /// Retries calls that failed for a transient reason.
    #[cfg(feature = "retry")]
    #[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
    fn retries<M>(self, layer: RetryLayer<M>) -> ServiceBuilder<Stack<RetryLayer<M>, L>> {
        self.add(layer)
    }

    /// Makes a second attempt of a call that takes longer than usual.
    #[cfg(feature = "retry")]
    #[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
    fn hedge<M>(self, layer: HedgeLayer<M>) -> ServiceBuilder<Stack<HedgeLayer<M>, L>> {
        self.add(layer)
    }

    /// Writes headers to each attempt. Its position is next to the client.
    #[cfg(feature = "retry")]
    #[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
    fn attempt_headers(
        self,
        layer: AttemptHeadersLayer,
    ) -> ServiceBuilder<Stack<AttemptHeadersLayer, L>> {
        self.add(layer)
    }

    /// Rejects calls while the upstream fails.
    #[cfg(feature = "breaker")]
    #[cfg_attr(docsrs, doc(cfg(feature = "breaker")))]
    fn circuit_breaker<M, R>(
        self,
        layer: CircuitBreakerLayer<M, R>,
    ) -> ServiceBuilder<Stack<CircuitBreakerLayer<M, R>, L>> {
        self.add(layer)
    }

    /// Limits the calls in flight.
    #[cfg(feature = "limit")]
    #[cfg_attr(docsrs, doc(cfg(feature = "limit")))]
    fn concurrency<M, R>(
        self,
        layer: ConcurrencyLimitLayer<M, R>,
    ) -> ServiceBuilder<Stack<ConcurrencyLimitLayer<M, R>, L>> {
        self.add(layer)
    }

    /// Rejects calls while the upstream fails its health probe.
    #[cfg(feature = "health")]
    #[cfg_attr(docsrs, doc(cfg(feature = "health")))]
    fn health_probe<P, M, R>(
        self,
        layer: HealthProbeLayer<P, M, R>,
    ) -> ServiceBuilder<Stack<HealthProbeLayer<P, M, R>, L>> {
        self.add(layer)
    }

    /// Bounds the time of the phases of a call.
    #[cfg(feature = "timeout")]
    #[cfg_attr(docsrs, doc(cfg(feature = "timeout")))]
    fn timeouts<M, R>(
        self,
        layer: TimeoutLayer<M, R>,
    ) -> ServiceBuilder<Stack<TimeoutLayer<M, R>, L>> {
        self.add(layer)
    }
}

impl<L> ServiceBuilderExt<L> for ServiceBuilder<L> {
    fn add<T>(self, layer: T) -> ServiceBuilder<Stack<T, L>> {
        self.layer(layer)
    }
}
