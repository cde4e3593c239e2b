//! The records of a hedge layer in requests, responses and errors. Retry layers and classifiers read them.

use std::{error::Error, fmt};

use crate::{
    error::{self, BoxError},
    redact::Redacted,
};

/// The number of a hedge attempt, in the extensions of its request. 1 is the first hedge attempt of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HedgeAttempt(pub u32);

/// Marks the result of a call whose deciding attempt was not sent, although an attempt that was dropped before may have
/// been. It is in the extensions of a response, and around an error.
#[derive(Clone)]
pub(crate) struct SentBefore<T = ()>(pub(crate) T);

impl SentBefore {
    /// Returns whether the error or one of its sources is marked.
    pub(crate) fn is_in(error: &(dyn Error + 'static)) -> bool {
        error::chain(error).any(|error| error.is::<SentBefore<BoxError>>())
    }
}

impl fmt::Debug for SentBefore<BoxError> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SentBefore").field(&Redacted(&self.0)).finish()
    }
}

impl fmt::Display for SentBefore<BoxError> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the last attempt was not sent, but an earlier attempt of the call may have been",
        )
    }
}

impl Error for SentBefore<BoxError> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.0)
    }
}

/// The hedge attempts of a call, in the extensions of the response. Absent if none was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hedged {
    /// Whether the response is that of a hedge attempt, and not that of the first attempt.
    pub won: bool,
    /// The number of hedge attempts that were sent.
    pub sent: u32,
}

impl Hedged {
    /// Returns the record of a response. `None` if no hedge attempt was sent.
    #[must_use]
    pub fn of<B>(response: &http::Response<B>) -> Option<Self> {
        response.extensions().get().copied()
    }
}
