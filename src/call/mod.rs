//! The spine: the five words that every layer is made of.
//!
//! ```text
//!             peek                 admit                      classify              end of stream
//!  poll_ready ─────▶ inner ready ──────▶ Permit ─▶ inner call ─▶ Protocol ─▶ Outcome ───▶ Permit::finish
//!      │                             │                             └─▶ "ask the body" ─▶ TrackedBody ─┘
//!      └ refused: never touch inner  └ refused: Rejected ─▶ Reject strategy ─▶ an error, or a response
//! ```
//!
//! 1. [`Outcome`]: what became of a call, and why.
//! 2. [`Protocol`]: decides the outcome from a head, an error or the end of the body.
//! 3. *Permit*: the right to make one call. It ends exactly once, also when the call is dropped or
//!    panics, and one of an older generation never changes a newer state.
//! 4. [`TrackedBody`]: carries the permit to the end of the response body.
//! 5. [`Rejected`]: a call that was not let through; a [`Reject`] strategy gives it its form.

#[cfg(any(feature = "retry", feature = "timeout"))]
mod alarm;
#[cfg(any(feature = "breaker", feature = "limit"))]
mod anchor;
mod attribution;
mod body;
mod clock;
#[cfg(feature = "connect")]
mod connection;
mod deadline;
#[cfg(feature = "timeout")]
mod far;
mod giver;
pub(crate) mod grpc;
pub(crate) mod hint;
pub(crate) mod http;
mod indicator;
#[cfg(any(feature = "breaker", feature = "limit", feature = "timeout"))]
mod lasting;
mod origin;
mod outcome;
mod permit;
mod protocol;
#[cfg(feature = "percentile")]
mod recent;
mod reject;
mod rejected;
#[cfg(any(feature = "breaker", feature = "lifecycle", feature = "limit", feature = "retry"))]
mod striped;
pub(crate) mod sync;

#[cfg(feature = "tower-http")]
#[cfg_attr(docsrs, doc(cfg(feature = "tower-http")))]
pub use self::protocol::TowerHttp;
pub use self::{
    attribution::SentMark,
    body::TrackedBody,
    deadline::{Deadline, DeadlineSource},
    indicator::Indicator,
    origin::Origin,
    outcome::{Outcome, OutcomeKind, Reason},
    protocol::{Classify, ClassifyHead, Http, PerResponse, Protocol},
    reject::{AsError, Reject, Respond, RespondWith},
    rejected::{Phase, Rejected, RejectedKind},
};

#[cfg(any(feature = "retry", feature = "timeout"))]
pub(crate) use self::alarm::Alarm;
#[cfg(any(feature = "breaker", feature = "limit"))]
pub(crate) use self::anchor::Anchor;
#[cfg(any(feature = "retry", feature = "timeout"))]
pub(crate) use self::attribution::DropCause;
#[cfg(feature = "retry")]
pub(crate) use self::attribution::is_mark_wanted;
#[cfg(feature = "connect")]
pub(crate) use self::connection::ConnectionError;
#[cfg(feature = "health")]
pub(crate) use self::http::known;
#[cfg(any(feature = "breaker", feature = "limit", feature = "timeout"))]
pub(crate) use self::lasting::Idle;
#[cfg(any(feature = "lifecycle", feature = "stack"))]
pub(crate) use self::protocol::HttpCall;
#[cfg(feature = "percentile")]
pub(crate) use self::recent::Recent;
#[cfg(any(feature = "breaker", feature = "lifecycle", feature = "limit", feature = "retry"))]
pub(crate) use self::striped::{Lease, Striped};
pub(crate) use self::{
    attribution::{
        COUNT_CANCELLED_AFTER, CallerDeadline, Ending, UpstreamClock, WaitsFor, attribute,
        want_mark,
    },
    body::{Eos, OwnAnswer},
    clock::{Clock, Moment, Nanos, nanos, poll_timer},
    deadline::has_passed,
    giver::{AnyGiver, Giver, Shared},
    permit::{Finish, Hold, Measures, Permit, Token},
    protocol::Judge,
    reject::{Form, accepts, response, whole_seconds},
    rejected::{Label, LayerKind},
};
#[cfg(feature = "timeout")]
pub(crate) use self::{
    body::AnswerBody,
    far::{Far, Found},
};
