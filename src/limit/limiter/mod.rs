//! The limiter: one atomic word for the calls in flight and the waiting calls, and a locked queue.
//!
//! # Mechanism
//!
//! [`Limiter::word`] is a `u64`:
//!
//! ```text
//! bit 63        ABANDONED: the last `Limit` has been dropped
//! bits 62..32   waiting: the number of queue entries
//! bits 31..0    in flight: the number of permits in use
//! ```
//!
//! A call that finds `waiting == 0` and `in flight < limit` acquires its permit by one compare-exchange that adds 1
//! ([`Limiter::enter`]). It releases the permit by one `fetch_sub` of 1 ([`Limiter::exit`]). No lock, no allocation and
//! no clock read is involved.
//!
//! Otherwise the call joins the queue ([`Limiter::join`]): under the lock of the queue, a compare-exchange adds 1 to
//! `waiting`, and the entry is inserted under the same lock hold. As long as `waiting` is not zero, `enter` fails, so a
//! new call cannot overtake the queue. A release that finds `waiting > 0` passes its permit on
//! ([`Limiter::hand_over`]): under the lock, one compare-exchange subtracts 1 from `waiting` and adds 1 to `in flight`,
//! the entry is removed from the queue, and its waker is woken without the lock. The permit belongs to the entry from
//! then on, before its future has been polled. If the future is dropped instead, [`Limiter::leave`] finds that the
//! entry has received a permit and releases it, which passes it to the next entry.
//!
//! `hand_over` repeats until no entry may have a permit, so one release also fills a limit that has been raised.
//!
//! # Invariants
//!
//! - `in flight` is never raised above the limit that the thread has read. The check and the addition are one
//!   compare-exchange. Adding first and subtracting on failure would be faster under contention, but other calls would
//!   observe too many calls in flight and be rejected. After the limit has been lowered, `in flight` may exceed it
//!   until calls end.
//! - No permit is lost while a call waits. Both counts are in one word, so its modifications have one order. Either a
//!   release comes before the compare-exchange of `join`: then that compare-exchange fails or observes the free permit,
//!   and the call acquires it. Or it comes after: then the value that `fetch_sub` returns has `waiting > 0`, and the
//!   releasing thread calls `hand_over`. `hand_over` has to take the lock, so the entry is in the queue by then. Two
//!   separate atomics would need a fence between them; do not split the word.
//! - While the lock is free, `waiting` equals the number of entries in the queue: each change of `waiting` happens
//!   under the lock, together with the change of the queue.
//! - `hand_over` moves a caller from `waiting` to `in flight` in one step. In two steps, a new call could acquire the
//!   permit in between, or `in flight` would exceed the limit.
//! - A change of the limit calls `hand_over` after the store. A concurrent `join` either comes first in the order of
//!   the lock, so that `hand_over` finds its entry, or comes later and observes the new limit. `enter` reads the limit
//!   without the lock and may use the old value for a moment: then it fails and `join` decides, or it admits a call by
//!   a limit that has just been lowered.
//! - With partitions or priorities every admission takes the lock (`core/sorted.rs`), because the counts of the
//!   partitions are in the queue. The word is changed by the same operations, and their calls do not use `enter`.
//! - No user code runs under the lock: wakers are woken, cloned and dropped without it.
//!
//! # Memory orderings
//!
//! - The Acquire of `enter`, `join` and `hand_over` pairs with the Release of `exit` (both are AcqRel where they do two
//!   things): the writes of a call happen before the next call that uses its permit. All changes of the word are
//!   read-modify-writes, so the release sequence of each exit extends to every later acquire.
//! - The AcqRel of `exit` and of [`abandon`](Limiter::abandon) also orders the last use of the limiter before its
//!   renewal; see `core/life.rs`.
//! - Loads before a compare-exchange are Relaxed: a stale value makes the compare-exchange fail. A stale `waiting > 0`
//!   or `in flight == limit` in `enter` leads to `join`, which decides by a compare-exchange of its own.
//! - The limit is ordered by the lock where it matters, as stated above. The other settings are independent values and
//!   are Relaxed.

mod life;
#[cfg(all(test, buttress_loom))]
mod loom_models;
mod partitioned;
mod settings;
mod unread;

