//! The state of each host, and the entries of the callers that wait.
//!
//! A host is in the [`Book`](super::connections::Book) while it has users: calls, connects and open connections, each with a [`Guest`]. Users of
//! one client share the [`Streams`] of this client. The last user removes the entries, so that their number is bounded by
//! the number of users.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::{
    connections::Connections,
    semaphore::{Gate, Place},
    streams::Streams,
};
use crate::{origin::Origin, time::Nanos};

/// The permits and queues of one host.
pub(super) struct Host {
    id: u64,
    pub(super) origin: Origin,
    /// The permits of connections.
    pub(super) gate: Arc<Gate>,
    /// The checkout permits. The limit is that of `gate`.
    pub(super) calls: Arc<Gate>,
    /// The number of clients with an entry of this host in the book. Changes under its lock.
    clients: AtomicUsize,
    /// The number of callers that wait for a permit of the total.
    pub(super) waiting: AtomicUsize,
}

impl Host {
    fn new(id: u64, origin: Origin, most: usize) -> Arc<Self> {
        Arc::new(Self {
            id,
            origin,
            gate: Gate::new(most),
            calls: Gate::new(most),
            clients: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Applies the cap per host. If the setting changes meanwhile, the newest value is applied: each thread compares
    /// the setting again after it has resized.
    pub(super) fn resize(&self, per_host: &AtomicUsize) {
        loop {
            let most = per_host.load(Ordering::SeqCst);
            self.gate.resize(most);
            self.calls.resize(most);
            if per_host.load(Ordering::SeqCst) == most {
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

/// The [`HttpVersion`] of a client and a host. A connection sets it with its first write. HTTP/1 does not replace HTTP/2.
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
pub(super) struct Guest {
    pub(super) all: Arc<Connections>,
    pub(super) streams: Arc<Streams>,
}

impl Guest {
    /// `owner` is the id of a [`Client`](super::client::Client), or [`NO_CLIENT`].
    pub(super) fn register(all: &Arc<Connections>, origin: Origin, owner: u64) -> Self {
        let mut book = all.book();
        let is_last = |last: &&Arc<Streams>| last.owner == owner && last.host.origin == origin;
        let streams = match book.last.as_ref().filter(is_last) {
            Some(last) => last.clone(),
            None => {
                let host = match book.hosts.get(&origin) {
                    Some(known) => known.clone(),
                    None => {
                        let id = book.next_id();
                        let host = Host::new(id, origin.clone(), all.settings.per_host());
                        book.hosts.insert(origin, host.clone());
                        book.hosts_by_id.insert(id, host.clone());
                        host
                    }
                };
                let streams = book.clients.entry((host.id, owner)).or_insert_with(|| {
                    host.clients.fetch_add(1, Ordering::Relaxed);
                    Arc::new(Streams::new(host, owner))
                });
                let streams = streams.clone();
                book.last = Some(streams.clone());
                streams
            }
        };
        // Increment under the lock. `Guest::drop` reads `users` again under the lock before it removes the entry.
        streams.users.fetch_add(1, Ordering::SeqCst);
        drop(book);
        Self { all: all.clone(), streams }
    }

    pub(super) fn host(&self) -> &Arc<Host> {
        &self.streams.host
    }

    /// Counts the caller as waiting for a permit of the total, and closes an idle connection of another host.
    ///
    /// The counters are raised before the search for an idle connection. A connection that becomes idle during the
    /// search then reads them; see [`core`](super::connections).
    pub(super) fn wait_elsewhere(&self) -> ForAll<'_> {
        self.host().waiting.fetch_add(1, Ordering::SeqCst);
        self.all.counts.for_all.fetch_add(1, Ordering::SeqCst);
        self.all.make_room_for(self.host());
        ForAll(self)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let streams = &self.streams;
        if streams.users.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let mut book = self.all.book();
        let key = (streams.host.id, streams.owner);
        let is_this = book.clients.get(&key).is_some_and(|known| Arc::ptr_eq(known, streams));
        if !is_this || streams.users.load(Ordering::SeqCst) > 0 {
            return;
        }
        book.clients.remove(&key);
        book.last.take_if(|last| Arc::ptr_eq(last, streams));
        if streams.host.clients.fetch_sub(1, Ordering::Relaxed) == 1 {
            book.hosts.remove(&streams.host.origin);
            book.hosts_by_id.remove(&streams.host.id);
        }
    }
}

/// The owner of connections that do not belong to a [`Client`](super::client::Client).
pub(super) const NO_CLIENT: u64 = 0;

/// The permits and the host that an open connection holds.
pub(super) struct Ticket {
    // Declared before `guest`, so that it is dropped first. If the host left the book before its permits were released,
    // a new entry of the same host would not count this connection.
    pub(super) _places: (Place, Place),
    pub(super) guest: Guest,
}

// ===== Queue entries =====

/// The queue entry of a caller that waits for a permit or a stream.
pub(super) struct Line<'a> {
    guest: &'a Guest,
    since: Nanos,
}

impl<'a> Line<'a> {
    /// Adds a queue entry. Returns `None` if the queue is full.
    pub(super) fn join(guest: &'a Guest) -> Option<Self> {
        let all = &*guest.all;
        let longest = all.settings.queue();
        let join = |waiting| (waiting < longest).then_some(waiting + 1);
        all.counts.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).ok()?;
        all.counts.waits.fetch_add(1, Ordering::Relaxed);
        Some(Self { guest, since: all.clock.now() })
    }

    /// Counts this caller as waiting for a permit of the total.
    pub(super) fn for_all(&self) -> ForAll<'a> {
        self.guest.wait_elsewhere()
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let all = &*self.guest.all;
        all.counts.waiting.fetch_sub(1, Ordering::AcqRel);
        all.counts.waited.fetch_add(all.clock.now().saturating_sub(self.since), Ordering::Relaxed);
    }
}

/// A caller that waits for a permit of the total.
pub(super) struct ForAll<'a>(&'a Guest);

impl Drop for ForAll<'_> {
    fn drop(&mut self) {
        self.0.all.counts.for_all.fetch_sub(1, Ordering::SeqCst);
        self.0.host().waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_user_of_a_client_and_of_a_host_removes_their_entries() {
        let all = Arc::new(Connections::new());
        let guest = |uri: &str, owner| {
            Guest::register(&all, Origin::of(&uri.parse().expect("a URI")), owner)
        };
        let sizes = || {
            let book = all.book();
            (book.hosts.len(), book.hosts_by_id.len(), book.clients.len(), book.last.is_some())
        };
        let one = guest("http://a", 1);
        let (again, other) = (guest("http://a", 1), guest("http://a", 2));
        assert!(Arc::ptr_eq(&one.streams, &again.streams));
        assert!(!Arc::ptr_eq(&one.streams, &other.streams));
        assert!(Arc::ptr_eq(one.host(), other.host()), "clients share the caps");
        let elsewhere = guest("http://b", 1);
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
