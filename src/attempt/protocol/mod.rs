//! The types and traits by which requests are saved and replayed, and responses classified and discarded.

mod any;
mod classify;
mod http;
#[cfg(feature = "reqwest")]
mod reqwest;
mod saved_request;

pub(crate) use self::classify::{classify_by_request, failed_status};
#[cfg(feature = "reqwest")]
pub use self::reqwest::Reqwest;
pub(crate) use self::saved_request::keyed;

use std::{
    error::Error,
    fmt,
    task::{Context, Poll},
    time::Duration,
};

use ::http::{Extensions, HeaderMap, Request, StatusCode};

use super::{
    hedged::{Hedged, SentBefore},
    record::Attempts,
    verdict::{BodyReplay, RetryAction, SafeRequests},
};
use crate::{error::BoxError, outcome::Outcome, redact::Redacted, time::Deadline};

/// The settings that determine how a request is saved.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    pub(crate) body_cap: u64,
    /// If set, only requests that are safe by it are saved. A hedge layer does not repeat any other request. `None` for
    /// a retry layer, which may repeat an unsafe request that the server has not processed.
    pub(crate) only: Option<&'a SafeRequests>,
    /// No request is saved.
    pub(crate) never: bool,
    /// An inner layer measures calls: requests carry a mark of their progress.
    pub(crate) marks: bool,
}

/// A request that can be saved and sent again. Implemented for every type that is `Clone`.
///
/// Implement it for another type to use [`RetryLayer::classify`](crate::retry::RetryLayer::classify) or
/// [`HedgeLayer::classify`](crate::hedge::HedgeLayer::classify) with it. HTTP requests do not need it.
///
/// ```
/// use buttress::retry::Replay;
///
/// /// Either a text, or a stream that can be read only once.
/// enum Upload {
///     Text(String),
///     Stream(std::net::TcpStream),
/// }
///
/// impl Replay for Upload {
///     type Kept = String;
///
///     fn keep(&self) -> Option<String> {
///         match self {
///             Self::Text(text) => Some(text.clone()),
///             Self::Stream(_) => None,
///         }
///     }
///
///     fn again(kept: &String) -> Self {
///         Self::Text(kept.clone())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be replayed",
    note = "derive `Clone` for it, or implement `buttress::retry::Replay`"
)]
pub trait Replay: Sized {
    /// The saved request.
    type Kept;

    /// Saves the request. Returns `None` if it cannot be sent again: it is then sent once and not retried.
    fn keep(&self) -> Option<Self::Kept>;

    /// Returns the request for another attempt.
    fn again(kept: &Self::Kept) -> Self;
}

impl<T: Clone> Replay for T {
    type Kept = T;

    fn keep(&self) -> Option<T> {
        Some(self.clone())
    }

    fn again(kept: &T) -> T {
        kept.clone()
    }
}

/// The number of a further attempt.
#[derive(Clone, Copy, Debug)]
pub struct Numbered {
    /// The number of the attempt. 2 is the second.
    pub(crate) number: u32,
    /// The number of previous attempts that the server may have seen.
    pub(crate) seen: u32,
}

/// A protocol whose requests can be saved and sent again.
///
/// Implemented for `http::Request` with any body, and after [`classify`](crate::retry::RetryLayer::classify) for every request
/// that is [`Replay`]. Do not implement it outside of this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot replay `{Req}`",
    note = "a retry or a hedge accepts `http::Request<B>` or, with `.classify(|result: Result<&Res, &E>| ..)`, any request that is `Clone`"
)]
pub trait ReplayRequest<Req>: Clone + Send + Sync + 'static {
    /// The request that the wrapped service receives.
    type Request;
    /// The saved request.
    type Kept;

    /// Returns whether the call is gRPC by its request.
    fn is_grpc(_: &Req) -> bool {
        false
    }

    /// Saves a request for further attempts. Returns `None` if it cannot or need not be saved.
    fn keep(request: &Req, rules: Rules<'_>) -> Option<Self::Kept>;

    /// Returns the request of the first attempt. Its body is saved from here on, while it is sent.
    fn first(request: Req, kept: Option<&mut Self::Kept>, rules: Rules<'_>) -> Self::Request;

    /// Returns the request of a further attempt.
    fn again(kept: &Self::Kept, attempt: Numbered) -> Self::Request;

    /// Returns the head of the saved request. Called only if the result is a [response or an error of
    /// HTTP](ClassifyAttempt::answer).
    fn head(_: &Self::Kept) -> Request<()> {
        Request::default()
    }

    /// Returns a header of the saved request.
    fn header<'a>(_: &'a Self::Kept, _name: &str) -> Option<&'a [u8]> {
        None
    }

    /// Returns the deadline in the request, if there is one.
    fn deadline(_: &Self::Kept) -> Option<Deadline> {
        None
    }

    /// Returns the request of the hedge attempt of this number. 1 is the first.
    fn hedge_attempt(kept: &Self::Kept, number: u32) -> Self::Request;

    /// Returns whether the request is safe to repeat.
    fn safe(kept: &Self::Kept, by: &SafeRequests) -> bool;

    /// Returns whether the request body can be replayed now.
    fn repeatable(kept: &Self::Kept) -> BodyReplay;

    /// Reserves the request body for the next attempt, by cutting off the previous one. Returns `false` if the body can
    /// no longer be replayed.
    fn claim(kept: &Self::Kept) -> bool;
}

