//! What all connections of a layer share: its settings, who is in, who waits, and what has happened.

use std::{
    collections::HashMap,
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
    life::{Life, Over},
};
use crate::{
    call::{Clock, Label, LayerKind, Nanos, Origin, Rejected, RejectedKind, Shared, nanos},
    event,
};

/// How long somebody waits who finds no place, what is to be held against connections, and their numbers.
pub(super) struct Connections {
    pub(super) clock: Clock,
    pub(super) settings: Settings,
    pub(super) counts: Counts,
    total: Arc<Gate>,
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
    for_all: AtomicUsize,
    pub(super) in_use: AtomicUsize,
    pub(super) created: AtomicU64,
    pub(super) closed: AtomicU64,
    pub(super) closed_for_age: AtomicU64,
    pub(super) closed_for_idleness: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) timed_out: AtomicU64,
    pub(super) reused: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) waited: AtomicU64,
    pub(super) saturated: AtomicU64,
}

/// A host is in the book for as long as somebody connects to it or is connected: what is as good as new is
/// forgotten at once, so that hosts never pile up.
#[derive(Default)]
struct Book {
    hosts: HashMap<Origin, Host>,
    open: HashMap<u64, Shared<Conn>>,
    next: u64,
    /// How many were asked to go for another host, and have not gone yet.
    making_room: usize,
}

struct Host {
    gate: Arc<Gate>,
    users: usize,
    /// Of these, how many stand in line for a place among all.
    waiting: usize,
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
            total: Gate::new(NO_LIMIT),
            book: Mutex::default(),
            label: OnceLock::new(),
        }
    }

    // ===== Settings =====

    pub(super) fn set_per_host(&self, most: usize) {
        let book = self.book();
        self.settings.per_host.store(most, Ordering::Relaxed);
        book.hosts.values().for_each(|host| host.gate.resize(most));
    }

    pub(super) fn set_total(&self, most: usize) {
        self.settings.total.store(most, Ordering::Relaxed);
        self.total.resize(most);
    }

    pub(super) fn set_queue(&self, length: usize, longest_wait: Duration) {
        self.settings.longest_wait.store(nanos(longest_wait), Ordering::Relaxed);
        self.settings.queue.store(length, Ordering::Relaxed);
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
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
        let host = Guest::register(this, origin);
        let own = host.gate.try_enter();
        if own.is_some() {
            if let Some(total) = this.total.try_enter() {
                return Ok(Ticket { _places: (own, Some(total)), host });
            }
        }
        let line = Line::join(&host).ok_or_else(|| this.refuse())?;
        let longest = Duration::from_nanos(this.settings.longest_wait.load(Ordering::Relaxed));
        let places = wanted(async {
            let own = match own {
                Some(own) => own,
                None => host.gate.enter().await,
            };
            let total = match this.total.try_enter() {
                Some(total) => total,
                None => {
                    let _elsewhere = line.for_all();
                    this.total.enter().await
                }
            };
            (Some(own), Some(total))
        });
        let places = timeout(longest, places).await;
        drop(line);
        match places {
            Ok(Some(places)) => Ok(Ticket { _places: places, host }),
            // Nobody is told: who asked has been served.
            Ok(None) => Err(this.rejected()),
            Err(_) => Err(this.refuse()),
        }
    }

    fn refuse(&self) -> Rejected {
        self.counts.saturated.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, reason = RejectedKind::Saturated.as_str(), "connection refused");
        self.rejected()
    }

    fn rejected(&self) -> Rejected {
        Rejected::by(LayerKind::Connect, RejectedKind::Saturated)
            .labelled(self.label.get().cloned())
    }

    // ===== The open ones =====

    pub(super) fn open(this: &Shared<Self>, host: &Guest, leased: bool) -> Shared<Conn> {
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
        let id = book.next;
        book.next += 1;
        let conn = Shared::new(Conn::new(this.clone(), id, host.origin.clone(), leased, life, now));
        book.open.insert(id, conn.clone());
        conn
    }

    pub(super) fn close(&self, conn: &Conn) {
        let why = conn.why_over();
        let mut book = self.book();
        book.open.remove(&conn.id());
        book.making_room -= usize::from(why == Some(Over::Room));
        drop(book);
        self.counts.closed.fetch_add(1, Ordering::Relaxed);
        match why {
            Some(Over::Age) => self.counts.closed_for_age.fetch_add(1, Ordering::Relaxed),
            Some(Over::Idle) => self.counts.closed_for_idleness.fetch_add(1, Ordering::Relaxed),
            Some(Over::Room | Over::Asked) | None => return,
        };
        event!(DEBUG, ?why, "connection is over");
    }

    /// Whether a connection that has just become idle is to go, since another host waits for its place.
    pub(super) fn needs_room_of(&self, conn: &Conn) -> bool {
        if self.counts.for_all.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let mut book = self.book();
        let of_its_own = book.hosts.get(conn.origin()).map_or(0, |host| host.waiting);
        let others = self.counts.for_all.load(Ordering::SeqCst) - of_its_own;
        book.making_room < others && conn.set_over(Over::Room) && {
            book.making_room += 1;
            true
        }
    }

    /// Asks the one that has been idle for longest to go, if it is another host's.
    fn make_room_for(&self, origin: &Origin) {
        let mut book = self.book();
        let idle = book.open.values().filter(|conn| conn.origin() != origin);
        let idle = idle.filter_map(|conn| Some((conn.idle_since()?, conn.id(), conn)));
        let Some((_, _, conn)) = idle.min_by_key(|(since, id, _)| (*since, *id)) else { return };
        let conn = conn.clone();
        book.making_room += usize::from(conn.set_over(Over::Room));
        drop(book);
        conn.wake();
    }

    pub(super) fn count_open(&self) -> usize {
        self.book().open.len()
    }

    /// Asks every connection to go once it is not in use.
    pub(super) fn ask_all(&self) {
        let open: Vec<_> = self.book().open.values().cloned().collect();
        open.iter().for_each(|conn| conn.ask());
    }

    fn book(&self) -> MutexGuard<'_, Book> {
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

