//! The state of each host, and the entries of the callers that wait.
//!
//! A host is in the [`Hosts`](super::state::Hosts) while it has users: calls, connects and open connections, each
//! with a [`HostRef`]. Users of one client share the [`Streams`] of this client. The last user removes the entries, so
//! that their number is bounded by the number of users.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::{
    semaphore::{PermitPair, ShrinkableSemaphore},
    state::ConnectState,
    streams::Streams,
};
use std::time::Duration;

use crate::time::WaitResult;
use crate::{origin::Origin, time::Nanos};

/// The permits and queues of one host.
pub(super) struct Host {
    id: u64,
    pub(super) origin: Origin,
    /// The permits of connections.
    pub(super) permits: Arc<ShrinkableSemaphore>,
    /// The checkout permits. The limit is that of `permits`.
    pub(super) checkout_permits: Arc<ShrinkableSemaphore>,
    /// The number of clients with an entry of this host in [`Hosts`](super::state::Hosts). Changes under its lock.
    clients: AtomicUsize,
    /// The number of callers that wait for a permit of the total.
    pub(super) waiting: AtomicUsize,
}

impl Host {
    fn new(id: u64, origin: Origin, max: usize) -> Arc<Self> {
        Arc::new(Self {
            id,
            origin,
            permits: ShrinkableSemaphore::new(max),
            checkout_permits: ShrinkableSemaphore::new(max),
            clients: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Applies the cap per host. If the setting changes meanwhile, the newest value is applied: each thread compares
    /// the setting again after it has resized.
    pub(super) fn resize(&self, per_host: &AtomicUsize) {
        loop {
            let max = per_host.load(Ordering::SeqCst);
            self.permits.resize(max);
            self.checkout_permits.resize(max);
            if per_host.load(Ordering::SeqCst) == max {
                return;
            }
        }
    }
}

/// The version of HTTP between a client and a host, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HttpVersion {
    Unknown,
    Http1,
    /// Calls share connections.
    Http2,
}

/// The [`HttpVersion`] of a client and a host. A connection sets it with its first write. HTTP/1 does not replace
/// HTTP/2.
#[derive(Debug, Default)]
pub(super) struct HostVersion {
    version: AtomicU8,
    changed: Notify,
}

impl HostVersion {
    const HTTP1: u8 = 1;
    const HTTP2: u8 = 2;

    pub(super) fn get(&self) -> HttpVersion {
        match self.version.load(Ordering::SeqCst) {
            Self::HTTP1 => HttpVersion::Http1,
            Self::HTTP2 => HttpVersion::Http2,
            _ => HttpVersion::Unknown,
        }
    }

    pub(super) fn is_http2(&self) -> bool {
        self.get() == HttpVersion::Http2
    }

    pub(super) fn set_http1(&self) {
        self.raise(Self::HTTP1);
    }

    pub(super) fn set_http2(&self) {
        self.raise(Self::HTTP2);
    }

    fn raise(&self, version: u8) {
        if self.version.fetch_max(version, Ordering::SeqCst) < version {
            self.changed.notify_waiters();
        }
    }

    /// Waits until the version meets the condition. The future of `notified` receives notifications from its creation
    /// on. It is created before the check, so that no notification is lost.
    pub(super) async fn wait_until(&self, condition: impl Fn(HttpVersion) -> bool) {
        loop {
            let changed = self.changed.notified();
            if condition(self.get()) {
                return;
            }
            changed.await;
        }
    }
}

// ===== Users of a host =====

/// A user of a host. The last one of a client removes the entry of the client, and the last one of all clients removes
/// the host.
pub(super) struct HostRef {
    pub(super) shared: Arc<ConnectState>,
    pub(super) streams: Arc<Streams>,
}

impl HostRef {
    /// `client_id` is the id of a [`Client`](super::client::Client), or [`NO_CLIENT`].
    pub(super) fn register(shared: &Arc<ConnectState>, origin: Origin, client_id: u64) -> Self {
        let mut hosts = shared.hosts();
        let is_last =
            |last: &&Arc<Streams>| last.client_id == client_id && last.host.origin == origin;
        let streams = match hosts.last.as_ref().filter(is_last) {
            Some(last) => last.clone(),
            None => {
                let host = match hosts.by_origin.get(&origin) {
                    Some(known) => known.clone(),
                    None => {
                        let id = hosts.next_id();
                        let host = Host::new(id, origin.clone(), shared.settings.max_per_host());
                        hosts.by_origin.insert(origin, host.clone());
                        hosts.by_id.insert(id, host.clone());
                        host
                    }
                };
                let streams = hosts.clients.entry((host.id, client_id)).or_insert_with(|| {
                    host.clients.fetch_add(1, Ordering::Relaxed);
                    Arc::new(Streams::new(host, client_id))
                });
                let streams = streams.clone();
                hosts.last = Some(streams.clone());
                streams
            }
        };
        // Increment under the lock. `HostRef::drop` reads `users` again under the lock before it removes the entry.
        streams.users.fetch_add(1, Ordering::SeqCst);
        drop(hosts);
        Self { shared: shared.clone(), streams }
    }

    pub(super) fn host(&self) -> &Arc<Host> {
        &self.streams.host
    }

    /// Counts the caller as waiting for a permit of the total, and closes an idle connection of another host.
    ///
    /// The counters are raised before the search for an idle connection. A connection that becomes idle during the
    /// search then reads them; see [`state`](super::state).
    pub(super) fn wait_for_total(&self) -> TotalWait<'_> {
        self.host().waiting.fetch_add(1, Ordering::SeqCst);
        self.shared.counts.waiting_for_total.fetch_add(1, Ordering::SeqCst);
        self.shared.close_idle_for(self.host());
        TotalWait(self)
    }
}

impl Drop for HostRef {
    fn drop(&mut self) {
        let streams = &self.streams;
        if streams.users.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let mut hosts = self.shared.hosts();
        let key = (streams.host.id, streams.client_id);
        let is_this = hosts.clients.get(&key).is_some_and(|known| Arc::ptr_eq(known, streams));
        if !is_this || streams.users.load(Ordering::SeqCst) > 0 {
            return;
        }
        hosts.clients.remove(&key);
        hosts.last.take_if(|last| Arc::ptr_eq(last, streams));
        if streams.host.clients.fetch_sub(1, Ordering::Relaxed) == 1 {
            hosts.by_origin.remove(&streams.host.origin);
            hosts.by_id.remove(&streams.host.id);
        }
    }
}

/// The owner of connections that do not belong to a [`Client`](super::client::Client).
pub(super) const NO_CLIENT: u64 = 0;

/// The permits and the host that an open connection holds.
pub(super) struct ConnPermits {
    // Declared before `host_ref`, so that it is dropped first. If the entry of the host were removed before its permits
    // were released, a new entry of the same host would not count this connection.
    pub(super) _permits: PermitPair,
    pub(super) host_ref: HostRef,
}

// ===== Queue entries =====

/// The queue entry of a caller that waits for a permit or a stream.
pub(super) struct QueueEntry<'a> {
    host_ref: &'a HostRef,
    since: Nanos,
    result: WaitResult,
}

