//! The state that all connections of a layer share: settings, permits, open connections and counters.
//!
//! # Permits
//!
//! A connection holds one permit of its host and one of the total. A connect acquires them in this order, and keeps the
//! first one while it waits for the second one. A call of a [`Client`](super::client::Client) that needs a connection
//! for itself acquires two checkout permits before that, from semaphores with the same limits; see
//! [`checkout`](super::checkout).
//!
//! # Closing an idle connection for another host
//!
//! If the total is at its maximum, a caller may wait while another host has idle connections. Either of two threads
//! closes one of them:
//!
//! - The caller raises `ConnectCounts::waiting_for_total` and `Host::waiting`, and then searches for the connection
//!   that has been idle for the longest time ([`ConnectState::close_idle_for`]).
//! - A call that ends its use of a connection lowers `Conn::uses`, and then reads `waiting_for_total`
//!   ([`ConnectState::close_for_other_host`]).
//!
//! Each thread writes one of the two counters and then reads the other. All four accesses are `SeqCst`, so at least one
//! thread observes the write of the other. A change must preserve this order. Otherwise a caller waits next to an idle
//! connection until its maximum wait is over.
//!
//! `Hosts::closing_for_others` counts the connections that are closing for this reason. It bounds the number of
//! connections that close themselves to the number of callers that wait. It changes under the same lock as the decision
//! `CloseReason::NeededElsewhere`, so `close` always finds this decision counted.
//!
//! # The lock
//!
//! Each connect and each close locks the [`Hosts`]. A scan over hosts or connections therefore locks it for [`SLICE`]
//! entries at a time. User code, such as wakers and their destructors, must not run under this lock: it may call a
//! handle, which locks the hosts again.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;

use super::{
    conn::Conn,
    executor::cancel_if_moved,
    hosts::{ConnPermits, Host, HostRef, NO_CLIENT, QueueEntry},
    lifetime::{CloseReason, Lifetime, NEVER},
    resolve::Lookups,
    semaphore::{NO_LIMIT, PermitPair, SemaphorePermit, ShrinkableSemaphore},
    streams::{Lane, Streams},
};
use crate::sync::{Mutex, MutexGuard};
use crate::time::{WaitResult, WaitTimes};
use crate::{
    event::{event, ms},
    fault::NameCell,
    origin::Origin,
    outcome::{LayerKind, Rejected, RejectedKind, WaitsFor},
    time::{Clock, Nanos, nanos},
};

const LAYER: &str = LayerKind::Connect.as_str();

/// The state of a [`ConnectLayer`](super::layer::ConnectLayer).
pub(super) struct ConnectState {
    pub(super) clock: Clock,
    pub(super) settings: ConnectSettings,
    pub(super) counts: ConnectCounts,
    pub(super) lookups: Arc<Lookups>,
    /// The permits of connections, of all hosts.
    total: Arc<ShrinkableSemaphore>,
    /// The checkout permits of calls to all hosts. The limit is that of `total`.
    pub(super) checkout_permits: Arc<ShrinkableSemaphore>,
    hosts: Mutex<Hosts>,
    label: NameCell,
    /// Whether a connector uses this state. From then on, a setter of the layer makes a [fork](Self::fork).
    is_in_use: AtomicBool,
}

/// The settings. Durations are in nanoseconds, and [`NEVER`] means that there is no limit.
pub(super) struct ConnectSettings {
    max_per_host: AtomicUsize,
    max_total: AtomicUsize,
    pub(super) queue_length: AtomicUsize,
    pub(super) max_wait: AtomicU64,
    pub(super) connect_timeout: AtomicU64,
    pub(super) max_age: AtomicU64,
    pub(super) max_idle: AtomicU64,
    /// In thousandths.
    pub(super) jitter: AtomicU32,
}

#[derive(Default)]
pub(super) struct ConnectCounts {
    pub(super) connecting: AtomicUsize,
    pub(super) waiting: AtomicUsize,
    /// The number of callers that wait for a permit of the total.
    pub(super) waiting_for_total: AtomicUsize,
    pub(super) in_use: AtomicUsize,
    /// The number of open connections that are to be closed.
    pub(super) closing: AtomicUsize,
    pub(super) created: AtomicU64,
    /// The number of connections that have been closed, by [`CloseReason`].
    closed: [AtomicU64; CloseReason::LABELS.len()],
    pub(super) failed: AtomicU64,
    pub(super) timed_out: AtomicU64,
    pub(super) reused: AtomicU64,
    pub(super) waits: AtomicU64,
    pub(super) stream_waits: AtomicU64,
    pub(super) waited: AtomicU64,
    pub(super) saturated: AtomicU64,
    pub(super) misconfigured: AtomicU64,
    pub(super) wait_times: WaitTimes,
}

