use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, Request};
use tower_layer::Layer;
use tower_service::Service;

use super::record::Attempt;
use crate::{
    event::{RepeatedEvent, event},
    outcome::LayerKind,
    user_code::catch_panic,
};

/// Writes headers to each attempt of a call: `traceparent`, or any other header that must differ between attempts.
///
/// Without this layer all attempts have the headers of the request. A server then cannot distinguish them, and a trace
/// shows several calls with the same parent.
///
/// ```
/// use buttress::{AttemptHeadersLayer, RetryLayer};
/// use http::HeaderValue;
/// use tower::ServiceBuilder;
/// # use http::{Request, Response};
/// # type Body = http_body_util::Empty<bytes::Bytes>;
/// # let client = tower::service_fn(|_: Request<_>| async { Ok::<_, std::io::Error>(Response::new(Body::new())) });
///
/// let client = ServiceBuilder::new()
///     .layer(RetryLayer::http())
///     .layer(AttemptHeadersLayer::new(|attempt, headers| {
///         headers.insert("x-attempt", HeaderValue::from(attempt));
///     }))
///     .service(client);
/// # let _ = tower::ServiceExt::oneshot(client, Request::new(Body::new()));
/// ```
///
/// The closure receives the number of the attempt ([`Attempt`](crate::retry::Attempt)): 1 is the first one. The number
/// of a hedge attempt is that of the first attempt plus its own. With a hedge inside of a retry, two attempts of a call
/// can therefore have the same number. The closure runs once for each attempt that reaches this layer, before the layer
/// calls the wrapped service. If the closure panics, the attempt is sent with the headers that the closure has written,
/// and an ERROR event reports the panic.
///
/// # In the stack
///
/// Put the layer inside of the retry and the hedge, next to the client. The closure then does not run for attempts that
/// a circuit breaker or a limit rejects. The layer works for gRPC, too, because the request of a generated client is an
/// `http::Request`. The ready-made clients have the method `attempt_headers`.
///
/// # Traces
///
/// Retry and hedge call the wrapped service inside of a `tracing` span `attempt`, one for each attempt. In the closure
/// and in the inner layers, `tracing::Span::current()` returns the span of their attempt. There are two ways to
/// propagate a trace with OpenTelemetry:
///
/// 1. This layer writes the context of the attempt's span. No further span is made.
///
///    ```
///    use buttress::{AttemptHeadersLayer, HedgeLayer, RetryLayer};
///    use opentelemetry::{global, propagation::Injector};
///    use tower::ServiceBuilder;
///    use tracing_opentelemetry::OpenTelemetrySpanExt;
///    # use http::{Request, Response, HeaderMap};
///    # type Body = http_body_util::Empty<bytes::Bytes>;
///    # let client = tower::service_fn(|_: Request<_>| async { Ok::<_, std::io::Error>(Response::new(Body::new())) });
///
///    // `opentelemetry_http::HeaderInjector` is the same.
///    struct Headers<'a>(&'a mut HeaderMap);
///    impl Injector for Headers<'_> {
///        fn set(&mut self, key: &str, value: String) {
///            if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(key), value.parse()) {
///                self.0.insert(name, value);
///            }
///        }
///    }
///
///    let client = ServiceBuilder::new()
///        .layer(RetryLayer::http())
///        .layer(HedgeLayer::http(std::time::Duration::from_millis(80)))
///        .layer(AttemptHeadersLayer::new(|_, headers| {
///            let context = tracing::Span::current().context();
///            global::get_text_map_propagator(|w3c| w3c.inject_context(&context, &mut Headers(headers)));
///        }))
///        .service(client);
///    # let _ = tower::ServiceExt::oneshot(client, Request::new(Body::new()));
///    ```
///
/// 2. A layer at the same position, such as that of `tower-otel`, makes the client spans of OpenTelemetry
///    (`SPAN_KIND_CLIENT`) and injects their context. Each attempt then has a client span, whose parent is the span of
///    the attempt. Such a layer can read [`Attempt`](crate::retry::Attempt) from the extensions of the request for its
///    `http.request.resend_count`.
///
///    ```
///    use std::task::{Context, Poll};
///
///    use buttress::{RetryLayer, retry::Attempt};
///    use tower::{Service, ServiceBuilder, layer::layer_fn};
///    use tracing::{Instrument, info_span, instrument::Instrumented};
///    # use http::{Request, Response};
///    # type Body = http_body_util::Empty<bytes::Bytes>;
///    # let client = tower::service_fn(|_: Request<_>| async { Ok::<_, std::io::Error>(Response::new(Body::new())) });
///
///    #[derive(Clone)]
///    struct ClientSpan<S>(S);
///
///    impl<S: Service<Request<B>>, B> Service<Request<B>> for ClientSpan<S> {
///        type Response = S::Response;
///        type Error = S::Error;
///        type Future = Instrumented<S::Future>;
///
///        fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
///            self.0.poll_ready(cx)
///        }
///
///        fn call(&mut self, request: Request<B>) -> Self::Future {
///            let resend_count = request.extensions().get().map(|Attempt(number)| number - 1);
///            let span = info_span!("GET", otel.kind = "client", http.request.resend_count = resend_count);
///            // Inject `span.context()` into the headers here, as above.
///            self.0.call(request).instrument(span)
///        }
///    }
///
///    let client = ServiceBuilder::new()
///        .layer(RetryLayer::http())
///        .layer(layer_fn(ClientSpan))
///        .service(client);
///    # let _ = tower::ServiceExt::oneshot(client, Request::new(Body::new()));
///    ```
///
/// The span `attempt` is at DEBUG, so an OpenTelemetry layer that is filtered at INFO does not record it. All attempts
/// then have the context of the caller, or none if another layer records the span. The two lines `with_target` keep
/// the spans of the attempts, and nothing else at DEBUG but the events of these layers:
///
/// ```
/// use tracing_subscriber::{filter::{LevelFilter, Targets}, prelude::*};
/// # let tracer = opentelemetry::trace::TracerProvider::tracer(
/// #     &opentelemetry::trace::noop::NoopTracerProvider::new(), "doc");
///
/// let spans = Targets::new()
///     .with_default(LevelFilter::INFO)
///     .with_target("buttress::retry", LevelFilter::DEBUG)
///     .with_target("buttress::hedge", LevelFilter::DEBUG);
/// let subscriber = tracing_subscriber::registry()
///     .with(tracing_opentelemetry::layer().with_tracer(tracer).with_filter(spans));
/// # let _ = subscriber;
/// ```
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone, Default)]
pub struct AttemptHeadersLayer {
    /// `None` in a ready-made stack without a closure: its requests are not changed.
    hook: Option<Arc<HeaderHook>>,
}

