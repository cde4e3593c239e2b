//! A hedge: a second copy of a call that takes long, against the slow one in a hundred.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use std::time::Duration;
//! use buttress::HedgeLayer;
//! use tower::ServiceBuilder;
//!
//! // 95 of 100 calls are answered within 80 ms: the others get a second chance then.
//! let hedge = HedgeLayer::http(Duration::from_millis(80));
//! let client = ServiceBuilder::new().layer(hedge).service(client());
//! ```
//!
//! On one budget with the retries over it, which both pay in for a call:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{HedgeLayer, RetryBudget, RetryLayer};
//!
//! let budget = RetryBudget::ratio(0.05);
//! let retry = RetryLayer::http().budget(budget.clone()).checked()?;
//! let hedge = HedgeLayer::http(Duration::from_millis(80)).budget(budget).checked()?;
//! # let _ = (retry, hedge); Ok(()) }
//! ```
//!
//! With the feature `percentile`, [`HedgeLayer::after_percentile`] takes the delay from what calls take of late.
//!
//! # How it decides
//!
//! Without an answer after the delay, a second copy is sent if the request is safe to repeat (its method,
//! RFC 9110 §9.2.2, an `Idempotency-Key`, or the user's word), its body can be sent again by then, its
//! [`Deadline`](crate::Deadline) has not passed, and the budget has a hedge left. A call has one
//! hedge attempt, or as many as [`max_hedges`](HedgeLayer::max_hedges) allows, each a delay after the one before.
//!
//! An answer is *good* if it is neither a failure nor throttled, nor one that a retry would try again: a
//! 200 or a 404, not an error, a 429 or a 500. A gRPC call is classified by its gRPC status, in the head, in the
//! trailers or mapped from the HTTP status; a stream that begins slowly is good. [`Http`](crate::call::Http) has the
//! table, which all layers share.
//!
//! | an answer comes | and it is good | and it is bad |
//! |---|---|---|
//! | before a hedge is sent | given out | given out: hedging is not retrying |
//! | from any, others under way | given out, the others dropped | dropped: the others decide |
//! | from the last one under way | given out | given out |
//!
//! So the last bad answer is the one given out, and an earlier one is dropped at once with the permit and
//! the connection it holds: the other copy may be waiting for just these. No hedge is sent any more after
//! any answer, hence none after one that says not to: a 429, a refusal of a layer further in, a negative
//! pushback. gRPC's hedging policy sends the next attempt at once after a failure. Here a retry layer does so.
//!
//! # In the stack
//!
//! Inside of a retry, over the circuit breaker and the limit: each copy is counted and limited. Best over
//! a balancer: two copies to one slow server help little. The wrapped service gets
//! `http::Request<ReplayBody<B>>`, as under a retry. A hedge carries [`HedgeCopy`] in its extensions, and
//! [`Attempt`](super::Attempt) as the first copy does, and over gRPC `grpc-previous-rpc-attempts` with one more
//! for each hedge attempt (gRFC A6). The response carries [`Hedged`] if a hedge attempt was sent. A hedge attempt that an
//! inner limit rejects ends the hedging of this call, and the attempts in flight decide.
//!
//! # Bodies
//!
//! A request body is saved while it is sent, up to 64 KiB. A request whose body the previous attempt still reads when the
//! delay is over is not hedged, and neither is one with a larger body. A request without a body can always be hedged.
//! The response is chosen by its head (gRPC: by its first frame); its body is not raced.
//!
//! # Readiness
//!
//! `poll_ready` is the wrapped service's. A hedge is made with a clone of its own, which is readied first:
//! while that one is pending the first copy goes on, and one that fails costs the hedge only. What was
//! withdrawn for a hedge that is never sent is paid back.
//!
//! # Cancellation
//!
//! Dropping the call drops all attempts. A panic in any of them is a panic of the call.
//!
//! # Cost
//!
//! Without a hedge: a copy of the request's head, two small allocations for a request with a body, and a
//! timer for a call that is not answered at once. A request that cannot be hedged pays none of these. A hedge attempt is
//! boxed: two allocations.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | delay | none, or [a percentile](HedgeLayer::after_percentile): near the 95th percentile of the latency is where to begin |
//! | [`max_hedges`](HedgeLayer::max_hedges) | 1 |
//! | [`budget`](HedgeLayer::budget) | 5 %, and 1 per second |
//! | [`replay_up_to`](HedgeLayer::replay_up_to) | 64 KiB |
//!
//! 5 % is what a hedge after the 95th percentile adds (Dean and Barroso, "The Tail at Scale", CACM 2013,
//! which measured 2 %): what would cost more is set too early, or everything is slow, and then more load is
//! no help. That hedges draw on a budget at all is gRPC's rule too (gRFC A6).
//!
//! # Unlike `tower::hedge`
//!
//! There the first answer wins, even when it is an error; there is no layer and no `Clone`, nothing bounds
//! the hedges, and what is safe to repeat is left to the user.

mod layer;
#[cfg(feature = "percentile")]
mod live;
mod service;

use std::{error::Error, fmt};

pub use self::{
    layer::{HedgeHandle, HedgeLayer, HedgeSnapshot},
    service::{Hedge, HedgeFuture},
};
use crate::{BoxError, error, redact::Redacted};

/// Marks the request of a hedge attempt, in its extensions. The number of the attempt: 1 is the first hedge attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HedgeCopy(pub u32);

/// Marks the result of a call whose deciding attempt was not sent, although an attempt that was dropped before it may have
/// been: in the extensions of a response, and around an error.
#[derive(Clone)]
pub(super) struct SentBefore<T = ()>(pub(super) T);

impl SentBefore {
    /// Returns whether the error or one of its sources is marked.
    pub(super) fn is_in(error: &(dyn Error + 'static)) -> bool {
        let mut next = Some(error);
        for _ in 0..16 {
            let Some(error) = next else { break };
            if error.is::<SentBefore<BoxError>>() {
                return true;
            }
            next = error::next(error);
        }
        false
    }
}

impl fmt::Debug for SentBefore<BoxError> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SentBefore").field(&Redacted(&self.0)).finish()
    }
}

impl fmt::Display for SentBefore<BoxError> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another attempt may have been sent")
    }
}

impl Error for SentBefore<BoxError> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}

/// States that hedge attempts were sent for this call, in the extensions of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hedged {
    /// Whether the response is that of a hedge attempt, and not that of the first attempt.
    pub won: bool,
    /// The number of hedge attempts that were sent.
    pub sent: u32,
}

impl Hedged {
    /// What is told by a response; none: no hedge was sent.
    #[must_use]
    pub fn of<B>(response: &http::Response<B>) -> Option<Self> {
        response.extensions().get().copied()
    }
}
