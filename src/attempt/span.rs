//! A span for each attempt of a retry or a hedge layer. Without the feature `tracing`, there is no span and no cost.

use std::time::Duration;

use crate::outcome::{LayerKind, Outcome};
#[cfg(feature = "tracing")]
use crate::{event, outcome::Reason};

/// The span of an attempt. `None` for a call without an attempt, or if no subscriber records DEBUG.
///
/// The span is boxed, because the future of each call contains it. The allocation is small beside the cost of a span.
#[derive(Debug)]
pub(crate) struct AttemptSpan(#[cfg(feature = "tracing")] Option<Box<tracing::Span>>);

/// An attempt that is not the first one of its call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FurtherAttempt {
    /// The number of attempts of the layer before this one, as OpenTelemetry specifies.
    pub(crate) resend_count: u32,
    /// The delay before the attempt.
    pub(crate) delay: Option<Duration>,
}

#[cfg(feature = "tracing")]
impl AttemptSpan {
    /// Returns no span, for a call without an attempt.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Returns the span of a first attempt, or no span if no subscriber records DEBUG: even entering a disabled span
    /// has a cost.
    #[inline]
    pub(crate) fn first<'a>(layer: LayerKind, name: impl FnOnce() -> &'a str) -> Self {
        if event::is_debug() { Self::begin(layer, name(), None) } else { Self(None) }
    }

    /// Returns the span of a further attempt.
    pub(crate) fn further(layer: LayerKind, name: &str, attempt: FurtherAttempt) -> Self {
        if event::is_debug() { Self::begin(layer, name, Some(attempt)) } else { Self(None) }
    }

    #[cold]
    fn begin(layer: LayerKind, name: &str, further: Option<FurtherAttempt>) -> Self {
        use tracing::field::Empty;
        // The target of a span is a constant.
        macro_rules! span {
            ($target:literal, $hedge:expr) => {
                tracing::debug_span!(
                    target: $target,
                    "attempt",
                    resilience.name = name,
                    layer = layer.as_str(),
                    hedge = $hedge,
                    http.request.resend_count = further.map(|attempt| attempt.resend_count),
                    delay_ms = further.and_then(|attempt| attempt.delay).map(event::ms),
                    outcome = Empty,
                    reason = Empty,
                )
            };
        }
        let span = match layer {
            LayerKind::Hedge => span!("buttress::hedge", further.is_some()),
            _ => span!("buttress::retry", false),
        };
        Self((!span.is_disabled()).then(|| Box::new(span)))
    }

    /// Records the outcome and ends the span.
    #[inline]
    pub(crate) fn end(&mut self, outcome: Outcome) {
        if let Some(span) = self.0.take() {
            record(&span, outcome);
        }
    }

    /// Enters the span until the guard is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Option<tracing::span::Entered<'_>> {
        self.0.as_ref().map(|span| span.enter())
    }
}

#[cfg(feature = "tracing")]
#[cold]
fn record(span: &tracing::Span, outcome: Outcome) {
    span.record("outcome", outcome.kind().as_str());
    span.record("reason", outcome.reason().as_str());
}

/// Ends the span of an attempt that its caller drops.
#[cfg(feature = "tracing")]
impl Drop for AttemptSpan {
    #[inline]
    fn drop(&mut self) {
        self.end(Outcome::cancelled().because(Reason::Dropped));
    }
}

#[cfg(not(feature = "tracing"))]
impl AttemptSpan {
    pub(crate) fn none() -> Self {
        Self()
    }

    pub(crate) fn first<'a>(_: LayerKind, _: impl FnOnce() -> &'a str) -> Self {
        Self()
    }

    pub(crate) fn further(_: LayerKind, _: &str, _: FurtherAttempt) -> Self {
        Self()
    }

    pub(crate) fn end(&mut self, _: Outcome) {}

    pub(crate) fn enter(&self) -> impl Drop {
        struct Entered;
        impl Drop for Entered {
            fn drop(&mut self) {}
        }
        Entered
    }
}
