//! How requests are sent again, and how answers are weighed.

mod any;
mod http;
mod kept;
#[cfg(feature = "reqwest")]
mod reqwest;
mod weigh;

#[cfg(feature = "reqwest")]
pub use self::reqwest::Reqwest;
pub(super) use self::weigh::{classify_by_request, failed_status};

use std::{
    task::{Context, Poll},
    time::Duration,
};

use ::http::Request;

use super::{
    attempts::Attempts,
    hedge::{Hedged, SentBefore},
    policy::{Class, Repeatable, Safe},
    rules::Answer,
};
use crate::{
    BoxError,
    call::{Deadline, Outcome},
};

/// What of the layer's settings a request is split by.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    pub(super) body_cap: u64,
    /// What is not safe to repeat is not repeated, unseen or not: nothing of it needs to be kept.
    pub(super) only: Option<&'a Safe>,
    /// Nothing needs to be kept.
    pub(super) never: bool,
    /// An inner layer measures calls: requests carry a mark of their progress.
    pub(super) marks: bool,
}

/// Requests that can be kept to be sent again: everything that is `Clone`, or says how here.
///
/// For [`RetryLayer::classify`](super::RetryLayer::classify) and its like; HTTP requests need no such thing.
///
/// ```
/// use buttress::retry::Replay;
///
/// /// Either a text, or a stream that is there once.
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
    message = "`{Self}` cannot be kept to be sent again",
    note = "derive `Clone` for it, or implement `buttress::retry::Replay`"
)]
pub trait Replay: Sized {
    /// What is kept.
    type Kept;

    /// What is needed to send it again; none: it cannot be, and is sent once.
    fn keep(&self) -> Option<Self::Kept>;

    /// The request once more.
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

/// A further attempt.
#[derive(Clone, Copy, Debug)]
pub struct Numbered {
    /// 2 is the second.
    pub(super) number: u32,
    /// How many before it a server may have seen.
    pub(super) seen: u32,
}

/// Requests that can be sent again.
///
/// `http::Request` of any body is, and with [`classify`](super::RetryLayer::classify) anything that is
/// [`Replay`]. Not to be implemented outside of this crate yet.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot send `{Req}` again",
    note = "a retry or a hedge takes `http::Request<B>`, or, with `.classify(|result: Result<&Res, &E>| ..)`, any request that is `Clone`"
)]
pub trait Repeat<Req>: Clone + Send + Sync + 'static {
    /// What the wrapped service gets.
    type Request;
    /// What is kept to send it again.
    type Kept;

    /// Returns whether the call is gRPC by its request.
    fn is_grpc(_: &Req) -> bool {
        false
    }

    /// What is kept of a request for the next attempt.
    fn keep(request: &Req, rules: Rules<'_>) -> Option<Self::Kept>;

    /// The first attempt; what goes away with it is kept from here on.
    fn first(request: Req, kept: Option<&mut Self::Kept>, rules: Rules<'_>) -> Self::Request;

    /// The attempt of this number.
    fn again(kept: &Self::Kept, attempt: Numbered) -> Self::Request;

    /// The head, made anew for those who want to look at it. Only asked for where there is an
    /// [answer](Weigh::answer) of HTTP's.
    fn head(_: &Self::Kept) -> Request<()> {
        Request::default()
    }

    /// Returns a header of the saved request.
    fn header<'a>(_: &'a Self::Kept, _name: &str) -> Option<&'a [u8]> {
        None
    }

    /// When the caller needs its answer, if the request says so.
    fn deadline(_: &Self::Kept) -> Option<Deadline> {
        None
    }

    /// Returns the request of the hedge attempt of this number. 1 is the first.
    fn hedge_attempt(kept: &Self::Kept, number: u32) -> Self::Request;

    /// Whether it may be repeated although it may have had an effect.
    fn safe(kept: &Self::Kept, by: &Safe) -> bool;

    /// Whether its body can be sent again by now.
    fn repeatable(kept: &Self::Kept) -> Repeatable;

    /// Keeps its body for the next attempt alone. False if it cannot be sent again after all.
    fn claim(kept: &Self::Kept) -> bool;
}

/// Answers that can be weighed, given out and discarded.
#[diagnostic::on_unimplemented(
    message = "a retry or a hedge cannot weigh answers of `{Res}` or `{E}`",
    note = "HTTP bodies must be `Unpin` (box one that is not with `http_body_util::BodyExt::boxed_unsync`), and errors `Into<BoxError>`",
    note = "for other types say what failed with `.classify(|result: Result<&Res, &E>| ..)`, `Res` and `E` being exactly the response and error of the wrapped service"
)]
pub trait Weigh<Res, E> {
    /// What the caller gets.
    type Response;
    /// What the caller gets when there is no answer.
    type Error;
    /// An answer that may still be given out or discarded.
    type Held: Unpin;

    /// How long an answer's beginning may be waited for.
    const PATIENCE: Duration;

    /// Classifies a response or an error. `None` if the beginning of the response body decides.
    fn weigh(&self, is_grpc_call: bool, result: &Result<Res, E>) -> Option<(Class, Outcome)>;

    /// Gives out what is good as it came.
    fn give(result: Result<Res, E>) -> Result<Self::Response, Self::Error>;

    /// Takes an answer, and what it is by itself.
    fn hold(result: Result<Res, E>, weight: Option<(Class, Outcome)>) -> Self::Held;

    /// What it is. Pending while its beginning is not here.
    fn poll_weigh(held: &mut Self::Held, cx: &mut Context<'_>) -> Poll<(Class, Outcome)>;

    /// Classifies a response whose body has not begun in time.
    fn undecided(_: &Self::Held) -> (Class, Outcome) {
        (Class::Final, Outcome::success())
    }

    /// Returns whether the attempt ended with an error.
    fn is_error(held: &Self::Held) -> bool;

    /// What it says, if it is one of HTTP's.
    fn answer(_: &Self::Held) -> Option<Answer<'_>> {
        None
    }

    /// Returns whether an inner retry layer has returned the error, which then carries [`Attempts`].
    fn has_inner_attempts(held: &Self::Held) -> bool {
        match Self::answer(held) {
            Some(Answer::Error(error)) => Attempts::is_in(error),
            _ => false,
        }
    }

    /// Reads it away, so that its connection can be used again. Ready when that is done, or when it is
    /// longer than `cap` bytes.
    fn poll_discard(held: &mut Self::Held, cap: u64, cx: &mut Context<'_>) -> Poll<()>;

    /// Gives it out, with the record if there is something to record.
    fn release(held: Self::Held, record: Option<Attempts>) -> Result<Self::Response, Self::Error>;

    /// Whether its errors can be such as this crate makes: for an attempt that is given up, too.
    const TAKES_ERRORS: bool = false;

    /// An answer of this crate's making. Only asked for where it [can](Self::TAKES_ERRORS) be.
    fn failed(_: BoxError) -> Option<(Self::Held, (Class, Outcome))> {
        None
    }

    /// The wrapped service broke.
    fn broken(error: E, record: Attempts) -> Self::Error;

    /// Gives it out as it is, told only that there was a hedge.
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
            Some(Answer::Head(_, _, extensions)) => extensions.get::<SentBefore>().is_some(),
            Some(Answer::Error(error)) => SentBefore::is_in(error),
            None => false,
        }
    }

    /// The wrapped service's error as it is.
    fn error(error: E) -> Self::Error;
}
