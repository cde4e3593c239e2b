//! The rule that classifies a response at the end of its body.

use http::HeaderMap;

use super::{
    grpc,
    outcome::{Outcome, Reason},
};

/// Classifies a response by its trailers, if it has any.
#[cfg(feature = "tower-http")]
type ClassifyTrailers = dyn FnOnce(Option<&HeaderMap>) -> Outcome + Send + Sync;

/// The rule that classifies a response at the end of its body.
pub(crate) enum Eos {
    /// The permit has been released, or the body is not tracked.
    Recorded,
    /// The response was not read for too long. Its permit has been released, and the body of an inner timeout layer
    /// ends the response.
    Unread,
    /// The response head has decided this outcome.
    Plain(Outcome),
    /// The `grpc-status` in the trailers decides, or this outcome if there is none.
    Grpc(Outcome),
    /// A classifier of tower-http decides by the trailers.
    #[cfg(feature = "tower-http")]
    Custom(Box<ClassifyTrailers>),
}

impl Eos {
    /// Returns the outcome of a body that has ended, with these trailers.
    pub(crate) fn end(&mut self, trailers: Option<&HeaderMap>) -> Outcome {
        match std::mem::replace(self, Self::Recorded) {
            Self::Recorded | Self::Unread => Outcome::success(),
            Self::Plain(outcome) => outcome,
            Self::Grpc(missing) => trailers.and_then(grpc::status).unwrap_or(missing),
            #[cfg(feature = "tower-http")]
            Self::Custom(classify) => classify(trailers),
        }
    }

    /// Returns the outcome of a body that fails.
    pub(crate) fn error(&mut self) -> Outcome {
        match std::mem::replace(self, Self::Recorded) {
            Self::Plain(outcome) if !outcome.is_success() => outcome,
            // The HTTP status in the head is already an error.
            Self::Grpc(mapped) if !mapped.is_success() && !is_missing(mapped) => mapped,
            _ => Outcome::failure().because(Reason::Body),
        }
    }

    /// Returns the outcome that the head decides, or a cancelled one if the end of the body decides.
    pub(crate) fn so_far(&self) -> Outcome {
        match self {
            Self::Plain(outcome) => *outcome,
            _ => Outcome::cancelled(),
        }
    }

    /// Returns the outcome for a permit that is released at the head: a success, unless the head has decided otherwise.
    pub(crate) fn begun(&self) -> Outcome {
        match self {
            Self::Plain(outcome) => *outcome,
            Self::Grpc(mapped) if !is_missing(*mapped) => *mapped,
            _ => Outcome::success(),
        }
    }

    /// Returns the outcome of a body that is dropped before its end.
    ///
    /// A plain success that is not read stays a success. A gRPC response with HTTP status 200 is cancelled, because its
    /// gRPC status is not known. With another HTTP status its outcome is the mapped one, because such responses rarely
    /// have trailers.
    pub(crate) fn dropped(&self) -> Outcome {
        match self {
            Self::Plain(outcome) => *outcome,
            Self::Grpc(mapped) if !is_missing(*mapped) => *mapped,
            _ => Outcome::cancelled(),
        }
    }
}

/// Returns whether only the trailers decide the outcome of a gRPC response.
fn is_missing(outcome: Outcome) -> bool {
    outcome.reason() == Reason::MissingStatus
}
