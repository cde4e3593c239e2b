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

#[cfg(feature = "reqwest")]
pub use self::protocol::Reqwest;
pub(crate) use self::{
    attempt::{AttemptFuture, Head, earns_deposit, is_good},
    core::{Core, lock},
    delays::{CallDelays, DelaySource},
    failure::PerKind,
    protocol::{
        AttemptResponse, ClassifyAttempt, Numbered, ReplayRequest, Rules, classify_by_request,
        failed_status, keyed,
    },
    verdict::{BodyReplay, RetryAction, SafeRequests},
};
pub use self::{
    backoff::{Backoff, Delays},
    budget::RetryBudget,
    failure::FailureKind,
    give_up::GiveUpReason,
    hedged::{HedgeAttempt, Hedged},
    peeked_body::PeekedBody,
    protocol::Replay,
    record::{Attempt, AttemptRecord, Attempts, RetryError},
    replay::ReplayBody,
    token_bucket::Withdrawal,
};
