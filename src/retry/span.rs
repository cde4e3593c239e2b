//! A span for each attempt. Without the feature `tracing`, there is no span and no cost.

use std::time::Duration;

use crate::outcome::Outcome;

#[cfg(feature = "tracing")]
const TARGET: &str = "buttress::retry";

/// `None` for a call without an attempt, or if no subscriber records DEBUG.
#[derive(Debug)]
pub(super) struct AttemptSpan(#[cfg(feature = "tracing")] Option<tracing::Span>);

#[cfg(feature = "tracing")]
impl AttemptSpan {
    /// Returns no span, for a call without an attempt.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Returns the span of a first attempt. There is none if no subscriber records DEBUG, because even entering a
    /// disabled span has a cost.
    #[inline]
    pub(super) fn first() -> Self {
        if tracing::level_filters::LevelFilter::current() < tracing::Level::DEBUG {
            return Self(None);
        }
        Self::begun()
    }

    #[cold]
    fn begun() -> Self {
        Self(tracing::enabled!(target: TARGET, tracing::Level::DEBUG).then(|| {
            use tracing::field::Empty;
            tracing::debug_span!(
                target: TARGET,
                "attempt",
                "http.request.resend_count" = Empty,
                delay_ms = Empty,
                reason = Empty
            )
        }))
    }

    /// Returns the span of a further attempt, with the number of the retry, as OpenTelemetry specifies, and the delay
    /// before it.
    pub(super) fn further(resent: u32, waited: Duration) -> Self {
        let this = Self::first();
        if let Some(span) = &this.0 {
            span.record("http.request.resend_count", resent);
            span.record("delay_ms", waited.as_millis() as u64);
        }
        this
    }

    /// Records the outcome and ends the span.
    pub(super) fn end(&mut self, outcome: Outcome) {
        if let Some(span) = self.0.take() {
            span.record("reason", tracing::field::debug(outcome));
        }
    }

    /// Enters the span until the guard is dropped.
    #[inline]
    pub(super) fn enter(&self) -> Option<tracing::span::Entered<'_>> {
        self.0.as_ref().map(tracing::Span::enter)
    }
}

#[cfg(not(feature = "tracing"))]
impl AttemptSpan {
    pub(super) fn none() -> Self {
        Self()
    }

    pub(super) fn first() -> Self {
        Self()
    }

    pub(super) fn further(_: u32, _: Duration) -> Self {
        Self()
    }

    pub(super) fn end(&mut self, _: Outcome) {}

    pub(super) fn enter(&self) -> impl Drop {
        struct Entered;
        impl Drop for Entered {
            fn drop(&mut self) {}
        }
        Entered
    }
}
