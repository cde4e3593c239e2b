//! A concurrency limit that really limits.

mod core;
mod handle;
mod layer;
mod queue;
mod wait;

pub use self::{
    handle::{ConcurrencyLimitHandle, ConcurrencyLimitSnapshot},
    layer::{ConcurrencyLimit, ConcurrencyLimitLayer},
};
pub use crate::admission::ResponseFuture;