/// A protocol whose responses can be classified, returned and discarded.
#[diagnostic::on_unimplemented(
    message = "a retry or a hedge cannot classify the results `{Res}` and `{E}`",
    note = "for HTTP, bodies must be `Unpin` (`http_body_util::BodyExt::boxed_unsync` boxes a body) and errors `Into<BoxError>`",
    note = "for other types, classify the results with `.classify(|result: Result<&Res, &E>| ..)`, where `Res` and `E` are exactly the response and error of the wrapped service"
)]
pub trait ClassifyAttempt<Res, E> {
    /// The response that the caller receives.
    type Response;
    /// The error that the caller receives.
    type Error;
    /// A response or an error that has not been returned or discarded yet.
    type Held: Unpin;

    /// The maximum time for which a response body may take to begin.
    const PATIENCE: Duration;

    /// Classifies a response or an error. `None` if the beginning of the response body decides.
    fn weigh(&self, is_grpc_call: bool, result: &Result<Res, E>) -> Option<(RetryAction, Outcome)>;

    /// Returns a result to the caller without a record.
    fn give(result: Result<Res, E>) -> Result<Self::Response, Self::Error>;

    /// Holds a result, with the class that [`weigh`](Self::weigh) has returned.
    fn hold(result: Result<Res, E>, weight: Option<(RetryAction, Outcome)>) -> Self::Held;

    /// Polls for the class and outcome of a held result. Pending until the beginning of its body is available.
    fn poll_weigh(held: &mut Self::Held, cx: &mut Context<'_>) -> Poll<(RetryAction, Outcome)>;

    /// Classifies a response whose body has not begun in time.
    fn undecided(_: &Self::Held) -> (RetryAction, Outcome) {
        (RetryAction::Final, Outcome::success())
    }

    /// Returns whether the attempt ended with an error.
    fn is_error(held: &Self::Held) -> bool;

    /// Returns the head of the held response, or its error. `None` if it is not of HTTP.
    fn answer(_: &Self::Held) -> Option<AttemptResponse<'_>> {
        None
    }

    /// Returns whether an inner retry layer has returned the error, which then carries [`Attempts`].
    fn has_inner_attempts(held: &Self::Held) -> bool {
        match Self::answer(held) {
            Some(AttemptResponse::Error(error)) => Attempts::is_in(error),
            _ => false,
        }
    }

    /// Drains the body of a response, so that its connection can be reused. Ready when the body has ended or exceeds
    /// `cap` bytes.
    fn poll_discard(held: &mut Self::Held, cap: u64, cx: &mut Context<'_>) -> Poll<()>;

    /// Returns a held result to the caller, with the record of the attempts if there is one.
    fn release(held: Self::Held, record: Option<Attempts>) -> Result<Self::Response, Self::Error>;

    /// Whether the error type can carry errors of this crate. Without it, a call has neither a deadline nor an attempt
    /// timeout.
    const TAKES_ERRORS: bool = false;

    /// Returns a held result for an error of this crate. `None` unless the protocol [takes such
    /// errors](Self::TAKES_ERRORS).
    fn failed(_: BoxError) -> Option<(Self::Held, (RetryAction, Outcome))> {
        None
    }

    /// Returns the error of a failed `poll_ready` to the caller.
    fn broken(error: E, record: Attempts) -> Self::Error;

    /// Returns a held result of a hedge layer to the caller. Adds only the record of the hedge attempts, if there is
    /// one.
    fn pass(held: Self::Held, hedged: Option<Hedged>) -> Result<Self::Response, Self::Error>;

    /// Marks the result of a call whose deciding attempt was not sent, although another attempt may have been.
    fn sent_before(
        result: Result<Self::Response, Self::Error>,
    ) -> Result<Self::Response, Self::Error> {
        result
    }

    /// Returns whether the result is [marked](Self::sent_before).
    fn is_sent_before(held: &Self::Held) -> bool {
        match Self::answer(held) {
            Some(AttemptResponse::Head(_, _, extensions)) => {
                extensions.get::<SentBefore>().is_some()
            }
            Some(AttemptResponse::Error(error)) => SentBefore::is_in(error),
            None => false,
        }
    }

    /// Returns an error of the wrapped service without a change.
    fn error(error: E) -> Self::Error;
}

#[derive(Clone, Copy)]
pub enum AttemptResponse<'a> {
    Head(StatusCode, &'a HeaderMap, &'a Extensions),
    Error(&'a (dyn Error + 'static)),
}

/// Omits the headers.
impl fmt::Debug for AttemptResponse<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head(status, ..) => f.debug_tuple("Head").field(status).finish_non_exhaustive(),
            Self::Error(error) => f.debug_tuple("Error").field(&Redacted(error)).finish(),
        }
    }
}
