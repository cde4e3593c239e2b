//! A subscriber of events and spans for the current thread.

use std::sync::OnceLock;

use tracing::{
    Dispatch, Event, Metadata, Subscriber,
    span::{Attributes, Id, Record},
    subscriber::{DefaultGuard, Interest, set_default},
};

/// Makes this subscriber the default of the current thread, until the guard is dropped.
///
/// tracing caches for each callsite whether any subscriber of the process is interested in it. With one subscriber it
/// asks only the default of the thread that reaches the callsite first. The thread of another test has no default, and
/// disables the callsite for all threads. So a second subscriber exists for as long as the process: its interest is
/// `sometimes`, and tracing asks the default of the current thread at each event.
pub fn listen<S: Subscriber + Send + Sync + 'static>(subscriber: S) -> DefaultGuard {
    static SOMETIMES: OnceLock<Dispatch> = OnceLock::new();
    SOMETIMES.get_or_init(|| Dispatch::new(Sometimes));
    let guard = set_default(subscriber);
    // A thread may have registered a callsite while the second subscriber was created.
    tracing::callsite::rebuild_interest_cache();
    guard
}

/// Is sometimes interested in each callsite, and enables none.
struct Sometimes;

impl Subscriber for Sometimes {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, _: &Metadata<'_>) -> bool {
        false
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