use std::{
    fmt,
    ops::RangeInclusive,
    sync::{Arc, OnceLock},
    task::{Context, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    adaptive::Teller,
    partition::{Line, Priority},
    queue::{Place, Queue, QueueOrder, Registered, Turn},
};
use crate::{
    event::event,
    fault::LayerName,
    outcome::{LayerKind, Outcome, Rejected, RejectedKind},
    permit::Token,
    sync::modelled::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

/// One concurrency limit: its permits, queue, settings and counters.
pub struct Limiter {
    /// `waiting << 32 | in flight`; see the module. While `waiting` is not zero, permits are acquired through the queue
    /// only.
    word: AtomicU64,
    limit: AtomicU32,
    adaptive: Option<Teller>,
    queue: Mutex<Queue>,
    /// The maximum length of the queue; 0 is no queue.
    longest_queue: AtomicU32,
    /// The maximum wait of a queue entry.
    longest_wait_ms: AtomicU64,
    retry_after_ms: AtomicU64,
    /// Whether a permit is released at the response head.
    to_the_head_only: AtomicBool,
    shadow: AtomicBool,
    /// Whether health calls are exempt.
    exempts_health: AtomicBool,
    /// The number of exempt `Check` calls of `grpc.health.v1` in flight.
    health_checks: AtomicU32,
    /// The number of exempt `Watch` streams of `grpc.health.v1` in flight.
    health_watches: AtomicU32,
    unread: Unread,
    counts: LimitCounts,
    /// Whether the limit has partitions or priorities, so that each admission takes the lock.
    sorts: AtomicBool,
    /// The number of uses that keep a fixed limit from being renewed: each exempt call in flight is one, and the owners
    /// and the calls in flight are one together. See `core/life.rs`.
    uses: AtomicU32,
    /// The reference by which the limiter returns to the [free list](super::reuse::Limit). Not set for an adaptive
    /// limit.
    home: OnceLock<&'static Self>,
}

/// The counters of rejections and of calls without a permit. On a cache line of its own, so that a rejection does not
/// invalidate the line that admitted calls read.
#[derive(Default)]
#[repr(align(128))]
struct LimitCounts {
    full: AtomicU64,
    waited_too_long: AtomicU64,
    deadline_passed: AtomicU64,
    outranked: AtomicU64,
    shadowed: AtomicU64,
    exempt: AtomicU64,
}

/// The result of an attempt to acquire a permit or to join the queue.
pub(crate) enum Entry {
    /// A permit has been acquired.
    In(Token),
    /// The call has joined the queue.
    Waits(Place),
}

/// The default of the `Retry-After` hint of rejections.
const RETRY_AFTER_MS: u64 = 1000;

const ONE_IN: u64 = 1;
const ONE_WAITING: u64 = 1 << 32;
/// Set when the last [`Limit`](super::reuse::Limit) has been dropped. It is the highest bit of the waiting count,
/// which is zero by then: a waiting call has a `Limit`. So `exit` detects a waiting call and an abandoned limit by one
/// comparison.
const ABANDONED: u64 = 1 << 63;
/// The maximum of the waiting count, which does not use the bit of [`ABANDONED`].
pub(super) const MOST_WAITING: u32 = (1 << 31) - 1;

/// The bits of a [`Token`]'s tag that are not for the algorithm. The layout of a tag:
///
/// ```text
/// bit 63        EXEMPT
/// bit 62        SHADOW
/// bit 61        HEALTH_WATCH
/// bit 60        HEALTH_CHECK
/// bits 59..40   the slot of a watched body, counted from 1 (`core/unread.rs`); 0 is none
/// bits 39..32   the index of the queue ([`Line`]); 0 is the calls without a share
/// bits 31..0    the number of calls in flight at the admission, for the algorithm of an adaptive limit; else 0
/// ```
///
/// A call of a fixed limit without any of these has the tag 0, so that [`Limiter::end`] tests a single value.
const MARKS: u64 = !0 << 32;
/// A call that needs no permit.
const EXEMPT: u64 = 1 << 63;
/// A call that was admitted in shadow mode instead of being rejected. It has no permit.
const SHADOW: u64 = 1 << 62;
/// An exempt `Watch` stream of `grpc.health.v1`.
const HEALTH_WATCH: u64 = 1 << 61;
/// An exempt `Check` of `grpc.health.v1`.
const HEALTH_CHECK: u64 = 1 << 60;
/// The maximum number of exempt checks of one limit at a time. They end fast, because a health registry responds at
/// once.
const MAX_HEALTH_CHECKS: u32 = 1024;
/// The maximum number of exempt `Watch` streams of one limit.
const MAX_HEALTH_WATCHES: u32 = 64;

/// Returns the bits of a tag for the index of a queue.
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
            counts: LimitCounts::default(),
            sorts: AtomicBool::new(false),
            uses: AtomicU32::new(1),
            home: OnceLock::new(),
        }
    }

    // ===== Acquiring a permit =====

    #[inline]
    pub(crate) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    fn store(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }

    fn is_shadow(&self) -> bool {
        self.shadow.load(Ordering::Relaxed)
    }

    /// Returns the maximum length of the queue. It is 0 in shadow mode, in which no call waits.
    fn longest_queue(&self) -> u32 {
        if self.is_shadow() { 0 } else { self.longest_queue.load(Ordering::Relaxed) }
    }

    /// Returns whether a call would be admitted at once. The result may be outdated at once.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        let word = self.word.load(Ordering::Relaxed);
        (waiting(word) == 0 && in_flight(word) < self.limit()) || self.is_shadow()
    }

    /// Acquires a permit, if one is free and no call waits. For calls without partitions and priorities.
    #[inline]
    pub(super) fn enter(&self) -> Option<Token> {
        let mut word = self.word.load(Ordering::Relaxed);
        // A compare-exchange instead of an addition that is undone on failure, although the latter is faster under
        // contention: other calls would observe more calls in flight than there are, and be rejected.
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

    /// Returns the token of an admitted call. `in_flight` includes the call. The token of a fixed limit is empty: only
    /// an algorithm uses the number.
    #[inline]
    pub(super) fn begin(&self, in_flight: u32) -> Token {
        self.adaptive.as_ref().map_or(Token::default(), |adaptive| adaptive.started(in_flight))
    }

    /// Joins the queue, or acquires a permit that has become free. For calls without partitions and priorities.
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

    /// Returns the state of this queue entry. If it waits, the waker of `cx` is woken when the state changes.
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

    /// Removes a queue entry, or releases the permit that it has received.
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

    // ===== Releasing a permit =====

    /// Releases the permit of a call that has ended.
    #[inline]
    pub(super) fn end(&self, token: Token) {
        if token.tag & MARKS == 0 {
            self.exit();
        } else {
            self.end_marked(token);
        }
    }

    /// Releases a permit of the word, and passes it on if a call waits.
    #[inline]
    fn exit(&self) {
        let before = self.word.fetch_sub(ONE_IN, Ordering::AcqRel);
        if before >= ONE_WAITING {
            self.exited(before);
        }
    }

    /// Handles a release after which there is more to do. `before` is the word before it. An abandoned limit has no
    /// waiting calls, and its last call ends the use of it.
    #[cold]
    fn exited(&self, before: u64) {
        if before & ABANDONED == 0 {
            self.hand_over();
        } else if in_flight(before) == 1 {
            self.leave_use();
        }
    }

    // ===== Adaptive limits =====

    /// Records the response head of a call with the algorithm, and admits waiting calls if the limit was raised.
    #[inline]
    pub(super) fn heard_head(&self, token: &mut Token, so_far: Outcome) {
        let Some(adaptive) = &self.adaptive else { return };
        // The algorithm gets a token without the marks, which only the release needs. The token of the call keeps its
        // marks even if the algorithm panics, so that the release stays correct.
        let mut unmarked = Token { tag: token.tag & !MARKS, ..*token };
        let changed = adaptive.head(&mut unmarked, so_far, |limit| self.store(limit));
        *token = Token { tag: token.tag & MARKS | unmarked.tag, ..unmarked };
        if changed {
            self.hand_over();
        }
    }

    /// Records the end of a call with the algorithm, and admits waiting calls if the limit was raised.
    #[inline]
    pub(super) fn heard_end(&self, mut token: Token, outcome: Outcome) {
        if let Some(adaptive) = &self.adaptive {
            token.tag &= !MARKS;
            if adaptive.on_sample(token, outcome, |limit| self.store(limit)) {
                self.hand_over();
            }
        }
    }

    // ===== Passing permits to waiting calls =====

    /// Passes permits to queue entries while there are free permits. Each waker is woken without the lock.
    pub(super) fn hand_over(&self) {
        loop {
            let mut queue = self.lock();
            let mut word = self.word.load(Ordering::Acquire);
            let turn = loop {
                let turn = queue.turn(self.limit(), in_flight(word), Instant::now);
                let Some(line) = turn else { break None };
                // Both counts change in one step; see the invariants of the module.
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
        // No user code runs under the lock, so the state is consistent even if the lock is poisoned.
        self.queue.lock()
    }

    /// Rejects a call. In shadow mode, admits it without a permit instead, and counts it.
    pub(super) fn turn_away(
        &self,
        kind: RejectedKind,
        label: impl FnOnce() -> Option<Arc<LayerName>>,
    ) -> Result<Token, Rejected> {
        let label = label();
        let _name = label.as_deref().map_or("", |label| &*label.name);
        if !self.is_shadow() {
            event!(limit, DEBUG, resilience.name = _name, reason = kind.as_str(), "call rejected");
            return Err(self.refuse(kind).labelled(label));
        }
        self.counts.shadowed.fetch_add(1, Ordering::Relaxed);
        event!(
            limit,
            DEBUG,
            resilience.name = _name,
            reason = kind.as_str(),
            "call would be rejected"
        );
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

    /// Counts a rejection and returns it, with the hint of the limit.
    fn refuse(&self, kind: RejectedKind) -> Rejected {
        self.counter(kind).fetch_add(1, Ordering::Relaxed);
        let rejected = Rejected::by(LayerKind::ConcurrencyLimit, kind);
        if kind == RejectedKind::DeadlinePassed {
            // A call whose deadline has passed has no use for a later response, so there is no hint.
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

use unread::Unread;
