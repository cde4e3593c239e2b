//! The state that all connections of a layer share: settings, permits, open connections and counters.
//!
//! # Permits
//!
//! A connection holds one permit of its host and one of the total. A connect acquires them in this order, and keeps the
//! first one while it waits for the second one. A call of a [`Client`](super::client::Client) that needs a connection for
//! itself acquires two checkout permits before that, from gates with the same limits; see [`turn`](super::checkout).
//!
//! # Closing an idle connection for another host
//!
//! If the total is at its maximum, a caller may wait while another host has idle connections. Either of two threads
//! closes one of them:
//!
//! - The caller raises `ConnectCounts::for_all` and `Host::waiting`, and then searches for the connection that has been idle
//!   for the longest time ([`Connections::make_room_for`]).
//! - A call that ends its use of a connection lowers `Conn::leases`, and then reads `for_all`
//!   ([`Connections::needs_room_of`]).
//!
//! Each thread writes one of the two counters and then reads the other. All four accesses are `SeqCst`, so at least one
//! thread observes the write of the other. A change must preserve this order. Otherwise a caller waits next to an idle
//! connection until its maximum wait is over.
//!
//! `Book::making_room` counts the connections that are closing for this reason. It bounds the number of connections
//! that close themselves to the number of callers that wait. It changes under the same lock as the decision
//! `Over::Room`, so `close` always finds this decision counted.
//!
//! # The lock
//!
//! Each connect and each close locks the [`Book`]. A scan over hosts or connections therefore locks it for [`SLICE`]
//! entries at a time. User code, such as wakers and their destructors, must not run under this lock: it may call a
//! handle, which locks the book again.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;

use super::{
    conn::Conn,
    executor::wanted,
    hosts::{Guest, Host, Line, NO_CLIENT, Ticket},
    lifetime::{self, Life, Over},
    resolve::Lookups,
    semaphore::{Gate, NO_LIMIT, Place},
    streams::{Lane, Room, Streams},
};
use crate::{
    event::event,
    fault::LayerName,
    origin::Origin,
    outcome::{LayerKind, Rejected, RejectedKind, WaitsFor},
    time::{Clock, Nanos, nanos},
};

/// The state of a [`ConnectLayer`](super::layer::ConnectLayer).
pub(super) struct Connections {
    pub(super) clock: Clock,
    pub(super) settings: ConnectSettings,
    pub(super) counts: ConnectCounts,
    pub(super) lookups: Arc<Lookups>,
    /// The permits of connections, of all hosts.
    total: Arc<Gate>,
    /// The checkout permits of calls to all hosts. The limit is that of `total`.
    pub(super) calls: Arc<Gate>,
    book: Mutex<Book>,
    label: OnceLock<Arc<LayerName>>,
}

/// The settings. Durations are in nanoseconds, and [`lifetime::NEVER`] means that there is no limit.
pub(super) struct ConnectSettings {
    per_host: AtomicUsize,
    total: AtomicUsize,
    queue: AtomicUsize,
    longest_wait: AtomicU64,
    pub(super) connect_timeout: AtomicU64,
    pub(super) age: AtomicU64,
    pub(super) idle: AtomicU64,
    /// In thousandths.
    pub(super) jitter: AtomicU32,
}

#[derive(Default)]
pub(super) struct ConnectCounts {
    pub(super) connecting: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    /// The number of callers that wait for a permit of the total.
    pub(super) for_all: AtomicUsize,
    pub(super) in_use: AtomicUsize,
    /// The number of open connections that are to be closed.
    pub(super) over: AtomicUsize,
    pub(super) created: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) closed_for_age: AtomicU64,
    pub(super) closed_for_idleness: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) timed_out: AtomicU64,
    pub(super) reused: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) stream_waits: AtomicU64,
    pub(super) waited: AtomicU64,
    pub(super) saturated: AtomicU64,
}

