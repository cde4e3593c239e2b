//! One connection: who uses it, since when nobody does, and whether it is to go.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    task::Waker,
};

use http::Extensions;
use hyper_util::client::legacy::connect::{CaptureConnection, Connected};

use super::{
    core::Connections,
    host::Host,
    life::{Life, NEVER, Over, Verdict},
    streams::{Lane, Opening},
    turn::Turn,
};
use crate::call::{Finish, Hold, Nanos, Outcome, Permit, Shared, Token};

pub(super) struct Conn {
    all: Shared<Connections>,
    id: u64,
    host: Arc<Host>,
    /// The lane of a [`Client`](super::Client). Without one, uses of the connection are not reported.
    lane: Option<Lane>,
    life: Life,
    leases: AtomicU32,
    idle_since: AtomicU64,
    /// Until when it is new, if nobody has used it yet: it is being given to whom it was made for.
    new_until: AtomicU64,
    has_served: AtomicBool,
    is_handed_over: AtomicBool,
    over: OnceLock<Over>,
    /// It was over when its use began.
    is_stale: AtomicBool,
    /// Of the task that reads from it.
    waker: Mutex<Option<Waker>>,
    is_http2: AtomicBool,
    /// The HTTP/2 streams that calls hold, and the maximum of the peer.
    streams: AtomicUsize,
    max_streams: AtomicUsize,
    /// One of the streams is for the call that opens this connection.
    has_reserved: AtomicBool,
    /// Of the call that opens this connection, until the SETTINGS of the peer arrive.
    opening: Mutex<Option<Opening>>,
}

/// The SETTINGS of the peer have not arrived.
const UNKNOWN: usize = usize::MAX;

/// How long it may take until a connection that is made gets its first call: far longer than it does.
const GRACE: Nanos = 1_000_000_000;

impl Conn {
    pub(super) fn new(
        all: Shared<Connections>,
        id: u64,
        host: Arc<Host>,
        lane: Option<Lane>,
        life: Life,
        now: Nanos,
    ) -> Self {
        Self {
            all,
            id,
            host,
            lane,
            life,
            leases: AtomicU32::new(0),
            idle_since: AtomicU64::new(now),
            new_until: AtomicU64::new(now.saturating_add(GRACE)),
            has_served: AtomicBool::new(false),
            is_handed_over: AtomicBool::new(false),
            over: OnceLock::new(),
            is_stale: AtomicBool::new(false),
            waker: Mutex::new(None),
            is_http2: AtomicBool::new(false),
            streams: AtomicUsize::new(0),
            max_streams: AtomicUsize::new(UNKNOWN),
            has_reserved: AtomicBool::new(false),
            opening: Mutex::new(None),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    pub(super) fn lane(&self) -> Option<Lane> {
        self.lane
    }

    pub(super) fn is_leased(&self) -> bool {
        self.lane.is_some()
    }

    /// Returns whether this connection has delivered a response head.
    pub(super) fn has_served(&self) -> bool {
        self.has_served.load(Ordering::Relaxed)
    }

    // ===== In use =====

    fn begin(&self) {
        if self.leases.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        self.all.counts.in_use.fetch_add(1, Ordering::Relaxed);
        let now = self.all.clock.now();
        if now < self.new_until.swap(0, Ordering::SeqCst) {
            // There is no other to send its first request over.
            return;
        }
        let idle_since = self.idle_since.load(Ordering::SeqCst);
        if let Verdict::Close(why) = self.life.judge(now, Some(idle_since)) {
            self.set_over(why);
        }
        self.is_stale.store(self.why_over().is_some(), Ordering::SeqCst);
    }

    fn end(&self) {
        let mut leases = self.leases.load(Ordering::SeqCst);
        loop {
            if leases == 1 {
                // First: who sees it idle must see since when.
                self.idle_since.store(self.all.clock.now(), Ordering::SeqCst);
            }
            let next = leases.saturating_sub(1);
            match self.leases.compare_exchange(leases, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) if next > 0 => return,
                Ok(_) => break,
                Err(now) => leases = now,
            }
        }
        self.all.counts.in_use.fetch_sub(1, Ordering::Relaxed);
        if self.why_over().is_some() || self.all.needs_room_of(self) {
            self.wake();
        }
    }

    /// It is no longer HTTP's: in use until it is closed.
    pub(super) fn hand_over(&self) {
        if !self.is_handed_over.swap(true, Ordering::SeqCst) {
            self.begin();
        }
    }

    /// It is closed.
    pub(super) fn close(&self) {
        if self.is_handed_over.load(Ordering::SeqCst) {
            self.end();
        }
        let why = match self.over.set(Over::Closed) {
            Ok(()) => None,
            Err(_) => self.why_over(),
        };
        self.all.close(self, why);
        if self.is_http2() {
            drop(self.take_opening());
            self.host.streams.unregister(self.id);
        }
    }

    /// Since when nobody uses it, as far as is known.
    pub(super) fn idle_since(&self, now: Nanos) -> Option<Nanos> {
        let idle = self.is_leased()
            && self.leases.load(Ordering::SeqCst) == 0
            && self.new_until.load(Ordering::SeqCst) <= now;
        idle.then(|| self.idle_since.load(Ordering::SeqCst))
    }

    // ===== Over =====

    /// Whether this is why it is to go: the first reason stays.
    pub(super) fn set_over(&self, why: Over) -> bool {
        let is_first = self.over.set(why).is_ok();
        if is_first && self.is_http2() {
            // The first call of the queue may open another connection.
            self.host.streams.notify();
        }
        self.all.counts.over.fetch_add(usize::from(is_first), Ordering::SeqCst);
        is_first
    }

    /// Why nobody is to begin to use it any more, if so.
    pub(super) fn why_over(&self) -> Option<Over> {
        self.over.get().copied()
    }

    /// Whether calls are to be kept from it. Where they share connections, and there is no room for another one, it
    /// serves on until nobody uses it: else the longest of its streams would keep every other call out.
    pub(super) fn is_to_be_left(&self) -> bool {
        let is_needed = || self.host.shares.known() && !self.all.has_room(&self.host);
        self.why_over().is_some() && !is_needed()
    }

    /// Whether its time was over before the call that it has been given to: nobody had the time to close it.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::SeqCst)
    }