// ===== Who is in the book =====

/// A user of a host's entry. The last one takes it out of the book.
pub(super) struct Guest {
    all: Shared<Connections>,
    origin: Origin,
    gate: Arc<Gate>,
}

impl Guest {
    fn register(all: &Shared<Connections>, origin: Origin) -> Self {
        let mut book = all.book();
        let host = book.hosts.entry(origin.clone()).or_insert_with(|| {
            let most = all.settings.per_host.load(Ordering::Relaxed);
            Host { gate: Gate::new(most), users: 0, waiting: 0 }
        });
        host.users += 1;
        let gate = host.gate.clone();
        drop(book);
        Self { all: all.clone(), origin, gate }
    }

    fn with(&self, edit: impl FnOnce(&mut Host)) {
        let mut book = self.all.book();
        let users = book.hosts.get_mut(&self.origin).map(|host| {
            edit(host);
            host.users
        });
        if users == Some(0) {
            book.hosts.remove(&self.origin);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.with(|host| host.users -= 1);
    }
}

/// What a connection holds for as long as it is open.
pub(super) struct Ticket {
    // Before the host: a place is given back while its gate is still in the book.
    _places: (Option<Place>, Option<Place>),
    pub(super) host: Guest,
}

/// One that waits.
struct Line<'a> {
    host: &'a Guest,
    since: Nanos,
}

impl<'a> Line<'a> {
    /// Unless the line is as long as it may be.
    fn join(host: &'a Guest) -> Option<Self> {
        let all = &*host.all;
        let longest = all.settings.queue.load(Ordering::Relaxed);
        let join = |waiting| (waiting < longest).then_some(waiting + 1);
        all.counts.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).ok()?;
        all.counts.waits.fetch_add(1, Ordering::Relaxed);
        Some(Self { host, since: all.clock.now() })
    }

    /// Its host has room, and all together have not: connections that nobody uses make room.
    fn for_all(&self) -> ForAll<'a> {
        let all = &*self.host.all;
        self.host.with(|host| {
            host.waiting += 1;
            all.counts.for_all.fetch_add(1, Ordering::SeqCst);
        });
        all.make_room_for(&self.host.origin);
        ForAll(self.host)
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let all = &*self.host.all;
        all.counts.waiting.fetch_sub(1, Ordering::AcqRel);
        all.counts.waited.fetch_add(all.clock.now().saturating_sub(self.since), Ordering::Relaxed);
    }
}

/// One that waits for a place among all.
struct ForAll<'a>(&'a Guest);

impl Drop for ForAll<'_> {
    fn drop(&mut self) {
        self.0.with(|host| {
            host.waiting -= 1;
            self.0.all.counts.for_all.fetch_sub(1, Ordering::SeqCst);
        });
    }
}
