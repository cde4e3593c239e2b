//! What a registry exports besides the text page.

#[cfg(feature = "metrics")]
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The exports of one registry. Its clones share them.
#[derive(Debug, Default)]
pub(super) struct Exports {
    /// Whether the metrics are published through the `metrics` facade.
    #[cfg(feature = "metrics")]
    facade: AtomicBool,
}

#[cfg(feature = "metrics")]
impl Exports {
    /// Turns the facade on. Returns whether it was off.
    pub(super) fn use_facade(&self) -> bool {
        !self.facade.swap(true, Relaxed)
    }

    /// Returns whether the facade is on.
    pub(super) fn uses_facade(&self) -> bool {
        self.facade.load(Relaxed)
    }
}
