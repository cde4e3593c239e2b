//! The layers of the peers around an upstream, set up as in their documentation, with settings as close as possible to
//! those in `ours`.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
};

use http::{Request, Response, StatusCode};
use tokio::time::{Sleep, sleep};
use tower::{
    Layer, Service,
    hedge::Hedge,
    retry::budget::{Budget, TpsBudget},
    util::MapResponse,
};

use crate::{
    ours::{IN_FLIGHT, RING, WAIT},
    world::{Body, Call, Rejection, Upstream, called, ms, secs, status},
};

pub fn none(upstream: Upstream) -> Call {
    upstream.0
}

type Answer<E> = Result<Response<Body>, E>;

fn failed<E>(answer: &Answer<E>) -> bool {
    answer.as_ref().map_or(true, |response| response.status().is_server_error())
}

// ===== Retries: three attempts =====

/// The policy from the documentation of tower's retry: a success makes a deposit, a retry makes a withdrawal.
#[derive(Clone)]
pub struct Policy {
    left: u32,
    budget: Option<Arc<TpsBudget>>,
}

impl Policy {
    pub fn with_budget() -> Self {
        Self { left: 2, budget: Some(Arc::default()) }
    }

    pub fn without() -> Self {
        Self { left: 2, budget: None }
    }
}

impl<E> tower::retry::Policy<Request<Body>, Response<Body>, E> for Policy {
    type Future = Sleep;

    fn retry(&mut self, _: &mut Request<Body>, answer: &mut Answer<E>) -> Option<Sleep> {
        if !failed(answer) {
            if let Some(budget) = &self.budget {
                budget.deposit();
            }
            return None;
        }
        let granted = || self.budget.as_ref().is_none_or(|budget| budget.withdraw());
        if self.left == 0 || !granted() {
            return None;
        }
        self.left -= 1;
        // Full jitter, as in this crate.
        let backoff = ms(100) * 2u32.pow(1 - self.left.min(1));
        Some(sleep(backoff.mul_f64(fastrand::f64())))
    }

    fn clone_request(&mut self, _: &Request<Body>) -> Option<Request<Body>> {
        Some(Request::new(Body::new()))
    }
}

pub fn tower_retry(upstream: Upstream) -> Call {
    called(tower::retry::Retry::new(Policy::with_budget(), upstream))
}

/// A retry without a budget.
pub fn naive_retry(upstream: Upstream) -> Call {
    called(tower::retry::Retry::new(Policy::without(), upstream))
}

mod resilience {
    pub use tower_resilience::{
        adaptive::{AdaptiveLimiterLayer, Aimd},
        bulkhead::BulkheadLayer,
        circuitbreaker::CircuitBreakerLayer,
        hedge::HedgeLayer,
        retry::{RetryBudgetBuilder, RetryLayer},
    };
}
use resilience as tr;

fn tr_retry_layer<E: Send + 'static>() -> tr::RetryLayer<Request<Body>, Response<Body>, E> {
    let budget = tr::RetryBudgetBuilder::new().token_bucket().build().expect("valid defaults");
    tr::RetryLayer::builder()
        .max_attempts(3)
        .exponential_backoff(ms(100))
        .retry_on_response(|response: &Response<Body>| response.status().is_server_error())
        .budget(budget)
        .build()
}

pub fn tr_retry(upstream: Upstream) -> Call {
    called(tr_retry_layer().layer(upstream))
}

// ===== Breakers: five failures in a row, open for two seconds, one probe =====

macro_rules! tr_breaker {
    ($($set:ident($($to:expr),*)),* $(,)?) => {
        tr::CircuitBreakerLayer::builder()
            $(.$set($($to),*))*
            .wait_duration_in_open(WAIT)
            .failure_classifier(failed)
            .build()
            .expect("valid settings")
    };
}

pub fn tr_breaker(upstream: Upstream) -> Call {
    called(tr_breaker!(consecutive_failures(5)).layer(upstream))
}

/// A breaker for slow calls over a sliding window. tower-resilience has no other.
pub fn tr_slow_breaker(upstream: Upstream) -> Call {
    let layer = tr_breaker!(
        sliding_window_size(10),
        minimum_number_of_calls(5),
        slow_call_duration_threshold(ms(500)),
        slow_call_rate_threshold(0.5),
    );
    called(layer.layer(upstream))
}

pub fn tr_ratio_breaker(upstream: Upstream) -> Call {
    let layer = tr_breaker!(sliding_window_size(RING as usize), failure_rate_threshold(0.5));
    called(layer.layer(upstream))
}

/// Turns a server error into an error, for breakers that do not classify HTTP responses.
async fn judged(upstream: Upstream) -> Result<Response<Body>, StatusCode> {
    let response = (upstream.0)().await.map_err(|Rejection| StatusCode::SERVICE_UNAVAILABLE)?;
    if response.status().is_server_error() { Err(response.status()) } else { Ok(response) }
}

