//! A retry that is safe, bounded and explained.

mod attempts;
mod backoff;
mod budget;
mod core;
mod exchange;
mod layer;
mod peek;
mod policy;
mod replay;
mod service;

pub use self::{
    attempts::{Attempt, Attempts, RetryError},
    backoff::Backoff,
    budget::{RetryBudget, Withdrawal},
    layer::{RetryHandle, RetryLayer, RetrySnapshot},
    peek::PeekedBody,
    policy::Stop,
    replay::ReplayBody,
    service::{ResponseFuture, Retry},
};
