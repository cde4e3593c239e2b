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
        if tracing::level_filters::LevelFilter::current() < tracing::Level::DEBUG {
            return Self::none();
        }
        Self::heard(resent)
    }

    #[cold]
    fn heard(resent: u32) -> Self {
        Self(tracing::enabled!(tracing::Level::DEBUG).then(|| {
            let empty = tracing::field::Empty;
            let span = tracing::debug_span!("attempt", "http.request.resend_count" = empty);
            if resent > 0 {
                span.record("http.request.resend_count", resent);
            }
            span
        }))
    }

    #[inline]
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Until what it gives is dropped.
    #[inline]
    pub(super) fn enter(&self) -> Option<tracing::span::Entered<'_>> {
        self.0.as_ref().map(tracing::Span::enter)
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

    pub(super) fn enter(&self) -> impl Drop {
        struct Entered;
        impl Drop for Entered {
            fn drop(&mut self) {}
        }
        Entered
    }
}
