//! The limit itself: one word for who is in and who waits, and a lock only for those who wait.

use std::{
    fmt,
    ops::RangeInclusive,
    sync::{Arc, OnceLock, PoisonError},
    task::{Context, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    adaptive::Teller,
    queue::{Place, Queue, QueueOrder, Registered, Turn},
    sort::{Line, Priority},
};
use crate::{
    call::{
        Label, LayerKind, Outcome, Rejected, RejectedKind, Token,
        sync::{
            Mutex, MutexGuard,
            atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        },
    },
    event,
};

/// One concurrency limit.
pub struct Limiter {
    /// `waiting << 32 | in flight`. With anybody waiting, nobody gets in but through the queue.
    word: AtomicU64,
    limit: AtomicU32,
    adaptive: Option<Teller>,
    queue: Mutex<Queue>,
    longest_queue: AtomicU32,
    longest_wait_ms: AtomicU64,
    retry_after_ms: AtomicU64,
    to_the_head_only: AtomicBool,
    shadow: AtomicBool,
    /// Whether health calls are exempt.
    exempts_health: AtomicBool,
    /// The number of exempt `Check` calls of `grpc.health.v1` in flight.
    health_checks: AtomicU32,
    /// The number of exempt `Watch` streams of `grpc.health.v1` in flight.
    health_watches: AtomicU32,
    unread: Unread,
    counts: Counts,
    /// Whether partitions or priorities are told apart.
    sorts: AtomicBool,
    /// What of it is still in use, once it is [abandoned](Self::abandon): the calls it counts, and each that is
    /// exempt.
    uses: AtomicU32,
    /// Where to find it once it is idle, if it is [used again](super::lasting::Limit).
    home: OnceLock<&'static Self>,
}

/// Out of the way of calls that find room: a refused one writes nothing that they read.
#[derive(Default)]
#[repr(align(128))]
struct Counts {
    full: AtomicU64,
    waited_too_long: AtomicU64,
    deadline_passed: AtomicU64,
    outranked: AtomicU64,
    shadowed: AtomicU64,
    exempt: AtomicU64,
}

/// What comes of an attempt to wait.
pub(super) enum Entry {
    /// A place has become free instead.
    In(Token),
    Waits(Place),
}

/// What refused calls are told of when to come back.
const RETRY_AFTER_MS: u64 = 1000;

const ONE_IN: u64 = 1;
const ONE_WAITING: u64 = 1 << 32;
/// Nobody has it any more but calls under way: in the place of those who wait, as nobody can.
const ABANDONED: u64 = 1 << 63;
/// What is left of the word for them.
pub(super) const MOST_WAITING: u32 = (1 << 31) - 1;

/// Marks of a token, above the number in flight that an algorithm hears of: its line, and whether it is
/// counted apart.
const MARKS: u64 = !0 << 32;
const EXEMPT: u64 = 1 << 63;
/// Let through in shadow mode.
const SHADOW: u64 = 1 << 62;
/// An exempt `Watch` stream of `grpc.health.v1`.
const HEALTH_WATCH: u64 = 1 << 61;
/// An exempt `Check` of `grpc.health.v1`.
const HEALTH_CHECK: u64 = 1 << 60;
/// The maximum number of exempt checks of one limit at a time. A server of health checks responds at once.
const MAX_HEALTH_CHECKS: u32 = 1024;
/// The maximum number of exempt `Watch` streams of one limit.
const MAX_HEALTH_WATCHES: u32 = 64;

fn mark(line: Line) -> u64 {
    u64::from(line) << 32
}

fn in_flight(word: u64) -> u32 {
    word as u32
}

fn waiting(word: u64) -> u32 {
    (word >> 32) as u32
}

impl Limiter {
    pub(super) fn new(limit: u32, adaptive: Option<Teller>) -> Self {
        Self {
            word: AtomicU64::new(0),
            limit: AtomicU32::new(limit),
            adaptive,
            queue: Mutex::new(Queue::default()),
            longest_queue: AtomicU32::new(0),
            longest_wait_ms: AtomicU64::new(0),
            retry_after_ms: AtomicU64::new(RETRY_AFTER_MS),
            to_the_head_only: AtomicBool::new(false),
            shadow: AtomicBool::new(false),
            exempts_health: AtomicBool::new(true),
            health_checks: AtomicU32::new(0),
            health_watches: AtomicU32::new(0),
            unread: Unread::default(),
            counts: Counts::default(),
            sorts: AtomicBool::new(false),
            uses: AtomicU32::new(1),
            home: OnceLock::new(),
        }
    }

    // ===== Getting in =====

    #[inline]
    pub(super) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    fn store(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }

    fn is_shadow(&self) -> bool {
        self.shadow.load(Ordering::Relaxed)
    }

    /// In shadow mode nobody waits either.
    fn longest_queue(&self) -> u32 {
        if self.is_shadow() { 0 } else { self.longest_queue.load(Ordering::Relaxed) }
    }

    /// Whether a call would get in now.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        let word = self.word.load(Ordering::Relaxed);
        (waiting(word) == 0 && in_flight(word) < self.limit()) || self.is_shadow()
    }

    /// Gets in if there is room and nobody waits.
    #[inline]
    pub(super) fn enter(&self) -> Option<Token> {
        let mut word = self.word.load(Ordering::Relaxed);
        // Not added first and taken back where somebody was faster, though that is quicker where two meet: more would
        // seem to be in than may be.
        while waiting(word) == 0 && in_flight(word) < self.limit() {
            match self.word.compare_exchange_weak(
                word,
                word + ONE_IN,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(self.begin(in_flight(word) + 1)),
                Err(now) => word = now,
            }
        }
        None
    }

    /// What a call remembers that is let in as one of so many: nothing, where nobody learns from it.
    #[inline]
    pub(super) fn begin(&self, in_flight: u32) -> Token {
        self.adaptive.as_ref().map_or(Token::default(), |adaptive| adaptive.started(in_flight))
    }

    /// Takes a place in the queue, if there is one to wait in.
    pub(super) fn join(&self) -> Result<Entry, RejectedKind> {
        let longest = self.longest_queue();
        if longest == 0 || self.limit() == 0 {
            return Err(RejectedKind::Full);
        }
        let mut queue = self.lock();
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let room = waiting(word) == 0 && in_flight(word) < self.limit();
            if !room && waiting(word) >= longest {
                return Err(RejectedKind::Full);
            }
            let next = if room { word + ONE_IN } else { word + ONE_WAITING };
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if room => return Ok(Entry::In(self.begin(in_flight(next)))),
                Ok(_) => return Ok(Entry::Waits(queue.join(0, Priority::NORMAL, Instant::now()))),
                Err(now) => word = now,
            }
        }
    }

    /// Returns whether this queue entry is next. If not, the waker of `cx` is woken when it is.
    ///
    /// `is_new`: no waker has been registered for the entry yet.
    pub(super) fn look(&self, place: Place, is_new: bool, cx: &Context<'_>) -> Turn {
        // A waker is user code. It is cloned and dropped without the lock: the last waker of a task drops the task,
        // which may hold permits of this limit.
        let mut waker = is_new.then(|| cx.waker().clone());
        loop {
            let mut queue = self.lock();
            let (turn, before) = queue.look(place, cx.waker(), waker.take());
            drop(queue);
            match before {
                Registered::Done(before) => {
                    drop(before);
                    return turn;
                }
                Registered::NeedsWaker => waker = Some(cx.waker().clone()),
            }
        }
    }

    /// Gives a place up, also if its turn has just come.
    pub(super) fn leave(&self, place: Place) {
        let mut queue = self.lock();
        let (turn, waker) = queue.leave(place);
        match turn {
            Turn::Waits => {
                self.word.fetch_sub(ONE_WAITING, Ordering::AcqRel);
            }
            Turn::Come => queue.shares.exit(place.0),
            Turn::Lost => {}
        }
        drop(queue);
        if turn == Turn::Come {
            self.exit();
        }
        drop(waker);
    }

    // ===== Getting out =====

    /// A call has ended.
    #[inline]
    pub(super) fn end(&self, token: Token) {
        if token.tag & MARKS == 0 {
            self.exit();
        } else {
            self.end_marked(token);
        }
    }

    #[inline]
    fn exit(&self) {
        let before = self.word.fetch_sub(ONE_IN, Ordering::AcqRel);
        if before >= ONE_WAITING {
            self.exited(before);
        }
    }

    #[cold]
    fn exited(&self, before: u64) {
        if before & ABANDONED == 0 {
            self.hand_over();
        } else if in_flight(before) == 1 {
            self.leave_use();
        }
    }

    // ===== Learning =====

    /// The head of a call's response is here.
    #[inline]
    pub(super) fn heard_head(&self, token: &mut Token, so_far: Outcome) {
        let Some(adaptive) = &self.adaptive else { return };
        // Not the call's own: an algorithm may panic, and the call ends by its marks all the same.
        let mut unmarked = Token { tag: token.tag & !MARKS, ..*token };
        let changed = adaptive.head(&mut unmarked, so_far, |limit| self.store(limit));
        *token = Token { tag: token.tag & MARKS | unmarked.tag, ..unmarked };
        if changed {
            self.hand_over();
        }
    }

    /// A call has ended.
    #[inline]
    pub(super) fn heard_end(&self, mut token: Token, outcome: Outcome) {
        if let Some(adaptive) = &self.adaptive {
            token.tag &= !MARKS;
            if adaptive.hear(token, outcome, |limit| self.store(limit)) {
                self.hand_over();
            }
        }
    }

    // ===== Handing over =====

    /// Lets in whoever waits while there is room. Each is woken once, outside of the lock.
    pub(super) fn hand_over(&self) {
        loop {
            let mut queue = self.lock();
            let mut word = self.word.load(Ordering::Acquire);
            let turn = loop {
                let turn = queue.turn(self.limit(), in_flight(word), Instant::now);
                let Some(line) = turn else { break None };
                // One fewer waits, one more is in: in one step, so that nobody slips in between.
                match self.word.compare_exchange_weak(
                    word,
                    word - ONE_WAITING + ONE_IN,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => break Some(queue.next(line, Instant::now())),
                    Err(now) => word = now,
                }
            };
            drop(queue);
            match turn {
                None => return,
                Some(waker) => waker.into_iter().for_each(Waker::wake),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No user code runs under the lock, so a poisoned lock protects a consistent state.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No, except in shadow mode: then it goes, and is not counted among the others.
    pub(super) fn turn_away(
        &self,
        kind: RejectedKind,
        label: impl FnOnce() -> Option<Arc<Label>>,
    ) -> Result<Token, Rejected> {
        let label = label();
        let _name = label.as_deref().map_or("", |label| &*label.name);
        if !self.is_shadow() {
            event!(DEBUG, resilience.name = _name, reason = kind.as_str(), "call shed");
            return Err(self.refuse(kind).labelled(label));
        }
        self.counts.shadowed.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, resilience.name = _name, reason = kind.as_str(), "call would be shed");
        Ok(Token::unmeasured(SHADOW))
    }

    fn counter(&self, kind: RejectedKind) -> &AtomicU64 {
        match kind {
            RejectedKind::WaitedTooLong => &self.counts.waited_too_long,
            RejectedKind::DeadlinePassed => &self.counts.deadline_passed,
            RejectedKind::Outranked => &self.counts.outranked,
            _ => &self.counts.full,
        }
    }

    fn refuse(&self, kind: RejectedKind) -> Rejected {
        self.counter(kind).fetch_add(1, Ordering::Relaxed);
        let rejected = Rejected::by(LayerKind::ConcurrencyLimit, kind);
        if kind == RejectedKind::DeadlinePassed {
            // Coming back helps nobody: the answer was needed by now.
            return rejected;
        }
        rejected
            .with_retry_after(Duration::from_millis(self.retry_after_ms.load(Ordering::Relaxed)))
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("limit", &self.limit())
            .field("in_flight", &self.in_flight())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

mod life;
#[cfg(all(test, buttress_loom))]
mod loom_models;
mod settings;
mod sorted;
mod unread;

use unread::Unread;
