//! The settings of other implementations: AWS, Envoy, gRPC, Finagle.

use std::{fmt, time::Duration};

use super::{
    handle::RetryHandle,
    layer::RetryLayer,
    policy::{HINT_JITTER, HintMode, MAX_TRANSPARENT},
};
use crate::{
    attempt::{Backoff, FailureKind, RETRY, RefillMode, RetryBudget},
    error::ConfigError,
};

/// Another implementation whose settings [`RetryLayer::preset`] follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RetryPreset {
    /// The AWS SDKs, retry behaviour 2.1.
    Aws,
    /// Envoy's defaults.
    Envoy,
    /// gRFC A6.
    Grpc,
    /// Finagle's defaults.
    Finagle,
}

impl RetryPreset {
    /// Returns the preset in `snake_case`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Aws => "aws",
            Self::Envoy => "envoy",
            Self::Grpc => "grpc",
            Self::Finagle => "finagle",
        }
    }
}

impl fmt::Display for RetryPreset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl<M> RetryLayer<M> {
    /// Sets delays, attempts and budget as in another implementation. The rules for requests that are safe to repeat
    /// stay the same.
    ///
    /// | preset | attempts | backoff | budget | a server's hint |
    /// |---|---|---|---|---|
    /// | `Aws` | 3 | [`Backoff::aws`] | [`RetryBudget::aws`] | lengthens the delay by at most 5 s |
    /// | `Envoy` | 2 | [`Backoff::envoy`] | unchanged: Envoy's counts the retries in flight | lower bound with up to 50 % jitter, [`max_wait`](Self::max_wait) 300 s |
    /// | `Grpc` | 4 | [`Backoff::grpc`] | [`RetryBudget::grpc(10, 0.1)`](RetryBudget::grpc) | is the delay |
    /// | `Finagle` | 3 | [`Backoff::finagle`] | [`RetryBudget::finagle`] | lower bound with up to 50 % jitter |
    ///
    /// gRPC has no defaults. The numbers of `Grpc`, including its budget, are those of the example in gRFC A6. `Grpc`
    /// makes at most one [transparent retry](super#connection-housekeeping) for each call, as gRFC A6 specifies.
    /// The other presets make at most five.
    ///
    /// [`RetryHandle::set_preset`] changes it while the layer runs, except the budget.
    pub fn preset(self, preset: RetryPreset) -> Self {
        let layer = self.set(|handle| handle.set_preset(preset));
        match preset {
            RetryPreset::Aws => layer.budget(RetryBudget::aws()),
            RetryPreset::Envoy => layer,
            RetryPreset::Grpc => layer.budget(RetryBudget::grpc(10, 0.1)),
            RetryPreset::Finagle => layer.budget(RetryBudget::finagle()),
        }
    }
}

impl RetryHandle {
    /// Sets delays and attempts as [`preset`](RetryLayer::preset) does. The budget stays.
    pub fn set_preset(&self, preset: RetryPreset) {
        let above = HintMode::Above { jitter: HINT_JITTER };
        let within = HintMode::Within(Duration::from_secs(5));
        let (attempts, backoff, hint, max_transparent) = match preset {
            RetryPreset::Aws => (3, Backoff::aws(), within, MAX_TRANSPARENT),
            RetryPreset::Envoy => (2, Backoff::envoy(), above, MAX_TRANSPARENT),
            RetryPreset::Grpc => (4, Backoff::grpc(), HintMode::Exact, 1),
            RetryPreset::Finagle => (3, Backoff::finagle(), above, MAX_TRANSPARENT),
        };
        self.0.set_unchecked(|policy| {
            (policy.attempts, policy.delays) = (attempts, backoff.into());
            (policy.hint, policy.max_transparent) = (hint, max_transparent);
            if preset == RetryPreset::Envoy {
                policy.max_wait = Some(Duration::from_secs(300));
            }
        });
    }
}

/// The backoffs of other implementations.
impl Backoff {
    /// Returns the backoff of the AWS SDKs, retry behaviour 2.1: 50 ms (1 s for throttled calls), doubled to a maximum
    /// of 20 s, full jitter.
    pub const fn aws() -> Self {
        let base = Duration::from_millis(50);
        Self::exponential(base).throttled(Duration::from_secs(1)).max(Duration::from_secs(20))
    }

    /// Returns Envoy's default backoff: 25 ms, doubled to a maximum of 250 ms, full jitter.
    ///
    /// Source: Envoy's `JitteredExponentialBackOffStrategy`. Envoy's documentation of the router filter states an older
    /// formula, `(2ⁿ - 1) × 25 ms`.
    pub const fn envoy() -> Self {
        Self::exponential(Duration::from_millis(25)).max(Duration::from_millis(250))
    }

    /// Returns the backoff of the example in gRFC A6: 100 ms, doubled to a maximum of 1 s, with a jitter of 20 % to
    /// either side. Unlike in gRFC A6, the maximum includes the jitter.
    pub const fn grpc() -> Self {
        let backoff = Self::exponential(Duration::from_millis(100)).max(Duration::from_secs(1));
        backoff.jitter_around(0.2)
    }

    /// Returns the backoff of Finagle's `RetryPolicy.tries`: decorrelated, from 5 ms to a maximum of 200 ms.
    pub const fn finagle() -> Self {
        Self::decorrelated(Duration::from_millis(5)).max(Duration::from_millis(200))
    }
}

/// The budgets of other implementations.
impl RetryBudget {
    /// Returns the budget of the AWS SDKs, retry behaviour 2.1: a bucket of 500 that starts full.
    ///
    /// A retry costs 14, or 5 after a throttled call. A good response deposits the cost of the call's last retry, or 1
    /// if there was none.
    #[must_use]
    pub fn aws() -> Self {
        let mut budget = Self::of(Self::bucket(1.0, 0, 500).filled(RefillMode::Responses));
        budget.costs = [14 * RETRY; 8];
        budget.cost(FailureKind::Throttled, 5.0)
    }

    /// Returns the budget of gRPC's retry throttling (gRFC A6): a bucket of `max_tokens` that starts full, at most
    /// 1000.
    ///
    /// Each retryable failure withdraws 1 token, whether it is retried or not. Each good response deposits
    /// `token_ratio`, in whole thousandths. Retries are made while more than half of the tokens are left.
    #[must_use]
    pub fn grpc(max_tokens: u32, token_ratio: f64) -> Self {
        // In binary, 0.57 is slightly less than 570 thousandths. The small addend prevents a result of 569.
        let ratio = (token_ratio * 1000.0 + 1e-6).floor() / 1000.0;
        let mut bucket = Self::bucket(ratio, 0, max_tokens);
        if max_tokens > 1000 {
            let fault = ConfigError::new("budget.cap", max_tokens, "use at most 1000 tokens");
            bucket.fault.get_or_insert(fault);
        }
        let floor = bucket.cap / 2;
        Self::of(bucket.filled(RefillMode::ResponsesLessFailures { floor }))
    }

    /// Returns Finagle's default budget: one retry for five first attempts, a trickle of 10 per second, and a cap of
    /// 100.
    #[must_use]
    pub fn finagle() -> Self {
        Self::with(0.2, 10, 100)
    }
}