/// The hosts in use and the open connections.
#[derive(Default)]
pub(super) struct Book {
    pub(super) hosts: HashMap<Origin, Arc<Host>>,
    /// The same hosts in an order that a scan in slices can follow.
    pub(super) hosts_by_id: BTreeMap<u64, Arc<Host>>,
    /// The connections of each client to each host in use, by the ids of the host and of the client.
    pub(super) clients: BTreeMap<(u64, u64), Arc<Streams>>,
    /// The entry of the last call. Most calls are to the same host as the call before, and a comparison costs less than
    /// a hash.
    pub(super) last: Option<Arc<Streams>>,
    /// The open connections by id, in an order that a scan in slices can follow.
    open: BTreeMap<u64, Arc<Conn>>,
    /// The last id of a connection or host.
    next: u64,
    /// The number of open connections that are closing for another host.
    making_room: usize,
}

/// The maximum number of hosts or connections that a scan touches per lock of the book.
const SLICE: usize = 64;

impl Book {
    pub(super) fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl ConnectSettings {
    pub(super) fn per_host(&self) -> usize {
        self.per_host.load(Ordering::SeqCst)
    }

    pub(super) fn queue(&self) -> usize {
        self.queue.load(Ordering::Relaxed)
    }
}

impl Connections {
    pub(super) fn new() -> Self {
        Self {
            clock: Clock::new(),
            settings: ConnectSettings {
                per_host: AtomicUsize::new(NO_LIMIT),
                total: AtomicUsize::new(NO_LIMIT),
                queue: AtomicUsize::new(1024),
                longest_wait: AtomicU64::new(nanos(Duration::from_secs(5))),
                connect_timeout: AtomicU64::new(nanos(Duration::from_secs(5))),
                age: AtomicU64::new(nanos(Duration::from_secs(300))),
                idle: AtomicU64::new(nanos(Duration::from_secs(4))),
                jitter: AtomicU32::new(200),
            },
            counts: ConnectCounts::default(),
            lookups: Lookups::new(),
            total: Gate::new(NO_LIMIT),
            calls: Gate::new(NO_LIMIT),
            book: Mutex::default(),
            label: OnceLock::new(),
        }
    }

    // ===== Settings =====

    pub(super) fn set_per_host(&self, most: usize) {
        // Store the setting before resizing: a host that is registered from now on reads the new cap.
        self.settings.per_host.store(most, Ordering::SeqCst);
        let mut next = 0;
        loop {
            // `resize` wakes callers, and wakers are user code. The lock is therefore held only to clone a slice.
            let slice: Vec<(u64, Arc<Host>)> = {
                let book = self.book();
                let hosts = book.hosts_by_id.range(next..).take(SLICE);
                hosts.map(|(id, host)| (*id, host.clone())).collect()
            };
            let Some((last, _)) = slice.last() else { return };
            next = last.saturating_add(1);
            for (_, host) in slice {
                host.resize(&self.settings.per_host);
            }
        }
    }

    pub(super) fn set_total(&self, most: usize) {
        self.settings.total.store(most, Ordering::Relaxed);
        self.total.resize(most);
        self.calls.resize(most);
    }

    pub(super) fn set_queue(&self, length: usize, longest_wait: Duration) {
        self.settings.longest_wait.store(nanos(longest_wait), Ordering::Relaxed);
        self.settings.queue.store(length, Ordering::Relaxed);
    }

    pub(super) fn name(&self, name: &str) {
        // Only the first name is used. Rejections share it.
        let _ = self.label.set(Arc::new(LayerName { name: name.into(), fault: None }));
    }

    pub(super) fn has_cap(&self) -> bool {
        self.caps() != (None, None)
    }

    pub(super) fn caps(&self) -> (Option<usize>, Option<usize>) {
        let cap = |cap: &AtomicUsize| match cap.load(Ordering::Relaxed) {
            cap if cap >= NO_LIMIT => None,
            cap => Some(cap),
        };
        (cap(&self.settings.per_host), cap(&self.settings.total))
    }

    // ===== Admission =====

