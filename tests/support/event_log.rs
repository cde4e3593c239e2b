//! Records the events of the current thread.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    mem,
    sync::{Arc, Mutex},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::DefaultGuard,
};

use super::tracing_events::listen;

/// One event with its fields as text.
#[derive(Debug)]
pub struct LoggedEvent {
    pub level: Level,
    pub target: &'static str,
    pub message: String,
    fields: BTreeMap<&'static str, String>,
}

impl LoggedEvent {
    /// Returns a field as text.
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).unwrap_or_else(|| panic!("no field {name}: {self:?}"))
    }
}

impl Visit for LoggedEvent {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            name => drop(self.fields.insert(name, value)),
        }
    }
}

/// Records the events of the current thread from a level upwards. Dropping it ends the recording.
pub struct EventLog {
    events: Arc<Mutex<Vec<LoggedEvent>>>,
    _guard: DefaultGuard,
}

impl EventLog {
    /// Begins to record events at INFO and above.
    pub fn at_info() -> Self {
        let events = Arc::default();
        let _guard = listen(Recorder(Arc::clone(&events), Level::INFO));
        Self { events, _guard }
    }

    /// Removes and returns the events so far.
    pub fn take(&self) -> Vec<LoggedEvent> {
        mem::take(&mut self.events.lock().unwrap())
    }
}

struct Recorder(Arc<Mutex<Vec<LoggedEvent>>>, Level);

impl Subscriber for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.level() <= &self.1
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut logged = LoggedEvent {
            level: *metadata.level(),
            target: metadata.target(),
            message: String::new(),
            fields: BTreeMap::new(),
        };
        event.record(&mut logged);
        self.0.lock().unwrap().push(logged);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
