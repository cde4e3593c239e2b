//! No user code runs under a lock: event subscribers, wakers, closures and destructors may use every handle.
//!
//! A violation is a deadlock, so each test runs on a thread of its own and within a time limit.

use std::{
    fmt::Write,
    future::{Future, pending, poll_fn},
    mem,
    panic::{AssertUnwindSafe, catch_unwind, panic_any},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, DeadlineLayer, Health, HealthProbeLayer,
    HedgeLayer, Lifecycle, Outcome, RetryLayer, TimeoutLayer, Timeouts, Trip,
    config::{ClientConfig, ServerConfig},
    health::{Check, FailOpen, ProbeState},
    limit::{
        CallPermit, QueueOrder,
        adaptive::{Aimd, Algorithm, LimitChange, Sample},
    },
    retry::ReplayBody,
    stack::{ClientStack, server},
    timeout::SendingBody,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full};
use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tracing::{Event, Metadata, Subscriber, span};

use crate::support::{ms, secs, tracing_events::listen};

type Body = Full<Bytes>;

fn request() -> Request<Body> {
    Request::new(Body::default())
}

fn status(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::default());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

/// Runs a test on a thread and a runtime with a paused clock of its own, and fails if it does not end.
fn within_time<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let (ended, end) = mpsc::channel();
    let thread = thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(test());
        let _ = ended.send(());
    });
    match end.recv_timeout(secs(30)) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().unwrap_err())
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("user code ran under a lock: deadlock"),
    }
}

/// The operations of user code on handles.
type Uses = Arc<Mutex<Vec<Arc<dyn Fn() + Send + Sync>>>>;

fn use_all(uses: &Uses) {
    // A copy, so that only locks of the crate can deadlock.
    let uses = uses.lock().unwrap().clone();
    uses.iter().for_each(|use_handle| use_handle());
}

fn add(uses: &Uses, use_handle: impl Fn() + Send + Sync + 'static) {
    uses.lock().unwrap().push(Arc::new(use_handle));
}

/// A waker that uses handles when it is woken, and when its last clone is dropped.
struct UsingWaker {
    uses: Uses,
    woken: AtomicUsize,
}

impl UsingWaker {
    fn new(uses: &Uses) -> Arc<Self> {
        Arc::new(Self { uses: uses.clone(), woken: AtomicUsize::new(0) })
    }

    fn woken(&self) -> usize {
        self.woken.load(Ordering::SeqCst)
    }
}

impl Wake for UsingWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.fetch_add(1, Ordering::SeqCst);
        use_all(&self.uses);
    }
}

impl Drop for UsingWaker {
    fn drop(&mut self) {
        use_all(&self.uses);
    }
}

/// Polls once with this waker.
fn poll<F: Future>(future: Pin<&mut F>, waker: &Arc<UsingWaker>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(&waker.clone().into()))
}

// ===== Subscribers =====

/// A subscriber that uses handles at every event.
struct UsingSubscriber {
    uses: Uses,
    events: Arc<Mutex<Vec<String>>>,
}

impl Subscriber for UsingSubscriber {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        if event.metadata().target().starts_with("buttress") {
            let mut message = String::new();
            event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                if field.name() == "message" {
                    write!(message, "{value:?}").unwrap();
                }
            });
            self.events.lock().unwrap().push(message);
            use_all(&self.uses);
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

async fn call<S>(service: &mut S) -> Result<S::Response, S::Error>
where
    S: Service<Request<Body>>,
{
    service.ready().await?.call(request()).await
}

