//! `Lifecycle` and its layer through their public API, with a paused clock.

use std::{
    convert::Infallible,
    future::{Future, pending},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    Health, Lifecycle, Rejected,
    health::CheckState,
    lifecycle::{Drain, LifecyclePhase},
    outcome::RejectedKind,
};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Body;
use http_body_util::{BodyExt, Full, channel::Channel};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{alive_tasks, settle, within_an_hour};

type Req = Request<Full<Bytes>>;

fn call() -> Req {
    Request::new(Full::default())
}

/// Returns a lifecycle whose layer rejects calls from the beginning of *stopping*, because the grace is zero.
fn lifecycle(health: &Health) -> Lifecycle {
    let lifecycle = Lifecycle::without_signals(health).unwrap().grace(Duration::ZERO);
    lifecycle.drain_delay(Duration::from_secs(5)).drain_timeout(Duration::from_secs(20))
}

fn app()
-> impl Service<Req, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send> + Clone {
    service_fn(|_: Req| async { Ok(Response::new(Full::from("app"))) })
}

// ===== Phases =====

#[tokio::test(start_paused = true)]
async fn phases_change_in_time_and_readiness_follows() {
    let health = Health::new();
    let lifecycle = lifecycle(&health);
    assert_eq!((lifecycle.phase(), health.is_ready()), (LifecyclePhase::Starting, false));
    assert_eq!(health.check("lifecycle"), Some(CheckState::Unknown));
    lifecycle.ready();
    assert_eq!((lifecycle.phase(), health.is_ready()), (LifecyclePhase::Ready, true));

    let began = Instant::now();
    let seen = tokio::spawn({
        let lifecycle = lifecycle.clone();
        async move {
            let mut seen = Vec::new();
            while lifecycle.phase() < LifecyclePhase::Stopped {
                let phase = lifecycle.changed().await;
                seen.push((phase.as_str(), began.elapsed().as_secs()));
            }
            seen
        }
    });
    settle().await;
    lifecycle.drain();
    settle().await;
    assert_eq!((lifecycle.phase(), health.is_ready()), (LifecyclePhase::Draining, false));
    assert_eq!(health.snapshot().remove(0).reason.as_deref(), Some("draining"));
    // `ready` has no effect after the beginning of the drain.
    lifecycle.ready();
    assert!(!health.is_ready());
    let seen = within_an_hour(seen).await.unwrap();
    assert_eq!(seen, [("draining", 0), ("stopping", 5), ("stopped", 25)]);
}

#[tokio::test(start_paused = true)]
async fn a_process_that_is_starting_can_drain() {
    let lifecycle = lifecycle(&Health::new());
    lifecycle.drain();
    within_an_hour(lifecycle.stopping()).await;
    lifecycle.ready();
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
}

#[tokio::test(start_paused = true)]
async fn skip_delay_ends_the_current_phase_only() {
    let second = Duration::from_secs(1);
    // The times of the calls of `skip_delay`, of *stopping* and of *stopped*, in seconds.
    for (hurries, stopping, stopped) in
        [(&[][..], 5, 25), (&[1], 1, 21), (&[1, 3], 1, 3), (&[0, 0], 0, 0), (&[7], 5, 7)]
    {
        let lifecycle = lifecycle(&Health::new());
        let began = Instant::now();
        let reached = |phase| {
            let (lifecycle, mut now) = (lifecycle.clone(), LifecyclePhase::Starting);
            tokio::spawn(async move {
                while now < phase {
                    now = lifecycle.changed().await;
                }
                began.elapsed()
            })
        };
        let (stops, ends) = (reached(LifecyclePhase::Stopping), reached(LifecyclePhase::Stopped));
        settle().await;
        // `skip_delay` has no effect before the drain.
        lifecycle.skip_delay();
        lifecycle.drain();
        for at in hurries {
            sleep((*at * second).saturating_sub(began.elapsed())).await;
            lifecycle.skip_delay();
            // A repeated `drain` has no effect.
            lifecycle.drain();
        }
        assert_eq!(within_an_hour(stops).await.unwrap(), stopping * second, "{hurries:?}");
        assert_eq!(within_an_hour(ends).await.unwrap(), stopped * second, "{hurries:?}");
        lifecycle.skip_delay();
        assert_eq!(lifecycle.phase(), LifecyclePhase::Stopped);
    }
}

