//! The waits of one call, the user's own too.

use std::{fmt, sync::Arc, time::Duration};

use super::backoff::{Backoff, Delays};

type Own = dyn Iterator<Item = Duration> + Send;

/// Where each call has its waits from.
#[derive(Clone)]
pub(super) enum Waits {
    Backoff(Backoff),
    Own(Arc<dyn Fn() -> Box<Own> + Send + Sync>),
}

/// The waits of one call.
pub(super) enum Series {
    Backoff(Delays),
    Own(Box<Own>),
}

impl Waits {
    pub(super) fn begin(&self) -> Series {
        match self {
            Self::Backoff(backoff) => Series::Backoff(backoff.delays()),
            Self::Own(begin) => Series::Own(begin()),
        }
    }

    pub(super) fn has_jitter(&self) -> bool {
        match self {
            Self::Backoff(backoff) => backoff.has_jitter(),
            Self::Own(_) => true,
        }
    }
}

impl Series {
    /// The next wait; none: there is to be no further attempt.
    pub(super) fn next(&mut self, throttled: bool) -> Option<Duration> {
        match self {
            Self::Backoff(delays) => Some(delays.draw(throttled)),
            Self::Own(waits) => waits.next(),
        }
    }

    /// Begins with the first wait again; one of the user's own goes on.
    pub(super) fn begin_anew(&mut self) {
        if let Self::Backoff(delays) = self {
            delays.begin_anew();
        }
    }
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backoff(backoff) => backoff.fmt(f),
            Self::Own(_) => f.write_str("Own"),
        }
    }
}
