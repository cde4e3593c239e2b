//! The snapshot of the handle, and settings that change while calls are in flight.

use std::time::Duration;

use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer, Deadline,
    limit::{
        ConcurrencyLimitHandle, QueueOrder,
        adaptive::{
            Aimd, Algorithm, ChangeReason, Fixed, Gradient2, Knee, LimitChange, Sample, Vegas,
        },
    },
    outcome::RejectedKind,
};
use http::Request;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use crate::support::{Strict, Watch, empty, hello, refused_as, request};

type Limit = ConcurrencyLimit<Strict>;
type Call = task::Spawn<Oneshot<Limit, Request<()>>>;

const MS: Duration = Duration::from_millis(1);

fn over(layer: &ConcurrencyLimitLayer) -> (Limit, Watch, ConcurrencyLimitHandle) {
    let (inner, watch) = Strict::holding();
    (layer.layer(inner), watch, layer.handle())
}

fn hold(service: &Limit) -> Call {
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    call
}

async fn refused(service: &Limit) -> RejectedKind {
    refused_as(service.clone().oneshot(request()).await)
}

// ===== Shadow mode =====

#[tokio::test(start_paused = true)]
async fn shadow_mode_rejects_no_call_and_counts_calls_that_would_be_rejected() {
    let (service, watch, handle) = over(&ConcurrencyLimitLayer::new(2).queue(5, 100 * MS).shadow());
    let mut calls: Vec<_> = (0..5).map(|_| hold(&service)).collect();
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(Duration::ZERO));
    let mut late = task::spawn(service.clone().oneshot(late));
    assert_pending!(late.poll());
    let place = handle.try_acquire().expect("shadow mode never rejects");
    let told = handle.snapshot();
    assert_eq!((watch.seen().calls, told.in_flight, told.waiting, told.shadowed), (6, 2, 0, 5));
    assert_eq!((told.rejected_full, told.rejected_deadline), (0, 0));

    // A call beyond the limit ends and does not change `in_flight`. Then a call with a permit ends.
    watch.end(4, Ok(hello()));
    drop(assert_ready_ok!(calls[4].poll()));
    assert_eq!(handle.in_flight(), 2);
    watch.end(0, Ok(hello()));
    drop(assert_ready_ok!(calls[0].poll()));
    assert_eq!(handle.in_flight(), 1);
    let _third = hold(&service);
    assert_eq!((handle.in_flight(), handle.snapshot().shadowed), (2, 5));

    handle.set_shadow(false);
    assert_pending!(task::spawn(service.clone().oneshot(request())).poll());
    handle.set_queue(0, Duration::ZERO).unwrap();
    assert_eq!(refused(&service).await, RejectedKind::Full);
    drop((calls, late, place, _third));
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

/// A call that waits when shadow mode starts is admitted at the end of its maximum wait.
#[tokio::test(start_paused = true)]
async fn shadow_mode_admits_a_call_after_its_maximum_wait() {
    let (service, watch, handle) = over(&ConcurrencyLimitLayer::new(1).queue(5, 100 * MS));
    let _first = hold(&service);
    let mut waiting = hold(&service);
    handle.set_shadow(true);
    advance(100 * MS).await;
    assert_pending!(waiting.poll());
    assert_eq!((watch.seen().calls, handle.snapshot().waiting, handle.in_flight()), (2, 0, 1));
    assert_eq!((handle.snapshot().shadowed, handle.snapshot().rejected_waited), (1, 0));
    drop(waiting);
    assert_eq!(handle.in_flight(), 1);
}

/// Calls beyond the limit are not samples of the algorithm.
#[tokio::test(start_paused = true)]
async fn shadow_mode_records_no_samples_of_calls_beyond_the_limit() {
    let (service, watch, handle) =
        over(&ConcurrencyLimitLayer::adaptive(Heard::default()).shadow());
    let mut calls: Vec<_> = (0..3).map(|_| hold(&service)).collect();
    for (number, call) in calls.iter_mut().enumerate() {
        watch.end(number, Ok(empty()));
        assert_ready_ok!(call.poll());
    }
    let told = handle.snapshot();
    assert_eq!((told.shadowed, told.last_change.map(|change| change.limit)), (2, Some(1)));
}

/// A limit of one. Each change reports the number of samples so far as its limit.
#[derive(Clone, Debug, Default)]
struct Heard(u32);

impl Algorithm for Heard {
    fn limit(&self) -> u32 {
        1
    }

    fn set_limit(&mut self, _: u32) {}

    fn on_sample(&mut self, _: &Sample) -> Option<LimitChange> {
        self.0 += 1;
        Some(LimitChange { limit: self.0, reason: ChangeReason::Other("heard") })
    }
}