/// Every layer goes through its changes of state, with a subscriber that uses every handle at every event.
#[test]
fn event_subscriber_may_use_every_handle() {
    within_time(|| async {
        let (uses, events) = (Uses::default(), Arc::new(Mutex::new(Vec::new())));
        let subscriber = UsingSubscriber { uses: uses.clone(), events: events.clone() };
        let _guard = listen(subscriber);

        // A circuit: it opens, stays open after a failed probe, and closes; it is changed by hand.
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1));
        let circuit = breaker.handle();
        let handle = circuit.clone();
        add(&uses, move || {
            let _ = (handle.state(), handle.snapshot(), format!("{handle:?}"));
            handle.set_trip(&Trip::consecutive(1)).unwrap();
            handle.set_open_for(secs(1)).unwrap();
            handle.set_shadow(false);
            drop(handle.isolate());
        });
        let failing = Arc::new(AtomicBool::new(true));
        let fails = failing.clone();
        let inner = service_fn(move |_: Request<Body>| {
            let code = if fails.load(Ordering::SeqCst) { 503 } else { 200 };
            async move { Ok::<_, BoxError>(status(code)) }
        });
        let mut service = breaker.layer(inner.clone());
        call(&mut service).await.unwrap();
        call(&mut service).await.unwrap_err();
        advance(secs(1)).await;
        call(&mut service).await.unwrap();
        failing.store(false, Ordering::SeqCst);
        advance(secs(1)).await;
        call(&mut service).await.unwrap();
        circuit.force_open();
        circuit.half_open();
        circuit.record(Outcome::success());
        drop(circuit.isolate());
        circuit.reset();

        // A keyed breaker.
        let keyed = CircuitBreakerLayer::new(Trip::consecutive(1)).per_origin();
        let handle = keyed.handle();
        add(&uses, move || {
            handle.all().into_iter().for_each(|(_, circuit)| drop(circuit.snapshot()));
        });
        failing.store(true, Ordering::SeqCst);
        let mut service = keyed.layer(inner.clone());
        call(&mut service).await.unwrap();
        call(&mut service).await.unwrap_err();

        // A limit that rejects, queues and adapts.
        let limit = ConcurrencyLimitLayer::adaptive(Aimd::new(4, 1..=8).unwrap()).upgrades();
        let held = Arc::new(Mutex::new(None::<CallPermit>));
        let (handle, seen) = (limit.handle(), held.clone());
        add(&uses, move || {
            let held = seen.lock().unwrap().clone();
            let _ = (handle.snapshot(), handle.try_acquire(), format!("{handle:?} {held:?}"));
            handle.set_bounds(1..=8).unwrap();
            handle.set_queue(0, secs(1)).unwrap();
            handle.set_queue_order(QueueOrder::Lifo).unwrap();
            handle.set_retry_after(secs(1));
            handle.set_shadow(false);
        });
        let taken = held.clone();
        let mut service = limit.clone().layer(service_fn(move |request: Request<Body>| {
            *taken.lock().unwrap() = request.extensions().get::<CallPermit>().cloned();
            async { Ok::<_, BoxError>(status(503)) }
        }));
        for _ in 0..50 {
            let _ = call(&mut service).await;
            advance(ms(100)).await;
        }
        let permits: Vec<_> = (0..20).map_while(|_| limit.handle().try_acquire().ok()).collect();
        call(&mut service).await.unwrap_err();
        drop(permits);

        // Retries, hedges, timeouts and deadlines.
        let retry = RetryLayer::http().attempts(2);
        let hedge = HedgeLayer::http(ms(10));
        let timeout = TimeoutLayer::http().head(ms(50));
        let deadline = DeadlineLayer::new().default_of(secs(9));
        let handles = (retry.handle(), hedge.handle(), timeout.handle(), deadline.handle());
        let clone = (retry.clone(), hedge.clone());
        add(&uses, move || {
            let (retry, hedge, timeout, deadline) = &handles;
            let _ = (retry.snapshot(), hedge.snapshot(), timeout.snapshot(), deadline.snapshot());
            timeout.set(Timeouts::new().response_idle(secs(9))).unwrap();
            deadline.set_default(secs(9)).unwrap();
            let _ = format!("{clone:?}");
        });
        let service = ServiceBuilder::new().layer(deadline).layer(retry).layer(hedge);
        let mut service = service.layer(timeout).service(service_fn(|_: Request<_>| async {
            sleep(secs(1)).await;
            Ok::<_, BoxError>(status(200))
        }));
        let _ = call(&mut service).await;

        // Health: checks, reporters and probes.
        let health = Health::new();
        let reporter = health.reporter("db").unwrap();
        let clones = (health.clone(), reporter.clone());
        add(&uses, move || {
            let (health, reporter) = &clones;
            let _ = (health.snapshot(), health.checks(), health.status(), format!("{health:?}"));
            reporter.pass();
            reporter.fail_because("used by a subscriber");
            drop(health.reporter("other"));
        });
        let fails = Arc::new(AtomicBool::new(true));
        let (first, second) = (fails.clone(), fails.clone());
        let check = Check::new("disk", move || {
            let fails = first.load(Ordering::SeqCst);
            async move { if fails { Err("full") } else { Ok(()) } }
        });
        health.add(check.every(secs(1)).thresholds(1, 1)).unwrap();
        let guard = FailOpen::new();
        let probe = HealthProbeLayer::check(move || {
            let fails = second.load(Ordering::SeqCst);
            async move { if fails { Err(()) } else { Ok(()) } }
        });
        let probe = probe.thresholds(1, 1).every(secs(1)).fail_open(&guard);
        let probe = probe.report_to(&health, "search");
        let handle = probe.handle();
        add(&uses, move || {
            let _ = (handle.state(), handle.snapshot(), guard.is_active(), format!("{handle:?}"));
        });
        let mut service = probe.layer(inner.clone());
        sleep(secs(3)).await;
        let _ = call(&mut service).await;
        fails.store(false, Ordering::SeqCst);
        sleep(secs(3)).await;

        // Whole stacks.
        let config = ClientConfig::from_toml("retry_attempts = 1").unwrap();
        let (client, served) =
            (ClientStack::new(&config).unwrap(), server(&ServerConfig::default()).unwrap());
        let handles = (client.handle(), served.handle());
        add(&uses, move || {
            let (client, server) = &handles;
            let _ = (client.snapshot(), client.config(), server.snapshot(), server.config());
            client.update(&client.config()).unwrap();
            server.update(&server.config()).unwrap();
            let _ = format!("{client:?}");
        });
        let stack = client.handle();
        stack.breaker().force_open();
        stack
            .update(&ClientConfig::from_toml("limit_max = 9\nretry_attempts = 1").unwrap())
            .unwrap();
        stack.breaker().reset();

        // A process that starts and ends.
        let lifecycle = Lifecycle::without_signals(&health).unwrap().drain_delay(secs(1));
        let handle = lifecycle.clone();
        add(&uses, move || {
            let mut changed = pin!(handle.changed());
            let _ = changed.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            let _ = (handle.phase(), handle.in_flight(), handle.rejected(), format!("{handle:?}"));
        });
        lifecycle.ready();
        lifecycle.drain();
        sleep(secs(60)).await;

        // Misconfigured layers.
        let mut service = ConcurrencyLimitLayer::new(0).layer(inner);
        call(&mut service).await.unwrap_err();

        // No use is dropped while the list of uses is locked.
        drop(mem::take(&mut *uses.lock().unwrap()));
        let events = mem::take(&mut *events.lock().unwrap());
        for event in [
            "circuit opened",
            "circuit half-open",
            "circuit forced",
            "circuit closed",
            "call rejected",
            "limit changed",
            "hedging",
            "timed out",
            "health probe down",
            "health probe up",
            "check failed",
            "check passed",
            "hedge won",
            "settings changed",
            "starting",
            "draining",
            "stopped",
            "misconfigured",
        ] {
            assert!(events.iter().any(|seen| seen == event), "no event `{event}` in {events:?}");
        }
    });
}

