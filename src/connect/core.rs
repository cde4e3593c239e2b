//! What all connections of a layer share: its settings, who is in, who waits, and what has happened.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
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
    gate::{Gate, NO_LIMIT, Place},
    host::{Guest, Host, Line, Ticket},
    life::{self, Life, Over},
    resolve::Lookups,
    streams::Lane,
};
use crate::{
    call::{Clock, Label, LayerKind, Nanos, Origin, Rejected, RejectedKind, Shared, nanos},
    event,
};

pub(super) struct Connections {
    pub(super) clock: Clock,
    pub(super) settings: Settings,
    pub(super) counts: Counts,
    pub(super) lookups: Arc<Lookups>,
    total: Arc<Gate>,
    /// Calls that need a connection each, of all hosts.
    pub(super) calls: Arc<Gate>,
    book: Mutex<Book>,
    label: OnceLock<Arc<Label>>,
}

pub(super) struct Settings {
    per_host: AtomicUsize,
    total: AtomicUsize,
    queue: AtomicUsize,
    longest_wait: AtomicU64,
    pub(super) connect_timeout: AtomicU64,
    pub(super) age: AtomicU64,
    pub(super) idle: AtomicU64,
    pub(super) jitter: AtomicU32,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) connecting: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    /// Of these, how many for a place among all connections.
    pub(super) for_all: AtomicUsize,
    pub(super) in_use: AtomicUsize,
    /// Connections that are over and still open.
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

/// Who is connected, and to whom.
#[derive(Default)]
pub(super) struct Book {
    pub(super) hosts: HashMap<Origin, Arc<Host>>,
    /// The same hosts in an order that a scan in slices can follow.
    pub(super) hosts_by_id: BTreeMap<u64, Arc<Host>>,
    /// Of these, the one that was asked for last: mostly it is asked for again, and to compare costs less than
    /// to hash.
    pub(super) last: Option<Arc<Host>>,
    /// Ordered by number, so that a scan in slices can follow them.
    open: BTreeMap<u64, Shared<Conn>>,
    /// The number of the next connection or host.
    next: u64,
    /// How many were asked to go for another host, and have not gone yet.
    making_room: usize,
}

/// The maximum number of hosts or connections that are touched while the book is locked once.
const SLICE: usize = 64;

