//! Traces of OpenTelemetry through retries and hedges, in the two positions that the documentation shows.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use buttress::{
    AttemptHeadersLayer, BoxError, HedgeLayer, RetryLayer,
    config::ClientConfig,
    retry::{Attempt, Backoff},
    stack::ClientStack,
};
use http::{HeaderMap, Request, Response};
use opentelemetry::{
    propagation::{Injector, TextMapPropagator},
    trace::TracerProvider,
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{InMemorySpanExporter, SdkTracerProvider, SpanData},
};
use tokio::time::sleep;
use tower::{Service, ServiceBuilder, ServiceExt, layer::layer_fn, service_fn};
use tracing::{Instrument, Span, info_span, instrument::Instrumented, subscriber::DefaultGuard};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::{Layer, SubscriberExt},
};

use super::{Body, request, status};
use crate::support::{ms, tracing_events::listen};

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = http::HeaderName::try_from(key).unwrap();
        self.0.insert(name, value.parse().unwrap());
    }
}

fn inject(span: &Span, headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject_context(&span.context(), &mut Headers(headers));
}

/// The traces of this thread.
struct Traces {
    provider: SdkTracerProvider,
    exporter: InMemorySpanExporter,
    _guard: DefaultGuard,
}

impl Traces {
    fn listen(filter: Targets) -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let guard = listen(tracing_subscriber::registry().with(layer.with_filter(filter)));
        Self { provider, exporter, _guard: guard }
    }

    fn finished(&self, name: &str) -> Vec<SpanData> {
        self.provider.force_flush().unwrap();
        let spans = self.exporter.get_finished_spans().unwrap();
        spans.into_iter().filter(|span| span.name == name).collect()
    }
}

/// The two lines of the documentation.
fn spans_of_attempts() -> Targets {
    Targets::new()
        .with_default(LevelFilter::INFO)
        .with_target("buttress::retry", LevelFilter::DEBUG)
        .with_target("buttress::hedge", LevelFilter::DEBUG)
}

/// The trace ids and parent ids of the `traceparent` headers that have arrived.
type Seen = Arc<Mutex<Vec<(String, String)>>>;

/// The first two calls fail after 100 ms, so that each has a hedge attempt. The fifth one succeeds.
fn upstream<B: Send + 'static>(
    seen: &Seen,
) -> impl Service<Request<B>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone {
    let seen = seen.clone();
    service_fn(move |request: Request<B>| {
        let parent = request.headers().get("traceparent");
        let parent = parent.map_or("--", |parent| parent.to_str().unwrap());
        let parts: Vec<_> = parent.split('-').map(str::to_owned).collect();
        let mut seen = seen.lock().unwrap();
        seen.push((parts[1].clone(), parts[2].clone()));
        let (code, after) = if seen.len() < 5 { (503, ms(100)) } else { (200, ms(10)) };
        async move {
            sleep(after).await;
            Ok(status(code))
        }
    })
}

fn retry() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(1)).without_jitter())
}

fn ids(spans: &[SpanData]) -> BTreeSet<String> {
    spans.iter().map(|span| span.span_context.span_id().to_string()).collect()
}

/// Asserts that five requests have one trace id and five parent ids, and returns the parent ids.
fn distinct(seen: &Seen, trace_id: &str) -> BTreeSet<String> {
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 5);
    assert!(seen.iter().all(|(trace, _)| trace == trace_id), "{seen:?}");
    let parents: BTreeSet<_> = seen.iter().map(|(_, parent)| parent.clone()).collect();
    assert_eq!(parents.len(), 5, "{seen:?}");
    parents
}