/// Turns the result of such a breaker into a response. `None` is a rejection by the breaker.
fn told(answer: Result<Response<Body>, Option<StatusCode>>) -> Result<Response<Body>, Rejection> {
    answer.or_else(|code| code.map(status).ok_or(Rejection))
}

fn failsafe<P>(upstream: Upstream, policy: P) -> Call
where
    P: failsafe::FailurePolicy + Send + Sync + 'static,
{
    use failsafe::{Error, futures::CircuitBreaker};
    let breaker = failsafe::Config::new().failure_policy(policy).build();
    Arc::new(move || {
        let answer = breaker.call(judged(upstream.clone()));
        Box::pin(async move {
            told(answer.await.map_err(|error| match error {
                Error::Inner(code) => Some(code),
                Error::Rejected => None,
            }))
        })
    })
}

pub fn failsafe_breaker(upstream: Upstream) -> Call {
    use failsafe::{backoff::constant, failure_policy::consecutive_failures};
    failsafe(upstream, consecutive_failures(5, constant(WAIT)))
}

/// failsafe has failure rates only over a time window, as a decaying average. The breaker stays closed until this time
/// has passed.
pub fn failsafe_ratio_breaker(upstream: Upstream) -> Call {
    use failsafe::{backoff::constant, failure_policy::success_rate_over_time_window};
    failsafe(upstream, success_rate_over_time_window(0.5, RING, secs(5), constant(WAIT)))
}

fn recloser(upstream: Upstream, ring: usize) -> Call {
    use recloser::{AsyncRecloser, Error, Recloser};
    let custom = Recloser::custom().error_rate(0.5).closed_len(ring).half_open_len(1);
    let breaker = AsyncRecloser::from(custom.open_wait(WAIT).build());
    Arc::new(move || {
        let answer = breaker.call(judged(upstream.clone()));
        Box::pin(async move {
            told(answer.await.map_err(|error| match error {
                Error::Inner(code) => Some(code),
                Error::Rejected => None,
            }))
        })
    })
}

/// recloser has only failure rates over a ring of calls: half of ten.
pub fn recloser_breaker(upstream: Upstream) -> Call {
    recloser(upstream, 10)
}

pub fn recloser_ratio_breaker(upstream: Upstream) -> Call {
    recloser(upstream, RING as usize)
}

// ===== Whole clients: the retry, breaker and limit of each crate =====

pub fn tower_client(upstream: Upstream) -> Call {
    let limited = tower::limit::GlobalConcurrencyLimitLayer::new(IN_FLIGHT).layer(upstream);
    let shed = tower::load_shed::LoadShed::new(limited);
    called(tower::retry::Retry::new(Policy::with_budget(), shed))
}

pub fn tr_client(upstream: Upstream) -> Call {
    let limited = tr::BulkheadLayer::builder().max_concurrent_calls(IN_FLIGHT).reject_when_full();
    let limited = limited.build().expect("valid settings").layer(upstream);
    let breaker = tr_breaker!(consecutive_failures(5));
    called(tr_retry_layer().layer(breaker.layer(limited)))
}

// ===== Adaptive limits =====

/// An initial limit of 10 and a maximum of 100, the defaults. The latency threshold must be configured.
pub fn tr_adaptive(upstream: Upstream) -> Call {
    let aimd = tr::Aimd::builder().latency_threshold(ms(100)).build().expect("valid settings");
    called(tower::load_shed::LoadShed::new(tr::AdaptiveLimiterLayer::new(aimd).layer(upstream)))
}

/// The target latency must be configured.
pub fn shedder(upstream: Upstream) -> Call {
    use little_loadshedder::{LoadShed, LoadShedResponse};
    let shed = LoadShed::new(upstream, 0.01, ms(100));
    called(MapResponse::new(shed, |answer| match answer {
        LoadShedResponse::Inner(response) => response,
        LoadShedResponse::Overload => status(StatusCode::SERVICE_UNAVAILABLE),
    }))
}

// ===== Hedges =====

#[derive(Clone, Copy)]
struct Always;

impl tower::hedge::Policy<Request<Body>> for Always {
    fn clone_request(&self, _: &Request<Body>) -> Option<Request<Body>> {
        Some(Request::new(Body::new()))
    }

    fn can_retry(&self, _: &Request<Body>) -> bool {
        true
    }
}

/// Hedges after the 98th percentile, which is 10 ms here. `Hedge` is not `Clone`, so the calls share it behind a lock.
pub fn tower_hedge(upstream: Upstream) -> Call {
    let service = Arc::new(Mutex::new(Hedge::new(upstream, Always, 100, 0.98, secs(10))));
    Arc::new(move || {
        let service = service.clone();
        Box::pin(async move {
            std::future::poll_fn(|cx| service.lock().expect("not poisoned").poll_ready(cx))
                .await
                .map_err(|_| Rejection)?;
            let answer = service.lock().expect("not poisoned").call(Request::new(Body::new()));
            let answer: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(answer);
            answer.await.map_err(|_| Rejection)
        })
    })
}

pub fn tr_hedge(upstream: Upstream) -> Call {
    called(tr::HedgeLayer::new(ms(10)).layer(upstream))
}
