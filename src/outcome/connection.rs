use std::{error::Error, fmt};

use crate::{error::BoxError, redact::Redacted};

/// An error of a request that was sent over a known connection. Its source is the client's own error.
pub(crate) struct ConnectionError {
    is_reused: bool,
    source: BoxError,
}

impl ConnectionError {
    /// `is_reused`: the connection had already delivered a response head.
    pub(crate) fn new(is_reused: bool, source: impl Into<BoxError>) -> Self {
        Self { is_reused, source: source.into() }
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.is_reused
    }
}

/// Marks a response whose connection serves no further request, so that the next attempt uses another connection.
/// Stored in the extensions of the response.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetiredConnection;

impl fmt::Debug for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionError")
            .field("is_reused", &self.is_reused)
            .field("source", &Redacted(&self.source))
            .finish()
    }
}

impl fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = if self.is_reused { "reused" } else { "new" };
        write!(f, "request failed on a {which} connection")
    }
}

impl Error for ConnectionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}