// ===== Wakers =====

#[test]
fn waker_of_a_queued_call_may_use_the_limit() {
    within_time(|| async {
        let limit = ConcurrencyLimitLayer::new(1).queue(9, secs(9));
        let (handle, uses) = (limit.handle(), Uses::default());
        let using = handle.clone();
        add(&uses, move || {
            let _ = (using.snapshot(), format!("{using:?}"));
            using.set_queue_order(QueueOrder::Fifo).unwrap();
        });
        let permit = handle.try_acquire().unwrap();
        let (first, second) = (UsingWaker::new(&uses), UsingWaker::new(&uses));
        let mut queued = pin!(handle.acquire());
        assert!(poll(queued.as_mut(), &first).is_pending());
        // The queue drops its clone of the first waker, which is the last one.
        drop(first);
        assert!(poll(queued.as_mut(), &second).is_pending());
        drop(permit);
        assert_eq!(second.woken(), 1);
        assert!(poll(queued.as_mut(), &second).is_ready());
        uses.lock().unwrap().clear();
    });
}

#[test]
fn waker_may_use_the_circuit_that_wakes_it() {
    within_time(|| async {
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1));
        let (handle, uses) = (breaker.handle(), Uses::default());
        let using = handle.clone();
        add(&uses, move || {
            let _ = (using.snapshot(), format!("{using:?}"));
            drop(using.isolate());
        });
        let waker = UsingWaker::new(&uses);
        let mut changed = pin!(handle.changed());
        assert!(poll(changed.as_mut(), &waker).is_pending());
        handle.record(Outcome::failure());
        assert_eq!(waker.woken(), 1);
        uses.lock().unwrap().clear();
    });
}