    /// Acquires the permits of one connection to `origin`, or waits for them in the queue. Dropping the future releases
    /// them.
    pub(super) async fn admit(
        this: &Arc<Self>,
        origin: Origin,
        lane: Option<Lane>,
    ) -> Result<Ticket, Rejected> {
        let guest = Guest::register(this, origin, lane.map_or(NO_CLIENT, |lane| lane.owner));
        if let Some(room) = lane.and_then(|lane| guest.streams.take_room(lane)) {
            return Ok(Ticket { _places: room, guest });
        }
        let gate = guest.host().gate.clone();
        let own = gate.try_enter();
        let own = match own.map(|own| (own, this.total.try_enter())) {
            Some((own, Some(total))) => return Ok(Ticket { _places: (own, total), guest }),
            Some((own, None)) => Some(own),
            None => None,
        };
        let line = Line::join(&guest).ok_or_else(|| this.refuse())?;
        let places = wanted(async {
            let own = match own {
                Some(own) => own,
                None => gate.enter().await,
            };
            if let Some(total) = this.total.try_enter() {
                return (own, total);
            }
            let _elsewhere = line.for_all();
            (own, this.total.enter().await)
        });
        let places = timeout(this.longest_wait(), reported(places)).await;
        drop(line);
        match places {
            Ok(Some(places)) => Ok(Ticket { _places: places, guest }),
            // Another connection has served the call, and hyper-util runs this connect in the background. Its result is
            // discarded, so the rejection is not counted.
            Ok(None) => Err(this.rejected()),
            Err(_) => Err(this.refuse()),
        }
    }

    /// Returns whether the permits for one more connection to this host are free.
    pub(super) fn has_room(&self, host: &Host) -> bool {
        host.gate.has_room() && self.total.has_room()
    }

    pub(super) fn count_stream_wait(&self) {
        self.counts.stream_waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Acquires the permits of one more connection to this host, if both are free.
    pub(super) fn try_room(&self, host: &Host) -> Option<Room> {
        host.gate.try_enter().zip(self.total.try_enter())
    }

    pub(super) fn try_enter_total(&self) -> Option<Place> {
        self.total.try_enter()
    }

    /// Waits for a permit of the total.
    pub(super) async fn enter_total(&self) -> Place {
        self.total.enter().await
    }

    /// Returns the connect timeout, or `None` if there is none.
    pub(super) fn connect_timeout(&self) -> Option<Duration> {
        let longest = self.settings.connect_timeout.load(Ordering::Relaxed);
        (longest != lifetime::NEVER).then(|| Duration::from_nanos(longest))
    }

    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_nanos(self.settings.longest_wait.load(Ordering::Relaxed))
    }

    /// Counts a rejection and returns it.
    pub(super) fn refuse(&self) -> Rejected {
        self.counts.saturated.fetch_add(1, Ordering::Relaxed);
        event!(connect, DEBUG, reason = RejectedKind::Saturated.as_str(), "connection rejected");
        self.rejected()
    }

    fn rejected(&self) -> Rejected {
        Rejected::by(LayerKind::Connect, RejectedKind::Saturated)
            .with_retry_after(Duration::from_secs(1))
            .labelled(self.label.get().cloned())
    }

    // ===== Open connections =====

    /// Registers a connection that has been opened.
    pub(super) fn open(this: &Arc<Self>, client: &Arc<Streams>, lane: Option<Lane>) -> Arc<Conn> {
        let now = this.clock.now();
        let settings = &this.settings;
        let life = Life::new(
            now,
            settings.age.load(Ordering::Relaxed),
            settings.idle.load(Ordering::Relaxed),
            settings.jitter.load(Ordering::Relaxed),
            fastrand::f64(),
        );
        this.counts.created.fetch_add(1, Ordering::Relaxed);
        let mut book = this.book();
        let id = book.next_id();
        let conn = Arc::new(Conn::new(this.clone(), id, client.clone(), lane, life, now));
        book.open.insert(id, conn.clone());
        conn
    }

