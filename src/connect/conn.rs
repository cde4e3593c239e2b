//! The state of one connection: its uses, its idle time, and the reason why it is to be closed.
//!
//! # Uses
//!
//! `uses` counts the uses of a connection that a [`Client`](super::client::Client) has opened. hyper-util's pool stores
//! a [`ConnTag`] with the connection. It clones the tag into the capture of each request that it assigns to the
//! connection, before it writes the request, and into the response. Each clone is a use. [`ConnTag::serve`] turns the
//! clone in the response into a permit that lasts to the end of the response body.
//!
//! # Closing
//!
//! `close_reason` holds the first reason why the connection is to be closed. From then on no call begins on the
//! connection, except where [`Conn::must_retire`] and `is_stale` state otherwise. The connection is closed when `uses`
//! is zero.
//!
//! Only hyper's connection task can close it: [`Io`](super::io::Io) then returns the end of the stream to that task.
//! The task registers its waker ([`Conn::register_waker`]) before it reads this state. Every other thread changes this
//! state before it calls [`Conn::wake`]. The lock of `waker` orders both, so either the task reads the change or the
//! other thread finds the waker.
//!
//! A request can be assigned to the connection after its time is over and before its task has run. `begin` detects this
//! and sets `is_stale`. An HTTP/1 connection then ends before the request is written, and hyper-util sends the request
//! over another connection. Once bytes of the request have been written, the request is served here.
//!
//! # Orderings
//!
//! - `end` stores `idle_since` before it lowers `uses` to zero, and [`Conn::idle_since()`] reads `uses` first. A
//!   thread that reads zero therefore reads the end of the latest use.
//! - `end` lowers `uses` before it reads the number of callers that wait for a permit of the total; see
//!   [`state`](super::state).
//! - `set_max_streams` stores the maximum before `register` takes `opening`. `store_opening` stores `opening` before it
//!   reads the maximum. At least one of them therefore releases the right to open a connection.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
};

use http::Extensions;
use hyper_util::client::legacy::connect::{CaptureConnection, Connected};

use super::{
    hosts::Host,
    lifetime::{CloseReason, Lifetime, LifetimeVerdict, NEVER},
    state::ConnectState,
    streams::{Lane, Opening, Streams},
};
use crate::sync::{Mutex, MutexGuard};
use crate::{
    outcome::Outcome,
    permit::{Permit, Release, ReleaseAt, Token},
    sealed::Sealed,
    time::Nanos,
};

pub(super) struct Conn {
    shared: Arc<ConnectState>,
    id: u64,
    /// The streams of the client and the host of this connection.
    client: Arc<Streams>,
    /// The lane of a [`Client`](super::client::Client). Without one, uses of the connection are not reported.
    lane: Option<Lane>,
    lifetime: Lifetime,
    opened_at: Nanos,
    /// The number of uses.
    uses: AtomicU32,
    /// The time of the end of the last use, or of the connect.
    idle_since: AtomicU64,
    /// The time until which an unused connection is not idle, because the call for which it was opened is about to use
    /// it. 0 after the first use.
    new_until: AtomicU64,
    /// A response head was delivered over this connection.
    has_served: AtomicBool,
    /// The connection was upgraded or is a tunnel. It is in use until it is closed.
    is_handed_over: AtomicBool,
    /// The first reason to close the connection.
    close_reason: OnceLock<CloseReason>,
    /// There was a reason to close the connection when its current use began.
    is_stale: AtomicBool,
    /// Wakes hyper's connection task.
    waker: Mutex<Option<Waker>>,
    is_http2: AtomicBool,
    /// The number of streams that calls hold.
    streams: AtomicUsize,
    /// The maximum that the peer set, or [`UNKNOWN`].
    max_streams: AtomicUsize,
    /// No call is sent over it any more: it is closed, or its lane does not use it.
    is_retired: AtomicBool,
    /// One of the streams is for the call that opens this connection.
    has_reserved: AtomicBool,
    /// The right of the call that opens this connection, until the SETTINGS of the peer arrive.
    opening: Mutex<Option<Opening>>,
}