impl Book {
    pub(super) fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Settings {
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
            settings: Settings {
                per_host: AtomicUsize::new(NO_LIMIT),
                total: AtomicUsize::new(NO_LIMIT),
                queue: AtomicUsize::new(1024),
                longest_wait: AtomicU64::new(nanos(Duration::from_secs(5))),
                connect_timeout: AtomicU64::new(nanos(Duration::from_secs(5))),
                age: AtomicU64::new(nanos(Duration::from_secs(300))),
                idle: AtomicU64::new(nanos(Duration::from_secs(4))),
                jitter: AtomicU32::new(200),
            },
            counts: Counts::default(),
            lookups: Lookups::new(),
            total: Gate::new(NO_LIMIT),
            calls: Gate::new(NO_LIMIT),
            book: Mutex::default(),
            label: OnceLock::new(),
        }
    }

    // ===== Settings =====

    pub(super) fn set_per_host(&self, most: usize) {
        // Set before the hosts are resized: a host that is registered from now on gets the new size.
        self.settings.per_host.store(most, Ordering::SeqCst);
        let mut next = 0;
        loop {
            // Resizing wakes callers, whose wakers are user code, so the hosts are cloned under the lock in slices and
            // resized without it.
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
        // The first name stays: refusals under way point at it.
        let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
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

    // ===== Getting in =====

    /// A place for one connection to `origin`: at once, or in turn.
    pub(super) async fn admit(this: &Shared<Self>, origin: Origin) -> Result<Ticket, Rejected> {
        let guest = Guest::register(this, origin);
        let gate = &guest.host.gate;
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
        let places = timeout(this.longest_wait(), places).await;
        drop(line);
        match places {
            Ok(Some(places)) => Ok(Ticket { _places: places, guest }),
            // Nobody is told: who asked has been served.
            Ok(None) => Err(this.rejected()),
            Err(_) => Err(this.refuse()),
        }
    }

    /// Whether one more connection to this host would get in at once.
    pub(super) fn has_room(&self, host: &Host) -> bool {
        host.gate.has_room() && self.total.has_room()
    }

    pub(super) fn count_stream_wait(&self) {
        self.counts.stream_waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits for a place among all connections.
    pub(super) async fn enter_total(&self) -> Place {
        self.total.enter().await
    }

    /// None: for ever.
    pub(super) fn connect_timeout(&self) -> Option<Duration> {
        let longest = self.settings.connect_timeout.load(Ordering::Relaxed);
        (longest != life::NEVER).then(|| Duration::from_nanos(longest))
    }

    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_nanos(self.settings.longest_wait.load(Ordering::Relaxed))
    }

    pub(super) fn refuse(&self) -> Rejected {
        self.counts.saturated.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, reason = RejectedKind::Saturated.as_str(), "connection refused");
        self.rejected()
    }

    fn rejected(&self) -> Rejected {
        Rejected::by(LayerKind::Connect, RejectedKind::Saturated)
            .with_retry_after(Duration::from_secs(1))
            .labelled(self.label.get().cloned())
    }

    // ===== The open ones =====

    pub(super) fn open(this: &Shared<Self>, host: &Arc<Host>, lane: Option<Lane>) -> Shared<Conn> {
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
        let conn = Shared::new(Conn::new(this.clone(), id, host.clone(), lane, life, now));
        book.open.insert(id, conn.clone());
        conn
    }

    /// `why` it was to go, if it was.
    pub(super) fn close(&self, conn: &Conn, why: Option<Over>) {
        let mut book = self.book();
        let removed = book.open.remove(&conn.id());
        book.making_room -= usize::from(why == Some(Over::Room));
        drop(book);
        // A connection holds a waker, which is user code.
        drop(removed);
        self.counts.closed.fetch_add(1, Ordering::Relaxed);
        self.counts.over.fetch_sub(usize::from(why.is_some()), Ordering::SeqCst);
        match why {
            Some(Over::Age) => self.counts.closed_for_age.fetch_add(1, Ordering::Relaxed),
            Some(Over::Idle) => self.counts.closed_for_idleness.fetch_add(1, Ordering::Relaxed),
            _ => return,
        };
        event!(DEBUG, ?why, "connection is over");
    }

    /// Whether a connection that has just become idle is to go, since another host waits for its place.
    pub(super) fn needs_room_of(&self, conn: &Conn) -> bool {
        if self.counts.for_all.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let mut book = self.book();
        let of_its_own = conn.host().waiting.load(Ordering::SeqCst);
        let others = self.counts.for_all.load(Ordering::SeqCst).saturating_sub(of_its_own);
        book.making_room < others && conn.set_over(Over::Room) && {
            book.making_room += 1;
            true
        }
    }

    /// Asks the one that has been idle for longest to go, if it is another host's.
    pub(super) fn make_room_for(&self, host: &Arc<Host>) {
        let now = self.clock.now();
        loop {
            let mut longest_idle: Option<(Nanos, Shared<Conn>)> = None;
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
            if conn.set_over(Over::Room) {
                book.making_room += 1;
                drop(book);
                return conn.wake();
            }
            // Another caller was faster. The next scan leaves this connection out.
        }
    }

    /// Visits the open connections in the order in which they were opened, and locks the book for a slice at a time. A
    /// connection that is opened or closed meanwhile may be left out.
    fn each_open(&self, mut visit: impl FnMut(&Shared<Conn>)) {
        let mut next = 0;
        loop {
            let slice: Vec<Shared<Conn>> =
                self.book().open.range(next..).take(SLICE).map(|(_, conn)| conn.clone()).collect();
            let Some(last) = slice.last() else { return };
            next = last.id().saturating_add(1);
            slice.iter().for_each(&mut visit);
        }
    }

    /// Whether a connection that is over is still open: seldom.
    #[inline]
    pub(super) fn any_over(&self) -> bool {
        self.counts.over.load(Ordering::SeqCst) > 0
    }

    pub(super) fn count_open(&self) -> usize {
        self.book().open.len()
    }

    /// Asks every connection to go once it is not in use.
    pub(super) fn ask_all(&self) {
        self.each_open(|conn| conn.ask());
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        // Nothing of a user's runs under it; were it poisoned, the book is still whole.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
