//! The settings of the timeout layer, in the layer, in the request and through the handle.

use std::time::Duration;

use buttress::{Rejected, TimeoutLayer, Timeouts, outcome::RejectedKind, timeout::TimeoutPhase};
use tokio::time::Instant;
use tower::{Layer, ServiceExt};

use crate::layers::time::fixtures::*;
use crate::support::{Strict, refused_as};

#[tokio::test(start_paused = true)]
async fn a_request_can_carry_timeouts() {
    let (inner, _watch) = Strict::holding();
    let service = TimeoutLayer::http().total(secs(600)).layer(inner);
    for (own, phase, after) in [
        (Timeouts::new(), TimeoutPhase::Head, 30),
        (Timeouts::new().head(secs(5)), TimeoutPhase::Head, 5),
        (Timeouts::new().head(secs(700)), TimeoutPhase::Total, 600),
        (Timeouts::new().head(None), TimeoutPhase::Total, 600),
        (Timeouts::new().response_idle(secs(1)), TimeoutPhase::Head, 30),
    ] {
        let mut request = request();
        request.extensions_mut().insert(own);
        let start = Instant::now();
        let error = service.clone().oneshot(request).await.unwrap_err();
        assert_eq!((phase_of(&error), start.elapsed()), (phase, secs(after)), "{own:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn zero_timeout_of_a_request_is_rejected_as_that_of_a_layer() {
    let (inner, watch) = Strict::new();
    let service = TimeoutLayer::http().layer(inner);
    let mut request = request();
    request.extensions_mut().insert(Timeouts::new().response_idle(Duration::ZERO));
    let error = service.clone().oneshot(request).await.unwrap_err();
    let refused = Rejected::find(&*error).unwrap();
    assert_eq!(refused.kind(), RejectedKind::Misconfigured);
    assert!(
        std::error::Error::source(refused)
            .unwrap()
            .to_string()
            .starts_with("`response_idle` is 0ns")
    );
    assert_eq!((watch.seen().calls, watch.seen().reserved), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_a_request_apply_to_each_of_its_attempts() {
    let (inner, watch) = Strict::holding();
    let wait = buttress::Backoff::constant(secs(1)).without_jitter();
    let service = tower::ServiceBuilder::new()
        .layer(buttress::RetryLayer::http().backoff(wait))
        .layer(TimeoutLayer::http())
        .service(inner);
    let mut request = request();
    request.extensions_mut().insert(Timeouts::new().head(secs(2)));
    let start = Instant::now();
    let error = service.oneshot(request).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::Head, secs(2 + 1 + 2 + 1 + 2)));
    assert_eq!(watch.seen().calls, 3);
}

#[tokio::test(start_paused = true)]
async fn handle_changes_the_timeouts_of_all_services_of_a_layer() {
    let (inner, _watch) = Strict::holding();
    let layer = TimeoutLayer::http().name("search");
    let (handle, service) = (layer.handle(), layer.layer(inner.clone()));
    handle.set_head(secs(7)).unwrap();
    for service in [service.clone(), layer.layer(inner)] {
        let start = Instant::now();
        let error = service.oneshot(request()).await.unwrap_err();
        let refused = Rejected::find(&*error).unwrap();
        assert_eq!((refused.layer(), refused.name()), ("timeout", Some("search")));
        assert_eq!(error.to_string(), "rejected by timeout `search`: no response head in time");
        assert_eq!(start.elapsed(), secs(7), "an existing service uses the new setting");
    }
    handle.set(Timeouts::new().head(secs(2))).unwrap();
    let start = Instant::now();
    service.clone().oneshot(request()).await.unwrap_err();
    assert_eq!(start.elapsed(), secs(2));
    let error =
        handle.set(Timeouts::new().response_idle(secs(9)).head(Duration::ZERO)).unwrap_err();
    assert_eq!(error.to_string(), "`head` is 0ns: use a time above zero, or none for no limit");
    let snapshot = handle.snapshot();
    assert_eq!(
        snapshot.timeouts.get(TimeoutPhase::Head),
        Some(secs(2)),
        "a rejected setting changes nothing"
    );
    assert_eq!(snapshot.timeouts.get(TimeoutPhase::Idle), Some(secs(60)));
    assert_eq!((snapshot.timed_out(), snapshot.timed_out_by(TimeoutPhase::Head)), (3, 3));
}

#[tokio::test(start_paused = true)]
async fn setter_of_a_layer_in_use_does_not_change_its_services() {
    let (inner, _watch) = Strict::holding();
    let layer = TimeoutLayer::http();
    let handle = layer.handle();
    let layer = layer.head(secs(7)).name("search");
    assert_eq!(handle.snapshot().timeouts.get(TimeoutPhase::Head), Some(secs(7)), "not in use yet");
    let service = layer.layer(inner.clone());
    let forked = layer.clone().head(secs(2)).response_idle(secs(9));
    let forked_handle = forked.handle();
    for (service, after) in [(service, 7), (forked.layer(inner), 2)] {
        let start = Instant::now();
        let error = service.oneshot(request()).await.unwrap_err();
        assert_eq!(error.to_string(), "rejected by timeout `search`: no response head in time");
        assert_eq!(start.elapsed(), secs(after));
    }
    for (handle, idle) in [(handle, 60), (forked_handle, 9)] {
        let snapshot = handle.snapshot();
        assert_eq!(snapshot.timeouts.get(TimeoutPhase::Idle), Some(secs(idle)));
        assert_eq!(snapshot.timed_out(), 1, "each layer counts its own calls");
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_of_zero_is_a_typed_error_and_rejects_calls() {
    let layer = TimeoutLayer::http().response_idle(Duration::ZERO);
    let error = layer.clone().checked().unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("response_idle", "0ns"));
    assert!(TimeoutLayer::new(Timeouts::new().total(Duration::ZERO)).checked().is_err());
    let (inner, watch) = Strict::new();
    let refused = layer.layer(inner).oneshot(request()).await;
    assert_eq!(refused_as(refused.map(drop)), RejectedKind::Misconfigured);
    assert_eq!(watch.seen().calls, 0);
}

#[test]
fn times_are_whole_milliseconds_rounded_up_to_a_maximum_of_49_days() {
    let get = |time| Timeouts::new().total(time).get(TimeoutPhase::Total).unwrap();
    assert_eq!(get(Duration::from_nanos(1)), ms(1));
    assert_eq!(get(Duration::from_nanos(1_000_001)), ms(2));
    assert_eq!(get(Duration::MAX), ms(u64::from(u32::MAX) - 1));
    assert_eq!(Timeouts::new().total(None).get(TimeoutPhase::Total), None);
    assert_eq!(Timeouts::http().get(TimeoutPhase::Deadline), None);
    assert_eq!(
        format!("{:?}", Timeouts::http().head(None)),
        "Timeouts { head: off, first_frame: 60s, response_idle: 60s, request_idle: 60s, request_stall: 300s, total: off }"
    );
}

#[tokio::test(start_paused = true)]
async fn a_call_outlives_its_layer() {
    let (inner, _watch) = Strict::holding();
    let call = TimeoutLayer::http().name("gone").layer(inner).oneshot(request());
    let error = tokio::spawn(call).await.unwrap().unwrap_err();
    assert_eq!(phase_of(&error), TimeoutPhase::Head);
}
