//! Tower layers that keep services standing.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![warn(missing_docs, missing_debug_implementations, unreachable_pub, rust_2018_idioms)]

mod admission;
pub mod call;
mod error;
mod event;

#[cfg(feature = "breaker")]
#[cfg_attr(docsrs, doc(cfg(feature = "breaker")))]
pub mod breaker;
#[cfg(feature = "limit")]
#[cfg_attr(docsrs, doc(cfg(feature = "limit")))]
pub mod limit;

#[cfg(feature = "breaker")]
pub use self::breaker::{CircuitBreaker, CircuitBreakerLayer, Trip};
#[cfg(feature = "retry")]
#[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
pub mod retry;

use self::event::event;
#[cfg(feature = "limit")]
pub use self::limit::{ConcurrencyLimit, ConcurrencyLimitLayer};
#[cfg(feature = "retry")]
pub use self::retry::{Attempts, Backoff, Retry, RetryBudget, RetryLayer};

pub use self::{
    call::{Outcome, Rejected},
    error::{BoxError, ConfigError},
};