    /// Removes a connection that has closed. `why` is the reason for which it was to be closed, if there was one.
    pub(super) fn close(&self, conn: &Conn, why: Option<Over>) {
        let mut book = self.book();
        let removed = book.open.remove(&conn.id());
        book.making_room -= usize::from(why == Some(Over::Room));
        drop(book);
        // Drop the connection without the lock: it contains a waker, whose destructor is user code.
        drop(removed);
        self.counts.closed.fetch_add(1, Ordering::Relaxed);
        self.counts.over.fetch_sub(usize::from(why.is_some()), Ordering::SeqCst);
        match why {
            Some(Over::Age) => self.counts.closed_for_age.fetch_add(1, Ordering::Relaxed),
            Some(Over::Idle) => self.counts.closed_for_idleness.fetch_add(1, Ordering::Relaxed),
            _ => return,
        };
        event!(connect, DEBUG, ?why, "connection closed");
    }

    /// Decides whether an idle connection closes because a caller of another host waits for a permit of the total.
    /// Returns whether this call made the decision.
    pub(super) fn needs_room_of(&self, conn: &Conn) -> bool {
        if self.counts.for_all.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let is_needed = {
            let mut book = self.book();
            let of_its_own = conn.host().waiting.load(Ordering::SeqCst);
            let others = self.counts.for_all.load(Ordering::SeqCst).saturating_sub(of_its_own);
            let is_needed = book.making_room < others && conn.mark_over(Over::Room);
            book.making_room += usize::from(is_needed);
            is_needed
        };
        if is_needed {
            conn.announce_over();
        }
        is_needed
    }

    /// Closes the connection of another host that has been idle for the longest time, if there is one.
    pub(super) fn make_room_for(&self, host: &Arc<Host>) {
        let now = self.clock.now();
        loop {
            let mut longest_idle: Option<(Nanos, Arc<Conn>)> = None;
            self.each_open(|conn| {
                if Arc::ptr_eq(conn.host(), host) || conn.why_over().is_some() {
                    return;
                }
                let Some(since) = conn.idle_since(now) else { return };
                if longest_idle.as_ref().is_none_or(|(longest, _)| since < *longest) {
                    longest_idle = Some((since, conn.clone()));
                }
            });
            let Some((_, conn)) = longest_idle else { return };
            let mut book = self.book();
            if conn.mark_over(Over::Room) {
                book.making_room += 1;
                drop(book);
                conn.announce_over();
                return conn.wake();
            }
            // Another thread has decided to close this connection meanwhile. The next scan skips it.
        }
    }

    /// Visits the open connections in the order in which they were opened, without the lock of the book. A connection
    /// that is opened or closed meanwhile may be skipped.
    fn each_open(&self, mut visit: impl FnMut(&Arc<Conn>)) {
        let mut next = 0;
        loop {
            let slice: Vec<Arc<Conn>> =
                self.book().open.range(next..).take(SLICE).map(|(_, conn)| conn.clone()).collect();
            let Some(last) = slice.last() else { return };
            next = last.id().saturating_add(1);
            slice.iter().for_each(&mut visit);
        }
    }

    /// Returns whether an open connection is to be closed.
    #[inline]
    pub(super) fn any_over(&self) -> bool {
        self.counts.over.load(Ordering::SeqCst) > 0
    }

    pub(super) fn count_open(&self) -> usize {
        self.book().open.len()
    }

    /// Closes every connection as soon as it is not in use.
    pub(super) fn ask_all(&self) {
        self.each_open(|conn| conn.ask());
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        // A panic under the lock leaves every entry of the book valid.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports each wait to the layers of the call, which polls this through hyper-util's client.
async fn reported<T>(wait: impl Future<Output = T>) -> T {
    let mut wait = pin!(wait);
    poll_fn(|cx| {
        let polled = wait.as_mut().poll(cx);
        if polled.is_pending() {
            WaitsFor::Client.report();
        }
        polled
    })
    .await
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (per_host, total) = self.caps();
        f.debug_struct("Connections")
            .field("max_per_host", &per_host)
            .field("max_total", &total)
            .field("open", &self.count_open())
            .finish_non_exhaustive()
    }
}