/// A closure of the application that writes the headers of an attempt.
type WriteHeaders = dyn Fn(u32, &mut HeaderMap) + Send + Sync;

/// The closure of a layer, and the limit on the event of its panics.
struct HeaderHook {
    write: Box<WriteHeaders>,
    panics: RepeatedEvent,
}

impl AttemptHeadersLayer {
    /// Creates a layer that runs this closure for each attempt. The arguments are the number of the attempt, from 1, and
    /// the headers of its request.
    pub fn new(write: impl Fn(u32, &mut HeaderMap) + Send + Sync + 'static) -> Self {
        let hook = HeaderHook { write: Box::new(write), panics: RepeatedEvent::new() };
        Self { hook: Some(Arc::new(hook)) }
    }
}

impl<S> Layer<S> for AttemptHeadersLayer {
    type Service = AttemptHeaders<S>;

    fn layer(&self, inner: S) -> AttemptHeaders<S> {
        AttemptHeaders { inner, hook: self.hook.clone() }
    }
}

impl fmt::Debug for AttemptHeadersLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttemptHeadersLayer").finish_non_exhaustive()
    }
}

/// The service of an [`AttemptHeadersLayer`].
#[derive(Clone)]
pub struct AttemptHeaders<S> {
    inner: S,
    hook: Option<Arc<HeaderHook>>,
}

impl<S> AttemptHeaders<S> {
    /// Returns the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B> Service<Request<B>> for AttemptHeaders<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> S::Future {
        if let Some(hook) = &self.hook {
            let number = request.extensions().get().map_or(1, |Attempt(number)| *number);
            hook.apply(number, request.headers_mut());
        }
        self.inner.call(request)
    }
}

impl HeaderHook {
    /// Runs the closure, and reports its panic.
    fn apply(&self, number: u32, headers: &mut HeaderMap) {
        if catch_panic(|| (self.write)(number, headers)).is_some() {
            return;
        }
        if let Some(occurrences) = self.panics.record() {
            event!(
                retry,
                ERROR,
                LayerKind::Retry.as_str(),
                "",
                occurrences = occurrences,
                "attempt headers panicked",
            );
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for AttemptHeaders<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttemptHeaders").field("inner", &self.inner).finish_non_exhaustive()
    }
}
