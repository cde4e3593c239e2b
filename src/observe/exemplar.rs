//! Exemplars: one traced value for each bucket of a histogram.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::SystemTime,
};

use tokio::time::Instant;

use crate::sync::Mutex;

/// OpenMetrics limits the names and values of the labels of an exemplar to 128 characters. The name is `trace_id`.
const MAX_CHARS: usize = 128 - "trace_id".len();

/// The id of the trace that a call belongs to, at most 120 characters.
///
/// ```
/// use buttress::observe::TraceId;
///
/// let id = TraceId::from_bytes(0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes());
/// assert_eq!(id.unwrap().as_str(), "4bf92f3577b34da6a3ce929d0e0e4736");
/// assert_eq!(TraceId::from_bytes([0; 16]), None);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TraceId(Arc<str>);

impl TraceId {
    /// Returns an id of W3C trace context, which OpenTelemetry uses too, in hexadecimal form. Returns `None` for the
    /// invalid id that consists of zeros.
    #[must_use]
    pub fn from_bytes(id: [u8; 16]) -> Option<Self> {
        let id = u128::from_be_bytes(id);
        (id != 0).then(|| Self(format!("{id:032x}").into()))
    }

    /// Returns an id of any other form. Returns `None` if the text is empty or has more than 120 characters.
    #[must_use]
    pub fn from_text(id: &str) -> Option<Self> {
        (1..=MAX_CHARS).contains(&id.chars().count()).then(|| Self(id.into()))
    }

    /// Returns the text of the id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A value in a bucket of a histogram, with the trace of its call.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Exemplar {
    /// The trace of the call.
    pub trace_id: TraceId,
    /// The value, in the unit of the histogram.
    pub value: f64,
    /// The time at which the value was recorded.
    pub at: SystemTime,
}

/// The last exemplar of each bucket of a histogram.
#[derive(Debug)]
pub(super) struct BucketExemplars {
    began: Instant,
    buckets: Box<[BucketExemplar]>,
}

#[derive(Debug, Default)]
struct BucketExemplar {
    /// The second in which the exemplar was written, counted from 1 at `began`. 0 before the first exemplar. It is
    /// written under the lock, and read without it.
    second: AtomicU64,
    exemplar: Mutex<Option<Exemplar>>,
}

impl BucketExemplars {
    pub(super) fn new(buckets: usize) -> Self {
        let buckets = (0..buckets).map(|_| BucketExemplar::default()).collect();
        Self { began: Instant::now(), buckets }
    }

    /// Writes the exemplar of a bucket, unless the bucket has one of this second. `trace_id` runs only in that case, and
    /// without a lock. Never waits: a bucket that another thread writes or reads is skipped.
    #[inline]
    pub(super) fn record(
        &self,
        bucket: usize,
        value: f64,
        now: Instant,
        trace_id: impl FnOnce() -> Option<TraceId>,
    ) {
        let second = now.saturating_duration_since(self.began).as_secs() + 1;
        let Some(bucket) = self.buckets.get(bucket) else { return };
        if bucket.second.load(Relaxed) != second {
            bucket.write(second, value, trace_id);
        }
    }

    /// Returns the exemplar of each bucket.
    pub(super) fn exemplars(&self) -> Vec<Option<Exemplar>> {
        self.buckets.iter().map(|bucket| bucket.exemplar.lock().clone()).collect()
    }
}

impl BucketExemplar {
    #[cold]
    fn write(&self, second: u64, value: f64, trace_id: impl FnOnce() -> Option<TraceId>) {
        let Some(trace_id) = trace_id() else { return };
        let next = Exemplar { trace_id, value, at: SystemTime::now() };
        let Some(mut exemplar) = self.exemplar.try_lock() else { return };
        self.second.store(second, Relaxed);
        *exemplar = Some(next);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn exemplar_is_written_once_a_second_and_only_with_a_trace() {
        let exemplars = BucketExemplars::new(2);
        let at = |ms| exemplars.began + Duration::from_millis(ms);
        let record = |bucket, value, ms, id: &str| {
            exemplars.record(bucket, value, at(ms), || TraceId::from_text(id));
        };
        let ids = || {
            let all = exemplars.exemplars().into_iter();
            all.map(|one| one.map(|one| one.trace_id.to_string())).collect::<Vec<_>>()
        };
        record(0, 0.1, 0, "");
        assert_eq!(ids(), [None, None]);
        record(0, 0.2, 10, "a");
        record(0, 0.3, 999, "b");
        record(1, 7.0, 999, "c");
        record(9, 7.0, 999, "no such bucket");
        assert_eq!(ids(), [Some("a".to_owned()), Some("c".to_owned())]);
        record(0, 0.4, 1000, "d");
        assert_eq!(ids(), [Some("d".to_owned()), Some("c".to_owned())]);
        let _held = exemplars.buckets[0].exemplar.try_lock();
        record(0, 0.5, 2000, "a bucket in use is skipped");
    }

    #[test]
    fn ids_are_bounded() {
        assert!(TraceId::from_text(&"ä".repeat(120)).is_some());
        assert!(TraceId::from_text(&"a".repeat(121)).is_none());
        assert!(TraceId::from_text("").is_none());
    }
}
