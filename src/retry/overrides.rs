//! The rules for retries that a user can set: lists of failures, unprocessed statuses, and a closure.

use std::{cell::OnceCell, error::Error, fmt, sync::Arc};

use http::{HeaderMap, Request, StatusCode};

use crate::{
    attempt::{AttemptResponse, GiveUpReason, RetryAction, failed_status, keyed},
    outcome::{Outcome, Pushback, Reason, grpc, retry_after},
    redact::{self, MAX_VALUE},
};

/// A failure that a rule lists: see [`retry_on`](super::layer::RetryLayer::retry_on) and
/// [`never_on`](super::layer::RetryLayer::never_on).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Failure {
    /// A response with this HTTP status, to a call that is not gRPC.
    Status(StatusCode),
    /// A response with this gRPC status, to a gRPC call: in the head, in the trailers, or mapped from the HTTP status.
    /// HTTP 503 without a `grpc-status` is 14, `UNAVAILABLE`. See [`Http`](crate::classify::Http).
    Grpc(u16),
    /// Any result with this reason.
    Because(Reason),
}

impl From<StatusCode> for Failure {
    fn from(status: StatusCode) -> Self {
        Self::Status(status)
    }
}

impl From<Reason> for Failure {
    fn from(reason: Reason) -> Self {
        Self::Because(reason)
    }
}

impl Failure {
    fn is(self, context: &AttemptContext<'_>) -> bool {
        let reason = context.outcome.reason();
        match self {
            Self::Status(status) => context.status() == Some(status) && !context.is_grpc(),
            Self::Grpc(code) => {
                reason == Reason::GrpcStatus && context.outcome.code() == Some(code)
            }
            Self::Because(because) => reason == because,
        }
    }
}

/// The request and the result of one attempt: see [`retry_if`](super::layer::RetryLayer::retry_if).
pub struct AttemptContext<'a> {
    /// Created on demand, because the saved request has its head in another form.
    request: OnceCell<Request<()>>,
    make: &'a dyn Fn() -> Request<()>,
    pub(crate) response: AttemptResponse<'a>,
    pub(crate) outcome: Outcome,
    pub(crate) attempt: u32,
}

impl<'a> AttemptContext<'a> {
    pub(crate) fn new(
        make: &'a dyn Fn() -> Request<()>,
        response: AttemptResponse<'a>,
        outcome: Outcome,
        attempt: u32,
    ) -> Self {
        Self { request: OnceCell::new(), make, response, outcome, attempt }
    }

    /// Returns the request head.
    #[must_use]
    pub fn request(&self) -> &Request<()> {
        self.request.get_or_init(self.make)
    }

    /// Returns the status of the response. `None` for an error.
    #[must_use]
    pub fn status(&self) -> Option<StatusCode> {
        match self.response {
            AttemptResponse::Head(status, ..) => Some(status),
            AttemptResponse::Error(_) => None,
        }
    }

    /// Returns the headers of the response. `None` for an error.
    #[must_use]
    pub fn headers(&self) -> Option<&'a HeaderMap> {
        match self.response {
            AttemptResponse::Head(_, headers, _) => Some(headers),
            AttemptResponse::Error(_) => None,
        }
    }

    /// Returns the error. `None` for a response.
    #[must_use]
    pub fn error(&self) -> Option<&'a (dyn Error + 'static)> {
        match self.response {
            AttemptResponse::Head(..) => None,
            AttemptResponse::Error(error) => Some(error),
        }
    }

    /// Returns whether the call is gRPC by its request or by its response.
    fn is_grpc(&self) -> bool {
        let by_request =
            |request: &Request<()>| grpc::is_grpc_call(request.method(), request.headers());
        self.headers().is_some_and(grpc::is_grpc) || by_request(self.request())
    }

    /// Returns the outcome: the reason, the status code and the server's hint.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Returns the number of the attempt. 1 is the first.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

/// Omits the headers, and the userinfo and query of the URI.
impl fmt::Debug for AttemptContext<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, uri) =
            (self.request().method(), redact::debug(self.request().uri(), MAX_VALUE));
        f.debug_struct("AttemptContext")
            .field("request", &format_args!("{method} {uri}"))
            .field("response", &self.response)
            .field("outcome", &self.outcome)
            .field("attempt", &self.attempt)
            .finish()
    }
}