/// The gates of one set wake each other's callers.
#[test]
fn waker_may_use_the_health_gate_that_wakes_it() {
    within_time(|| async {
        let (guard, uses) = (FailOpen::new(), Uses::default());
        let gate = || {
            let probe = HealthProbeLayer::check(|| async {
                sleep(secs(1)).await;
                Err::<(), _>(())
            });
            probe.thresholds(1, 1).backpressure().fail_open(&guard)
        };
        let (first, second) = (gate(), gate());
        let inner = service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(status(200)) });
        let mut waits = first.clone().layer(inner);
        let (one, other) = (first.handle(), second.handle());
        add(&uses, move || {
            let _ = (one.snapshot(), other.snapshot());
        });
        while first.handle().state() != ProbeState::Down {
            sleep(ms(100)).await;
        }
        // All gates of the set are down. Another gate joins, which is not down.
        let _second = second.clone().layer(inner);
        let waker = UsingWaker::new(&uses);
        let mut ready = pin!(poll_fn(|cx| waits.poll_ready(cx)));
        assert!(poll(ready.as_mut(), &waker).is_pending());
        while second.handle().state() != ProbeState::Down {
            sleep(ms(100)).await;
        }
        assert!(waker.woken() > 0, "all of the set are down");
        assert!(poll(ready.as_mut(), &waker).is_ready());
        uses.lock().unwrap().clear();
    });
}

#[test]
fn waker_of_a_watcher_of_health_may_use_the_lifecycle() {
    within_time(|| async {
        let health = Health::new();
        let lifecycle = Lifecycle::without_signals(&health).unwrap().drain_delay(Duration::ZERO);
        let uses = Uses::default();
        let (using, registry) = (lifecycle.clone(), health.clone());
        add(&uses, move || {
            let mut changed = pin!(using.changed());
            let _ = changed.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            let _ = (using.phase(), registry.snapshot(), registry.is_ready());
        });
        let waker = UsingWaker::new(&uses);
        for change in [Lifecycle::ready, Lifecycle::drain] {
            let mut changed = pin!(health.changed());
            assert!(poll(changed.as_mut(), &waker).is_pending());
            let before = waker.woken();
            change(&lifecycle);
            assert!(waker.woken() > before);
            assert!(poll(changed.as_mut(), &waker).is_ready());
        }
        uses.lock().unwrap().clear();
    });
}

#[test]
fn waker_may_use_the_stack_that_an_update_wakes_it_from() {
    within_time(|| async {
        let stack = ClientStack::new(&ClientConfig::from_toml("limit_max = 1").unwrap()).unwrap();
        let (handle, uses) = (stack.handle(), Uses::default());
        let using = handle.clone();
        let nested = ClientConfig::from_toml("limit_max = 5").unwrap();
        add(&uses, move || {
            let _ = (using.snapshot(), using.config(), format!("{using:?}"));
            using.update(&nested).unwrap();
        });
        let service =
            stack.layer(service_fn(|_: Request<_>| pending::<Result<Response<Body>, BoxError>>()));
        let waker = UsingWaker::new(&uses);
        let mut calls: Vec<_> =
            (0..3).map(|_| Box::pin(service.clone().oneshot(request()))).collect();
        for call in &mut calls {
            assert!(poll(call.as_mut(), &waker).is_pending());
        }
        assert_eq!(handle.snapshot().waiting, 2);
        handle.update(&ClientConfig::from_toml("limit_max = 2").unwrap()).unwrap();
        assert!(waker.woken() > 0);
        // The nested update is applied after the outer one.
        assert_eq!((handle.config().limit.max, handle.snapshot().waiting), (Some(5), 0));
        uses.lock().unwrap().clear();
    });
}

// ===== Destructors =====

/// Uses handles when it is dropped.
struct UsesOnDrop(Uses);

impl Drop for UsesOnDrop {
    fn drop(&mut self) {
        use_all(&self.0);
    }
}

