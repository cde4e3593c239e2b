//! The layers of the peers, set up as in their documentation, with settings as close as possible to those in `ours`.

use std::{
    convert::Infallible,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, Full};
use tower::{
    Layer, Service,
    retry::{
        Policy,
        budget::{Budget, TpsBudget},
    },
};

use crate::{
    calls::{Bare, BareHttp, Oops, Stuck, filled},
    ours::Numbers,
};

const HOUR: Duration = Duration::from_secs(3600);

// ===== tower =====

#[derive(Clone)]
struct Budgeted(Arc<TpsBudget>);

impl Policy<u64, u64, Oops> for Budgeted {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut u64, result: &mut Result<u64, Oops>) -> Option<Ready<()>> {
        match result {
            Ok(_) => {
                self.0.deposit();
                None
            }
            Err(_) => self.0.withdraw().then(|| ready(())),
        }
    }

    fn clone_request(&mut self, request: &u64) -> Option<u64> {
        Some(*request)
    }
}

pub fn tower_limit() -> impl Numbers {
    tower::limit::GlobalConcurrencyLimitLayer::new(100).layer(Bare)
}

pub fn tower_retry() -> impl Numbers {
    tower::retry::Retry::new(Budgeted(Arc::default()), Bare)
}

#[derive(Clone)]
pub struct BudgetedHttp(Arc<TpsBudget>);

type AnswerHttp = Result<Response<Full<Bytes>>, Infallible>;

impl Policy<Request<Empty<Bytes>>, Response<Full<Bytes>>, Infallible> for BudgetedHttp {
    type Future = Ready<()>;

    fn retry(
        &mut self,
        _: &mut Request<Empty<Bytes>>,
        result: &mut AnswerHttp,
    ) -> Option<Ready<()>> {
        match result {
            Ok(answer) if answer.status().is_server_error() => self.0.withdraw().then(|| ready(())),
            _ => {
                self.0.deposit();
                None
            }
        }
    }

    fn clone_request(&mut self, request: &Request<Empty<Bytes>>) -> Option<Request<Empty<Bytes>>> {
        Some(request.clone())
    }
}

pub fn tower_http_retry() -> tower::retry::Retry<BudgetedHttp, BareHttp> {
    tower::retry::Retry::new(BudgetedHttp(Arc::default()), BareHttp)
}

pub fn tower_timeout<S: Clone + Send>(inner: S) -> tower::timeout::Timeout<S> {
    tower::timeout::Timeout::new(inner, Duration::from_secs(30))
}

/// Three layers, because tower has no circuit breaker.
pub fn tower_stack() -> impl Numbers {
    let retried = tower::retry::Retry::new(Budgeted(Arc::default()), Bare);
    tower_timeout(tower::limit::GlobalConcurrencyLimitLayer::new(100).layer(retried))
}

pub fn tower_full() -> impl Numbers {
    let limited = filled(tower::limit::GlobalConcurrencyLimitLayer::new(1).layer(Stuck));
    tower::load_shed::LoadShed::new(limited)
}

// ===== tower-resilience =====

mod resilience {
    pub(super) use tower_resilience::{
        adaptive::{AdaptiveLimiterLayer, Aimd},
        bulkhead::BulkheadLayer,
        circuitbreaker::{CircuitBreakerLayer, SlidingWindowType},
        retry::{RetryBudgetBuilder, RetryLayer},
    };
}
use resilience as tr;

pub fn tr_breaker(window: usize) -> impl Numbers {
    let layer = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_size(window)
        .build()
        .unwrap();
    layer.layer(Bare)
}

pub fn tr_breaker_time() -> impl Numbers {
    let layer = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_type(tr::SlidingWindowType::TimeBased)
        .sliding_window_duration(Duration::from_secs(1))
        .build()
        .unwrap();
    layer.layer(Bare)
}

pub fn tr_open() -> impl Numbers {
    let layer = tr::CircuitBreakerLayer::builder().wait_duration_in_open(HOUR).build().unwrap();
    let service = layer.layer(Bare);
    let mut cx = Context::from_waker(Waker::noop());
    assert!(pin!(service.force_open()).poll(&mut cx).is_ready(), "no other user of the lock");
    service
}

/// A full bulkhead, whose rejections wait for the next tick of a timer.
pub fn tr_full() -> impl Numbers {
    let one = tr::BulkheadLayer::builder().max_concurrent_calls(1).reject_when_full();
    filled(one.build().unwrap().layer(Stuck))
}

