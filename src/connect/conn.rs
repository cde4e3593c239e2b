//! One connection: who uses it, since when nobody does, and whether it is to go.

use std::{
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::Waker,
};

use super::{
    core::Connections,
    life::{Life, NEVER, Over, Verdict},
};
use crate::call::{Finish, Hold, Nanos, Origin, Outcome, Permit, Shared, Token};

pub(super) struct Conn {
    all: Shared<Connections>,
    id: u64,
    origin: Origin,
    /// Whether each use of it is told: else nobody knows when it is idle.
    leased: bool,
    life: Life,
    leases: AtomicU32,
    idle_since: AtomicU64,
    has_served: AtomicBool,
    is_handed_over: AtomicBool,
    over: OnceLock<Over>,
    /// It was over when its use began.
    is_stale: AtomicBool,
    /// Of the task that reads from it.
    waker: Mutex<Option<Waker>>,
}

impl Conn {
    pub(super) fn new(
        all: Shared<Connections>,
        id: u64,
        origin: Origin,
        leased: bool,
        life: Life,
        now: Nanos,
    ) -> Self {
        Self {
            all,
            id,
            origin,
            leased,
            life,
            leases: AtomicU32::new(0),
            idle_since: AtomicU64::new(now),
            has_served: AtomicBool::new(false),
            is_handed_over: AtomicBool::new(false),
            over: OnceLock::new(),
            is_stale: AtomicBool::new(false),
            waker: Mutex::new(None),
        }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    pub(super) fn is_leased(&self) -> bool {
        self.leased
    }

    // ===== In use =====

    fn begin(&self) {
        if self.leases.fetch_add(1, Ordering::SeqCst) > 0 {
            return;
        }
        self.all.counts.in_use.fetch_add(1, Ordering::Relaxed);
        let now = self.all.clock.now();
        if let Verdict::Close(why) =
            self.life.judge(now, Some(self.idle_since.load(Ordering::SeqCst)))
        {
            self.set_over(why);
        }
        if self.over.get().is_some() {
            self.is_stale.store(true, Ordering::SeqCst);
        }
    }

    fn end(&self) {
        let now = self.all.clock.now();
        // First: who sees it idle must see since when.
        self.idle_since.store(now, Ordering::SeqCst);
        if self.leases.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        self.all.counts.in_use.fetch_sub(1, Ordering::Relaxed);
        if self.life.is_old(now) {
            self.set_over(Over::Age);
        }
        if self.over.get().is_some() || self.all.needs_room_of(self) {
            self.wake();
        }
    }

    /// The right to use it for one call, to the end of the response body.
    pub(super) fn serve(this: &Shared<Self>) -> Permit<Self> {
        this.begin();
        if this.has_served.swap(true, Ordering::Relaxed) {
            this.all.counts.reused.fetch_add(1, Ordering::Relaxed);
        }
        this.permit(Token::default())
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
        self.all.close(self);
    }

    /// Since when nobody uses it, as far as is known.
    pub(super) fn idle_since(&self) -> Option<Nanos> {
        let idle = self.leased && self.leases.load(Ordering::SeqCst) == 0;
        idle.then(|| self.idle_since.load(Ordering::SeqCst))
    }

    // ===== Over =====

    /// Whether this is why it is to go: the first reason stays.
    pub(super) fn set_over(&self, why: Over) -> bool {
        self.over.set(why).is_ok()
    }

    pub(super) fn why_over(&self) -> Option<Over> {
        self.over.get().copied()
    }

    /// Whether nobody is to begin to use it any more.
    pub(super) fn is_over(&self) -> bool {
        if self.life.is_old(self.all.clock.now()) {
            self.set_over(Over::Age);
        }
        self.over.get().is_some()
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
        self.set_over(Over::Asked);
        self.wake();
    }

    /// What is to be done now; what is to be done later is in how many nanoseconds.
    pub(super) fn judge(&self) -> Verdict {
        let idle_since = self.idle_since();
        if let (Some(why), Some(_)) = (self.why_over(), idle_since) {
            return Verdict::Close(why);
        }
        let now = self.all.clock.now();
        match self.life.judge(now, idle_since) {
            Verdict::Close(why) => {
                self.set_over(why);
                Verdict::Close(why)
            }
            Verdict::Keep(NEVER) => Verdict::Keep(NEVER),
            Verdict::Keep(at) => Verdict::Keep(at.saturating_sub(now)),
        }
    }

    // ===== Waking =====

    pub(super) fn watch(&self, waker: &Waker) {
        let mut watcher = self.waker.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *watcher {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    pub(super) fn wake(&self) {
        let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Finish for Conn {
    fn finish(&self, _: Token, _: Outcome) {
        self.end();
    }

    fn hold(&self) -> Hold {
        Hold::Body
    }
}

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