#[test]
fn destructor_of_a_replaced_rule_may_use_the_circuit() {
    within_time(|| async {
        let uses = Uses::default();
        let rule = || {
            let captured = UsesOnDrop(uses.clone());
            Trip::when(move |_| {
                let _ = &captured;
                false
            })
        };
        let breaker = CircuitBreakerLayer::new(rule());
        let handle = breaker.handle();
        let using = handle.clone();
        add(&uses, move || {
            let _ = (using.snapshot(), format!("{using:?}"));
        });
        let new = rule();
        handle.set_trip(&new).unwrap();
        drop(new);
        handle.set_trip(&Trip::when(|_| true)).unwrap();
        uses.lock().unwrap().clear();
    });
}

#[test]
fn destructor_of_a_replaced_closure_may_use_the_retry() {
    within_time(|| async {
        let uses = Uses::default();
        let captured = UsesOnDrop(uses.clone());
        let retry = RetryLayer::http().retry_if(move |_| {
            let _ = &captured;
            None
        });
        let using = retry.clone();
        add(&uses, move || {
            let _ = (using.handle().snapshot(), format!("{using:?}"));
        });
        let _retry = retry.retry_if(|_| None);
        uses.lock().unwrap().clear();
    });
}

/// A waker that owns a request body, as the waker of a task that owns it does.
#[test]
fn destructor_of_a_waker_may_drop_the_request_body() {
    within_time(|| async {
        struct Endless;

        impl http_body::Body for Endless {
            type Data = Bytes;
            type Error = BoxError;

            fn poll_frame(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
                Poll::Pending
            }
        }

        let uses = Uses::default();
        let body = Arc::new(Mutex::new(None));
        let taken = body.clone();
        // Without a timeout of the call itself: its timer would keep a clone of the waker.
        let timeout = TimeoutLayer::new(Timeouts::new().request_idle(secs(9)));
        let service = timeout.layer(service_fn(move |request: Request<_>| {
            *taken.lock().unwrap() = Some(request.into_body());
            pending::<Result<Response<Body>, BoxError>>()
        }));
        let mut call = pin!(service.oneshot(Request::new(Endless)));
        let waker = UsingWaker::new(&uses);
        assert!(poll(call.as_mut(), &waker).is_pending());
        assert!(body.lock().unwrap().is_some());
        add(&uses, move || {
            let body = body.lock().unwrap().take();
            drop(body);
        });
        drop(waker);
        let next = UsingWaker::new(&Uses::default());
        assert!(poll(call.as_mut(), &next).is_pending());
        assert_eq!(next.woken(), 1, "the body has ended");
        uses.lock().unwrap().clear();
    });
}

#[test]
fn request_and_response_body_may_use_the_layers_when_they_are_dropped() {
    within_time(|| async {
        struct UsingBody {
            uses: UsesOnDrop,
            data: Option<Bytes>,
        }

        impl http_body::Body for UsingBody {
            type Data = Bytes;
            type Error = BoxError;

            fn poll_frame(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
                use_all(&self.uses.0);
                Poll::Ready(self.data.take().map(|data| Ok(Frame::data(data))))
            }
        }

        let uses = Uses::default();
        let body = |uses: &Uses| UsingBody {
            uses: UsesOnDrop(uses.clone()),
            data: Some(Bytes::from_static(b"data")),
        };
        let retry = RetryLayer::http().attempts(3).assume_idempotent();
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(2)).open_for(secs(1));
        let limit = ConcurrencyLimitLayer::adaptive(Aimd::new(4, 1..=8).unwrap());
        let timeout = TimeoutLayer::http();
        let handles = (retry.clone(), breaker.handle(), limit.handle(), timeout.handle());
        add(&uses, move || {
            let (retry, breaker, limit, timeout) = &handles;
            let _ = (retry.handle().snapshot(), breaker.snapshot(), limit.snapshot());
            let _ = (timeout.snapshot(), format!("{retry:?} {breaker:?} {limit:?}"));
            drop(breaker.isolate());
        });
        let answers = uses.clone();
        let mut service =
            ServiceBuilder::new().layer(retry).layer(breaker).layer(limit).layer(timeout).service(
                service_fn(move |request: Request<SendingBody<ReplayBody<UsingBody>>>| {
                    let mut response = Response::new(body(&answers));
                    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                    async move {
                        let read = pin!(request.into_body()).frame().await;
                        drop(read);
                        Ok::<_, BoxError>(response)
                    }
                }),
            );
        for _ in 0..3 {
            let request = Request::post("/").body(body(&uses)).unwrap();
            let response = service.ready().await.unwrap().call(request).await;
            drop(response);
            sleep(secs(2)).await;
        }
        uses.lock().unwrap().clear();
    });
}

