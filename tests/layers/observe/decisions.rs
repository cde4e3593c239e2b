use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Wake, Waker},
    time::Duration,
};

use buttress::{
    CircuitBreakerLayer, Outcome, Trip,
    breaker::OpenDuration,
    config::ClientConfig,
    health::{Check, Health},
    lifecycle::Lifecycle,
    observe::{Decisions, Registry},
    stack::ClientStack,
};
use tokio::time::advance;
use tracing_subscriber::prelude::*;

fn search(registry: &Registry) -> CircuitBreakerLayer {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(2))
        .open_for(OpenDuration::fixed(Duration::from_secs(5)))
        .name("search");
    registry.watch(&layer.handle()).unwrap();
    layer
}

/// Returns the events and reasons of all decisions so far.
async fn events(decisions: &mut Decisions) -> Vec<(&'static str, Option<String>, String)> {
    let mut events = Vec::new();
    while let Ok(Some(decision)) = tokio::time::timeout(Duration::ZERO, decisions.next()).await {
        events.push((decision.event, decision.reason.map(String::from), decision.why));
    }
    events
}

#[tokio::test(start_paused = true)]
async fn transitions_of_a_circuit_are_decisions_with_reason_and_values() {
    let registry = Registry::new();
    let layer = search(&registry);
    let mut decisions = registry.decisions();
    let handle = layer.handle();
    for _ in 0..2 {
        handle.record(Outcome::failure());
    }
    advance(Duration::from_secs(5)).await;
    assert_eq!(handle.state().as_str(), "half_open");
    handle.record(Outcome::success());
    handle.force_open();
    handle.force_open();
    handle.reset();
    let expected = [
        ("circuit opened", Some("consecutive"), "2 failures in a row"),
        ("circuit half-open", None, "open before"),
        ("circuit closed", None, "half_open before"),
        ("circuit forced", None, "forced_open, closed before"),
        ("circuit forced", None, "closed, forced_open before"),
    ];
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(event, reason, why)| (event, reason.map(str::to_owned), why.to_owned()))
        .collect();
    assert_eq!(events(&mut decisions).await, expected);
}

#[tokio::test(start_paused = true)]
async fn each_registry_receives_the_decisions_of_the_layers_that_it_watches() {
    let (first, second) = (Registry::new(), Registry::new());
    let layer = search(&first);
    second.watch(&layer.handle()).unwrap();
    let other = CircuitBreakerLayer::http().name("other");
    second.watch(&other.handle()).unwrap();
    let (mut of_first, mut of_second) = (first.decisions(), second.decisions());
    layer.handle().force_open();
    other.handle().force_open();
    assert_eq!(events(&mut of_first).await.len(), 1);
    assert_eq!(events(&mut of_second).await.len(), 2);
    drop(first);
    assert_eq!(of_first.next().await, None);
    layer.handle().reset();
    assert_eq!(events(&mut of_second).await.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn phases_of_the_process_and_changes_of_checks_are_decisions() {
    let registry = Registry::new();
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    registry.watch(&lifecycle).unwrap();
    registry.watch(&health).unwrap();
    let mut decisions = registry.decisions();
    lifecycle.ready();
    let check =
        Check::new("db", || async { Err::<(), _>("no route") }).every(Duration::from_secs(1));
    health.add(check).unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    lifecycle.drain();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let events: Vec<_> = events(&mut decisions).await;
    let names: Vec<_> = events.iter().map(|(event, ..)| *event).collect();
    assert_eq!(names[0], "ready", "{events:?}");
    assert!(names.contains(&"check failed"), "{events:?}");
    let end: Vec<_> = names.iter().filter(|name| **name != "check failed").skip(1).collect();
    assert_eq!(end, [&"draining", &"stopping", &"stopped"], "{events:?}");
    // The text of a failed check is not part of a decision, because the page withholds it by default.
    assert!(!format!("{events:?}").contains("no route"));
}

#[tokio::test(start_paused = true)]
async fn update_of_a_stack_is_a_decision_with_the_keys() {
    let registry = Registry::new();
    let config = ClientConfig::load("search").finish().unwrap();
    let stack = ClientStack::new(&config).unwrap();
    registry.watch(&stack.handle()).unwrap();
    let mut decisions = registry.decisions();
    stack.handle().update(&config).unwrap();
    assert_eq!(events(&mut decisions).await, []);
    let changed = ClientConfig::load("search").toml("retry_attempts = 2").finish().unwrap();
    stack.handle().update(&changed).unwrap();
    let expected = ("settings changed", None, "retry_attempts".to_owned());
    assert_eq!(events(&mut decisions).await, [expected]);
}

/// A waker that panics.
struct PanicsOnWake;

impl Wake for PanicsOnWake {
    fn wake(self: Arc<Self>) {
        panic!("on purpose");
    }
}

#[tokio::test(start_paused = true)]
async fn panic_of_a_waker_reaches_neither_the_layer_nor_other_receivers() {
    let registry = Registry::new();
    let layer = search(&registry);
    let (mut first, mut second) = (registry.decisions(), registry.decisions());
    let waker = Waker::from(Arc::new(PanicsOnWake));
    let mut waiting = Box::pin(first.next());
    assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    let other = tokio::spawn(async move {
        let event = second.next().await.map(|decision| decision.event);
        (event, second.next().await.is_none())
    });
    tokio::task::yield_now().await;
    layer.handle().force_open();
    tokio::task::yield_now().await;
    assert_eq!(waiting.await.unwrap().event, "circuit forced");
    let mut waiting = Box::pin(first.next());
    assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    drop(registry);
    let ended = tokio::time::timeout(Duration::from_secs(1), other).await;
    assert_eq!(
        ended.expect("the other receiver is woken").unwrap(),
        (Some("circuit forced"), true)
    );
    assert_eq!(waiting.await, None);
}

#[tokio::test(start_paused = true)]
async fn receiver_that_does_not_wait_keeps_no_waker() {
    let registry = Registry::new();
    let mut decisions = registry.decisions();
    let wakes = Arc::new(PanicsOnWake);
    let waker = Waker::from(wakes.clone());
    {
        let mut waiting = pin!(decisions.next());
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    drop(waker);
    assert_eq!(Arc::strong_count(&wakes), 1);
}

/// A subscriber that panics at each event.
struct PanicsOnEvent;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for PanicsOnEvent {
    fn on_event(&self, _: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        panic!("on purpose");
    }
}

#[tokio::test(start_paused = true)]
async fn panic_of_a_subscriber_ends_neither_checks_nor_the_drain() {
    let registry = Registry::new();
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    registry.watch(&lifecycle).unwrap();
    let _subscriber =
        tracing::subscriber::set_default(tracing_subscriber::registry().with(PanicsOnEvent));
    let mut decisions = registry.decisions();
    lifecycle.ready();
    let results = std::sync::Mutex::new(vec![Ok(()), Err("no route"), Ok(())]);
    let check = Check::new("db", move || {
        let next = results.lock().unwrap().pop().unwrap_or(Ok(()));
        async move { next }
    });
    health.add(check.every(Duration::from_secs(1))).unwrap();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(health.is_ready());
    lifecycle.drain();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let events = events(&mut decisions).await;
    let names: Vec<_> = events.iter().map(|(event, ..)| *event).collect();
    assert_eq!(names, ["ready", "draining", "stopping", "stopped"], "{events:?}");
}