/// Returns the outcome of a response that is a success for other layers and that a rule lists as a failure.
fn failed(context: &AttemptContext<'_>) -> Outcome {
    let AttemptResponse::Head(status, headers, _) = context.response else {
        return Outcome::failure();
    };
    let failed = failed_status(status, headers);
    match (context.outcome.reason(), context.outcome.code()) {
        (reason @ Reason::GrpcStatus, Some(code)) => failed.because(reason).with_code(code),
        _ => failed,
    }
}

type RetryRule = dyn Fn(&AttemptContext<'_>) -> Option<bool> + Send + Sync;

/// The rules that the user sets. Empty by default.
#[derive(Clone, Default)]
pub(crate) struct Overrides {
    listed: Vec<(Failure, bool)>,
    /// Statuses with which the upstream declares that it has not processed the request.
    unprocessed: Vec<StatusCode>,
    closure: Option<Arc<RetryRule>>,
}

impl Overrides {
    pub(crate) fn set_override(&mut self, failure: Failure, retry: bool) {
        self.listed.retain(|(listed, _)| *listed != failure);
        self.listed.push((failure, retry));
    }

    pub(crate) fn set_closure(&mut self, closure: Arc<RetryRule>) {
        self.closure = Some(closure);
    }

    pub(crate) fn set_unprocessed(&mut self, statuses: Vec<StatusCode>) {
        self.unprocessed = statuses;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.listed.is_empty() && self.unprocessed.is_empty() && self.closure.is_none()
    }

    /// Returns whether the last rule for `failure` forbids a retry.
    pub(crate) fn forbids(&self, failure: Failure) -> bool {
        self.listed.contains(&(failure, false))
    }

    /// Returns a status that one rule lists as unprocessed and another as never to be retried.
    pub(crate) fn contradiction(&self) -> Option<StatusCode> {
        self.unprocessed.iter().copied().find(|&status| self.forbids(Failure::Status(status)))
    }

    /// Applies the user's rules to the class of a result.
    ///
    /// Returns the class, and whether the closure or the list of unprocessed statuses declares a retry safe for any
    /// method. The rules cannot overrule a pushback of the server that forbids a retry, or a deadline that has passed.
    /// They can overrule a rejection.
    pub(crate) fn apply(
        &self,
        class: RetryAction,
        context: &mut AttemptContext<'_>,
    ) -> (RetryAction, bool) {
        if matches!(
            class,
            RetryAction::Forbidden(GiveUpReason::Pushback | GiveUpReason::DeadlinePassed)
        ) {
            return (class, false);
        }
        let by_closure = self.closure.as_ref().and_then(|closure| closure(context));
        let listed = || self.listed.iter().rev().find(|(failure, _)| failure.is(context));
        let decision = by_closure.or_else(|| listed().map(|(_, retry)| *retry));
        let is_listed = |&status: &StatusCode| {
            context.status() == Some(status) && Failure::Status(status).is(context)
        };
        // A rejection that is a response is not a declaration of the upstream.
        let is_unprocessed = decision != Some(false)
            && !matches!(class, RetryAction::Forbidden(_))
            && self.unprocessed.iter().any(is_listed);
        let decision = decision.or(is_unprocessed.then_some(true));
        let pushed_back =
            context.headers().and_then(retry_after::pushback) == Some(Pushback::Never);
        // The server reports that the key was used for another request (draft-ietf-httpapi-idempotency-key-header). A
        // retry would fail again.
        let key_reused = context.status() == Some(StatusCode::UNPROCESSABLE_ENTITY)
            && keyed(context.request().headers());
        let class = match decision {
            Some(true) if !key_reused && !pushed_back => RetryAction::Retry,
            // Keep the reason for which a retry is forbidden.
            Some(_) if matches!(class, RetryAction::Forbidden(_)) => class,
            Some(_) if context.outcome.reason() == Reason::Rejected => {
                RetryAction::Forbidden(GiveUpReason::Rejected)
            }
            Some(_) => RetryAction::Done,
            None => class,
        };
        if class == RetryAction::Retry && context.outcome.is_success() {
            context.outcome = failed(context);
        }
        (class, class == RetryAction::Retry && (by_closure == Some(true) || is_unprocessed))
    }
}

impl fmt::Debug for Overrides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overrides")
            .field("listed", &self.listed)
            .field("unprocessed", &self.unprocessed)
            .field("closure", &self.closure.is_some())
            .finish()
    }
}
