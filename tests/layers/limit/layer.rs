//! The concurrency limit through its public API, first with the contract of every layer.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    BoxError, ConcurrencyLimit, ConcurrencyLimitLayer, ConfigError, Deadline, Rejected,
    limit::{ConcurrencyLimitHandle, QueueOrder},
    outcome::RejectedKind,
};
use futures_util::FutureExt;
use http::{Method, Request, Response};
use tokio::{
    task::JoinSet,
    time::{advance, timeout},
};
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, service_fn, util::Oneshot};

use crate::support::{
    Oops, Piece, ScriptBody, Strict, Then, Watch,
    contract::{Subject, contract_tests},
    empty, grpc, hello, read, refused_as, request, status,
};

type Limit = ConcurrencyLimit<Strict>;
type Waiting = task::Spawn<Oneshot<Limit, Request<()>>>;
type Call = <Limit as Service<Request<()>>>::Future;

// ===== The contract of every layer =====

/// A limit of one.
struct One {
    layer: ConcurrencyLimitLayer,
    handle: ConcurrencyLimitHandle,
    occupant: Option<Call>,
}

impl Subject for One {
    type Layer = ConcurrencyLimitLayer;
    type Service = Limit;

    async fn new() -> Self {
        let layer = ConcurrencyLimitLayer::new(1);
        Self { handle: layer.handle(), layer, occupant: None }
    }

    fn layer(&self) -> &ConcurrencyLimitLayer {
        &self.layer
    }

    fn taken(&self) -> usize {
        self.handle.in_flight() as usize - usize::from(self.occupant.is_some())
    }

    fn shut(&mut self) {
        let (inner, _) = Strict::holding();
        self.occupant = Some(self.layer.layer(inner).call(request()));
    }

    fn unshut(&mut self) {
        self.occupant = None;
    }
}

contract_tests!(One);

/// A permit that is released wakes the first queued caller and no other one.
#[tokio::test(start_paused = true)]
async fn waiting_caller_woken_on_open() {
    let (service, watch, _handle) = limit(1, 8);
    let mut first = hold(&service);
    let (mut next, last) = (hold(&service), hold(&service));
    end(&watch, 0, &mut first);
    assert!(next.is_woken() && !last.is_woken());
    assert_pending!(next.poll());
    assert_eq!(watch.seen().calls, 2);
}

