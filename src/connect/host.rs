//! The state of each host, and the entries of the callers that wait.
//!
//! A host is in the [`Book`] while it has users: calls, connects and open connections, each with a [`Guest`]. The last
//! user removes it, so that the number of hosts is bounded by the number of users.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::{
    core::{Book, Connections},
    gate::{Gate, Place},
    streams::Streams,
};
use crate::call::{Nanos, Origin, Shared};

/// The permits, queues and HTTP/2 connections of one host.
pub(super) struct Host {
    id: u64,
    pub(super) origin: Origin,
    /// The permits of connections.
    pub(super) gate: Arc<Gate>,
    /// The checkout permits. The limit is that of `gate`.
    pub(super) calls: Arc<Gate>,
    pub(super) version: HostVersion,
    pub(super) streams: Streams,
    /// The queue for an HTTP/2 stream. The call with the only permit is the first call of the queue.
    pub(super) head: Arc<Gate>,
    /// The number of [`Guest`]s.
    users: AtomicUsize,
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
            version: HostVersion::default(),
            streams: Streams::default(),
            head: Gate::new(1),
            users: AtomicUsize::new(0),
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

/// The version of HTTP that a host uses, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HttpVersion {
    Unknown,
    Http1,
    /// Calls share connections.
    Http2,
}

/// The [`HttpVersion`] of a host. A connection sets it with its first write. HTTP/1 does not replace HTTP/2.
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

/// A user of a host. The last one removes the host from the book.
pub(super) struct Guest {
    pub(super) all: Shared<Connections>,
    pub(super) host: Arc<Host>,
}

impl Guest {
    pub(super) fn register(all: &Shared<Connections>, origin: Origin) -> Self {
        let mut book = all.book();
        let host = match book.last.as_ref().filter(|last| last.origin == origin) {
            Some(last) => last.clone(),
            None => match book.hosts.get(&origin) {
                Some(known) => known.clone(),
                None => {
                    let id = book.next_id();
                    let host = Host::new(id, origin.clone(), all.settings.per_host());
                    book.hosts.insert(origin, host.clone());
                    book.hosts_by_id.insert(id, host.clone());
                    host
                }
            },
        };
        let Book { last, .. } = &mut *book;
        if !last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &host)) {
            *last = Some(host.clone());
        }
        // Increment under the lock. `Guest::drop` reads `users` again under the lock before it removes the host.
        host.users.fetch_add(1, Ordering::SeqCst);
        drop(book);
        Self { all: all.clone(), host }
    }
}

impl Guest {
    /// Counts the caller as waiting for a permit of the total, and closes an idle connection of another host.
    ///
    /// The counters are raised before the search for an idle connection. A connection that becomes idle during the
    /// search then reads them; see [`core`](super::core).
    pub(super) fn wait_elsewhere(&self) -> ForAll<'_> {
        let Self { all, host } = self;
        host.waiting.fetch_add(1, Ordering::SeqCst);
        all.counts.for_all.fetch_add(1, Ordering::SeqCst);
        all.make_room_for(host);
        ForAll(self)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if self.host.users.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        let mut book = self.all.book();
        let known = book.hosts.get(&self.host.origin);
        let is_this = known.is_some_and(|known| Arc::ptr_eq(known, &self.host));
        if is_this && self.host.users.load(Ordering::SeqCst) == 0 {
            book.hosts.remove(&self.host.origin);
            book.hosts_by_id.remove(&self.host.id);
            book.last.take_if(|last| Arc::ptr_eq(last, &self.host));
        }
    }
}

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
        self.0.host.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
