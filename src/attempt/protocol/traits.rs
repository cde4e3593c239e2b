//! The traits of a protocol: [`ReplayRequest`] saves and replays its requests, and [`ClassifyAttempt`] classifies,
//! returns and discards its responses.

use std::{
    error::Error,
    fmt,
    task::{Context, Poll},
    time::Duration,
};

use http::{Extensions, HeaderMap, Request, StatusCode};

use super::super::{
    hedged::{Hedged, SentBefore},
    record::Attempts,
    verdict::{BodyReplay, Classified, RetryAction, SafeRequests},
};
use crate::{error::BoxError, outcome::Outcome, redact::Redacted, sealed::Sealed, time::Deadline};

/// The settings that determine how a request is saved.
#[derive(Clone, Copy, Debug)]
pub struct SaveRules<'a> {
    pub(crate) max_replay_bytes: u64,
    /// If set, only requests that are safe by it are saved. A hedge layer does not repeat any other request. `None` for
    /// a retry layer, which may repeat an unsafe request that the server has not processed.
    pub(crate) safe_requests: Option<&'a SafeRequests>,
    /// No request is saved.
    pub(crate) is_off: bool,
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
///     type Saved = String;
///
///     fn save(&self) -> Option<String> {
///         match self {
///             Self::Text(text) => Some(text.clone()),
///             Self::Stream(_) => None,
///         }
///     }
///
///     fn replay(saved: &String) -> Self {
///         Self::Text(saved.clone())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be replayed",
    note = "derive `Clone` for it, or implement `buttress::retry::Replay`"
)]
pub trait Replay: Sized {
    /// The saved request.
    type Saved;

    /// Saves the request. Returns `None` if it cannot be sent again: it is then sent once and not retried.
    fn save(&self) -> Option<Self::Saved>;

    /// Returns the request for another attempt.
    fn replay(saved: &Self::Saved) -> Self;
}

impl<T: Clone> Replay for T {
    type Saved = T;

    fn save(&self) -> Option<T> {
        Some(self.clone())
    }

    fn replay(saved: &T) -> T {
        saved.clone()
    }
}

/// The number of a further attempt.
#[derive(Clone, Copy, Debug)]
pub struct AttemptNumber {
    /// The number of the attempt. 2 is the second.
    pub(crate) number: u32,
    /// The number of previous attempts that the server may have seen.
    pub(crate) seen: u32,
}

/// A protocol whose requests can be saved and sent again. Sealed: user code names it only in bounds.
///
/// [`Http`](crate::classify::Http) implements it for `http::Request` with any body,
/// [`Classify`](crate::classify::Classify) for every request that is [`Replay`], and `Reqwest` for the requests of
/// reqwest.
///
/// ```
/// use buttress::retry::{ClassifyAttempt, ReplayRequest, Retry, RetryLayer};
/// use tower::{Layer, Service};
///
/// fn retried<M, S, Req>(layer: RetryLayer<M>, inner: S) -> Retry<S, M>
/// where
///     M: ReplayRequest<Req> + ClassifyAttempt<S::Response, S::Error>,
///     S: Service<M::Request> + Clone,
/// {
///     layer.layer(inner)
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot replay `{Req}`",
    note = "a retry or a hedge accepts `http::Request<B>` or, with `.classify(|result: Result<&Res, &E>| ..)`, any request that is `Clone`"
)]
pub trait ReplayRequest<Req>: Sealed + Clone + Send + Sync + 'static {
    /// The request that the wrapped service receives.
    type Request;
    /// The saved request.
    type Saved;

    /// Returns whether the call is gRPC by its request.
    fn is_grpc(_: &Req) -> bool {
        false
    }

    /// Saves a request for further attempts. Returns `None` if it cannot or need not be saved.
    fn save(request: &Req, rules: SaveRules<'_>) -> Option<Self::Saved>;

    /// Returns the request of the first attempt. Its body is saved while it is sent.
    fn first_attempt(
        request: Req,
        saved: Option<&mut Self::Saved>,
        rules: SaveRules<'_>,
    ) -> Self::Request;

    /// Returns the request of a further attempt.
    fn replay(saved: &Self::Saved, attempt: AttemptNumber) -> Self::Request;

    /// Returns the head of the saved request. Called only if the result is a [response or an error of
    /// HTTP](ClassifyAttempt::response).
    fn head(_: &Self::Saved) -> Request<()> {
        Request::default()
    }

    /// Returns a header of the saved request.
    fn header<'a>(_: &'a Self::Saved, _name: &str) -> Option<&'a [u8]> {
        None
    }

    /// Returns the deadline in the request, if there is one.
    fn deadline(_: &Self::Saved) -> Option<Deadline> {
        None
    }

    /// Returns the request of the hedge attempt of this number. 1 is the first.
    fn hedge_attempt(saved: &Self::Saved, number: u32) -> Self::Request;

    /// Returns whether the request is safe to repeat.
    fn is_safe(saved: &Self::Saved, by: &SafeRequests) -> bool;

    /// Returns whether the request body can be replayed now.
    fn body_replay(saved: &Self::Saved) -> BodyReplay;

    /// Reserves the request body for the next attempt, by cutting off the previous one. Returns `false` if the body can
    /// no longer be replayed.
    fn take_over(saved: &Self::Saved) -> bool;
}

