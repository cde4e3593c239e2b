//! The layers of this crate around an upstream.

use std::time::Duration;

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, HedgeLayer, RetryBudget, RetryLayer, Trip,
    limit::adaptive::Knee,
};
use tower::{Layer, ServiceBuilder};

use crate::world::{Call, Upstream, called, ms, secs};

// ===== Retries: three attempts =====

/// A retry budget of 10 % of the calls, without a reserve.
pub fn ours_retry() -> RetryLayer {
    RetryLayer::http().budget(RetryBudget::with(0.1, 0, 100))
}

pub fn retry(upstream: Upstream) -> Call {
    called(ours_retry().layer(upstream))
}

/// The default: a retry budget of 20 % of the calls, and one retry per second.
pub fn retry_default(upstream: Upstream) -> Call {
    called(RetryLayer::http().layer(upstream))
}

/// Spreads clients over five times the hint.
pub fn retry_wide(upstream: Upstream) -> Call {
    called(RetryLayer::http().hint_jitter(5.0).layer(upstream))
}

// ===== Breakers: five failures in a row, open for two seconds, one probe =====

pub const WAIT: Duration = secs(2);

pub fn ours_breaker() -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::consecutive(5)).open_for(WAIT)
}

pub fn breaker(upstream: Upstream) -> Call {
    called(ours_breaker().layer(upstream))
}

/// Opens also if half of the calls take at least 500 ms.
pub fn slow_breaker(upstream: Upstream) -> Call {
    let slow = Trip::slow_ratio(0.5, ms(500)).over(10).min_calls(5);
    let layer = CircuitBreakerLayer::new(Trip::any([Trip::consecutive(5), slow])).open_for(WAIT);
    called(layer.layer(upstream))
}

/// The number of calls in the window of a breaker that opens when half of them failed.
pub const RING: u32 = 20;

pub fn ratio_breaker(upstream: Upstream) -> Call {
    let trip = Trip::failure_ratio(0.5).over(RING).min_calls(RING);
    called(CircuitBreakerLayer::new(trip).open_for(WAIT).layer(upstream))
}

// ===== A whole client =====

pub const IN_FLIGHT: usize = 100;

pub fn client(upstream: Upstream) -> Call {
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(ours_breaker())
        .layer(ConcurrencyLimitLayer::new(IN_FLIGHT));
    called(stack.service(upstream))
}

// ===== Adaptive limit =====

pub fn adaptive(upstream: Upstream) -> Call {
    let knee = Knee::new(20, 1..=1000).expect("valid settings");
    called(ConcurrencyLimitLayer::adaptive(knee).layer(upstream))
}

// ===== Hedges =====

pub fn hedge(upstream: Upstream) -> Call {
    called(HedgeLayer::http(ms(10)).layer(upstream))
}

pub fn hedge_percentile(upstream: Upstream) -> Call {
    called(HedgeLayer::after_percentile(0.95).layer(upstream))
}
