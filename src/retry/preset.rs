//! Presets that follow other implementations.

use std::time::Duration;

use super::{
    layer::RetryLayer,
    policy::{HINT_JITTER, Hint, MAX_TRANSPARENT},
};
use crate::attempt::{Backoff, RetryBudget};

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
    pub fn preset(self, preset: RetryPreset) -> Self {
        self.settings.set(|policy| {
            (policy.hint, policy.max_transparent) = match preset {
                RetryPreset::Grpc => (Hint::Exact, 1),
                RetryPreset::Aws => (Hint::Within(Duration::from_secs(5)), MAX_TRANSPARENT),
                RetryPreset::Envoy | RetryPreset::Finagle => {
                    (Hint::Above { jitter: HINT_JITTER }, MAX_TRANSPARENT)
                }
            };
        });
        match preset {
            RetryPreset::Aws => self.attempts(3).backoff(Backoff::aws()).budget(RetryBudget::aws()),
            RetryPreset::Envoy => {
                self.attempts(2).backoff(Backoff::envoy()).max_wait(Duration::from_secs(300))
            }
            RetryPreset::Grpc => {
                self.attempts(4).backoff(Backoff::grpc()).budget(RetryBudget::grpc(10, 0.1))
            }
            RetryPreset::Finagle => {
                self.attempts(3).backoff(Backoff::finagle()).budget(RetryBudget::finagle())
            }
        }
    }
}