    /// That call has begun all the same.
    pub(super) fn keep_stale(&self) {
        self.is_stale.store(false, Ordering::SeqCst);
    }

    pub(super) fn ask(&self) {
        if self.is_leased() {
            self.set_over(Over::Asked);
            self.wake();
        }
    }

    /// What is to be done now; when to look again is in how many nanoseconds.
    pub(super) fn judge(&self) -> Verdict {
        let now = self.all.clock.now();
        let idle_since = self.idle_since(now);
        if idle_since.is_some() {
            self.all.needs_room_of(self);
        }
        let verdict = match self.why_over() {
            Some(why) => Verdict::Close(why),
            None => self.life.judge(now, idle_since),
        };
        let new_for = self.new_until.load(Ordering::SeqCst).saturating_sub(now);
        let at = match verdict {
            Verdict::Close(why) => {
                self.set_over(why);
                if idle_since.is_some() {
                    return Verdict::Close(why);
                }
                // Who ends its use wakes who closes it.
                NEVER
            }
            Verdict::Keep(at) => at,
        };
        // One that is made for nobody becomes idle by that alone.
        let after = if at == NEVER { NEVER } else { at.saturating_sub(now) };
        Verdict::Keep(if new_for > 0 { after.min(new_for) } else { after })
    }

    // ===== HTTP/2 =====

    /// The client has sent the preface of HTTP/2.
    pub(super) fn set_http2(&self) {
        self.is_http2.store(true, Ordering::SeqCst);
        self.host.shares.tell();
    }

    pub(super) fn is_http2(&self) -> bool {
        self.is_http2.load(Ordering::SeqCst)
    }

    /// The SETTINGS of the peer have arrived.
    pub(super) fn set_max_streams(this: &Shared<Self>, max: usize) {
        this.max_streams.store(max.min(UNKNOWN - 1), Ordering::SeqCst);
        this.host.streams.register(this);
    }

    pub(super) fn try_take_stream(&self) -> bool {
        let max = self.max_streams.load(Ordering::SeqCst);
        let take = |streams: usize| (streams < max).then(|| streams.saturating_add(1));
        self.streams.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    /// Takes a stream for a call that uses this connection already.
    pub(super) fn seize_stream(&self) {
        if !self.has_reserved.swap(false, Ordering::SeqCst) {
            self.streams.fetch_add(1, Ordering::SeqCst);
        }
    }

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
        self.host.streams.notify();
    }

