//! A subscriber of events and spans for the current thread.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    mem,
    sync::{Arc, Mutex, OnceLock},
};

use tracing::{
    Dispatch, Event, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::{DefaultGuard, Interest, set_default},
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt},
    registry,
    registry::LookupSpan,
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

// ===== A log of events and spans =====

/// An event or a span of this crate, with the text of each field.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// The message of an event, or the name of a span.
    pub message: String,
    pub level: String,
    /// The target without `buttress::`.
    pub target: String,
    pub fields: BTreeMap<String, String>,
    /// The index of the parent of a span in the list of all spans.
    pub parent: Option<usize>,
    pub is_closed: bool,
}

impl Entry {
    /// Returns the text of a field, or an empty one.
    pub fn get(&self, field: &str) -> &str {
        self.fields.get(field).map_or("", String::as_str)
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let text = format!("{value:?}");
        match field.name() {
            "message" => self.message = text,
            name => drop(self.fields.insert(name.to_owned(), text)),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name().to_owned(), value.to_owned());
    }
}

/// Records the events of this crate, and all spans, of the current thread.
#[derive(Clone, Default)]
pub struct EventLog {
    events: Arc<Mutex<Vec<Entry>>>,
    spans: Arc<Mutex<Vec<Entry>>>,
}

impl EventLog {
    /// Begins to record. Dropping the guard ends the recording.
    pub fn listen() -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = listen(registry().with(log.clone()));
        (log, guard)
    }

    /// Removes and returns the events.
    pub fn take(&self) -> Vec<Entry> {
        mem::take(&mut *self.events.lock().unwrap())
    }

    pub fn spans(&self) -> Vec<Entry> {
        self.spans.lock().unwrap().clone()
    }
}

fn entry(metadata: &Metadata<'_>) -> Entry {
    let target = metadata.target();
    Entry {
        level: metadata.level().to_string(),
        target: target.strip_prefix("buttress::").unwrap_or(target).to_owned(),
        ..Entry::default()
    }
}

/// The index of a span in the list of all spans, in the extensions of the span.
struct Index(usize);

impl<S> Layer<S> for EventLog
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("buttress::") {
            let mut entry = entry(event.metadata());
            event.record(&mut entry);
            self.events.lock().unwrap().push(entry);
        }
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut entry = entry(attributes.metadata());
        entry.message = attributes.metadata().name().to_owned();
        entry.parent = span.parent().and_then(|span| span.extensions().get().map(|Index(n)| *n));
        attributes.record(&mut entry);
        let mut spans = self.spans.lock().unwrap();
        span.extensions_mut().insert(Index(spans.len()));
        spans.push(entry);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(Index(n)) = span.extensions().get() {
            values.record(&mut self.spans.lock().unwrap()[*n]);
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        if let Some(Index(n)) = span.extensions().get() {
            self.spans.lock().unwrap()[*n].is_closed = true;
        }
    }
}
