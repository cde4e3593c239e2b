use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    lifetime::{CloseReason, NEVER},
    state::ConnectState,
};
use crate::{error::ConfigError, event::settings_changed, outcome::LayerKind, time::nanos};

/// Reads the state of the connections of a layer, changes its settings and recycles its connections, from outside of
/// the stack.
///
/// Clones refer to the same connections: those of all connectors that the layer or a clone of it made.
#[derive(Clone)]
pub struct ConnectHandle(pub(super) Arc<ConnectState>);

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
        let closed = counts.closed();
        ConnectSnapshot {
            max_per_host,
            max_total,
            open: self.0.count_open(),
            in_use: counts.in_use.load(Ordering::Relaxed),
            connecting: counts.connecting.load(Ordering::Relaxed),
            lookups: self.0.lookups.count(),
            waiting: counts.waiting.load(Ordering::Relaxed),
            created: counts.created.load(Ordering::Relaxed),
            closed: closed.iter().sum(),
            closed_for_age: closed[CloseReason::Age as usize],
            closed_for_idleness: closed[CloseReason::Idle as usize],
            failed: counts.failed.load(Ordering::Relaxed),
            timed_out: counts.timed_out.load(Ordering::Relaxed),
            reused: counts.reused.load(Ordering::Relaxed),
            waits: counts.waits.load(Ordering::Relaxed),
            waits_for_stream: counts.stream_waits.load(Ordering::Relaxed),
            waited: Duration::from_nanos(counts.waited.load(Ordering::Relaxed)),
            saturated: counts.saturated.load(Ordering::Relaxed),
        }
    }

    /// Changes the [maximum number of connections to one host](super::layer::ConnectLayer::max_per_host).
    ///
    /// A higher maximum admits waiting callers at once. A lower one takes effect as connections close.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_per_host(&self, max: usize) -> Result<(), ConfigError> {
        self.0.set_max_per_host(one_or_more("max_per_host", max)?);
        self.report_setting("max_per_host");
        Ok(())
    }

    /// Changes the [maximum number of connections in total](super::layer::ConnectLayer::max_total), as
    /// [`set_max_per_host`](Self::set_max_per_host) does per host.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_total(&self, max: usize) -> Result<(), ConfigError> {
        self.0.set_max_total(one_or_more("max_total", max)?);
        self.report_setting("max_total");
        Ok(())
    }

    /// Changes the [length and the maximum wait of the queue](super::layer::ConnectLayer::queue). Applies to callers
    /// that queue later.
    ///
    /// # Errors
    ///
    /// Fails if the maximum wait is below 1 ms and the length is not 0. The settings are then unchanged.
    pub fn set_queue(&self, length: usize, max_wait: Duration) -> Result<(), ConfigError> {
        if length > 0 && max_wait < Duration::from_millis(1) {
            let remedy = "use 1ms or more, or a length of 0";
            return Err(ConfigError::new("queue.max_wait", max_wait, remedy));
        }
        self.0.settings.max_wait.store(nanos(max_wait), Ordering::Relaxed);
        self.0.settings.queue_length.store(length, Ordering::Relaxed);
        self.report_setting("queue");
        Ok(())
    }

    /// Changes the [timeout of a connect](super::layer::ConnectLayer::connect_timeout). Applies to connects that begin
    /// later.
    ///
    /// # Errors
    ///
    /// Fails if the timeout is zero. The setting is then unchanged.
    pub fn set_connect_timeout(
        &self,
        timeout: impl Into<Option<Duration>>,
    ) -> Result<(), ConfigError> {
        self.set_limit(&self.0.settings.connect_timeout, "connect_timeout", timeout.into())
    }

    /// Changes the [maximum age of a connection](super::layer::ConnectLayer::max_age). Applies to connections that are
    /// opened later.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_age(&self, max: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        self.set_limit(&self.0.settings.max_age, "max_age", max.into())
    }

    /// Changes the [maximum idle time of a connection](super::layer::ConnectLayer::max_idle). Applies to connections
    /// that are opened later.
    ///
    /// # Errors
    ///
    /// Fails if the maximum is zero. The setting is then unchanged.
    pub fn set_max_idle(&self, max: impl Into<Option<Duration>>) -> Result<(), ConfigError> {
        self.set_limit(&self.0.settings.max_idle, "max_idle", max.into())
    }

    /// Changes the [share by which age and idle time are shortened](super::layer::ConnectLayer::jitter). Applies to
    /// connections that are opened later.
    ///
    /// # Errors
    ///
    /// Fails if the share is not 0 to 0.9. The setting is then unchanged.
    pub fn set_jitter(&self, share: f64) -> Result<(), ConfigError> {
        if !(0.0..=0.9).contains(&share) {
            return Err(ConfigError::new("jitter", share, "use 0 to 0.9"));
        }
        self.0.settings.jitter.store((share * 1000.0) as u32, Ordering::Relaxed);
        self.report_setting("jitter");
        Ok(())
    }

    /// Closes every connection: an idle one at once, and one in use after its calls.
    ///
    /// Later calls use new connections as far as the caps allow. Only connections of a
    /// [`Client`](super::client::Client) are closed.
    pub fn recycle(&self) {
        self.0.recycle();
    }

    /// Stores the limit of a time. `None` means that there is no limit.
    fn set_limit(
        &self,
        setting: &AtomicU64,
        field: &'static str,
        time: Option<Duration>,
    ) -> Result<(), ConfigError> {
        let limit = match time {
            Some(time) => nanos(ConfigError::above_zero(field, time)?),
            None => NEVER,
        };
        setting.store(limit, Ordering::Relaxed);
        self.report_setting(field);
        Ok(())
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let layer = LayerKind::Connect.as_str();
        settings_changed!(connect, self.0.is_in_use(), layer, self.0.name(), key);
    }
}

fn one_or_more(field: &'static str, max: usize) -> Result<usize, ConfigError> {
    match max {
        0 => Err(ConfigError::new(field, max, "use 1 or more")),
        max => Ok(max),
    }
}

impl fmt::Debug for ConnectHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ConnectHandle").field(&*self.0).finish()
    }
}