#[tokio::test(start_paused = true)]
async fn closure_propagates_the_span_of_each_attempt() {
    let (traces, seen) = (Traces::listen(spans_of_attempts()), Seen::default());
    let client = ServiceBuilder::new()
        .layer(retry())
        .layer(HedgeLayer::http(ms(80)))
        .layer(AttemptHeadersLayer::new(|_, headers| inject(&Span::current(), headers)))
        .service(upstream(&seen));
    let response = client.oneshot(request()).instrument(info_span!("caller")).await.unwrap();
    assert_eq!(response.status(), 200);
    let caller = &traces.finished("caller")[0].span_context;
    let parents = distinct(&seen, &caller.trace_id().to_string());
    // Three attempts of the retry, each with one or two spans of the hedge inside.
    let attempts = traces.finished("attempt");
    let (of_retry, of_hedge): (Vec<_>, Vec<_>) =
        attempts.into_iter().partition(|span| span.parent_span_id == caller.span_id());
    assert_eq!((of_retry.len(), of_hedge.len()), (3, 5));
    assert_eq!(parents, ids(&of_hedge), "each request has the context of its attempt");
}

/// Makes the client spans of OpenTelemetry, as the documentation shows.
#[derive(Clone)]
struct ClientSpan<S>(S);

impl<S, B> Service<Request<B>> for ClientSpan<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let resend_count = request.extensions().get().map(|Attempt(number)| number - 1);
        let span =
            info_span!("GET", otel.kind = "client", http.request.resend_count = resend_count);
        inject(&span, request.headers_mut());
        self.0.call(request).instrument(span)
    }
}

#[tokio::test(start_paused = true)]
async fn client_spans_inside_of_the_retry_are_children_of_the_attempts() {
    let (traces, seen) = (Traces::listen(spans_of_attempts()), Seen::default());
    let client = ServiceBuilder::new()
        .layer(retry())
        .layer(HedgeLayer::http(ms(80)))
        .layer(layer_fn(ClientSpan))
        .service(upstream(&seen));
    client.oneshot(request()).instrument(info_span!("caller")).await.unwrap();
    let caller = &traces.finished("caller")[0].span_context;
    let parents = distinct(&seen, &caller.trace_id().to_string());
    let (clients, attempts) = (traces.finished("GET"), traces.finished("attempt"));
    assert_eq!(parents, ids(&clients), "each request has the context of its client span");
    let of_clients: BTreeSet<_> =
        clients.iter().map(|span| span.parent_span_id.to_string()).collect();
    assert_eq!(of_clients.len(), 5);
    assert!(of_clients.is_subset(&ids(&attempts)), "the parent is the span of the attempt");
    let resent = |span: &SpanData| {
        let count =
            span.attributes.iter().find(|kv| kv.key.as_str() == "http.request.resend_count");
        count.map(|kv| kv.value.to_string())
    };
    let mut resent: Vec<_> = clients.iter().map(resent).collect();
    resent.sort();
    let text = |count: &str| Some(count.to_owned());
    assert_eq!(resent, [None, text("1"), text("1"), text("2"), text("2")]);
}

#[tokio::test(start_paused = true)]
async fn filter_at_info_removes_the_spans_of_attempts() {
    let filter = Targets::new().with_default(LevelFilter::INFO);
    let (traces, seen) = (Traces::listen(filter), Seen::default());
    let client = ServiceBuilder::new()
        .layer(retry())
        .layer(HedgeLayer::http(ms(80)))
        .layer(AttemptHeadersLayer::new(|_, headers| inject(&Span::current(), headers)))
        .service(upstream(&seen));
    client.oneshot(request()).instrument(info_span!("caller")).await.unwrap();
    let caller = traces.finished("caller")[0].span_context.span_id().to_string();
    assert!(traces.finished("attempt").is_empty());
    // The context is that of the caller, or none if the span exists for another subscriber.
    let is_of_attempt = |(_, parent): &(String, String)| !parent.is_empty() && *parent != caller;
    assert!(!seen.lock().unwrap().iter().any(is_of_attempt));
}

#[tokio::test(start_paused = true)]
async fn ready_made_stack_propagates_the_span_of_each_attempt() {
    let (traces, seen) = (Traces::listen(spans_of_attempts()), Seen::default());
    let config = ClientConfig::from_toml("hedge_after = \"80ms\"\nbreaker_failures = 99").unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let stack = stack.attempt_headers(|_, headers| inject(&Span::current(), headers));
    let client = tower::Layer::layer(&stack, upstream(&seen));
    client.oneshot(request()).instrument(info_span!("caller")).await.unwrap();
    let caller = &traces.finished("caller")[0].span_context;
    distinct(&seen, &caller.trace_id().to_string());
}
