//! The timeout of an attempt, and its span.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{Attempts, Backoff, Outcome, RetryLayer, outcome::Reason, retry::GiveUpReason};
use tokio::time::{Instant, sleep};
use tower::Layer;
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span,
};

use super::fixtures::*;

fn layer() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(0))).attempt_timeout(ms(100)).without_budget()
}

/// Responds with 200. The first response takes this time.
fn slow_once(first: Duration) -> Inner {
    Inner::with(move |n, _| async move {
        if n == 1 {
            sleep(first).await;
        }
        Ok(status(200))
    })
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_times_out_is_retried() {
    let inner = slow_once(Duration::from_secs(60));
    let log = inner.log.clone();
    let start = Instant::now();
    let response = send(&layer().layer(inner), get()).await.unwrap();
    assert_eq!((Attempts::of(&response).made, log.calls()), (2, 2));
    assert!(start.elapsed() >= ms(100) && start.elapsed() <= ms(103), "{:?}", start.elapsed());
    assert_eq!(log.taken(), (0, 0), "the slow attempt is dropped");
    // A response before the timeout.
    let response = send(&layer().layer(slow_once(ms(99))), get()).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 1);
}

#[tokio::test(start_paused = true)]
async fn the_last_attempt_has_the_same_timeout_and_its_error_names_it() {
    let inner = Inner::<ScriptBody>::with(|_, _| pending());
    let start = Instant::now();
    let result = send(&layer().layer(inner), get()).await;
    assert_eq!((told(&result).made, told(&result).stop), (3, GiveUpReason::AttemptsUsedUp));
    assert!(start.elapsed() >= ms(300) && start.elapsed() <= ms(309), "{:?}", start.elapsed());
    let error = result.err().unwrap();
    assert_eq!(error.source().unwrap().to_string(), "rejected by retry: no response head in time");
    // The server may have processed the request.
    let unsafe_one = layer().layer(Inner::<ScriptBody>::with(|_, _| pending()));
    let result = send(&unsafe_one, post(ScriptBody::empty())).await;
    assert_eq!(told(&result).stop, GiveUpReason::Unsafe);
    let never = layer().never_on(Reason::Timeout);
    let result = send(&never.layer(Inner::<ScriptBody>::with(|_, _| pending())), get()).await;
    assert_eq!(told(&result).made, 1);
}

/// The timeout ends at the head, so it does not limit a stream.
#[tokio::test(start_paused = true)]
async fn the_attempt_timeout_does_not_limit_a_body() {
    let inner: Inner = Inner::new(|_| {
        let late = ScriptBody::new([Piece::Pause(Duration::from_secs(60)), data("late")]);
        Ok(status(200).map(|_| late))
    });
    let response = send(&layer().layer(inner), get()).await.unwrap();
    assert_eq!(read(response.into_body()).await.0, "late");
}

#[test]
fn settings_that_a_closure_replaces_are_a_typed_error() {
    let error = RetryLayer::http().attempt_timeout(Duration::ZERO).checked().unwrap_err();
    assert_eq!(error.field, "attempt_timeout");
    let closure = |_: Result<&(), &Oops>| Outcome::success();
    let layers = [
        layer(),
        RetryLayer::http().never_on(Reason::Timeout),
        RetryLayer::http().methods([http::Method::GET]),
    ];
    for layer in layers {
        assert_eq!(layer.classify(closure).checked().unwrap_err().field, "classify");
    }
    assert!(RetryLayer::new().classify(closure).checked().is_ok());
}

// ===== Spans =====

#[derive(Debug, PartialEq)]
struct AttemptContext {
    resent: Option<u64>,
    delay_ms: Option<u64>,
    outcome: String,
    reason: String,
    over: bool,
}

/// Records the spans of attempts, and whether one is entered.
#[derive(Clone, Default)]
struct Watch(Arc<Mutex<(Vec<AttemptContext>, bool)>>);

impl Watch {
    fn with<T>(
        &self,
        id: &span::Id,
        act: impl FnOnce(&mut AttemptContext, &mut bool) -> T,
    ) -> Option<T> {
        let mut now = self.0.lock().unwrap();
        let (spans, entered) = &mut *now;
        let number = usize::try_from(id.into_u64()).unwrap().checked_sub(2)?;
        Some(act(&mut spans[number], entered))
    }
}

impl Visit for AttemptContext {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "outcome" => self.outcome = format!("{value:?}"),
            "reason" => self.reason = format!("{value:?}"),
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "http.request.resend_count" => self.resent = Some(value),
            name => {
                assert_eq!(name, "delay_ms");
                self.delay_ms = Some(value);
            }
        }
    }
}

impl Subscriber for Watch {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        if attributes.metadata().name() != "attempt" {
            return span::Id::from_u64(1);
        }
        let spans = &mut self.0.lock().unwrap().0;
        let mut span = AttemptContext {
            resent: None,
            delay_ms: None,
            outcome: String::new(),
            reason: String::new(),
            over: false,
        };
        attributes.record(&mut span);
        spans.push(span);
        span::Id::from_u64(spans.len() as u64 + 1)
    }

    fn record(&self, id: &span::Id, values: &span::Record<'_>) {
        self.with(id, |span, _| values.record(span));
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {}

    fn enter(&self, id: &span::Id) {
        self.with(id, |_, entered| *entered = true);
    }

    fn exit(&self, id: &span::Id) {
        self.with(id, |_, entered| *entered = false);
    }

    fn try_close(&self, id: span::Id) -> bool {
        self.with(&id, |span, _| span.over = true).is_some()
    }
}

#[tokio::test(start_paused = true)]
async fn each_attempt_has_a_span_that_ends_with_it() {
    let watch = Watch::default();
    let _guard = crate::support::tracing_events::listen(watch.clone());
    let inside = watch.clone();
    let inner = Inner::<ScriptBody>::with(move |n, _| {
        let watch = inside.clone();
        assert!(watch.0.lock().unwrap().1, "the span is entered in `call`");
        async move {
            sleep(ms(1)).await;
            let (spans, entered) = &*watch.0.lock().unwrap();
            assert!(entered, "the span is entered in `poll`");
            let open = spans.iter().filter(|span| !span.over).count();
            assert_eq!(open, 1, "attempt {n}: the earlier spans are closed");
            Ok(status(503))
        }
    });
    let backoff = Backoff::constant(ms(7)).without_jitter();
    send(&layer().backoff(backoff).layer(inner), get()).await.unwrap();
    let (spans, entered) = &*watch.0.lock().unwrap();
    let seen: Vec<_> = spans.iter().map(|span| (span.resent, span.delay_ms)).collect();
    assert_eq!(seen, [(None, None), (Some(1), Some(7)), (Some(2), Some(7))]);
    let is_failure =
        |span: &AttemptContext| (&*span.outcome, &*span.reason) == (r#""failure""#, r#""status""#);
    assert!(spans.iter().all(|span| span.over && is_failure(span)), "{spans:?}");
    assert!(!entered);
}
