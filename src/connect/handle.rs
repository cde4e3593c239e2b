use std::{fmt, sync::atomic::Ordering, time::Duration};

use super::core::Connections;
use crate::{ConfigError, call::Shared};

/// Looks at connections, and steers them, from outside of the stack.
///
/// Clones see the same ones, and so do all connectors that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConnectHandle(pub(super) Shared<Connections>);

/// All connections of a layer at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectSnapshot {
    /// How many there may be to one host, if that is bounded.
    pub max_per_host: Option<usize>,
    /// How many there may be in total, if that is bounded.
    pub max_total: Option<usize>,
    /// How many are open.
    pub open: usize,
    /// How many of them serve a call, to the end of its response body, or are no longer HTTP's. Told by
    /// [`Client`](super::Client)s only.
    pub in_use: usize,
    /// How many are being opened.
    pub connecting: usize,
    /// The number of DNS lookups in progress, including those whose connects have timed out. Only a
    /// [`Resolver`](super::Resolver) reports lookups.
    pub lookups: usize,
    /// How many wait for a place, or for a stream of an HTTP/2 connection.
    pub waiting: usize,
    /// How many have been opened.
    pub created: u64,
    /// How many have been closed, by whomever.
    pub closed: u64,
    /// Of these, how many since they were as old as they may become.
    pub closed_for_age: u64,
    /// Of these, how many since nobody used them.
    pub closed_for_idleness: u64,
    /// How many attempts to connect have failed, other than by the connect timeout.
    pub failed: u64,
    /// How many attempts to connect took too long.
    pub timed_out: u64,
    /// How many calls were answered over a connection that had answered one before. Told by
    /// [`Client`](super::Client)s only.
    pub reused: u64,
    /// How many have had to wait for a place.
    pub waits: u64,
    /// The number of calls that have had to wait for a stream, because all streams of the HTTP/2 connections were in
    /// use. `waits` includes them.
    pub waits_for_stream: u64,
    /// How long they have waited, all together.
    pub waited: Duration,
    /// How many were refused: no room to wait, or waited for too long.
    pub saturated: u64,
}

impl ConnectHandle {
    /// All there is to know at this moment.
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

    /// Changes the cap per host: a higher one lets waiters in at once, a lower one takes effect as connections
    /// close.
    ///
    /// # Errors
    ///
    /// Zero.
    pub fn set_max_per_host(&self, most: usize) -> Result<(), ConfigError> {
        self.0.set_per_host(checked("max_per_host", most)?);
        Ok(())
    }

    /// Changes the cap in total, likewise.
    ///
    /// # Errors
    ///
    /// Zero.
    pub fn set_max_total(&self, most: usize) -> Result<(), ConfigError> {
        self.0.set_total(checked("max_total", most)?);
        Ok(())
    }

    /// Closes every connection: an idle one at once, one in use after its calls. What comes next connects anew, as
    /// far as the caps allow.
    /// Done by [`Client`](super::Client)s only.
    pub fn renew(&self) {
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
