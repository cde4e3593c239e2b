//! What there is of each host, and who waits for it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::{
    core::{Book, Connections},
    gate::{Gate, Place},
    streams::Streams,
};
use crate::call::{Nanos, Origin, Shared};

/// In the book for as long as somebody connects to it, is connected, or waits: what is as good as new is
/// forgotten at once, so that hosts never pile up.
pub(super) struct Host {
    id: u64,
    pub(super) origin: Origin,
    pub(super) gate: Arc<Gate>,
    /// For calls that need a connection each.
    pub(super) calls: Arc<Gate>,
    pub(super) shares: Shares,
    pub(super) streams: Streams,
    /// For the one call at the head of the queue for a stream.
    pub(super) head: Arc<Gate>,
    users: AtomicUsize,
    /// Who waits for a place among all.
    pub(super) waiting: AtomicUsize,
}

impl Host {
    fn new(id: u64, origin: Origin, most: usize) -> Arc<Self> {
        Arc::new(Self {
            id,
            origin,
            gate: Gate::new(most),
            calls: Gate::new(most),
            shares: Shares::default(),
            streams: Streams::default(),
            head: Gate::new(1),
            users: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Sets the number of permits. Of several threads that resize at once, the last one reads the newest setting.
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

/// Whether calls to a host share its connections, as over HTTP/2: known once there is one.
#[derive(Debug, Default)]
pub(super) struct Shares {
    does: AtomicBool,
    told: Notify,
}

impl Shares {
    pub(super) fn known(&self) -> bool {
        self.does.load(Ordering::SeqCst)
    }

    pub(super) fn tell(&self) {
        if !self.does.swap(true, Ordering::SeqCst) {
            self.told.notify_waiters();
        }
    }

    /// For ever if they do not.
    pub(super) async fn wait_until_known(&self) {
        let told = self.told.notified();
        if !self.known() {
            told.await;
        }
    }
}

// ===== Who uses it =====

/// A user of a host. The last one takes it out of the book.
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
        // Under the lock: who takes it out of the book looks again.
        host.users.fetch_add(1, Ordering::SeqCst);
        drop(book);
        Self { all: all.clone(), host }
    }
}

impl Guest {
    /// Counts the caller among those that wait for a place among all connections: idle ones of other hosts make room.
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

/// What a connection holds for as long as it is open.
pub(super) struct Ticket {
    // Before the guest: a place is given back while its gate is still in the book.
    pub(super) _places: (Place, Place),
    pub(super) guest: Guest,
}

// ===== Who waits =====

/// One that waits.
pub(super) struct Line<'a> {
    guest: &'a Guest,
    since: Nanos,
}

impl<'a> Line<'a> {
    /// Unless the line is as long as it may be.
    pub(super) fn join(guest: &'a Guest) -> Option<Self> {
        let all = &*guest.all;
        let longest = all.settings.queue();
        let join = |waiting| (waiting < longest).then_some(waiting + 1);
        all.counts.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).ok()?;
        all.counts.waits.fetch_add(1, Ordering::Relaxed);
        Some(Self { guest, since: all.clock.now() })
    }

    /// Its host has room, and all together have not: connections that nobody uses make room.
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

/// One that waits for a place among all.
pub(super) struct ForAll<'a>(&'a Guest);

impl Drop for ForAll<'_> {
    fn drop(&mut self) {
        self.0.all.counts.for_all.fetch_sub(1, Ordering::SeqCst);
        self.0.host.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
