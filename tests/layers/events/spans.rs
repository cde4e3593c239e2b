//! The spans of attempts.

use buttress::{
    AttemptHeadersLayer, BoxError, HedgeLayer, RetryLayer,
    hedge::HedgeAttempt,
    retry::{Attempt, Backoff},
};
use http::{HeaderValue, Request};
use tokio::time::sleep;
use tower::{Layer, ServiceBuilder, service_fn};
use tracing::{Instrument, info_span};

use super::{AT_ONCE, call, status, upstream};
use crate::support::{
    ms, secs,
    tracing_events::{Entry, EventLog},
};

const FIELDS: [&str; 5] = ["hedge", "http.request.resend_count", "delay_ms", "outcome", "reason"];

fn fields(span: &Entry) -> String {
    FIELDS.map(|field| span.get(field)).join(" ")
}

fn attempts(log: &EventLog) -> Vec<Entry> {
    let spans = log.spans();
    assert_eq!(spans[0].message, "caller");
    spans.into_iter().skip(1).collect()
}

#[tokio::test(start_paused = true)]
async fn each_attempt_of_retry_has_span_under_span_of_caller() {
    let (log, _guard) = EventLog::listen();
    let backoff = Backoff::constant(ms(7)).without_jitter();
    let retry = RetryLayer::http().backoff(backoff).name("search");
    let service = retry.layer(upstream([(503, AT_ONCE), (503, AT_ONCE), (200, AT_ONCE)]));
    call(service).instrument(info_span!("caller")).await.unwrap();
    let spans = attempts(&log);
    let seen: Vec<_> = spans.iter().map(fields).collect();
    assert_eq!(
        seen,
        ["false   failure status", "false 1 7 failure status", "false 2 7 success completed"]
    );
    for span in &spans {
        let (name, layer) = (span.get("resilience.name"), span.get("layer"));
        assert_eq!((&*span.message, &*span.level, &*span.target), ("attempt", "DEBUG", "retry"));
        assert_eq!((span.parent, name, layer, span.is_closed), (Some(0), "search", "retry", true));
    }
}

#[tokio::test(start_paused = true)]
async fn span_of_hedge_attempt_is_sibling_and_superseded_attempt_is_cancelled() {
    let (log, _guard) = EventLog::listen();
    let slow_first = service_fn(|request: Request<_>| async move {
        let is_hedge = request.extensions().get::<HedgeAttempt>().is_some();
        assert_eq!(request.extensions().get(), is_hedge.then_some(&Attempt(2)));
        sleep(if is_hedge { ms(10) } else { secs(1) }).await;
        Ok::<_, BoxError>(status(200))
    });
    let hedge = HedgeLayer::http(ms(80)).name("search");
    call(hedge.layer(slow_first)).instrument(info_span!("caller")).await.unwrap();
    let spans = attempts(&log);
    let seen: Vec<_> = spans.iter().map(fields).collect();
    assert_eq!(seen, ["false   cancelled superseded", "true 1 80 success completed"]);
    for span in spans {
        let name = span.get("resilience.name").to_owned();
        assert_eq!((&*span.message, &*span.target, span.parent), ("attempt", "hedge", Some(0)));
        assert!(span.is_closed && name == "search");
    }
}

#[tokio::test(start_paused = true)]
async fn span_of_dropped_attempt_is_cancelled() {
    let (log, _guard) = EventLog::listen();
    let service = RetryLayer::http().layer(upstream([(200, secs(9))]));
    let call = call(service).instrument(info_span!("caller"));
    assert!(tokio::time::timeout(secs(1), call).await.is_err());
    assert_eq!(
        attempts(&log).iter().map(fields).collect::<Vec<_>>(),
        ["false   cancelled dropped"]
    );
}

/// The spans of a hedge inside of a retry are under the span of the retry's attempt.
#[tokio::test(start_paused = true)]
async fn closure_writes_headers_of_each_attempt_inside_of_its_span() {
    let (log, _guard) = EventLog::listen();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let numbers = seen.clone();
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::http().attempts(2).backoff(Backoff::constant(ms(1)).without_jitter()))
        .layer(HedgeLayer::http(ms(80)))
        .layer(AttemptHeadersLayer::new(|attempt, headers| {
            let span = tracing::Span::current();
            assert_eq!(span.metadata().map(|metadata| metadata.name()), Some("attempt"));
            headers.insert("x-attempt", HeaderValue::from(attempt));
        }))
        .map_request(move |request: Request<_>| {
            numbers
                .lock()
                .unwrap()
                .push(request.headers()["x-attempt"].to_str().unwrap().to_owned());
            request
        })
        .service(upstream([(503, ms(100)), (503, ms(100)), (200, AT_ONCE)]));
    call(stack).instrument(info_span!("caller")).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), ["1", "2", "2"]);
    let spans = attempts(&log);
    let tree: Vec<_> = spans.iter().map(|span| (&*span.target, span.parent.unwrap())).collect();
    assert_eq!(tree, [("retry", 0), ("hedge", 1), ("hedge", 1), ("retry", 0), ("hedge", 4)]);
}

#[tokio::test(start_paused = true)]
async fn attempt_is_sent_although_closure_for_its_headers_panics() {
    let headers = AttemptHeadersLayer::new(|_, headers| {
        headers.insert("x-before", HeaderValue::from_static("1"));
        panic!("in the closure");
    });
    let inner = service_fn(|request: Request<super::Body>| async move {
        assert!(request.headers().contains_key("x-before"));
        Ok::<_, BoxError>(status(200))
    });
    assert_eq!(call(headers.layer(inner)).await.unwrap().status(), 200);
}