/// The maximum number of streams before the SETTINGS of the peer arrive.
const UNKNOWN: usize = usize::MAX;

/// The maximum time between the connect and the first call: 1 s, far longer than hyper-util needs.
const GRACE: Nanos = 1_000_000_000;

impl Conn {
    pub(super) fn new(
        shared: Arc<ConnectState>,
        id: u64,
        client: Arc<Streams>,
        lane: Option<Lane>,
        lifetime: Lifetime,
        now: Nanos,
    ) -> Self {
        Self {
            shared,
            id,
            client,
            lane,
            lifetime,
            opened_at: now,
            uses: AtomicU32::new(0),
            idle_since: AtomicU64::new(now),
            new_until: AtomicU64::new(now.saturating_add(GRACE)),
            has_served: AtomicBool::new(false),
            is_handed_over: AtomicBool::new(false),
            close_reason: OnceLock::new(),
            is_stale: AtomicBool::new(false),
            waker: Mutex::new(None),
            is_http2: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            max_streams: AtomicUsize::new(UNKNOWN),
            is_retired: AtomicBool::new(false),
            has_reserved: AtomicBool::new(false),
            opening: Mutex::new(None),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn opened_at(&self) -> Nanos {
        self.opened_at
    }

    pub(super) fn host(&self) -> &Arc<Host> {
        &self.client.host
    }

    pub(super) fn lane(&self) -> Option<Lane> {
        self.lane
    }

    /// Returns whether uses of this connection are reported.
    pub(super) fn reports_uses(&self) -> bool {
        self.lane.is_some()
    }

    /// Returns whether this connection has delivered a response head.
    pub(super) fn has_served(&self) -> bool {
        self.has_served.load(Ordering::Relaxed)
    }

    // ===== Uses =====

    /// Begins a use. The first of several concurrent uses checks whether the time of the connection is over.
    fn begin(&self) {
        if self.uses.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        self.shared.counts.in_use.fetch_add(1, Ordering::Relaxed);
        let now = self.shared.clock.now();
        if now < self.new_until.swap(0, Ordering::SeqCst) {
            // This is the first use of a new connection. The call waited for it, so it is not checked.
            return;
        }
        let idle_since = self.idle_since.load(Ordering::SeqCst);
        if let LifetimeVerdict::Close(reason) = self.lifetime.verdict(now, Some(idle_since)) {
            self.set_closing(reason);
        }
        self.is_stale.store(self.close_reason().is_some(), Ordering::SeqCst);
    }

    /// Ends a use. After the last one, a connection that is to be closed is closed.
    fn end(&self) {
        let mut uses = self.uses.load(Ordering::SeqCst);
        loop {
            if uses == 1 {
                // Store the time first: a thread that reads zero uses must read the time of this end.
                self.idle_since.store(self.shared.clock.now(), Ordering::SeqCst);
            }
            let next = uses.saturating_sub(1);
            match self.uses.compare_exchange(uses, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) if next > 0 => return,
                Ok(_) => break,
                Err(now) => uses = now,
            }
        }
        self.shared.counts.in_use.fetch_sub(1, Ordering::Relaxed);
        if self.close_reason().is_some() || self.shared.close_for_other_host(self) {
            self.wake();
        }
    }

    /// Marks a connection that was upgraded or is a tunnel as in use until it is closed.
    pub(super) fn hand_over(&self) {
        if !self.is_handed_over.swap(true, Ordering::SeqCst) {
            self.begin();
        }
    }

    /// Records that the connection is closed.
    pub(super) fn close(&self) {
        if self.is_handed_over.load(Ordering::SeqCst) {
            self.end();
        }
        let reason = match self.close_reason.set(CloseReason::Closed) {
            Ok(()) => None,
            Err(_) => self.close_reason(),
        };
        self.shared.close(self, reason);
        self.set_retired();
        drop(self.take_opening());
        if self.has_streams() {
            self.client.unregister(self.id);
        }
    }

    /// Returns the time since which the connection is idle. `None` if it is in use, if it is new, or if its uses are
    /// not reported.
    pub(super) fn idle_since(&self, now: Nanos) -> Option<Nanos> {
        let idle = self.reports_uses()
            && self.uses.load(Ordering::SeqCst) == 0
            && self.new_until.load(Ordering::SeqCst) <= now;
        idle.then(|| self.idle_since.load(Ordering::SeqCst))
    }

    // ===== Reasons to close =====

    /// Sets the reason to close the connection, unless there is one already.
    fn set_closing(&self, reason: CloseReason) {
        if self.mark_closing(reason) {
            self.announce_closing();
        }
    }

    /// Sets the reason to close the connection. Returns `false` if there was one already, which is kept. Otherwise call
    /// [`announce_closing`](Self::announce_closing) without any lock.
    #[must_use]
    pub(super) fn mark_closing(&self, reason: CloseReason) -> bool {
        let is_first = self.close_reason.set(reason).is_ok();
        self.shared.counts.closing.fetch_add(usize::from(is_first), Ordering::SeqCst);
        is_first
    }

    /// Wakes the first call of the queue: this connection may take no further call, so the call may open another one. A
    /// waker is user code, so no lock may be held.
    pub(super) fn announce_closing(&self) {
        if self.has_streams() {
            self.client.notify();
        }
    }

    /// Returns the reason to close the connection, if there is one.
    pub(super) fn close_reason(&self) -> Option<CloseReason> {
        self.close_reason.get().copied()
    }

    /// Returns whether no further call may begin on this connection.
    ///
    /// A connection that is to be closed still takes calls if calls share connections and the caps permit no other
    /// connection. Otherwise all calls to the host would wait for the end of its last stream.
    pub(super) fn must_retire(&self) -> bool {
        let is_needed =
            || self.client.version.is_http2() && !self.shared.has_free_permits(self.host());
        self.close_reason().is_some() && !is_needed()
    }

    /// Returns whether the time of the connection was over before its current use began.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::SeqCst)
    }

