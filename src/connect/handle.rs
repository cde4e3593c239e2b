use std::{fmt, sync::Arc, sync::atomic::Ordering, time::Duration};

use super::connections::Connections;
use crate::error::ConfigError;

/// Reads the state of the connections of a layer, changes its caps and renews its connections, from outside of the
/// stack.
///
/// Clones refer to the same connections: those of all connectors that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConnectHandle(pub(super) Arc<Connections>);

/// The connections of a layer at one moment, and its counters since it was created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectSnapshot {
    /// The maximum number of connections to one host, or `None`.
    pub max_per_host: Option<usize>,
    /// The maximum number of connections in total, or `None`.
    pub max_total: Option<usize>,
    /// The number of open connections.
    pub open: usize,
    /// The number of open connections that serve a call, to the end of its response body, or were upgraded or made a
    /// tunnel. Only a [`Client`](super::client::Client) reports uses.
    pub in_use: usize,
    /// The number of connections that are being opened.
    pub connecting: usize,
    /// The number of DNS lookups in progress, including those whose connects have timed out. Only a
    /// [`Resolver`](super::resolve::Resolver) reports lookups.
    pub lookups: usize,
    /// The number of queue entries: callers that wait for a permit or for a stream of an HTTP/2 connection.
    pub waiting: usize,
    /// The number of connections that have been opened.
    pub created: u64,
    /// The number of connections that have been closed, by this crate or by the peer.
    pub closed: u64,
    /// The number of connections that have been closed because of their age. `closed` includes them.
    pub closed_for_age: u64,
    /// The number of connections that have been closed because they were unused. `closed` includes them.
    pub closed_for_idleness: u64,
    /// The number of connects that have failed before the connect timeout.
    pub failed: u64,
    /// The number of connects that the connect timeout has ended.
    pub timed_out: u64,
    /// The number of calls whose response came over a connection that had delivered a response before. Only a
    /// [`Client`](super::client::Client) reports uses.
    pub reused: u64,
    /// The number of queue entries since the layer was created.
    pub waits: u64,
    /// The number of calls that have had to wait for a stream, because all streams of the HTTP/2 connections were in
    /// use. `waits` includes them.
    pub waits_for_stream: u64,
    /// The total time of all queue entries that have ended.
    pub waited: Duration,
    /// The number of rejections, because the queue was full or the maximum wait was over.
    pub saturated: u64,
}

impl ConnectHandle {
    /// Returns a copy of the current state and counters. The values are read one after the other.
    #[must_use]
    pub fn snapshot(&self) -> ConnectSnapshot {
        let counts = &self.0.counts;
        let (max_per_host, max_total) = self.0.caps();
        ConnectSnapshot {
            max_per_host,
            max_total,
            open: self.0.count_open(),
            in_use: counts.in_use.load(Ordering::Relaxed),
            connecting: counts.connecting.load(Ordering::Relaxed),
            lookups: self.0.lookups.count(),
            waiting: counts.waiting.load(Ordering::Relaxed),
            created: counts.created.load(Ordering::Relaxed),
            closed: counts.closed.load(Ordering::Relaxed),
            closed_for_age: counts.closed_for_age.load(Ordering::Relaxed),
            closed_for_idleness: counts.closed_for_idleness.load(Ordering::Relaxed),
            failed: counts.failed.load(Ordering::Relaxed),
            timed_out: counts.timed_out.load(Ordering::Relaxed),
            reused: counts.reused.load(Ordering::Relaxed),
            waits: counts.waits.load(Ordering::Relaxed),
            waits_for_stream: counts.stream_waits.load(Ordering::Relaxed),
            waited: Duration::from_nanos(counts.waited.load(Ordering::Relaxed)),
            saturated: counts.saturated.load(Ordering::Relaxed),
        }
    }

    /// Changes the maximum number of connections per host.
    ///
    /// A higher maximum admits waiting callers at once. A lower one takes effect as connections close.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_per_host(&self, most: usize) -> Result<(), ConfigError> {
        self.0.set_per_host(checked("max_per_host", most)?);
        Ok(())
    }

    /// Changes the maximum number of connections in total, as [`set_max_per_host`](Self::set_max_per_host) does per
    /// host.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_total(&self, most: usize) -> Result<(), ConfigError> {
        self.0.set_total(checked("max_total", most)?);
        Ok(())
    }

    /// Closes every connection: an idle one at once, and one in use after its calls.
    ///
    /// Later calls use new connections as far as the caps allow. Only connections of a [`Client`](super::client::Client) are
    /// closed.
    pub fn recycle(&self) {
        self.0.ask_all();
    }
}

pub(super) fn checked(field: &'static str, most: usize) -> Result<usize, ConfigError> {
    match most {
        0 => Err(ConfigError::new(field, most, "use 1 or more")),
        most => Ok(most),
    }
}

impl fmt::Debug for ConnectHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnectHandle").field(&*self.0).finish()
    }
}
