//! The parts that the two attempt layers, retry and hedge, have in common. Both save the request of a call, make
//! attempts with it, and classify their responses. The retry makes one attempt after the other, the hedge makes them at
//! the same time.
//!
//! # The life of an attempt
//!
//! ```text
//! save ──▶ first_attempt ──▶ AttemptFuture ──▶ classify ──▶ returned to the caller
//!   │                          ▲     │             │
//!   │                          │     └ timeout     └──▶ discarded
//!   └──▶ replay or hedge_attempt                          │
//!                  ▲                                      │
//!                  └── delay, budget, readiness ◀─────────┘
//! ```
//!
//! 1. The protocol of the layer [saves](ReplayRequest::save) the request: the head as it is, and the body while the
//!    first attempt sends it ([`ReplayBody`]).
//! 2. An [`AttemptFuture`] polls the wrapped service for the response head. The response is then
//!    [classified](ClassifyAttempt::classify) by its head. For gRPC the first frame of the body may decide; the body
//!    then is a [`PeekedBody`]. The class is a [`RetryAction`] and an [`Outcome`](crate::outcome::Outcome).
//! 3. A response that ends the call is returned. Any other is a *pending* response until the layer has decided: it is
//!    then returned with the record of the attempts ([`Attempts`], [`Hedged`]), or discarded.
//! 4. A further attempt makes a [withdrawal](RetryBudget::withdraw) from the budget, and is made with a clone of the
//!    wrapped service ([`Core`]). It replays the saved request. Its body cuts off the body of the attempt before.
//!
//! This module makes no decision of a layer. `retry` and `hedge` import from it, and it imports from neither.
//!
//! # Files
//!
//! | file | contents |
//! |---|---|
//! | `attempt` | the future of an attempt, until its response is classified |
//! | `call` | the saved request of a call, with its protocol |
//! | `core` | the state of one service of a layer and its clones |
//! | `protocol/` | the traits of a protocol, and the protocols: HTTP and gRPC, reqwest, any type |
//! | `replay/` | request bodies that are saved while they are sent, and replayed |
//! | `peeked_body` | response bodies whose first frame was read in advance |
//! | `verdict`, `failure`, `give_up` | the class of a result, the kind of a failure, the reason to give up |
//! | `record`, `hedged` | the records in requests, responses and errors |
//! | `span` | the span of an attempt |
//! | `headers` | the layer that writes headers to each attempt |
//! | `backoff` | the delays of a call |
//! | `budget`, `token_bucket` | the retry budget, and its balance |

mod attempt;
mod backoff;
mod budget;
mod call;
mod core;
mod failure;
mod give_up;
mod headers;
mod hedged;
mod peeked_body;
mod protocol;
mod record;
mod replay;
mod span;
mod token_bucket;
mod verdict;

#[cfg(feature = "reqwest")]
pub use self::protocol::{PendingReqwest, Reqwest};
pub(crate) use self::{
    attempt::{AttemptFuture, PolledHead, earns_deposit, is_good},
    backoff::{CallDelays, DelaySource},
    core::Core,
    failure::PerKind,
    protocol::{classify_by_request, failed_status, keyed},
    span::{AttemptSpan, FurtherAttempt},
    token_bucket::{RETRY, RefillMode},
};
pub use self::{
    backoff::{Backoff, Delays},
    budget::RetryBudget,
    call::SavedCall,
    failure::FailureKind,
    give_up::GiveUpReason,
    headers::{AttemptHeaders, AttemptHeadersLayer},
    hedged::{HedgeAttempt, Hedged},
    peeked_body::PeekedBody,
    protocol::{
        AttemptNumber, AttemptResponse, ClassifyAttempt, PendingResponse, PendingResult, Replay,
        ReplayRequest, SaveRules, SavedRequest,
    },
    record::{Attempt, AttemptRecord, Attempts, RetryError},
    replay::ReplayBody,
    token_bucket::Withdrawal,
    verdict::{BodyReplay, Classified, RetryAction, SafeRequests},
};