    /// Keeps a stale connection open for its current use, because bytes of the request have been written.
    pub(super) fn serve_stale(&self) {
        self.is_stale.store(false, Ordering::SeqCst);
    }

    /// Closes the connection as soon as it is not in use, if its uses are reported.
    pub(super) fn request_close(&self) {
        if self.reports_uses() {
            self.set_closing(CloseReason::Requested);
            self.wake();
        }
    }

    /// Decides whether to close the connection now. [`LifetimeVerdict::Keep`] contains the nanoseconds until the next
    /// decision, or [`NEVER`].
    pub(super) fn verdict(&self) -> LifetimeVerdict {
        let now = self.shared.clock.now();
        let idle_since = self.idle_since(now);
        if idle_since.is_some() {
            self.shared.close_for_other_host(self);
        }
        let verdict = match self.close_reason() {
            Some(reason) => LifetimeVerdict::Close(reason),
            None => self.lifetime.verdict(now, idle_since),
        };
        let new_for = self.new_until.load(Ordering::SeqCst).saturating_sub(now);
        let at = match verdict {
            LifetimeVerdict::Close(reason) => {
                self.set_closing(reason);
                if idle_since.is_some() {
                    return LifetimeVerdict::Close(reason);
                }
                // The connection is in use. `end` wakes the task that closes it.
                NEVER
            }
            LifetimeVerdict::Keep(at) => at,
        };
        // A new connection without a use becomes idle at `new_until`, where no event wakes the task.
        let after = if at == NEVER { NEVER } else { at.saturating_sub(now) };
        LifetimeVerdict::Keep(if new_for > 0 { after.min(new_for) } else { after })
    }

    // ===== HTTP/2 =====

