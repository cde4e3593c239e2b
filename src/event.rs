//! Events: one macro, and the limit on events that traffic repeats.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::time::{Clock, Nanos};

/// Emits one `tracing` event with the target `buttress::<layer>`. Without the feature `tracing` it expands to no code.
///
/// The target is explicit, so that a filter of an application does not depend on the modules of this crate.
///
/// A subscriber is user code and may call any handle, so no lock of this crate may be held here.
#[cfg(feature = "tracing")]
macro_rules! event {
    ($layer:ident, $level:ident, $($what:tt)*) => {
        ::tracing::event!(
            target: concat!("buttress::", stringify!($layer)),
            ::tracing::Level::$level,
            $($what)*
        )
    };
}
#[cfg(not(feature = "tracing"))]
macro_rules! event {
    ($($what:tt)*) => {{}};
}
pub(crate) use event;

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
