//! One span for each attempt; nothing at all without the feature.

#[cfg(feature = "tracing")]
#[derive(Debug)]
pub(super) struct Span(tracing::Span);

#[cfg(feature = "tracing")]
impl Span {
    /// A further attempt says which it is, as OpenTelemetry has it.
    pub(super) fn attempt(resent: u32) -> Self {
        let span =
            tracing::debug_span!("attempt", "http.request.resend_count" = tracing::field::Empty);
        if resent > 0 {
            span.record("http.request.resend_count", resent);
        }
        Self(span)
    }

    pub(super) fn none() -> Self {
        Self(tracing::Span::none())
    }

    pub(super) fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        self.0.in_scope(act)
    }
}

#[cfg(not(feature = "tracing"))]
#[derive(Debug)]
pub(super) struct Span;

#[cfg(not(feature = "tracing"))]
impl Span {
    pub(super) fn attempt(_: u32) -> Self {
        Self
    }

    pub(super) fn none() -> Self {
        Self
    }

    pub(super) fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        act()
    }
}