    /// Records that the client has sent the preface of HTTP/2.
    pub(super) fn set_http2(&self) {
        self.is_http2.store(true, Ordering::SeqCst);
        self.client.retire_lane(self.lane);
        self.client.version.set_http2();
    }

    /// Records that the client has begun a request of HTTP/1. If calls of this client share connections, they wait for
    /// streams and not for checkout permits, so the connection is registered with one stream.
    pub(super) fn set_http1(this: &Arc<Self>) {
        this.client.version.set_http1();
        if this.reports_uses() && this.has_streams() {
            Self::set_max_streams(this, 1);
        } else {
            this.max_streams.store(1, Ordering::SeqCst);
        }
    }

    /// Returns whether calls take a stream of this connection. Over HTTP/1 they do if the host has used HTTP/2 before.
    fn has_streams(&self) -> bool {
        self.is_http2() || self.client.version.is_http2()
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::SeqCst)
    }

    /// Records the maximum number of streams from the SETTINGS of the peer. Calls can use the connection from then on.
    pub(super) fn set_max_streams(this: &Arc<Self>, max: usize) {
        match this.max_streams.swap(max.min(UNKNOWN - 1), Ordering::SeqCst) {
            UNKNOWN => this.client.register(this),
            _ => this.client.notify(),
        }
    }

    /// Lets no call take a stream any more: the peer has sent GOAWAY, or the lane does not use this connection any
    /// more.
    pub(super) fn retire(&self) {
        if self.set_retired() && self.has_streams() {
            // The first call of the queue may open another connection.
            self.client.notify();
        }
    }

    /// Returns whether it was not retired before.
    pub(super) fn set_retired(&self) -> bool {
        !self.is_retired.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_retired(&self) -> bool {
        self.is_retired.load(Ordering::SeqCst)
    }

    /// Takes a stream if one is free.
    pub(super) fn try_take_stream(&self) -> bool {
        let max = self.max_streams.load(Ordering::SeqCst);
        let take = |streams: usize| (streams < max).then(|| streams.saturating_add(1));
        self.streams.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    /// Takes a stream for a call that uses this connection already: the reserved stream if there is one, and otherwise
    /// a further one, even above the maximum.
    pub(super) fn seize_stream(&self) {
        if !self.has_reserved.swap(false, Ordering::SeqCst) {
            self.streams.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Reserves a stream for the call that opens this connection.
    pub(super) fn reserve_stream(&self) {
        self.streams.fetch_add(1, Ordering::SeqCst);
        self.has_reserved.store(true, Ordering::SeqCst);
    }

    /// Releases the reserved stream, unless the call has taken it.
    pub(super) fn release_reserved(&self) {
        if self.has_reserved.swap(false, Ordering::SeqCst) {
            self.streams.fetch_sub(1, Ordering::SeqCst);
        }
    }

    pub(super) fn release_stream(&self) {
        self.streams.fetch_sub(1, Ordering::SeqCst);
        self.client.notify();
    }

    /// Keeps other calls from opening a connection until the SETTINGS of the peer have arrived.
    pub(super) fn store_opening(&self, opening: Opening) {
        let before = self.opening().replace(opening);
        drop(before);
        // Read the maximum after the store: if the SETTINGS arrived in between, `register` did not find `opening`.
        if self.max_streams.load(Ordering::SeqCst) != UNKNOWN || self.close_reason().is_some() {
            drop(self.take_opening());
        }
    }

    pub(super) fn take_opening(&self) -> Option<Opening> {
        self.opening().take()
    }

    fn opening(&self) -> MutexGuard<'_, Option<Opening>> {
        self.opening.lock()
    }

    // ===== Waking =====

    /// Registers the waker of the task that reads from the connection.
    pub(super) fn register_waker(&self, waker: &Waker) {
        if self.registered_waker().as_ref().is_some_and(|known| known.will_wake(waker)) {
            return;
        }
        // A waker is user code: it is cloned and dropped without the lock.
        let waker = waker.clone();
        let before = self.registered_waker().replace(waker);
        drop(before);
    }

    /// Wakes the task that reads from the connection.
    pub(super) fn wake(&self) {
        let waker = self.registered_waker().take();
        waker.into_iter().for_each(Waker::wake);
    }

    fn registered_waker(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waker.lock()
    }
}

impl Sealed for Conn {}

impl Release for Conn {
    fn release(&self, token: Token, _: Outcome) {
        self.end();
        // Release the permits after `end`, so that the next call finds this connection idle.
        match token.tag {
            HAS_CHECKOUT_PERMITS => {
                self.host().checkout_permits.release();
                self.shared.checkout_permits.release();
            }
            HAS_STREAM => self.release_stream(),
            _ => {}
        }
    }

    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Body
    }
}

/// The tag of a call that releases its two checkout permits at its end.
pub(super) const HAS_CHECKOUT_PERMITS: u64 = 1;
/// The tag of a call that releases an HTTP/2 stream at its end.
pub(super) const HAS_STREAM: u64 = 2;

/// A reference to a connection, which hyper-util's pool stores with the connection. A clone is a use of the connection.
pub(super) struct ConnTag {
    pub(super) conn: Arc<Conn>,
    is_use: bool,
}

impl ConnTag {
    /// Returns the tag that the pool stores, which is not a use.
    pub(super) fn new(conn: Arc<Conn>) -> Self {
        Self { conn, is_use: false }
    }

    /// Returns the tag of the connection to which the request is assigned, or `None` if there is none yet.
    pub(super) fn of(call: &CaptureConnection) -> Option<Self> {
        Self::of_connected(call.connection_metadata().as_ref()?)
    }

    pub(super) fn of_connected(connected: &Connected) -> Option<Self> {
        let mut extensions = Extensions::new();
        connected.get_extras(&mut extensions);
        extensions.remove()
    }

    /// Turns the tag into a permit that uses the connection to the end of the response body.
    ///
    /// `held` is what the call holds besides: [`HAS_CHECKOUT_PERMITS`], [`HAS_STREAM`] or 0.
    pub(super) fn serve(mut self, held: u64) -> Permit<Arc<Conn>> {
        let conn = self.conn.clone();
        if !std::mem::replace(&mut self.is_use, false) {
            conn.begin();
        }
        if conn.has_served.swap(true, Ordering::Relaxed) {
            conn.shared.counts.reused.fetch_add(1, Ordering::Relaxed);
        }
        Permit::of(&conn, Token::unmeasured(held))
    }
}

impl Clone for ConnTag {
    fn clone(&self) -> Self {
        self.conn.begin();
        Self { conn: self.conn.clone(), is_use: true }
    }
}

impl Drop for ConnTag {
    fn drop(&mut self) {
        if self.is_use {
            self.conn.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, task::Wake, thread, time::Duration};

    use super::super::hosts::HostRef;
    use super::*;
    use crate::origin::Origin;

    /// A waker that uses the connection when it is dropped. The last waker of a task that owns the connection does this
    /// too.
    struct UsesConn(Arc<Conn>);

    impl Wake for UsesConn {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for UsesConn {
        fn drop(&mut self) {
            self.0.wake();
            self.0.register_waker(Waker::noop());
        }
    }

    #[test]
    fn waker_may_use_the_connection_when_it_is_dropped() {
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            let shared = Arc::new(ConnectState::new());
            let origin = Origin::of(&"http://search".parse().expect("a URI"));
            let host_ref = HostRef::register(&shared, origin, 1);
            let lane = Some(Lane { client_id: 1, index: 0 });
            let conn = ConnectState::open(&shared, &host_ref.streams, lane);
            conn.register_waker(&Arc::new(UsesConn(conn.clone())).into());
            conn.register_waker(Waker::noop());
            let _ = ended.send(());
        });
        end.recv_timeout(Duration::from_secs(30)).expect("no deadlock");
    }
}