    /// Keeps other calls from opening a connection until the SETTINGS of the peer have arrived.
    pub(super) fn hold(&self, opening: Opening) {
        let before = self.opening().replace(opening);
        drop(before);
        // Looked at afterwards: the SETTINGS may have arrived meanwhile.
        if self.max_streams.load(Ordering::SeqCst) != UNKNOWN || self.why_over().is_some() {
            drop(self.take_opening());
        }
    }

    pub(super) fn take_opening(&self) -> Option<Opening> {
        self.opening().take()
    }

    fn opening(&self) -> MutexGuard<'_, Option<Opening>> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ===== Waking =====

    /// Registers the waker of the task that reads from the connection.
    pub(super) fn watch(&self, waker: &Waker) {
        if self.watcher().as_ref().is_some_and(|known| known.will_wake(waker)) {
            return;
        }
        // A waker is user code: it is cloned and dropped without the lock.
        let waker = waker.clone();
        let before = self.watcher().replace(waker);
        drop(before);
    }

    pub(super) fn wake(&self) {
        let waker = self.watcher().take();
        waker.into_iter().for_each(Waker::wake);
    }

    fn watcher(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Finish for Conn {
    fn finish(&self, token: Token, _: Outcome) {
        self.end();
        // After: who comes next is to find it idle.
        match token.tag {
            HAS_TURN => {
                self.host.calls.leave();
                self.all.calls.leave();
            }
            HAS_STREAM => self.release_stream(),
            _ => {}
        }
    }

    fn hold(&self) -> Hold {
        Hold::Body
    }
}

/// The tag of a call that took a turn, and gives it back at its end.
pub(super) const HAS_TURN: u64 = 1;
/// The tag of a call that holds an HTTP/2 stream to its end.
pub(super) const HAS_STREAM: u64 = 2;

/// What hyper-util's pool keeps with a connection, and clones for each use before a byte is written.
pub(super) struct Tag {
    pub(super) conn: Shared<Conn>,
    is_lease: bool,
}

impl Tag {
    /// The one that the pool keeps.
    pub(super) fn new(conn: Shared<Conn>) -> Self {
        Self { conn, is_lease: false }
    }

    /// Of the connection that a call has got, once it has got one.
    pub(super) fn of(call: &CaptureConnection) -> Option<Self> {
        Self::of_connected(call.connection_metadata().as_ref()?)
    }

    pub(super) fn of_connected(connected: &Connected) -> Option<Self> {
        let mut extensions = Extensions::new();
        connected.get_extras(&mut extensions);
        extensions.remove()
    }

    /// The right to use it for one call, to the end of the response body.
    pub(super) fn serve(mut self, turn: Option<Turn>) -> Permit<Shared<Conn>> {
        let conn = self.conn.clone();
        if !std::mem::replace(&mut self.is_lease, false) {
            conn.begin();
        }
        if conn.has_served.swap(true, Ordering::Relaxed) {
            conn.all.counts.reused.fetch_add(1, Ordering::Relaxed);
        }
        let tag = turn.map_or(0, |turn| turn.keep(&conn));
        conn.permit(Token::unmeasured(tag))
    }
}

impl Clone for Tag {
    fn clone(&self) -> Self {
        self.conn.begin();
        Self { conn: self.conn.clone(), is_lease: true }
    }
}

impl Drop for Tag {
    fn drop(&mut self) {
        if self.is_lease {
            self.conn.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, task::Wake, thread, time::Duration};

    use super::*;
    use crate::{call::Origin, connect::host::Guest};

    /// A waker that uses the connection when it is dropped, as the last waker of a task does that owns it.
    struct UsesConn(Shared<Conn>);

    impl Wake for UsesConn {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for UsesConn {
        fn drop(&mut self) {
            self.0.wake();
            self.0.watch(Waker::noop());
        }
    }

    #[test]
    fn waker_may_use_the_connection_when_it_is_dropped() {
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            let all = Shared::new(Connections::new());
            let guest = Guest::register(&all, Origin::of(&"http://search".parse().expect("a URI")));
            let lane = Some(Lane { owner: 0, index: 0 });
            let conn = Connections::open(&all, &guest.host, lane);
            conn.watch(&Arc::new(UsesConn(conn.clone())).into());
            conn.watch(Waker::noop());
            let _ = ended.send(());
        });
        end.recv_timeout(Duration::from_secs(30)).expect("no deadlock");
    }
}
