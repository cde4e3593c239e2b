//! Events: one macro, and the limit on events that traffic repeats.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::time::{Clock, Nanos};

/// Emits one `tracing` event of a layer: `event!(target, LEVEL, layer, name, field = value, …, "message")`.
///
/// The target is `buttress::<target>`. It is explicit, so that a filter of an application does not depend on the modules
/// of this crate. `layer` is the kind of the layer as text, and `name` is the name of the layer, or empty. They are the
/// fields `layer` and `resilience.name` of each event. `docs/events.md` lists all events.
///
/// - The field `reason` is the result of an `as_str`. Prose is in the message, or in the field `why` ([`prose`]).
/// - A duration is a number of milliseconds ([`ms`]), and its field ends in `_ms`.
/// - A subscriber is user code and may call any handle, so no lock of this crate may be held here.
///
/// The macro computes the values only if a subscriber is interested, and never without the feature `tracing`.
#[cfg(feature = "tracing")]
macro_rules! event {
    (
        $target:ident, $level:ident, $layer:expr, $name:expr,
        $($field:ident = $value:expr,)* $message:literal $(,)?
    ) => {
        ::tracing::event!(
            target: concat!("buttress::", stringify!($target)),
            ::tracing::Level::$level,
            resilience.name = $name,
            layer = $layer,
            $($field = $value,)*
            $message
        )
    };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    (
        $target:ident, $level:ident, $layer:expr, $name:expr,
        $($field:ident = $value:expr,)* $message:literal $(,)?
    ) => {
        if false {
            let _ = (stringify!($level), $message, &$layer, &$name, $(&$value,)*);
        }
    };
}
pub(crate) use event;

/// Returns the value of a field whose text is made by `Display`, such as `why`.
#[cfg(feature = "tracing")]
pub(crate) use tracing::field::display as prose;
#[cfg(not(feature = "tracing"))]
pub(crate) fn prose<T>(value: T) -> T {
    value
}

/// Converts a duration to milliseconds, the unit of the fields that end in `_ms`.
#[inline]
pub(crate) fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Returns whether a subscriber may be interested in events at DEBUG. Costs one load.
#[inline]
pub(crate) fn is_debug() -> bool {
    #[cfg(feature = "tracing")]
    return tracing::level_filters::LevelFilter::current() >= tracing::Level::DEBUG;
    #[cfg(not(feature = "tracing"))]
    false
}

thread_local! {
    /// Whether a stack applies a configuration on this thread.
    static IS_UPDATING: Cell<bool> = const { Cell::new(false) };
}

/// Applies a configuration to the handles of a stack, without an event for each setting. The stack emits one event with
/// the keys that changed.
#[cfg_attr(not(feature = "stack"), allow(dead_code))]
pub(crate) fn as_one_update<T>(apply: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_UPDATING.set(self.0);
        }
    }
    let _restore = Restore(IS_UPDATING.replace(true));
    apply()
}

/// Emits the event "settings changed" for a setter of a handle. Emits nothing if the setter is a part of the
/// [update](as_one_update) of a stack, or if no service uses the layer yet. The arguments are those of [`event`] and
/// the name of the setting.
macro_rules! settings_changed {
    ($target:ident, $is_in_use:expr, $layer:expr, $name:expr, $key:expr) => {
        if $is_in_use && $crate::event::reports_settings() {
            $crate::event::event!($target, INFO, $layer, $name, keys = $key, "settings changed");
        }
    };
}
pub(crate) use settings_changed;

/// Returns whether a setter on this thread emits an event.
#[cfg_attr(not(feature = "full"), allow(dead_code))]
pub(crate) fn reports_settings() -> bool {
    cfg!(feature = "tracing") && !IS_UPDATING.get()
}

/// The minimum time between two summaries of a repeated event.
const SUMMARY_INTERVAL: Nanos = 10_000_000_000;

/// Limits an event that traffic, or an outage, can repeat: the first occurrence is emitted at once, and later
/// occurrences are summarised at most once in 10 s.
///
/// A summary is emitted by the first occurrence after the interval, because layers have no task of their own. Its
/// count includes the occurrences since the previous event. Without tracing nothing is recorded.
#[derive(Debug)]
pub(crate) struct RepeatedEvent {
    clock: Clock,
    /// The earliest time of the next event. 0 before the first one.
    next: AtomicU64,
    /// Occurrences since the previous event.
    unreported: AtomicU64,
}

impl RepeatedEvent {
    pub(crate) fn new() -> Self {
        Self { clock: Clock::new(), next: AtomicU64::new(0), unreported: AtomicU64::new(0) }
    }

    /// Records one occurrence. Returns the number of occurrences to report if an event is due.
    pub(crate) fn record(&self) -> Option<u64> {
        if cfg!(not(feature = "tracing")) {
            return None;
        }
        self.unreported.fetch_add(1, Ordering::Relaxed);
        let next = self.next.load(Ordering::Relaxed);
        let now = self.clock.now();
        if next != 0 && now < next {
            return None;
        }
        let after = now.saturating_add(SUMMARY_INTERVAL);
        // If the exchange fails, another thread emits the event. This occurrence is in its count, or in that of the
        // next event.
        self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some(self.unreported.swap(0, Ordering::Relaxed))
    }
}

#[cfg(all(test, not(buttress_loom), feature = "tracing"))]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn repeated_event_is_emitted_once_and_then_summarised() {
        let event = RepeatedEvent::new();
        assert_eq!(event.record(), Some(1));
        for _ in 1..1000 {
            assert_eq!(event.record(), None);
        }
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(event.record(), Some(1000));
        assert_eq!(event.record(), None);
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(event.record(), Some(2));
    }

    #[test]
    fn concurrent_occurrences_are_all_counted_and_emit_one_event() {
        let event = RepeatedEvent::new();
        let reported: Vec<u64> = thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| (0..1000).filter_map(|_| event.record()).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(reported.len(), 1);
        assert_eq!(reported[0] + event.unreported.load(Ordering::Relaxed), 4000);
    }
}
