//! TODO page

mod attempt;
mod backoff;
mod budget;
mod core;
mod delays;
mod failure;
mod give_up;
mod hedged;
mod peeked_body;
mod protocol;
mod record;
mod replay;
mod token_bucket;
mod verdict;

pub(crate) use self::{
    attempt::{Head, Weighed, earns_deposit, is_good},
    core::{Core, lock},
    delays::{Series, Waits},
    failure::PerKind,
    protocol::{Answer, Numbered, Repeat, Rules, Weigh, classify_by_request, failed_status, keyed},
    verdict::{Class, Repeatable, Safe},
};
pub use self::{
    backoff::{Backoff, Delays},
    budget::RetryBudget,
    failure::FailureKind,
    give_up::Stop,
    hedged::{HedgeAttempt, Hedged},
    peeked_body::PeekedBody,
    protocol::{Replay, Reqwest},
    record::{Attempt, Attempts, RetryError, Tried},
    replay::ReplayBody,
    token_bucket::Withdrawal,
};
