//! The layers of this crate, set up as in their documentation and warmed up.

use std::time::Duration;

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, HealthProbeLayer, Outcome, RetryLayer,
    TimeoutLayer, Trip,
    classify::{PerResponse, Protocol},
    limit::adaptive::Knee,
};
use tower::{Layer, Service};

use crate::calls::{Bare, Oops, Stuck, drive, filled};

/// A service of plain numbers.
pub trait Numbers: Service<u64> + Clone + Send + 'static {}

impl<S: Service<u64> + Clone + Send + 'static> Numbers for S {}

fn judged<M>(
    layer: CircuitBreakerLayer<M>,
) -> CircuitBreakerLayer<impl Protocol<u64, u64, Oops, Response = u64>> {
    layer.classify(|result: Result<&u64, &Oops>| match result {
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::failure(),
    })
}

pub fn breaker(trip: Trip) -> impl Numbers {
    let service = judged(CircuitBreakerLayer::new(trip)).layer(Bare);
    drive(service.clone())(1000);
    service
}

/// A breaker with a failure ratio of 50 % over a full window, as in a service that has run for a while.
pub fn count_breaker(calls: u32) -> impl Numbers {
    let service = breaker(count_rule(calls));
    drive(service.clone())(u64::from(calls));
    service
}

fn count_rule(calls: u32) -> Trip {
    Trip::failure_ratio(0.5).over(calls).min_calls(20.min(calls))
}

pub fn limit() -> impl Numbers {
    ConcurrencyLimitLayer::new(100).per_response().layer(Bare)
}

pub fn adaptive() -> impl Numbers {
    ConcurrencyLimitLayer::adaptive(Knee::default()).per_response().layer(Bare)
}

pub fn retry() -> impl Numbers {
    let service = RetryLayer::http()
        .classify(|result: Result<&u64, &Oops>| match result {
            Ok(_) => Outcome::success(),
            Err(_) => Outcome::failure(),
        })
        .layer(Bare);
    // The retry budget is full, as in a service that has run for a minute.
    drive(service.clone())(10_000);
    service
}

fn probe() -> HealthProbeLayer<buttress::health::CallProbe<impl Fn() -> u64 + Clone>, PerResponse> {
    HealthProbeLayer::new(|| 0)
}

pub fn stack<S>(inner: S) -> impl Numbers
where
    S: Service<u64, Response = u64, Error: Into<BoxError> + Send, Future: Send> + Numbers + Sync,
{
    let fails = |result: Result<&u64, &BoxError>| match result {
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::failure(),
    };
    let service = RetryLayer::new().classify(fails).layer(
        CircuitBreakerLayer::new(count_rule(100))
            .classify(fails)
            .layer(ConcurrencyLimitLayer::new(100).per_response().layer(probe().layer(inner))),
    );
    drive(service.clone())(10_000);
    service
}

pub fn timeout<S>(inner: S) -> impl Numbers
where
    S: Service<u64, Response = u64, Error = Oops> + Numbers,
{
    TimeoutLayer::http().per_response().layer(inner)
}

// ===== Rejections =====

pub fn open() -> impl Numbers {
    let layer = judged(CircuitBreakerLayer::http().open_for(Duration::from_secs(3600)));
    let handle = layer.handle();
    (0..5).for_each(|_| handle.record(Outcome::failure()));
    layer.layer(Bare)
}

pub fn full() -> impl Numbers {
    filled(ConcurrencyLimitLayer::new(1).per_response().layer(Stuck))
}