/// A protocol whose responses can be classified, returned and discarded. Sealed, as [`ReplayRequest`] is.
#[diagnostic::on_unimplemented(
    message = "a retry or a hedge cannot classify the results `{Res}` and `{E}`",
    note = "for HTTP, bodies must be `Unpin` (`http_body_util::BodyExt::boxed_unsync` boxes a body) and errors `Into<BoxError>`",
    note = "for other types, classify the results with `.classify(|result: Result<&Res, &E>| ..)`, where `Res` and `E` are exactly the response and error of the wrapped service"
)]
pub trait ClassifyAttempt<Res, E>: Sealed {
    /// The response that the caller receives.
    type Response;
    /// The error that the caller receives.
    type Error;
    /// A response or an error that has not been returned or discarded yet.
    type Pending: Unpin;

    /// The maximum time for which a response body may take to begin.
    const MAX_FIRST_FRAME_WAIT: Duration;

    /// Classifies a response or an error. `None` if the beginning of the response body decides.
    fn classify(&self, is_grpc_call: bool, result: &Result<Res, E>) -> Option<Classified>;

    /// Returns the result of the first attempt to the caller, without a record.
    fn return_first(result: Result<Res, E>) -> Result<Self::Response, Self::Error>;

    /// Returns a pending result, with the class that [`classify`](Self::classify) has returned.
    fn pending(result: Result<Res, E>, classified: Option<Classified>) -> Self::Pending;

    /// Polls for the class and outcome of a pending result. Ready when the beginning of its body is available.
    fn poll_classify(pending: &mut Self::Pending, cx: &mut Context<'_>) -> Poll<Classified>;

    /// Classifies a response whose body has not begun in time.
    fn classify_unread(_: &Self::Pending) -> Classified {
        (RetryAction::Done, Outcome::success())
    }

    /// Returns whether the attempt ended with an error.
    fn is_error(pending: &Self::Pending) -> bool;

    /// Returns the head of the pending response, or its error. `None` if it is not of HTTP.
    fn response(_: &Self::Pending) -> Option<AttemptResponse<'_>> {
        None
    }

    /// Returns whether an inner retry layer has returned the error, which then carries [`Attempts`].
    fn has_inner_attempts(pending: &Self::Pending) -> bool {
        match Self::response(pending) {
            Some(AttemptResponse::Error(error)) => Attempts::is_in(error),
            _ => false,
        }
    }

    /// Drains the body of a response, so that its connection can be reused. Ready when the body has ended or exceeds
    /// `cap` bytes.
    fn poll_discard(pending: &mut Self::Pending, cap: u64, cx: &mut Context<'_>) -> Poll<()>;

    /// Returns a pending result to the caller, with the record of the attempts if there is one.
    fn return_recorded(
        pending: Self::Pending,
        record: Option<Attempts>,
    ) -> Result<Self::Response, Self::Error>;

    /// Whether the error type can carry errors of this crate. Without it, a call has neither a deadline nor an attempt
    /// timeout.
    const ACCEPTS_ERRORS: bool = false;

    /// Returns a pending result for an error of this crate. `None` unless the protocol [accepts such
    /// errors](Self::ACCEPTS_ERRORS).
    fn pending_error(_: BoxError) -> Option<(Self::Pending, Classified)> {
        None
    }

    /// Returns the error of a failed `poll_ready` to the caller.
    fn readiness_error(error: E, record: Attempts) -> Self::Error;

    /// Returns a pending result of a hedge layer to the caller. Adds only the record of the hedge attempts, if there is
    /// one.
    fn return_hedged(
        pending: Self::Pending,
        hedged: Option<Hedged>,
    ) -> Result<Self::Response, Self::Error>;

    /// Marks the result of a call whose deciding attempt was not sent, although another attempt may have been.
    fn mark_sent_before(
        result: Result<Self::Response, Self::Error>,
    ) -> Result<Self::Response, Self::Error> {
        result
    }

    /// Returns whether the result is [marked](Self::mark_sent_before).
    fn is_sent_before(pending: &Self::Pending) -> bool {
        match Self::response(pending) {
            Some(AttemptResponse::Head(_, _, extensions)) => {
                extensions.get::<SentBefore>().is_some()
            }
            Some(AttemptResponse::Error(error)) => SentBefore::is_in(error),
            None => false,
        }
    }

    /// Returns an error of the wrapped service without a change.
    fn inner_error(error: E) -> Self::Error;
}

/// The head of a response, or an error.
#[derive(Clone, Copy)]
pub enum AttemptResponse<'a> {
    /// The status, the headers and the extensions of a response.
    Head(StatusCode, &'a HeaderMap, &'a Extensions),
    /// The error of an attempt.
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