// ===== Clones of a layer =====

#[tokio::test(start_paused = true)]
async fn setter_of_a_clone_does_not_change_a_service_that_was_built() {
    let layer = ConcurrencyLimitLayer::new(1).name("first");
    let handle = layer.handle();
    // Before the first service, setters act on the shared state.
    let layer = layer.queue(0, Duration::ZERO);
    let (service, _watch, _) = over(&layer);
    let other = layer.clone().queue(1, Duration::from_secs(1)).shadow();
    let _call = hold(&service);
    assert_eq!(refused(&service).await, RejectedKind::Full);
    assert_eq!((handle.in_flight(), handle.snapshot().rejected()), (1, 1));
    // The clone has a limit of its own, with the settings of the first.
    let forked = other.handle();
    assert_eq!((forked.limit(), forked.in_flight(), forked.snapshot().rejected()), (1, 0, 0));
    let (service, _watch, _) = over(&other);
    let _calls = [hold(&service), hold(&service)];
    assert_eq!((forked.in_flight(), forked.snapshot().shadowed), (1, 1));
    assert_eq!((handle.in_flight(), handle.snapshot().shadowed), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn setter_of_a_clone_copies_the_algorithm() {
    let layer = ConcurrencyLimitLayer::adaptive(Heard::default());
    let (service, watch, handle) = over(&layer);
    let fork = layer.clone().retry_after(MS).handle();
    for number in 0..3 {
        let mut call = hold(&service);
        watch.end(number, Ok(empty()));
        drop(assert_ready_ok!(call.poll()));
    }
    assert_eq!((handle.limit(), fork.limit()), (3, 1));
}

#[tokio::test(start_paused = true)]
async fn settings_change_through_the_handle() {
    let layer = ConcurrencyLimitLayer::new(1);
    let (service, watch, handle) = over(&layer);
    handle.set_release_at_head(true);
    let mut call = hold(&service);
    watch.end(0, Ok(hello()));
    let response = assert_ready_ok!(call.poll());
    assert_eq!(handle.in_flight(), 0, "released at the head");
    drop(response);
    assert!(handle.set_count_cancelled_after(Duration::from_secs(1)).is_err(), "a fixed limit");
    assert!(handle.set_count_cancelled_after(None).is_ok());
    handle.set_until_body_end(true);
}

// ===== Waits =====

#[tokio::test(start_paused = true)]
async fn waiting_times_are_reported_as_percentiles() {
    let (service, watch, handle) = over(&ConcurrencyLimitLayer::new(1).queue(200, 150 * MS));
    assert_eq!((handle.snapshot().wait_p50, handle.wait_percentile(1.0)), (None, None));
    let mut now = hold(&service);
    for number in 0..100_u32 {
        let next = hold(&service);
        advance((number + 1) * MS).await;
        watch.end(number as usize, Ok(empty()));
        assert_ready_ok!(now.poll());
        now = next;
        assert_pending!(now.poll());
    }
    let about = |wait: Option<Duration>, ms: u32| {
        let wait = wait.expect("a recorded wait");
        wait >= ms * MS && wait <= ms * MS * 9 / 8
    };
    // The percentiles cover the last 30 to 60 s, which contain all of these waits.
    assert!(about(handle.snapshot().wait_p50, 50), "{:?}", handle.snapshot().wait_p50);
    assert!(about(handle.snapshot().wait_p99, 99), "{:?}", handle.snapshot().wait_p99);
    // A rejected wait is recorded. The wait of a dropped call is not.
    let mut vain = hold(&service);
    drop(hold(&service));
    advance(150 * MS).await;
    assert_eq!(refused_as(assert_ready!(vain.poll())), RejectedKind::WaitedTooLong);
    assert!(about(handle.wait_percentile(1.0), 150));
    advance(Duration::from_secs(120)).await;
    assert_eq!(handle.snapshot().wait_p99, None);
}

#[tokio::test(start_paused = true)]
async fn rejections_are_counted_by_reason() {
    let (service, _watch, handle) = over(&ConcurrencyLimitLayer::new(1).queue(1, MS));
    let _first = hold(&service);
    let mut waiting = hold(&service);
    assert_eq!(refused(&service).await, RejectedKind::Full);
    assert_eq!(refused(&service).await, RejectedKind::Full);
    advance(MS).await;
    assert_eq!(refused_as(assert_ready!(waiting.poll())), RejectedKind::WaitedTooLong);
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(Duration::ZERO));
    assert_eq!(refused_as(service.oneshot(late).await), RejectedKind::DeadlinePassed);
    let told = handle.snapshot();
    let by_reason = [
        told.rejected_full,
        told.rejected_waited,
        told.rejected_deadline,
        told.rejected_outranked,
        told.shadowed,
    ];
    assert_eq!((by_reason, told.rejected()), ([2, 1, 1, 0, 0], 4));
}

// ===== Changes =====

#[tokio::test(start_paused = true)]
async fn the_queue_changes_while_calls_wait() {
    let (service, watch, handle) = over(&ConcurrencyLimitLayer::new(1));
    let mut first = hold(&service);
    assert_eq!(refused(&service).await, RejectedKind::Full);
    handle.set_queue(2, 100 * MS).unwrap();
    let (mut early, mut late) = (hold(&service), hold(&service));
    assert_eq!(refused(&service).await, RejectedKind::Full);
    // Calls that wait stay in the queue above its new length, with their own maximum wait.
    handle.set_queue(1, 10 * MS).unwrap();
    handle.set_queue_order(QueueOrder::Lifo).unwrap();
    advance(50 * MS).await;
    assert_pending!(early.poll());
    assert_eq!(refused(&service).await, RejectedKind::Full);
    watch.end(0, Ok(empty()));
    assert_ready_ok!(first.poll());
    assert!(late.is_woken() && !early.is_woken());
    assert_pending!(late.poll());
    advance(50 * MS).await;
    assert_eq!(refused_as(assert_ready!(early.poll())), RejectedKind::WaitedTooLong);
    let mut brief = hold(&service);
    advance(10 * MS).await;
    assert_eq!(refused_as(assert_ready!(brief.poll())), RejectedKind::WaitedTooLong);

    handle.set_retry_after(Duration::from_secs(7));
    handle.set_queue(0, Duration::ZERO).unwrap();
    let error = service.oneshot(request()).await.unwrap_err();
    let told = buttress::Rejected::find(&*error).unwrap();
    assert_eq!(told.retry_after(), Some(Duration::from_secs(7)));
    for bad in [
        handle.set_queue(1, Duration::ZERO),
        handle.set_queue_order(QueueOrder::Adaptive(Duration::ZERO)),
        handle.set_limit(0),
    ] {
        assert!(bad.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn bounds_of_an_algorithm_change_while_it_runs() {
    fn bounded(algorithm: impl Algorithm + Clone) {
        let name = format!("{algorithm:?}");
        let layer = ConcurrencyLimitLayer::adaptive(algorithm);
        let (service, _watch, handle) = over(&layer);
        assert_eq!(handle.snapshot().limit, 50, "{name}");
        handle.set_bounds(1..=2).unwrap();
        let told = handle.snapshot();
        let by_hand = LimitChange { limit: 2, reason: ChangeReason::ByHand };
        assert_eq!((told.limit, told.last_change), (2, Some(by_hand)), "{name}");
        let _two = [hold(&service), hold(&service)];
        assert!(task::spawn(service.oneshot(request())).poll().is_ready());
        handle.set_limit(9).unwrap();
        assert_eq!(handle.snapshot().limit, 2, "{name}");
        handle.set_bounds(30..=40).unwrap();
        assert_eq!(handle.snapshot().limit, 30, "{name}");
        for (low, high) in [(0, 5), (5, 4)] {
            let fault = handle.set_bounds(low..=high).unwrap_err();
            assert!(["limit", "adaptive.bounds"].contains(&fault.field), "{fault}");
        }
    }
    bounded(Knee::new(50, 10..=100).unwrap());
    bounded(Aimd::new(50, 10..=100).unwrap());
    bounded(Vegas::new(50, 10..=100).unwrap());
    bounded(Gradient2::new(50, 10..=100).unwrap());
    let without =
        [ConcurrencyLimitLayer::new(5), ConcurrencyLimitLayer::adaptive(Fixed::new(5).unwrap())];
    for layer in without {
        assert_eq!(layer.handle().set_bounds(1..=9).unwrap_err().field, "adaptive.bounds");
        assert_eq!(layer.handle().snapshot().limit, 5);
    }
}

/// Wider bounds raise the limit, which admits queued callers.
#[tokio::test(start_paused = true)]
async fn wider_bounds_admit_queued_callers() {
    let layer = ConcurrencyLimitLayer::adaptive(Knee::new(1, 1..=1).unwrap()).queue(5, 100 * MS);
    let (service, _watch, handle) = over(&layer);
    let _first = hold(&service);
    let waiting = [hold(&service), hold(&service)];
    handle.set_bounds(2..=9).unwrap();
    assert_eq!(waiting.each_ref().map(|call| call.is_woken()), [true, false]);
    assert_eq!(handle.in_flight(), 2);
}