// ===== Panics =====

/// Panics in every method, once it is armed.
#[derive(Clone, Debug)]
struct Panics(Arc<AtomicBool>);

impl Panics {
    fn panic_if_armed(&self) {
        if self.0.load(Ordering::SeqCst) {
            panic_any("an algorithm that panics");
        }
    }
}

impl Algorithm for Panics {
    fn limit(&self) -> u32 {
        self.panic_if_armed();
        7
    }

    fn set_limit(&mut self, _: u32) {
        self.panic_if_armed();
    }

    fn set_bounds(&mut self, _: std::ops::RangeInclusive<u32>) -> bool {
        self.panic_if_armed();
        true
    }

    fn on_sample(&mut self, _: &Sample) -> Option<LimitChange> {
        self.panic_if_armed();
        None
    }
}

/// A panic that leaves a destructor during an unwind aborts the process, and all tests with it.
#[test]
fn algorithm_that_panics_while_a_caller_unwinds_leaves_the_limit_as_it_is() {
    within_time(|| async {
        let armed = Arc::new(AtomicBool::new(false));
        let layer = ConcurrencyLimitLayer::adaptive(Panics(armed.clone())).until_body_end();
        let layer = layer.count_cancelled_after(ms(1));
        let handle = layer.handle();
        armed.store(true, Ordering::SeqCst);

        // Calls that end while their caller unwinds: with a response head, and without.
        let heads = layer.clone().layer(service_fn(|_: Request<Body>| async {
            Ok::<_, BoxError>(Response::new(Body::from("data")))
        }));
        let response = heads.oneshot(request()).await.unwrap();
        let silent = layer
            .clone()
            .layer(service_fn(|_: Request<Body>| pending::<Result<Response<Body>, BoxError>>()));
        let mut silent = Box::pin(silent.oneshot(request()));
        assert!(poll(silent.as_mut(), &UsingWaker::new(&Uses::default())).is_pending());
        advance(secs(1)).await;
        let failed = layer.layer(service_fn(|_: Request<Body>| async {
            let mut response = Response::new(Body::from("data"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, BoxError>(response)
        }));
        let failed = failed.oneshot(request()).await.unwrap();
        assert_eq!(handle.in_flight(), 3);
        let caller = catch_unwind(AssertUnwindSafe(move || {
            let (_response, _silent, _failed) = (response, silent, failed);
            panic_any("a caller that panics");
        }));
        assert_eq!(caller.unwrap_err().downcast_ref(), Some(&"a caller that panics"));

        let snapshot = handle.snapshot();
        assert_eq!((snapshot.limit, snapshot.in_flight, snapshot.last_change), (7, 0, None));
        assert_eq!(handle.set_limit(9).unwrap_err().field, "limit");
        assert_eq!(handle.set_bounds(1..=9).unwrap_err().field, "adaptive.bounds");
        assert_eq!(handle.snapshot().limit, 7);
        armed.store(false, Ordering::SeqCst);
        handle.set_limit(7).unwrap();
    });
}

#[test]
fn algorithm_that_panics_from_the_start_is_a_typed_error() {
    let layer = ConcurrencyLimitLayer::adaptive(Panics(Arc::new(AtomicBool::new(true))));
    assert_eq!(layer.checked().unwrap_err().field, "adaptive");
}

#[test]
fn rule_that_panics_while_a_caller_unwinds_does_not_trip() {
    within_time(|| async {
        let layer = CircuitBreakerLayer::new(Trip::when(|_| panic_any("a rule that panics")));
        let handle = layer.handle();
        let service = layer.layer(service_fn(|_: Request<Body>| async {
            let mut response = Response::new(Body::from("data"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, BoxError>(response)
        }));
        let mut call = Box::pin(service.oneshot(request()));
        let response = poll(call.as_mut(), &UsingWaker::new(&Uses::default()));
        let caller = catch_unwind(AssertUnwindSafe(move || {
            let _ends_here = (response, call);
            panic_any("a caller that panics");
        }));
        assert!(caller.is_err());
        assert_eq!(handle.state(), buttress::breaker::CircuitState::Closed);
    });
}
