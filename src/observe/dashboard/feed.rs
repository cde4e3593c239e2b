//! The data of the page: the status as one document, and as the frames of streams.
//!
//! All streams of a page share one sample of each second. A sample contains the JSON text of each layer, so that the next
//! sample finds the layers that have changed, and the frame with these changes is made once for all streams.

use std::{
    collections::HashSet,
    fmt::Write,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    json::JsonText,
    observe::{
        registry::Registry,
        sampler::SAMPLE_INTERVAL,
        status::{LayerStatus, Status, StatusJson},
    },
    sync::Mutex,
};

/// The settings of the page that change its data.
#[derive(Clone, Debug, Default)]
pub(super) struct PageOptions {
    pub(super) title: String,
    pub(super) has_controls: bool,
    pub(super) has_details: bool,
}

impl PageOptions {
    fn json(&self) -> StatusJson<'_> {
        StatusJson {
            title: &self.title,
            has_controls: self.has_controls,
            has_details: self.has_details,
            ..StatusJson::default()
        }
    }
}

/// The data of one page.
#[derive(Debug)]
pub(super) struct Feed {
    pub(super) registry: Registry,
    options: PageOptions,
    newest: Mutex<Newest>,
}

/// The newest sample and its number. The streams hold the sample, so it is dropped with the last of them.
#[derive(Debug, Default)]
struct Newest {
    number: u64,
    sample: Weak<FeedSample>,
}

/// The status at one time, for all streams.
#[derive(Debug)]
pub(super) struct FeedSample {
    /// Increases by 1 with each sample.
    number: u64,
    /// The time of the next sample.
    pub(super) next_at: Instant,
    status: Status,
    /// The JSON texts of the layers, with the newest value of each track.
    layers: Vec<String>,
    /// The changes since the previous sample, or all layers if that sample was dropped.
    tick: Bytes,
}

impl Feed {
    pub(super) fn new(registry: Registry, options: PageOptions) -> Arc<Self> {
        Arc::new(Self { registry, options, newest: Mutex::default() })
    }

    /// Returns the status as one document.
    pub(super) fn document(&self) -> String {
        self.registry.status().write_json(&self.options.json())
    }

    /// Returns the sample of this time.
    pub(super) fn sample(&self, now: Instant) -> Arc<FeedSample> {
        let is_current = |sample: &Arc<FeedSample>| now < sample.next_at;
        let (number, before) = {
            let newest = self.newest.lock();
            (newest.number, newest.sample.upgrade())
        };
        if let Some(sample) = before.as_ref().filter(|sample| is_current(sample)) {
            return sample.clone();
        }
        // Reads the layers and writes the sample without the lock. Another stream may do the same; the first sample is
        // used. If that sample has been dropped meanwhile, no stream has seen its number, so the number is used again.
        let status = self.registry.status();
        let sample = Arc::new(self.next(number + 1, now, status, before.as_deref()));
        let mut newest = self.newest.lock();
        if let Some(other) = newest.sample.upgrade().filter(|_| newest.number != number) {
            return other;
        }
        *newest = Newest { number: sample.number, sample: Arc::downgrade(&sample) };
        sample
    }

    fn next(
        &self,
        number: u64,
        now: Instant,
        status: Status,
        before: Option<&FeedSample>,
    ) -> FeedSample {
        let options = StatusJson { max_samples: 1, ..self.options.json() };
        let text = |layer: &LayerStatus| {
            let mut json = String::with_capacity(512);
            layer.write_json(&mut json, &options);
            json
        };
        let layers: Vec<String> = status.layers.iter().map(text).collect();
        let known: HashSet<&String> = before.iter().flat_map(|before| &before.layers).collect();
        let mut tick = String::with_capacity(1024);
        tick.push_str("event: tick\ndata: {");
        status.write_head(&mut tick, &options);
        tick.push_str(",\"order\":[");
        for (nth, layer) in status.layers.iter().enumerate() {
            let comma = if nth > 0 { "," } else { "" };
            let _ = write!(tick, "{comma}{}", JsonText(&layer.id()));
        }
        tick.push_str("],\"layers\":[");
        for (nth, layer) in layers.iter().filter(|text| !known.contains(text)).enumerate() {
            let comma = if nth > 0 { "," } else { "" };
            let _ = write!(tick, "{comma}{layer}");
        }
        tick.push_str("]}\n\n");
        // A late sample does not delay the following ones, unless it is later than a whole interval.
        let due = before.map(|before| before.next_at + SAMPLE_INTERVAL).filter(|due| *due > now);
        let next_at = due.unwrap_or(now + SAMPLE_INTERVAL);
        FeedSample { number, next_at, status, layers, tick: tick.into() }
    }

    /// Returns the whole status as an event. Its `id` is the number of the last decision.
    pub(super) fn snapshot(&self, sample: &FeedSample) -> String {
        let json = sample.status.write_json(&self.options.json());
        match sample.last_decision() {
            0 => format!("event: snapshot\ndata: {json}\n\n"),
            id => format!("event: snapshot\nid: {id}\ndata: {json}\n\n"),
        }
    }
}

impl FeedSample {
    /// Returns the changes since the previous sample if `seen` is that sample. Otherwise returns `None`: the stream needs
    /// the whole status.
    pub(super) fn tick_after(&self, seen: &Self) -> Option<&Bytes> {
        (seen.number + 1 == self.number).then_some(&self.tick)
    }

    pub(super) fn is_newer_than(&self, other: &Self) -> bool {
        self.number > other.number
    }

    /// Returns the number of the last decision, or 0.
    pub(super) fn last_decision(&self) -> u64 {
        self.status.decisions.first().map_or(0, |decision| decision.id)
    }

    /// Writes the decisions after this number as events, the oldest first.
    pub(super) fn write_decisions(&self, after: u64, to: &mut String) {
        for decision in self.status.decisions.iter().rev().filter(|decision| decision.id > after) {
            let _ = write!(to, "event: decision\nid: {}\ndata: ", decision.id);
            decision.write_json(to);
            to.push_str("\n\n");
        }
    }
}
