//! One span for each attempt; nothing at all without the feature.

#[cfg(feature = "tracing")]
#[derive(Debug)]
pub(super) struct Span(Option<tracing::Span>);

#[cfg(feature = "tracing")]
impl Span {
    /// A further attempt says which it is, as OpenTelemetry has it. None where nobody listens: even a
    /// disabled span is not for nothing to enter.
    #[inline]
    pub(super) fn attempt(resent: u32) -> Self {
        Self(tracing::enabled!(tracing::Level::DEBUG).then(|| {
            let empty = tracing::field::Empty;
            let span = tracing::debug_span!("attempt", "http.request.resend_count" = empty);
            if resent > 0 {
                span.record("http.request.resend_count", resent);
            }
            span
        }))
    }

    pub(super) fn none() -> Self {
        Self(None)
    }

    #[inline]
    pub(super) fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        match &self.0 {
            Some(span) => span.in_scope(act),
            None => act(),
        }
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