impl<'a> QueueEntry<'a> {
    /// Adds a queue entry. Returns `None` if the queue is full.
    pub(super) fn join(host_ref: &'a HostRef) -> Option<Self> {
        let shared = &*host_ref.shared;
        let max = shared.settings.queue_length();
        let join = |waiting| (waiting < max).then_some(waiting + 1);
        shared.counts.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).ok()?;
        shared.counts.waits.fetch_add(1, Ordering::Relaxed);
        Some(Self { host_ref, since: shared.clock.now(), result: WaitResult::Abandoned })
    }

    /// Ends the wait with this result. An entry that is dropped without one is abandoned.
    pub(super) fn end(mut self, result: WaitResult) {
        self.result = result;
    }
}

impl Drop for QueueEntry<'_> {
    fn drop(&mut self) {
        let shared = &*self.host_ref.shared;
        shared.counts.waiting.fetch_sub(1, Ordering::AcqRel);
        let waited = shared.clock.now().saturating_sub(self.since);
        shared.counts.waited.fetch_add(waited, Ordering::Relaxed);
        let waited = Duration::from_nanos(waited);
        shared.counts.wait_times.record(self.result, waited);
        shared.counts.wait_times.export(self.result, || waited);
    }
}

/// A caller that waits for a permit of the total.
pub(super) struct TotalWait<'a>(&'a HostRef);

impl Drop for TotalWait<'_> {
    fn drop(&mut self) {
        self.0.shared.counts.waiting_for_total.fetch_sub(1, Ordering::SeqCst);
        self.0.host().waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_user_of_a_client_and_of_a_host_removes_their_entries() {
        let shared = Arc::new(ConnectState::new());
        let host_ref = |uri: &str, client_id| {
            HostRef::register(&shared, Origin::of(&uri.parse().expect("a URI")), client_id)
        };
        let sizes = || {
            let hosts = shared.hosts();
            (hosts.by_origin.len(), hosts.by_id.len(), hosts.clients.len(), hosts.last.is_some())
        };
        let one = host_ref("http://a", 1);
        let (again, other) = (host_ref("http://a", 1), host_ref("http://a", 2));
        assert!(Arc::ptr_eq(&one.streams, &again.streams));
        assert!(!Arc::ptr_eq(&one.streams, &other.streams));
        assert!(Arc::ptr_eq(one.host(), other.host()), "clients share the caps");
        let elsewhere = host_ref("http://b", 1);
        assert_eq!(sizes(), (2, 2, 3, true));
        drop(one);
        assert_eq!(sizes(), (2, 2, 3, true));
        drop(again);
        assert_eq!(sizes(), (2, 2, 2, true));
        drop(elsewhere);
        assert_eq!(sizes(), (1, 1, 1, false));
        drop(other);
        assert_eq!(sizes(), (0, 0, 0, false));
    }
}
