use std::{fmt, future::Future};

use http::Extensions;

use super::state::{LifecyclePhase, LifecycleState, LifecycleStep};
use crate::permit::{Permit, ShardedRef};

/// A token that notifies a call of the drain, for streams and other work that does not end by itself.
///
/// A [`LifecycleLayer`](super::layer::LifecycleLayer) inserts a token into the extensions of every request. axum's
/// `Extension<Drain>` extracts it. [`Lifecycle::token`](super::handle::Lifecycle::token) returns a token for other
/// work.
#[derive(Clone)]
pub struct Drain(ShardedRef<LifecycleState>);

impl Drain {
    pub(super) fn new(state: ShardedRef<LifecycleState>) -> Self {
        Self(state)
    }

    /// Returns the token in the extensions of a request, if there is one.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// Returns whether the phase is [`Stopping`](LifecyclePhase::Stopping) or later, so that streams should end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.0.phase() >= LifecyclePhase::Stopping
    }

    /// Returns a future that resolves when the phase is [`Stopping`](LifecyclePhase::Stopping) or later, at once if it
    /// already is.
    ///
    /// A stream ends at this time by `futures::StreamExt::take_until`.
    pub fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        let state = self.0.clone();
        async move { state.reached(LifecycleStep::Stopping).await }
    }

    /// Returns a guard that counts as one call in flight until it is dropped. The drain waits for it until the drain
    /// timeout ([`drain_timeout`](super::handle::Lifecycle::drain_timeout)) expires.
    ///
    /// For work that outlasts its response, such as a WebSocket or a spawned task.
    pub fn guard(&self) -> DrainGuard {
        DrainGuard { _permit: self.0.acquire() }
    }
}

/// A guard that counts as one call in flight until it is dropped. Made by [`Drain::guard`].
#[must_use = "the end of the work is reported when this is dropped"]
pub struct DrainGuard {
    _permit: Permit<ShardedRef<LifecycleState>>,
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