pub fn tr_limit() -> impl Numbers {
    tr::BulkheadLayer::builder().max_concurrent_calls(100).build().unwrap().layer(Bare)
}

pub fn tr_retry() -> impl Numbers<Response = u64, Future: Send> {
    let budget = tr::RetryBudgetBuilder::new().token_bucket().build().unwrap();
    let layer = tr::RetryLayer::<u64, u64, Oops>::builder().max_attempts(3).budget(budget).build();
    layer.layer(Bare)
}

pub fn tr_adaptive() -> impl Numbers {
    tr::AdaptiveLimiterLayer::new(tr::Aimd::builder().build().unwrap()).layer(Bare)
}

pub fn tr_stack() -> impl Numbers {
    // The errors of its layers are not `Clone`, which its retry requires. So the retry is innermost.
    let retried = tr_retry();
    let limited = tr::BulkheadLayer::builder()
        .max_concurrent_calls(100)
        .build()
        .unwrap()
        .layer(Erase(retried));
    let breaker = tr::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_size(100)
        .build()
        .unwrap();
    tr::AdaptiveLimiterLayer::new(tr::Aimd::builder().build().unwrap())
        .layer(breaker.layer(Erase(limited)))
}

/// Replaces the error type of a service by [`Oops`], which meets the bounds of every layer.
#[derive(Clone)]
struct Erase<S>(S);

impl<S: Service<u64>> Service<u64> for Erase<S> {
    type Response = S::Response;
    type Error = Oops;
    type Future = futures_map::MapOops<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        self.0.poll_ready(cx).map_err(|_| Oops)
    }

    fn call(&mut self, request: u64) -> Self::Future {
        futures_map::MapOops { future: self.0.call(request) }
    }
}

mod futures_map {
    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll},
    };

    pin_project_lite::pin_project! {
        pub struct MapOops<F> {
            #[pin]
            pub(super) future: F,
        }
    }

    impl<T, E, F: Future<Output = Result<T, E>>> Future for MapOops<F> {
        type Output = Result<T, super::Oops>;

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
            self.project().future.poll(cx).map_err(|_| super::Oops)
        }
    }
}

// ===== Others =====

pub fn shedder() -> impl Numbers {
    little_loadshedder::LoadShed::new(Bare, 0.01, Duration::from_secs(1))
}

/// A rate limit of one call per nanosecond, which never rejects.
pub fn governor() -> impl FnMut(u64) + Send {
    let quota = governor::Quota::with_period(Duration::from_nanos(1)).expect("above zero");
    let limiter = governor::RateLimiter::direct(quota.allow_burst(std::num::NonZeroU32::MAX));
    move |calls| {
        for _ in 0..calls {
            black_box(limiter.check().is_ok());
        }
    }
}

/// Calls a breaker that wraps a closure.
fn called<B>(breaker: B, call: impl Fn(&B, u64) -> bool + Send) -> impl FnMut(u64) + Send
where
    B: Send,
{
    move |calls| {
        for request in 0..calls {
            black_box(call(&breaker, black_box(request)));
        }
    }
}

pub fn failsafe() -> impl FnMut(u64) + Send {
    use failsafe::CircuitBreaker;
    let breaker = failsafe::Config::new().build();
    called(breaker, |breaker, request| breaker.call(|| Ok::<_, Oops>(request)).is_ok())
}

pub fn failsafe_open() -> impl FnMut(u64) + Send {
    use failsafe::{CircuitBreaker, backoff::constant, failure_policy::consecutive_failures};
    let five = consecutive_failures(5, constant(HOUR));
    let breaker = failsafe::Config::new().failure_policy(five).build();
    while breaker.is_call_permitted() {
        let _ = breaker.call(|| Err::<u64, _>(Oops));
    }
    called(breaker, |breaker, request| breaker.call(|| Ok::<_, Oops>(request)).is_ok())
}

pub fn recloser() -> impl FnMut(u64) + Send {
    let breaker = recloser::Recloser::default();
    called(breaker, |breaker, request| breaker.call(|| Ok::<_, Oops>(request)).is_ok())
}

pub fn recloser_open() -> impl FnMut(u64) + Send {
    let breaker = recloser::Recloser::custom().closed_len(10).open_wait(HOUR).build();
    while breaker.call(|| Err::<u64, _>(Oops)).is_err_and(|error| !is_refusal(&error)) {}
    called(breaker, |breaker, request| breaker.call(|| Ok::<_, Oops>(request)).is_ok())
}

fn is_refusal(error: &recloser::Error<Oops>) -> bool {
    matches!(error, recloser::Error::Rejected)
}