#[tokio::test(start_paused = true)]
async fn a_repeated_drain_does_not_shorten_the_delay() {
    let lifecycle = lifecycle(&Health::new());
    let began = Instant::now();
    for _ in 0..3 {
        lifecycle.drain();
        settle().await;
    }
    within_an_hour(lifecycle.stopping()).await;
    assert_eq!(began.elapsed(), Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn without_a_delay_the_phase_is_stopping_when_drain_returns() {
    let lifecycle =
        lifecycle(&Health::new()).drain_delay(Duration::ZERO).drain_timeout(Duration::ZERO);
    lifecycle.drain();
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
    assert_eq!(within_an_hour(lifecycle.changed()).await, LifecyclePhase::Stopped);
}

/// The clock jumps by a day, as after the suspension of the machine.
#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_skips_no_phase() {
    let lifecycle = lifecycle(&Health::new());
    lifecycle.drain();
    settle().await;
    advance(Duration::from_secs(86_400)).await;
    settle().await;
    assert_eq!(
        lifecycle.phase(),
        LifecyclePhase::Stopping,
        "calls in flight have the full time of stopping"
    );
    advance(Duration::from_secs(20)).await;
    settle().await;
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn times_set_after_the_layer_was_made_apply() {
    let lifecycle = lifecycle(&Health::new());
    let service = lifecycle.layer().layer(app());
    let lifecycle = lifecycle.drain_delay(Duration::ZERO).drain_timeout(Duration::MAX);
    lifecycle.drain();
    settle().await;
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
    assert_eq!(within_an_hour(service.oneshot(call())).await.unwrap().status(), 503);
    sleep(Duration::from_secs(86_400)).await;
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_lifecycle_leaks_no_task_and_removes_its_check() {
    let health = Health::new();
    for drained in [false, true] {
        let lifecycle = lifecycle(&health);
        let error = Lifecycle::without_signals(&health).unwrap_err();
        assert_eq!(error.field, "check.name", "the registry already has a lifecycle");
        let (layer, token) = (lifecycle.layer(), lifecycle.token());
        if drained {
            lifecycle.drain();
        }
        settle().await;
        drop((lifecycle, layer));
        settle().await;
        assert_eq!(alive_tasks(), 1, "the token keeps the task");
        drop(token);
        settle().await;
        assert_eq!((alive_tasks(), health.checks()), (0, vec![]));
    }
}

/// The task that receives signals ends with its runtime. Servers in other runtimes must stop instead of waiting for a
/// signal.
#[test]
fn a_lifecycle_is_stopped_when_its_runtime_ends() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for with_signals in [true, false] {
        let health = Health::new();
        let lifecycle = runtime().block_on(async {
            if with_signals { Lifecycle::new(&health) } else { Lifecycle::without_signals(&health) }
        });
        let lifecycle = lifecycle.unwrap();
        assert_eq!((lifecycle.phase(), health.is_ready()), (LifecyclePhase::Stopped, false));
        let served =
            runtime().block_on(within_an_hour(lifecycle.run(pending::<Result<(), Infallible>>())));
        assert_eq!(served.unwrap().cut_calls, 0);
    }
}

#[test]
fn a_lifecycle_without_a_runtime_is_a_typed_error() {
    assert_eq!(Lifecycle::new(&Health::new()).unwrap_err().field, "lifecycle");
}

#[test]
fn signals_without_io_are_a_typed_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let health = Health::new();
        assert_eq!(Lifecycle::new(&health).unwrap_err().field, "lifecycle.signals");
        assert!(health.checks().is_empty() && Lifecycle::without_signals(&health).is_ok());
    });
}

#[test]
fn a_lifecycle_without_timers_is_a_typed_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let health = Health::new();
        for made in [Lifecycle::new(&health), Lifecycle::without_signals(&health)] {
            let error = made.unwrap_err();
            assert_eq!((error.field, &*error.value), ("lifecycle", "\"a runtime without timers\""));
        }
        assert!(health.checks().is_empty());
    });
}