impl ConnectCounts {
    /// Returns the number of connections that have been closed, by [`CloseReason`].
    pub(super) fn closed(&self) -> [u64; CloseReason::LABELS.len()] {
        std::array::from_fn(|reason| self.closed[reason].load(Ordering::Relaxed))
    }
}

/// The hosts in use and the open connections.
#[derive(Default)]
pub(super) struct Hosts {
    pub(super) by_origin: HashMap<Origin, Arc<Host>>,
    /// The same hosts in an order that a scan in slices can follow.
    pub(super) by_id: BTreeMap<u64, Arc<Host>>,
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
    closing_for_others: usize,
}

/// The maximum number of hosts or connections that a scan touches per lock of the hosts.
const SLICE: usize = 64;

impl Hosts {
    pub(super) fn next_id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl ConnectSettings {
    pub(super) fn max_per_host(&self) -> usize {
        self.max_per_host.load(Ordering::SeqCst)
    }

    pub(super) fn queue_length(&self) -> usize {
        self.queue_length.load(Ordering::Relaxed)
    }
}

impl ConnectState {
    pub(super) fn new() -> Self {
        Self {
            clock: Clock::new(),
            settings: ConnectSettings {
                max_per_host: AtomicUsize::new(NO_LIMIT),
                max_total: AtomicUsize::new(NO_LIMIT),
                queue_length: AtomicUsize::new(1024),
                max_wait: AtomicU64::new(nanos(Duration::from_secs(5))),
                connect_timeout: AtomicU64::new(nanos(Duration::from_secs(5))),
                max_age: AtomicU64::new(nanos(Duration::from_secs(300))),
                max_idle: AtomicU64::new(nanos(Duration::from_secs(4))),
                jitter: AtomicU32::new(200),
            },
            counts: ConnectCounts::default(),
            lookups: Lookups::new(),
            total: ShrinkableSemaphore::new(NO_LIMIT),
            checkout_permits: ShrinkableSemaphore::new(NO_LIMIT),
            hosts: Mutex::default(),
            label: NameCell::default(),
            is_in_use: AtomicBool::new(false),
        }
    }

    // ===== Settings =====

    pub(super) fn set_max_per_host(&self, max: usize) {
        // Store the setting before resizing: a host that is registered from now on reads the new cap.
        self.settings.max_per_host.store(max, Ordering::SeqCst);
        let mut next = 0;
        loop {
            // `resize` wakes callers, and wakers are user code. The lock is therefore held only to clone a slice.
            let slice: Vec<(u64, Arc<Host>)> = {
                let hosts = self.hosts();
                let hosts = hosts.by_id.range(next..).take(SLICE);
                hosts.map(|(id, host)| (*id, host.clone())).collect()
            };
            let Some((last, _)) = slice.last() else { return };
            next = last.saturating_add(1);
            for (_, host) in slice {
                host.resize(&self.settings.max_per_host);
            }
        }
    }

    pub(super) fn set_max_total(&self, max: usize) {
        self.settings.max_total.store(max, Ordering::Relaxed);
        self.total.resize(max);
        self.checkout_permits.resize(max);
    }

    pub(super) fn set_name(&self, name: &str) {
        self.label.set(name);
    }

    pub(super) fn has_name(&self) -> bool {
        self.label.has_own()
    }

    pub(super) fn name(&self) -> &str {
        self.label.as_str()
    }

    /// Records that a connector uses this state.
    pub(super) fn set_in_use(&self) {
        self.is_in_use.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.is_in_use.load(Ordering::Relaxed)
    }

