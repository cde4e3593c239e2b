//! Layers that are dropped while their calls are in flight, on several threads: the next owner of a slot starts clean.

use std::{sync::mpsc, thread, time::Duration};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, TimeoutLayer, Trip, breaker::CircuitState,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::{runtime::Builder, sync::oneshot};
use tower::{Layer, Service, service_fn};

type Body = Empty<Bytes>;

fn run(rounds: usize, round: impl Fn(&mpsc::Sender<Job>) + Send + Sync + 'static) {
    let round = std::sync::Arc::new(round);
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let round = round.clone();
            thread::spawn(move || {
                let runtime = Builder::new_current_thread().enable_all().build().unwrap();
                let _guard = runtime.enter();
                let (jobs, ends) = mpsc::channel::<Job>();
                let ender = thread::spawn(move || {
                    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
                    runtime.block_on(async {
                        while let Ok(job) = ends.recv() {
                            job.await;
                        }
                    });
                });
                for _ in 0..rounds {
                    round(&jobs);
                }
                drop(jobs);
                ender.join().unwrap();
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

type Job = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

#[test]
fn breaker_of_a_reused_slot_counts_no_call_of_the_former_one() {
    run(5000, |jobs| {
        let layer = CircuitBreakerLayer::new(Trip::consecutive(1));
        let handle = layer.handle();
        let (tell, told) = oneshot::channel::<()>();
        let told = std::sync::Arc::new(std::sync::Mutex::new(Some(told)));
        let mut service = layer.layer(service_fn(move |_: Request<()>| {
            let told = told.lock().unwrap().take().unwrap();
            async move {
                let _ = told.await;
                Err::<Response<Body>, BoxError>("down".into())
            }
        }));
        assert_eq!(handle.snapshot().seen.consecutive_failures, 0);
        assert_eq!(handle.state(), CircuitState::Closed, "a call of another circuit");
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(Service::<Request<()>>::poll_ready(&mut service, &mut cx).is_ready());
        let call = service.call(Request::new(()));
        drop((service, layer));
        let _ = tell.send(());
        jobs.send(Box::pin(async move {
            let _ = call.await;
        }))
        .unwrap();
        assert_ne!(handle.state(), CircuitState::HalfOpen);
        drop(handle);
    });
}

#[test]
fn limit_of_a_reused_slot_has_no_call_of_the_former_one() {
    run(5000, |jobs| {
        let layer = ConcurrencyLimitLayer::new(1).queue(4, Duration::from_secs(1));
        let handle = layer.handle();
        assert_eq!(handle.in_flight(), 0);
        let mut service = layer.layer(service_fn(|_: Request<()>| async {
            Ok::<_, BoxError>(Response::new(Body::new()))
        }));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(Service::<Request<()>>::poll_ready(&mut service, &mut cx).is_ready());
        let call = service.call(Request::new(()));
        assert_eq!(handle.in_flight(), 1);
        let waiting = service.call(Request::new(()));
        let permit = handle.try_acquire();
        assert!(permit.is_err());
        jobs.send(Box::pin(async move { drop(call) })).unwrap();
        jobs.send(Box::pin(async move { drop(waiting) })).unwrap();
        drop((service, layer, handle));
    });
}

#[test]
fn timeout_of_a_reused_slot_counts_no_call_of_the_former_one() {
    run(2000, |jobs| {
        let layer = TimeoutLayer::http().head(Duration::from_millis(1)).per_response();
        let handle = layer.handle();
        assert_eq!(handle.snapshot().timed_out(), 0);
        let mut service = layer
            .layer(service_fn(|()| async { std::future::pending::<Result<(), BoxError>>().await }));
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(Service::<()>::poll_ready(&mut service, &mut cx).is_ready());
        let call = service.call(());
        jobs.send(Box::pin(async move {
            let _ = call.await;
        }))
        .unwrap();
        drop((service, layer));
        assert!(handle.snapshot().timed_out() <= 1);
    });
}
