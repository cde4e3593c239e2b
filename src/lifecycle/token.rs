use std::{fmt, future::Future};

use http::Extensions;

use super::state::{Phase, State};
use crate::call::{Lease, Permit};

/// Tells a call that the process ends: for streams, and for whatever else would not end by itself.
///
/// A [`LifecycleLayer`](super::LifecycleLayer) puts one into the extensions of every request; axum's
/// `Extension<Drain>` takes it out.
#[derive(Clone)]
pub struct Drain(Lease<State>);

impl Drain {
    pub(super) fn new(state: Lease<State>) -> Self {
        Self(state)
    }

    /// What a request carries.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// Whether what is under way should come to its end now.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.phase() >= Phase::Stopping
    }

    /// Waits until what is under way should come to its end: at once, if that is so already. Fits
    /// `futures::StreamExt::take_until`.
    pub fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        let state = self.0.clone();
        async move { state.reached(Phase::Stopping).await }
    }

    /// Counts as one more call until it is dropped, so that the process waits for it, up to the longest time: for
    /// work that no answer waits for, as a WebSocket's, or a task of its own.
    pub fn guard(&self) -> DrainGuard {
        DrainGuard { _permit: self.0.enter() }
    }
}

/// Work under way; made by [`Drain::guard`].
#[must_use = "dropping it says that the work has ended"]
pub struct DrainGuard {
    _permit: Permit<Lease<State>>,
}

impl fmt::Debug for DrainGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DrainGuard")
    }
}

impl fmt::Debug for Drain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Drain").field(&self.0.phase()).finish()
    }
}