#[tokio::test]
async fn auto_traits() {
    fn fits<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send + 'static>(_: &T) {}
    let lifecycle = lifecycle(&Health::new());
    fits(&lifecycle);
    fits(&lifecycle.layer());
    fits(&lifecycle.token());
    let mut service = lifecycle.layer().layer(app());
    fits(&service);
    sent(&service.ready().await.unwrap().call(call()));
    sent(&lifecycle.stopping());
    let fails = service_fn(|_: Req| async {
        Err::<Response<Full<Bytes>>, _>(buttress::BoxError::from("no"))
    });
    let boxed = tower::util::BoxCloneSyncService::new(fails);
    let outer = lifecycle.layer().layer(boxed);
    let spawned = tokio::spawn(async move {
        let mut outer = outer;
        outer.ready().await.unwrap().call(call()).await.map(drop)
    });
    assert_eq!(spawned.await.unwrap().unwrap_err().to_string(), "no");
}

// ===== Calls =====

#[tokio::test(start_paused = true)]
async fn calls_are_served_until_the_delay_is_over_and_then_rejected() {
    let lifecycle = lifecycle(&Health::new());
    let service = lifecycle.layer().layer(app());
    let ask = async |request: Req| service.clone().oneshot(request).await.unwrap();
    assert_eq!(ask(call()).await.status(), 200, "starting");
    lifecycle.ready();
    lifecycle.drain();
    sleep(Duration::from_millis(4999)).await;
    assert_eq!(ask(call()).await.status(), 200, "draining");
    within_an_hour(lifecycle.stopping()).await;
    let refused = ask(call()).await;
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["retry-after"], "1");
    let why = refused.extensions().get::<Rejected>().unwrap();
    assert_eq!((why.kind(), why.layer()), (RejectedKind::ShuttingDown, "lifecycle"));
    let mut rpc = call();
    *rpc.method_mut() = http::Method::POST;
    rpc.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    *rpc.version_mut() = Version::HTTP_2;
    let refused = ask(rpc).await;
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["grpc-status"]),
        (200, &"14".parse().unwrap())
    );
    assert_eq!((lifecycle.rejected(), lifecycle.in_flight()), (2, 0));
}

