//! The delays of one call, from a backoff or from an iterator of the user.

use std::{fmt, sync::Arc, time::Duration};

use super::backoff::{Backoff, Delays};

type Own = dyn Iterator<Item = Duration> + Send;

/// The source of the delays of a call.
#[derive(Clone)]
pub(crate) enum DelaySource {
    Backoff(Backoff),
    Own(Arc<dyn Fn() -> Box<Own> + Send + Sync>),
}

/// The delays of one call.
pub(crate) enum CallDelays {
    Backoff(Delays),
    Own(Box<Own>),
}

impl DelaySource {
    pub(crate) fn begin(&self) -> CallDelays {
        match self {
            Self::Backoff(backoff) => CallDelays::Backoff(backoff.delays()),
            Self::Own(begin) => CallDelays::Own(begin()),
        }
    }

    pub(crate) fn has_jitter(&self) -> bool {
        match self {
            Self::Backoff(backoff) => backoff.has_jitter(),
            Self::Own(_) => true,
        }
    }
}

impl CallDelays {
    /// Returns the next delay. `None` if there is no further attempt.
    pub(crate) fn next(&mut self, throttled: bool) -> Option<Duration> {
        match self {
            Self::Backoff(delays) => Some(delays.draw(throttled)),
            Self::Own(waits) => waits.next(),
        }
    }

    /// Restarts a backoff at its first delay. An iterator of the user continues.
    pub(crate) fn begin_anew(&mut self) {
        if let Self::Backoff(delays) = self {
            delays.begin_anew();
        }
    }
}

impl fmt::Debug for DelaySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backoff(backoff) => backoff.fmt(f),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}