#[tokio::test(start_paused = true)]
async fn unread_response_releases_its_permit_when_dropped() {
    let (service, watch, handle) = limit(1, 0);
    for response in [hello(), grpc([Piece::data("a"), Piece::Stuck]), status(500)] {
        watch.script([Then::Answer(response)]);
        drop(service.clone().oneshot(request()).await.unwrap());
        assert_eq!(handle.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
    let good = || ConcurrencyLimitLayer::new(1);
    let second = Duration::from_secs(1);
    let mut bad = vec![
        (ConcurrencyLimitLayer::new(0), "limit", "0", "use 1 to"),
        (good().queue(1, Duration::ZERO), "queue.max_wait", "0ns", "1ms or more"),
        (good().queue(1, Duration::from_micros(999)), "queue.max_wait", "999µs", "1ms or more"),
        (
            good().queue_order(QueueOrder::Adaptive(Duration::ZERO)),
            "queue_order",
            "0ns",
            "above zero",
        ),
    ];
    #[cfg(target_pointer_width = "64")]
    bad.extend([
        (ConcurrencyLimitLayer::new(1 << 32), "limit", "4294967296", "use 1 to 4294967295"),
        (good().queue(1 << 32, second), "queue.length", "4294967296", "at most 2147483647"),
    ]);
    for (layer, field, value, remedy) in bad {
        let (inner, watch) = Strict::new();
        let error = layer.layer(inner).oneshot(request()).await.unwrap_err();
        let refused = Rejected::find(&*error).expect("a rejection");
        assert_eq!(
            (refused.kind(), refused.layer()),
            (RejectedKind::Misconfigured, "concurrency_limit")
        );
        let source = std::error::Error::source(refused).expect("a source");
        let told: &ConfigError =
            source.downcast_ref().expect("the source is the configuration error");
        assert_eq!((watch.seen().polls, watch.seen().calls), (0, 0));
        let fault = layer.checked().unwrap_err();
        assert_eq!(&fault, told);
        assert_eq!((fault.field, fault.value.as_str()), (field, value));
        assert!(fault.remedy.contains(remedy), "{fault}");
    }
    let longest = i32::MAX as usize;
    assert!(good().queue(longest, second).checked().is_ok());
    let beyond = good().handle().set_queue(longest + 1, second).unwrap_err();
    assert_eq!((beyond.field, &*beyond.remedy), ("queue.length", "use at most 2147483647"));
    assert!(
        good().queue(0, Duration::ZERO).checked().is_ok(),
        "without a queue, the maximum wait does not matter"
    );
    assert_eq!(good().handle().set_limit(0).unwrap_err().field, "limit");
}

#[tokio::test(start_paused = true)]
async fn setters_after_the_handle_apply() {
    let layer = ConcurrencyLimitLayer::new(1);
    let (inner, watch) = Strict::holding();
    let handle = layer.handle();
    let service = layer
        .queue(1, Duration::from_secs(9))
        .name("late")
        .retry_after(Duration::from_secs(3))
        .release_at_head()
        .layer(inner);
    let mut first = hold(&service);
    let mut waiting = hold(&service);
    assert_eq!((handle.snapshot().in_flight, handle.snapshot().waiting), (1, 1));
    let error = service.clone().oneshot(request()).await.unwrap_err();
    let told = Rejected::find(&*error).unwrap();
    assert_eq!((told.name(), told.retry_after()), (Some("late"), Some(Duration::from_secs(3))));
    watch.end(0, Ok(hello()));
    let _unread = assert_ready_ok!(first.poll());
    assert_pending!(waiting.poll());
    assert_eq!(watch.seen().calls, 2);
}

// ===== The limit =====

const PATIENCE: Duration = Duration::from_secs(5);

/// A limit over a service that holds every call, unless it is scripted.
fn limit(limit: usize, queue: usize) -> (Limit, Watch, ConcurrencyLimitHandle) {
    let layer = ConcurrencyLimitLayer::new(limit).queue(queue, PATIENCE);
    let (inner, watch) = Strict::holding();
    (layer.layer(inner), watch, layer.handle())
}

/// A call that is in flight or waits.
fn hold(service: &Limit) -> Waiting {
    let mut call = task::spawn(service.clone().oneshot(request()));
    assert_pending!(call.poll());
    call
}

async fn refused(service: &Limit) -> RejectedKind {
    refused_as(service.clone().oneshot(request()).await)
}

/// Ends a call in flight, and reads its response.
#[track_caller]
fn end(watch: &Watch, number: usize, call: &mut Waiting) {
    assert!(watch.end(number, Ok(empty())));
    assert_ready_ok!(call.poll());
}

#[tokio::test(start_paused = true)]
async fn never_above_the_limit() {
    let (service, watch, handle) = limit(3, 100);
    let mut calls: Vec<_> = (0..50).map(|_| hold(&service)).collect();
    for (number, call) in calls.iter_mut().enumerate() {
        assert!(watch.seen().in_flight <= 3);
        let _ = call.is_woken().then(|| call.poll());
        end(&watch, number, call);
    }
    assert_eq!((watch.seen().calls, watch.seen().peak), (50, 3));
    assert_eq!((handle.snapshot().in_flight, handle.snapshot().waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn without_a_queue_a_call_beyond_the_limit_is_rejected_at_once() {
    let (service, _watch, handle) = limit(2, 0);
    let _calls = [hold(&service), hold(&service)];
    let error = service.clone().oneshot(request()).await.unwrap_err();
    let told = Rejected::find(&*error).unwrap();
    assert_eq!(
        (told.kind(), told.retry_after()),
        (RejectedKind::Full, Some(Duration::from_secs(1)))
    );
    assert_eq!(handle.snapshot().rejected_full, 1);
}

#[tokio::test(start_paused = true)]
async fn respond_rejects_in_the_form_of_the_client() {
    let layer = ConcurrencyLimitLayer::new(1).retry_after(Duration::from_millis(1001)).respond();
    let (inner, _watch) = Strict::holding();
    let service = layer.layer(inner);
    let mut first = task::spawn(service.clone().oneshot(request()));
    assert_pending!(first.poll());
    let http = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(
        (http.status().as_u16(), &http.headers()["retry-after"]),
        (503, &"2".parse().unwrap())
    );
    assert_eq!(http.headers()["content-type"], "application/problem+json");
    assert!(http.extensions().get::<Rejected>().is_some());
    let body = String::from_utf8(read(http.into_body()).await.unwrap().0).unwrap();
    assert!(body.contains(r#""reason":"limit_reached""#), "{body}");

    let mut call = request();
    *call.method_mut() = Method::POST;
    call.headers_mut().insert("content-type", "application/grpc+proto".parse().unwrap());
    let grpc = service.clone().oneshot(call).await.unwrap();
    assert_eq!(
        (grpc.status().as_u16(), &grpc.headers()["grpc-status"]),
        (200, &"14".parse().unwrap())
    );
    assert_eq!(grpc.headers()["grpc-retry-pushback-ms"], "1001");
    let told = read(grpc.into_body()).await.unwrap();
    assert_eq!(told, (vec![], None), "trailers-only");
}

#[tokio::test(start_paused = true)]
async fn the_permit_is_held_to_the_end_of_the_body() {
    let (service, watch, handle) = limit(1, 0);
    watch.script([Then::Answer(hello())]);
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(handle.in_flight(), 1);
    assert_eq!(refused(&service).await, RejectedKind::Full);
    read(response.into_body()).await.unwrap();
    assert_eq!(handle.in_flight(), 0);
    // The same after a head that is a failure.
    let mut bad = hello();
    *bad.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
    watch.script([Then::Answer(bad)]);
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(handle.in_flight(), 1);
    drop(response);
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn released_at_the_head_if_asked() {
    let layer = ConcurrencyLimitLayer::new(1).release_at_head();
    let (inner, watch) = Strict::new();
    let service = layer.layer(inner);
    let pieces = [Piece::data("ab"), Piece::data("c")];
    watch.script([Then::Answer(Response::new(ScriptBody::new(pieces)))]);
    let response = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(layer.handle().in_flight(), 0);
    let _second = service.clone().oneshot(request()).await.unwrap();
    assert_eq!(read(response.into_body()).await.unwrap().0, b"abc");
    assert_eq!(layer.handle().in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn per_response_limits_services_of_any_types() {
    let layer = ConcurrencyLimitLayer::new(1).per_response();
    let (inner, watch) = Strict::<u8>::of(|| Then::Hold);
    let service = layer.layer(inner);
    let mut first = task::spawn(service.clone().oneshot("any request"));
    assert_pending!(first.poll());
    assert_eq!(refused_as(service.clone().oneshot("another").await), RejectedKind::Full);
    watch.end(0, Ok(7));
    assert_eq!(assert_ready_ok!(first.poll()), 7);
    assert_eq!(layer.handle().in_flight(), 0);
    watch.script([Then::Fail(Oops("no"))]);
    let error: BoxError = service.oneshot("a third").await.unwrap_err();
    assert!(error.is::<Oops>());
    assert_eq!(layer.handle().in_flight(), 0);
}

// ===== The queue =====

#[tokio::test(start_paused = true)]
async fn first_come_first_served() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut waiting: Vec<_> = (0..5).map(|_| hold(&service)).collect();
    assert_eq!(handle.snapshot().waiting, 5);
    end(&watch, 0, &mut first);
    for number in 0..5 {
        // A new caller joins the end of the queue, also before the woken caller has been polled.
        assert_eq!(handle.snapshot().waiting as usize + number, 4);
        for (other, call) in waiting.iter_mut().enumerate() {
            assert_eq!(call.is_woken(), other == number, "{other} at {number}");
        }
        assert_pending!(waiting[number].poll());
        end(&watch, number + 1, &mut waiting[number]);
    }
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_new_call_never_overtakes_the_queue() {
    let (service, watch, _handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut next = hold(&service);
    end(&watch, 0, &mut first);
    let mut newcomer = hold(&service);
    assert_eq!(
        watch.seen().calls,
        1,
        "the permit is granted, although its caller has not been polled"
    );
    assert_pending!(next.poll());
    assert_eq!(watch.seen().calls, 2);
    end(&watch, 1, &mut next);
    assert_pending!(newcomer.poll());
    end(&watch, 2, &mut newcomer);
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded() {
    let (service, _watch, handle) = limit(1, 2);
    let _first = hold(&service);
    let mut waiting = vec![hold(&service), hold(&service)];
    assert_eq!(refused(&service).await, RejectedKind::Full);
    waiting.pop();
    waiting.push(hold(&service));
    assert_eq!(refused(&service).await, RejectedKind::Full);
    assert_eq!((handle.snapshot().waiting, handle.snapshot().rejected_full), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn call_waits_no_longer_than_the_maximum_wait() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut early = hold(&service);
    advance(PATIENCE / 2).await;
    let mut late = hold(&service);
    advance(PATIENCE / 2 - Duration::from_millis(1)).await;
    assert_pending!(early.poll());
    advance(Duration::from_millis(1)).await;
    assert!(early.is_woken());
    assert_eq!(refused_as(assert_ready!(early.poll())), RejectedKind::WaitedTooLong);
    assert_pending!(late.poll());
    assert_eq!((handle.snapshot().waiting, handle.snapshot().rejected_waited), (1, 1));
    end(&watch, 0, &mut first);
    assert_pending!(late.poll());
    assert_eq!(watch.seen().calls, 2);
}

/// A permit that is granted takes precedence over a maximum wait that has just passed.
#[tokio::test(start_paused = true)]
async fn a_granted_permit_precedes_the_end_of_the_maximum_wait() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut next = hold(&service);
    advance(PATIENCE).await;
    end(&watch, 0, &mut first);
    assert_pending!(next.poll());
    end(&watch, 1, &mut next);
    assert_eq!((handle.in_flight(), handle.snapshot().rejected_waited), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_queued_caller_leaves_the_queue() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let (gone, mut stays) = (hold(&service), hold(&service));
    drop(gone);
    assert_eq!(handle.snapshot().waiting, 1);
    end(&watch, 0, &mut first);
    assert_pending!(stays.poll());
    end(&watch, 1, &mut stays);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
    let _room = hold(&service);
    assert_eq!(watch.seen().calls, 3);
}

#[tokio::test(start_paused = true)]
async fn permit_of_a_cancelled_queued_caller_passes_to_the_next() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let (gone, mut next) = (hold(&service), hold(&service));
    end(&watch, 0, &mut first);
    assert!(gone.is_woken() && !next.is_woken());
    drop(gone);
    assert!(next.is_woken());
    assert_pending!(next.poll());
    end(&watch, 1, &mut next);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn last_in_first_out_serves_the_newest_caller_first() {
    let (service, watch, _handle) = ordered(QueueOrder::Lifo);
    let mut first = hold(&service);
    let waiting: Vec<_> = (0..3).map(|_| hold(&service)).collect();
    end(&watch, 0, &mut first);
    assert_eq!(
        waiting.iter().map(|call| call.is_woken()).collect::<Vec<_>>(),
        [false, false, true]
    );
}

/// The newest caller is first only while the oldest one has waited for too long.
#[tokio::test(start_paused = true)]
async fn adaptive_order_reverses_while_the_oldest_caller_waits_too_long() {
    let (service, watch, _handle) = ordered(QueueOrder::Adaptive(Duration::from_millis(100)));
    let mut first = hold(&service);
    let mut oldest = hold(&service);
    let old = hold(&service);
    advance(Duration::from_millis(99)).await;
    let mut newest = hold(&service);
    end(&watch, 0, &mut first);
    assert!(oldest.is_woken() && !old.is_woken() && !newest.is_woken());
    assert_pending!(oldest.poll());
    advance(Duration::from_millis(1)).await;
    end(&watch, 1, &mut oldest);
    assert!(newest.is_woken() && !old.is_woken());
    assert_pending!(newest.poll());
    end(&watch, 2, &mut newest);
    assert!(old.is_woken());
}

/// One permit, and a queue of eight.
fn ordered(order: QueueOrder) -> (Limit, Watch, ConcurrencyLimitHandle) {
    let layer = ConcurrencyLimitLayer::new(1).queue(8, PATIENCE).queue_order(order);
    let (inner, watch) = Strict::holding();
    (layer.layer(inner), watch, layer.handle())
}

/// A caller that was never polled has no waker, and gets the permit all the same.
#[tokio::test(start_paused = true)]
async fn a_queued_future_that_was_never_polled_receives_a_permit() {
    let (mut service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let unpolled = service.call(request());
    let mut next = hold(&service);
    end(&watch, 0, &mut first);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (1, 1));
    drop(unpolled);
    assert_pending!(next.poll());
    end(&watch, 1, &mut next);
    assert_eq!(handle.in_flight(), 0);
}

/// A queued caller does not poll the inner service before it has a permit.
#[tokio::test(start_paused = true)]
async fn a_queued_caller_does_not_poll_the_inner_service() {
    let (service, watch, _handle) = limit(1, 8);
    let _first = hold(&service);
    let polls = watch.seen().polls;
    let mut waiting = hold(&service);
    assert_pending!(waiting.poll());
    assert_eq!((watch.seen().polls, watch.seen().reserved), (polls, 0));
}

// ===== Resizing =====

#[tokio::test(start_paused = true)]
async fn a_higher_limit_admits_queued_callers() {
    let (service, watch, handle) = limit(1, 8);
    let _first = hold(&service);
    let mut waiting = [hold(&service), hold(&service), hold(&service)];
    handle.set_limit(3).unwrap();
    assert_eq!(waiting.each_ref().map(|call| call.is_woken()), [true, true, false]);
    for call in &mut waiting {
        assert_pending!(call.poll());
    }
    assert_eq!((watch.seen().calls, handle.in_flight(), handle.snapshot().waiting), (3, 3, 1));
}

#[tokio::test(start_paused = true)]
async fn a_lower_limit_drains() {
    let (service, watch, handle) = limit(3, 8);
    let mut calls = [hold(&service), hold(&service), hold(&service)];
    let mut waiting = hold(&service);
    handle.set_limit(1).unwrap();
    for (number, call) in calls.iter_mut().enumerate() {
        assert!(!waiting.is_woken());
        end(&watch, number, call);
    }
    assert!(waiting.is_woken());
    assert_pending!(waiting.poll());
    assert_eq!((handle.snapshot().limit, handle.in_flight()), (1, 1));
}

// ===== Under real threads =====

/// Some callers end, some are dropped while they wait or run, and one changes the limit: no caller hangs, and no permit
/// is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn many_threads_lose_no_permit() {
    let layer = ConcurrencyLimitLayer::new(4).queue(1000, Duration::from_secs(60)).per_response();
    let handle = layer.handle();
    let busy = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let seen = busy.clone();
    let service = layer.layer(service_fn(move |yields: usize| {
        let busy = busy.clone();
        async move {
            let now = busy.0.fetch_add(1, Ordering::SeqCst) + 1;
            busy.1.fetch_max(now, Ordering::SeqCst);
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            busy.0.fetch_sub(1, Ordering::SeqCst);
            Ok::<_, Oops>(())
        }
    }));
    let mut callers = JoinSet::new();
    for n in 0..64 {
        let (service, handle) = (service.clone(), handle.clone());
        callers.spawn(async move {
            for round in 0..100 {
                let mut call = pin!(service.clone().oneshot(0));
                if (n + round) % 3 == 0 {
                    // Dropped after one poll, with or without a permit.
                    let _ = call.as_mut().now_or_never();
                } else {
                    service.clone().oneshot(round % 4).await.unwrap();
                }
                if n == 0 {
                    handle.set_limit(1 + round % 4).unwrap();
                }
            }
        });
    }
    timeout(Duration::from_secs(60), callers.join_all()).await.expect("a caller hangs");
    assert!(seen.1.load(Ordering::SeqCst) <= 4);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

/// A queue needs a timer, and thus a runtime. The panic without one leaks no permit.
#[test]
fn a_wait_without_a_runtime_leaves_no_queue_entry() {
    let layer = ConcurrencyLimitLayer::new(1).queue(1, Duration::from_secs(1));
    let handle = layer.handle();
    let service = layer.layer(Strict::holding().0);
    let mut first = task::spawn(service.clone().oneshot(request()));
    assert_pending!(first.poll());
    let waiting = std::panic::AssertUnwindSafe(|| {
        assert_pending!(task::spawn(service.oneshot(request())).poll());
    });
    assert!(std::panic::catch_unwind(waiting).is_err());
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (1, 0));
    drop(first);
    assert_eq!(handle.in_flight(), 0);
}

// ===== Deadlines =====

/// A call with a deadline.
fn due(service: &Limit, after: Duration) -> task::Spawn<Oneshot<Limit, Request<()>>> {
    let mut request = request();
    request.extensions_mut().insert(Deadline::after(after));
    task::spawn(service.clone().oneshot(request))
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_deadline_has_passed_is_not_begun() {
    let (service, watch, handle) = limit(1, 8);
    let error = assert_ready!(due(&service, Duration::ZERO).poll()).unwrap_err();
    let told = Rejected::find(&*error).unwrap();
    assert_eq!((told.kind(), told.retry_after()), (RejectedKind::DeadlinePassed, None));
    assert_eq!((watch.seen().calls, handle.snapshot().rejected_deadline), (0, 1));
    assert_pending!(due(&service, Duration::from_millis(1)).poll());
    assert_eq!(watch.seen().calls, 1);
}

#[tokio::test(start_paused = true)]
async fn a_queued_caller_is_rejected_at_its_deadline() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut soon = due(&service, Duration::from_millis(300));
    let mut late = due(&service, 2 * PATIENCE);
    assert_pending!(soon.poll());
    assert_pending!(late.poll());
    advance(Duration::from_millis(300)).await;
    assert!(soon.is_woken() && !late.is_woken());
    assert_eq!(refused_as(assert_ready!(soon.poll())), RejectedKind::DeadlinePassed);
    assert_eq!((handle.snapshot().waiting, handle.snapshot().rejected_deadline), (1, 1));
    advance(PATIENCE).await;
    assert_eq!(refused_as(assert_ready!(late.poll())), RejectedKind::WaitedTooLong);
    end(&watch, 0, &mut first);
    assert_eq!(handle.in_flight(), 0);
}

/// The call has a permit, and the inner service is not ready: the call waits until its deadline and no longer.
#[tokio::test(start_paused = true)]
async fn caller_that_waits_for_the_inner_service_is_rejected_at_its_deadline() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut next = due(&service, Duration::from_millis(300));
    assert_pending!(next.poll());
    watch.set_ready(false);
    end(&watch, 0, &mut first);
    assert_pending!(next.poll());
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (1, 0));
    advance(Duration::from_millis(300)).await;
    assert!(next.is_woken());
    assert_eq!(refused_as(assert_ready!(next.poll())), RejectedKind::DeadlinePassed);
    assert_eq!((handle.in_flight(), watch.seen().calls), (0, 1));
    assert_eq!(handle.snapshot().rejected_deadline, 1, "the rejection is counted");
}

/// Neither shadow mode nor an exemption rejects a call.
#[tokio::test(start_paused = true)]
async fn exempt_and_shadowed_calls_wait_for_the_inner_service_after_their_deadline() {
    for shadow in [true, false] {
        let (inner, watch) = Strict::holding();
        watch.set_ready(false);
        let layer = ConcurrencyLimitLayer::new(1);
        let handle = layer.handle();
        handle.set_shadow(shadow);
        let mut request = request();
        request.extensions_mut().insert(Deadline::after(Duration::from_millis(300)));
        let mut call = if shadow {
            task::spawn(layer.layer(inner).clone().call(request).boxed())
        } else {
            task::spawn(layer.exempt_paths(["/"]).layer(inner).call(request).boxed())
        };
        for _ in 0..3 {
            assert_pending!(call.poll());
            advance(Duration::from_millis(200)).await;
        }
        let seen = handle.snapshot();
        assert_eq!((seen.rejected_deadline, seen.shadowed), (0, u64::from(shadow)), "{shadow}");
        watch.set_ready(true);
        assert_pending!(call.poll());
        assert!(watch.end(0, Ok(empty())));
        assert!(assert_ready!(call.poll()).is_ok());
    }
}

/// The permit of the late caller passes to the next caller, which may still be in time.
#[tokio::test(start_paused = true)]
async fn a_granted_permit_does_not_precede_the_callers_deadline() {
    let (service, watch, handle) = limit(1, 8);
    let mut first = hold(&service);
    let mut soon = due(&service, Duration::from_millis(300));
    assert_pending!(soon.poll());
    let mut next = hold(&service);
    advance(Duration::from_millis(300)).await;
    end(&watch, 0, &mut first);
    assert_eq!(refused_as(assert_ready!(soon.poll())), RejectedKind::DeadlinePassed);
    assert!(next.is_woken());
    assert_pending!(next.poll());
    assert_eq!(watch.seen().calls, 2);
    end(&watch, 1, &mut next);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_passed_deadline_is_reported_as_the_reason() {
    let (inner, _watch) = Strict::new();
    let service = ConcurrencyLimitLayer::new(1).respond().layer(inner);
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(Duration::ZERO));
    let http = service.clone().oneshot(late.clone()).await.unwrap();
    assert_eq!((http.status().as_u16(), http.headers().get("retry-after")), (504, None));
    *late.method_mut() = Method::POST;
    late.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let grpc = service.oneshot(late).await.unwrap();
    assert_eq!(grpc.headers()["grpc-status"], "4");
}