/// Each call is either served completely or rejected. After `run` has returned, no call reaches the service, so that
/// the application may drop its state.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_at_the_start_of_the_drain_is_served_or_rejected_and_never_lost() {
    for _ in 0..50 {
        let lifecycle = lifecycle(&Health::new()).drain_delay(Duration::ZERO);
        lifecycle.ready();
        let over = Arc::new(AtomicBool::new(false));
        let gone = over.clone();
        let service = lifecycle.layer().layer(service_fn(move |_: Req| {
            assert!(!gone.load(SeqCst), "called after `run` has returned");
            async { Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("app"))) }
        }));
        let (told, mut some) = tokio::sync::mpsc::channel(1);
        let callers: Vec<_> = (0..4)
            .map(|_| {
                let (service, told) = (service.clone(), told.clone());
                tokio::spawn(async move {
                    let mut served = 0u64;
                    loop {
                        let response = service.clone().oneshot(call()).await.unwrap();
                        match response.status().as_u16() {
                            200 => served += 1,
                            503 => return served,
                            other => panic!("{other}"),
                        }
                        let whole = response.into_body().collect().await.unwrap().to_bytes();
                        assert_eq!(whole, "app");
                        let _ = told.try_send(());
                    }
                })
            })
            .collect();
        within_an_hour(some.recv()).await;
        lifecycle.drain();
        let ended = within_an_hour(lifecycle.run(async { Ok::<_, Infallible>(()) })).await.unwrap();
        over.store(true, SeqCst);
        let mut served = 0;
        for caller in callers {
            served += within_an_hour(caller).await.unwrap();
        }
        assert!(served > 0);
        assert_eq!((ended.cut_calls, lifecycle.rejected(), lifecycle.in_flight()), (0, 4, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn http1_responses_carry_connection_close_from_the_drain_on() {
    let lifecycle = lifecycle(&Health::new());
    let service = lifecycle.layer().layer(service_fn(|request: Req| async move {
        let mut response = Response::new(Full::<Bytes>::default());
        if let Some(says) = request.uri().query() {
            response.headers_mut().insert("connection", says.parse().unwrap());
        }
        Ok::<_, Infallible>(response)
    }));
    let says = async |path: &str, version: Version| {
        let request = Request::builder().uri(path).version(version).body(Full::default()).unwrap();
        let response = service.clone().oneshot(request).await.unwrap();
        let said = response.headers().get_all("connection").iter();
        said.map(|value| value.to_str().unwrap().to_owned()).reduce(|all, more| all + "|" + &more)
    };
    assert_eq!(says("/", Version::HTTP_11).await, None);
    assert_eq!(says("/?keep-alive", Version::HTTP_11).await.as_deref(), Some("keep-alive"));
    lifecycle.drain();
    for stopping in [false, true] {
        settle().await;
        assert_eq!(lifecycle.phase() == LifecyclePhase::Stopping, stopping);
        assert_eq!(says("/", Version::HTTP_11).await.as_deref(), Some("close"));
        assert_eq!(says("/", Version::HTTP_10).await.as_deref(), Some("close"));
        assert_eq!(says("/", Version::HTTP_2).await, None);
        if !stopping {
            for (itself, all) in [
                // The value contains `upgrade` or `close`: the layer adds nothing.
                ("Upgrade", "Upgrade"),
                ("te,UPGRADE", "te,UPGRADE"),
                ("Close", "Close"),
                // Other values do not keep the connection open: the layer adds `close`.
                ("keep-alive", "keep-alive|close"),
                ("x-hop", "x-hop|close"),
            ] {
                let said = says(&format!("/?{itself}"), Version::HTTP_11).await;
                assert_eq!(said.as_deref(), Some(all));
            }
        }
        within_an_hour(lifecycle.stopping()).await;
    }
}

/// How a call ends.
enum End {
    BodyRead,
    BodyDropped,
    FutureDropped,
    Unpolled,
    Panics,
    Fails,
}

#[tokio::test(start_paused = true)]
async fn a_call_is_in_flight_to_its_end_however_it_ends() {
    let health = Health::new();
    let lifecycle = lifecycle(&health);
    type Answer =
        Pin<Box<dyn Future<Output = Result<Response<Channel<Bytes>>, &'static str>> + Send>>;
    for end in [
        End::BodyRead,
        End::BodyDropped,
        End::FutureDropped,
        End::Unpolled,
        End::Panics,
        End::Fails,
    ] {
        let (sender, body) = Channel::<Bytes>::new(1);
        let mut body = Some(body);
        let does: Box<dyn FnMut() -> Answer + Send> = match end {
            End::BodyRead | End::BodyDropped => Box::new(move || {
                let body = body.take().unwrap();
                Box::pin(async { Ok(Response::new(body)) })
            }),
            End::FutureDropped | End::Unpolled => Box::new(|| Box::pin(pending())),
            End::Panics => Box::new(|| Box::pin(async { panic!("scripted panic") })),
            End::Fails => Box::new(|| Box::pin(async { Err("failed") })),
        };
        let does = std::sync::Arc::new(std::sync::Mutex::new(does));
        let mut service =
            lifecycle.layer().layer(service_fn(move |_: Req| (does.lock().unwrap())()));
        let future = service.ready().await.unwrap().call(call());
        assert_eq!(lifecycle.in_flight(), 1);
        match end {
            End::BodyRead => {
                let response = future.await.unwrap();
                assert_eq!(lifecycle.in_flight(), 1, "the stream is still open");
                drop(sender);
                response.into_body().collect().await.unwrap();
            }
            End::BodyDropped => drop(future.await.unwrap()),
            End::FutureDropped => {
                let task = tokio::spawn(future);
                settle().await;
                task.abort();
                assert!(task.await.unwrap_err().is_cancelled());
            }
            End::Unpolled => drop(future),
            End::Panics => assert!(tokio::spawn(future).await.unwrap_err().is_panic()),
            End::Fails => assert_eq!(future.await.unwrap_err(), "failed"),
        }
        assert_eq!(lifecycle.in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn the_token_in_the_request_resolves_at_stopping() {
    let lifecycle = lifecycle(&Health::new());
    let service = lifecycle.layer().layer(service_fn(|request: Req| async move {
        let drain = Drain::of(request.extensions()).unwrap().clone();
        let (mut sender, body) = Channel::<Bytes>::new(1);
        tokio::spawn(async move {
            sender.send_data("tick ".into()).await.unwrap();
            drain.stopping().await;
            assert!(drain.is_stopping());
            sender.send_data("bye".into()).await.unwrap();
        });
        Ok::<_, Infallible>(Response::new(body))
    }));
    let began = Instant::now();
    let response = service.oneshot(call()).await.unwrap();
    assert!(!response.body().is_end_stream());
    lifecycle.drain();
    let told = within_an_hour(response.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!((&*told, began.elapsed()), (&b"tick bye"[..], Duration::from_secs(5)));
    assert_eq!(lifecycle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_end_is_dropped_and_its_calls_are_counted() {
    let lifecycle = lifecycle(&Health::new());
    let mut service = lifecycle
        .layer()
        .layer(service_fn(|_: Req| pending::<Result<Response<Full<Bytes>>, Infallible>>()));
    let _hangs = [
        service.ready().await.unwrap().call(call()),
        service.clone().ready().await.unwrap().call(call()),
    ];
    let began = Instant::now();
    lifecycle.drain();
    let drained = within_an_hour(lifecycle.run(pending::<Result<(), Infallible>>())).await.unwrap();
    assert_eq!((drained.cut_calls, began.elapsed()), (2, Duration::from_secs(25)));
    // If the server ends by itself, no call counts as cut, and `run` returns its error.
    let ended = lifecycle.run(async { Ok::<_, Infallible>(()) }).await.unwrap();
    assert_eq!(ended.cut_calls, 0);
    assert_eq!(
        lifecycle.run(async { Err::<(), _>("port taken") }).await.unwrap_err(),
        "port taken"
    );
}

#[tokio::test(start_paused = true)]
async fn the_drain_waits_for_a_guard_until_the_drain_timeout() {
    for (takes, ends, cut_calls) in [(7, 7, 0), (60, 20, 1)] {
        let lifecycle = lifecycle(&Health::new()).drain_delay(Duration::ZERO);
        let guard = lifecycle.token().guard();
        tokio::spawn(async move {
            sleep(Duration::from_secs(takes)).await;
            drop(guard);
        });
        // Without a drain, `run` does not wait for the guard.
        let ended = lifecycle.run(async { Ok::<_, Infallible>(()) });
        assert_eq!(within_an_hour(ended).await.unwrap().cut_calls, 0);
        let began = Instant::now();
        lifecycle.drain();
        let drained =
            within_an_hour(lifecycle.run(async { Ok::<_, Infallible>(()) })).await.unwrap();
        assert_eq!((drained.cut_calls, began.elapsed().as_secs()), (cut_calls, ends));
    }
}

/// A service that is ready while the value of the channel is `true`.
#[derive(Clone)]
struct Gated(tokio::sync::watch::Receiver<bool>);

impl Service<Req> for Gated {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        let open = std::pin::pin!(self.0.wait_for(|open| *open)).poll(cx);
        open.map(|_| Ok(()))
    }

    fn call(&mut self, _: Req) -> Self::Future {
        std::future::ready(Ok(Response::default()))
    }
}

#[tokio::test(start_paused = true)]
async fn caller_that_waits_for_the_service_is_rejected_at_stopping() {
    let lifecycle = lifecycle(&Health::new());
    let (_gate, gated) = tokio::sync::watch::channel(false);
    let mut service = lifecycle.layer().layer(Gated(gated));
    let waiting = tokio::spawn(service.clone().oneshot(call()));
    lifecycle.drain();
    settle().await;
    assert!(!waiting.is_finished());
    let began = Instant::now();
    assert_eq!(within_an_hour(waiting).await.unwrap().unwrap().status(), 503);
    assert_eq!(began.elapsed(), Duration::from_secs(5));
    // A later call does not wait either.
    assert_eq!(service.ready().await.unwrap().call(call()).await.unwrap().status(), 503);
    assert_eq!(lifecycle.in_flight(), 0);
}