    /// Returns a state with these settings and this name, which no connector uses.
    pub(super) fn fork(&self) -> Self {
        let fork = Self { label: self.label.fork(), ..Self::new() };
        let (old, new) = (&self.settings, &fork.settings);
        for (old, new) in [
            (&old.max_wait, &new.max_wait),
            (&old.connect_timeout, &new.connect_timeout),
            (&old.max_age, &new.max_age),
            (&old.max_idle, &new.max_idle),
        ] {
            new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        new.jitter.store(old.jitter.load(Ordering::Relaxed), Ordering::Relaxed);
        new.queue_length.store(old.queue_length(), Ordering::Relaxed);
        fork.set_max_per_host(old.max_per_host());
        fork.set_max_total(old.max_total.load(Ordering::Relaxed));
        fork
    }

    pub(super) fn has_cap(&self) -> bool {
        self.caps() != (None, None)
    }

    pub(super) fn caps(&self) -> (Option<usize>, Option<usize>) {
        let cap = |cap: &AtomicUsize| match cap.load(Ordering::Relaxed) {
            cap if cap >= NO_LIMIT => None,
            cap => Some(cap),
        };
        (cap(&self.settings.max_per_host), cap(&self.settings.max_total))
    }

    // ===== Admission =====

    /// Acquires the permits of one connection to `origin`, or waits for them in the queue. Dropping the future releases
    /// them.
    pub(super) async fn admit(
        this: &Arc<Self>,
        origin: Origin,
        lane: Option<Lane>,
    ) -> Result<ConnPermits, Rejected> {
        let host_ref =
            HostRef::register(this, origin, lane.map_or(NO_CLIENT, |lane| lane.client_id));
        if let Some(permits) = lane.and_then(|lane| host_ref.streams.take_permits(lane)) {
            return Ok(ConnPermits { _permits: permits, host_ref });
        }
        let permits = host_ref.host().permits.clone();
        let own = permits.try_acquire();
        let own = match own.map(|own| (own, this.total.try_acquire())) {
            Some((own, Some(total))) => {
                return Ok(ConnPermits { _permits: (own, total), host_ref });
            }
            Some((own, None)) => Some(own),
            None => None,
        };
        let entry = QueueEntry::join(&host_ref).ok_or_else(|| this.reject())?;
        let permits = cancel_if_moved(async {
            let own = match own {
                Some(own) => own,
                None => permits.acquire().await,
            };
            if let Some(total) = this.total.try_acquire() {
                return (own, total);
            }
            let _total_wait = host_ref.wait_for_total();
            (own, this.total.acquire().await)
        });
        let permits = timeout(this.max_wait(), report_waits(permits)).await;
        entry.end(match &permits {
            Ok(Some(_)) => WaitResult::Admitted,
            Ok(None) => WaitResult::Abandoned,
            Err(_) => WaitResult::Rejected,
        });
        match permits {
            Ok(Some(permits)) => Ok(ConnPermits { _permits: permits, host_ref }),
            // Another connection has served the call, and hyper-util runs this connect in the background. Its result is
            // discarded, so the rejection is not counted.
            Ok(None) => Err(this.rejection()),
            Err(_) => Err(this.reject()),
        }
    }

    /// Returns whether the permits for one more connection to this host are free.
    pub(super) fn has_free_permits(&self, host: &Host) -> bool {
        host.permits.has_free() && self.total.has_free()
    }

    pub(super) fn count_stream_wait(&self) {
        self.counts.stream_waits.fetch_add(1, Ordering::Relaxed);
    }

    /// Acquires the permits of one more connection to this host, if both are free.
    pub(super) fn try_permits(&self, host: &Host) -> Option<PermitPair> {
        host.permits.try_acquire().zip(self.total.try_acquire())
    }

    pub(super) fn try_acquire_total(&self) -> Option<SemaphorePermit> {
        self.total.try_acquire()
    }

    /// Waits for a permit of the total.
    pub(super) async fn acquire_total(&self) -> SemaphorePermit {
        self.total.acquire().await
    }

    /// Returns the connect timeout, or `None` if there is none.
    pub(super) fn connect_timeout(&self) -> Option<Duration> {
        let timeout = self.settings.connect_timeout.load(Ordering::Relaxed);
        (timeout != NEVER).then(|| Duration::from_nanos(timeout))
    }

    pub(super) fn max_wait(&self) -> Duration {
        Duration::from_nanos(self.settings.max_wait.load(Ordering::Relaxed))
    }

    /// Counts a rejection and returns it.
    pub(super) fn reject(&self) -> Rejected {
        self.counts.saturated.fetch_add(1, Ordering::Relaxed);
        self.rejection().reported()
    }

    fn rejection(&self) -> Rejected {
        Rejected::by(LayerKind::Connect, RejectedKind::Saturated)
            .with_retry_after(Duration::from_secs(1))
            .labelled(self.label.get().cloned())
    }

    // ===== Open connections =====

    /// Registers a connection that has been opened.
    pub(super) fn open(this: &Arc<Self>, client: &Arc<Streams>, lane: Option<Lane>) -> Arc<Conn> {
        let now = this.clock.now();
        let settings = &this.settings;
        let lifetime = Lifetime::new(
            now,
            settings.max_age.load(Ordering::Relaxed),
            settings.max_idle.load(Ordering::Relaxed),
            settings.jitter.load(Ordering::Relaxed),
            fastrand::f64(),
        );
        this.counts.created.fetch_add(1, Ordering::Relaxed);
        let mut hosts = this.hosts();
        let id = hosts.next_id();
        let conn = Arc::new(Conn::new(this.clone(), id, client.clone(), lane, lifetime, now));
        hosts.open.insert(id, conn.clone());
        conn
    }

    /// Removes a connection that has closed. `reason` is the reason for which it was to be closed, if there was one.
    pub(super) fn close(&self, conn: &Conn, reason: Option<CloseReason>) {
        let mut hosts = self.hosts();
        let removed = hosts.open.remove(&conn.id());
        hosts.closing_for_others -= usize::from(reason == Some(CloseReason::NeededElsewhere));
        drop(hosts);
        // Drop the connection without the lock: it contains a waker, whose destructor is user code.
        drop(removed);
        let ended_by = reason.unwrap_or(CloseReason::Closed);
        self.counts.closed[ended_by as usize].fetch_add(1, Ordering::Relaxed);
        self.counts.closing.fetch_sub(usize::from(reason.is_some()), Ordering::SeqCst);
        event!(
            connect,
            DEBUG,
            LAYER,
            self.name(),
            reason = ended_by.as_str(),
            age_ms = self.clock.now().saturating_sub(conn.opened_at()) / 1_000_000,
            "connection closed",
        );
    }

    /// Emits the event of a connect that has succeeded.
    pub(super) fn notify_of_opened(&self, took: Duration) {
        event!(connect, DEBUG, LAYER, self.name(), took_ms = ms(took), "connection opened");
    }

    /// Emits the event of a connect that has failed. The event does not contain the error, because the text of the
    /// error may contain an address.
    pub(super) fn notify_of_failed(&self, reason: &'static str, took: Duration) {
        event!(
            connect,
            DEBUG,
            LAYER,
            self.name(),
            reason = reason,
            took_ms = ms(took),
            "connection failed",
        );
    }

    /// Decides whether an idle connection closes because a caller of another host waits for a permit of the total.
    /// Returns whether this call made the decision.
    pub(super) fn close_for_other_host(&self, conn: &Conn) -> bool {
        if self.counts.waiting_for_total.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let is_needed = {
            let mut hosts = self.hosts();
            let of_its_own = conn.host().waiting.load(Ordering::SeqCst);
            let others =
                self.counts.waiting_for_total.load(Ordering::SeqCst).saturating_sub(of_its_own);
            let is_needed = hosts.closing_for_others < others
                && conn.mark_closing(CloseReason::NeededElsewhere);
            hosts.closing_for_others += usize::from(is_needed);
            is_needed
        };
        if is_needed {
            conn.announce_closing();
        }
        is_needed
    }

    /// Closes the connection of another host that has been idle for the longest time, if there is one.
    pub(super) fn close_idle_for(&self, host: &Arc<Host>) {
        let now = self.clock.now();
        loop {
            let mut longest_idle: Option<(Nanos, Arc<Conn>)> = None;
            self.each_open(|conn| {
                if Arc::ptr_eq(conn.host(), host) || conn.close_reason().is_some() {
                    return;
                }
                let Some(since) = conn.idle_since(now) else { return };
                if longest_idle.as_ref().is_none_or(|(max, _)| since < *max) {
                    longest_idle = Some((since, conn.clone()));
                }
            });
            let Some((_, conn)) = longest_idle else { return };
            let mut hosts = self.hosts();
            if conn.mark_closing(CloseReason::NeededElsewhere) {
                hosts.closing_for_others += 1;
                drop(hosts);
                conn.announce_closing();
                return conn.wake();
            }
            // Another thread has decided to close this connection meanwhile. The next scan skips it.
        }
    }

    /// Visits the open connections in the order in which they were opened, without the lock. A connection
    /// that is opened or closed meanwhile may be skipped.
    fn each_open(&self, mut visit: impl FnMut(&Arc<Conn>)) {
        let mut next = 0;
        loop {
            let slice: Vec<Arc<Conn>> =
                self.hosts().open.range(next..).take(SLICE).map(|(_, conn)| conn.clone()).collect();
            let Some(last) = slice.last() else { return };
            next = last.id().saturating_add(1);
            slice.iter().for_each(&mut visit);
        }
    }

    /// Returns whether an open connection is to be closed.
    #[inline]
    pub(super) fn any_closing(&self) -> bool {
        self.counts.closing.load(Ordering::SeqCst) > 0
    }

    pub(super) fn count_open(&self) -> usize {
        self.hosts().open.len()
    }

    /// Closes every connection as soon as it is not in use.
    pub(super) fn recycle(&self) {
        self.each_open(|conn| conn.request_close());
    }

    pub(super) fn hosts(&self) -> MutexGuard<'_, Hosts> {
        // A panic under the lock leaves every entry valid.
        self.hosts.lock()
    }
}

/// Reports each wait to the layers of the call, which polls this through hyper-util's client.
async fn report_waits<T>(wait: impl Future<Output = T>) -> T {
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

impl fmt::Debug for ConnectState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (per_host, total) = self.caps();
        f.debug_struct("ConnectState")
            .field("max_per_host", &per_host)
            .field("max_total", &total)
            .field("open", &self.count_open())
            .finish_non_exhaustive()
    }
}
