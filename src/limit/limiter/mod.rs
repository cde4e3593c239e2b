//! The limiter: one atomic word for the calls in flight and the waiting calls, and a locked queue.
//!
//! # Mechanism
//!
//! The counts of a [`LimitWord`] are a `u64`:
//!
//! ```text
//! bit 63        ABANDONED: the limiter has been dropped
//! bits 62..32   waiting: the number of queue entries
//! bits 31..0    in flight: the number of permits in use
//! ```
//!
//! A call that finds `waiting == 0` and `in flight < limit` acquires its permit by one compare-exchange that adds 1
//! ([`Limiter::try_acquire`]). It releases the permit by one `fetch_sub` of 1 ([`LimitWord::release`]). No lock, no
//! allocation and no clock read is involved.
//!
//! Otherwise the call joins the queue ([`Limiter::join_queue`]): under the lock of the queue, a compare-exchange adds 1
//! to `waiting`, and the entry is inserted under the same lock hold. As long as `waiting` is not zero, `try_acquire`
//! fails, so a new call cannot overtake the queue. A release that finds `waiting > 0` passes its permit on
//! ([`Limiter::grant_next`]): under the lock, one compare-exchange subtracts 1 from `waiting` and adds 1 to
//! `in flight`, the entry is removed from the queue, and its waker is woken without the lock. The permit belongs to the
//! entry from then on, before its future has been polled. If the future is dropped instead, [`Limiter::leave_queue`]
//! finds that the entry has received a permit and releases it, which passes it to the next entry.
//!
//! `grant_next` repeats until no entry may have a permit, so one release also fills a limit that has been raised.
//!
//! # Life
//!
//! A limiter is reference-counted by its layers, services, handles and waiting calls, and is deallocated with the last
//! reference. A reference count per call would cost two atomic operations more than the permit itself. So only the word
//! outlives the limiter: it lies in a [slot](crate::permit::Slot), and the permit of a call holds a `&'static`
//! reference to the slot. The slot finds the limiter for the rare release that passes its permit on.
//!
//! Some calls need the limiter at their release: the calls of an adaptive limit, the calls of a partition, and exempt
//! calls, which are not in the word. Their permits hold a counted reference; see `shared.rs`.
//!
//! The drop of the limiter sets ABANDONED. If no call is in flight then, the drop recycles the slot; otherwise the
//! release that takes `in flight` from 1 to 0 with the bit set does. Both are read-modify-writes of one word, so
//! exactly one of them observes "abandoned, and no call in flight". No call is admitted after the drop, because an
//! admission needs a reference to the limiter, and no entry is in the queue, because a waiting call has one.
//!
//! Some code may still use the slot when another limiter owns it, without an effect on that limiter:
//!
//! - A call that was admitted in shadow mode is not counted. Its release does nothing.
//! - A response body whose permit the sweeper has released still owns its reader slot, and frees only that.
//! - The sweeper continues for the new owner.
//! - A release that found a waiting call looks up the limiter after its `fetch_sub`. The waiting call and the limiter
//!   may be dropped in between. Then it finds no limiter, or calls `grant_next` for the new owner, which passes on only
//!   permits that are free.
//!
//! # Invariants
//!
//! - `in flight` is never raised above the limit that the thread has read. The check and the addition are one
//!   compare-exchange. Adding first and subtracting on failure would be faster under contention, but other calls would
//!   observe too many calls in flight and be rejected. After the limit has been lowered, `in flight` may exceed it
//!   until calls end.
//! - No permit is lost while a call waits. Both counts are in one word, so its modifications have one order. Either a
//!   release comes before the compare-exchange of `join_queue`: then that compare-exchange fails or observes the free
//!   permit, and the call acquires it. Or it comes after: then the value that `fetch_sub` returns has `waiting > 0`,
//!   and the releasing thread calls `grant_next`. `grant_next` has to take the lock, so the entry is in the queue by
//!   then. Two separate atomics would need a fence between them; do not split the word.
//! - While the lock is free, `waiting` equals the number of entries in the queue: each change of `waiting` happens
//!   under the lock, together with the change of the queue.
//! - `grant_next` moves a caller from `waiting` to `in flight` in one step. In two steps, a new call could acquire the
//!   permit in between, or `in flight` would exceed the limit.
//! - A change of the limit calls `grant_next` after the store. A concurrent `join_queue` either comes first in the
//!   order of the lock, so that `grant_next` finds its entry, or comes later and observes the new limit. `try_acquire`
//!   reads the limit without the lock and may use the old value for a moment: then it fails and `join_queue` decides,
//!   or it admits a call by a limit that has just been lowered.
//! - With partitions or priorities every admission takes the lock (`partitioned.rs`), because the counts of the
//!   partitions are in the queue. The word is changed by the same operations, and their calls do not use `try_acquire`.
//! - No user code runs under the lock: wakers are woken, cloned and dropped without it.
//!
//! # Memory orderings
//!
//! - The Acquire of an admission (`try_acquire`, or `change` in `join_queue` and `grant_next`) pairs with the Release
//!   of [`LimitWord::release`]: the writes of a call happen before the next call that uses its permit. All changes of
//!   the word are read-modify-writes, so the release sequence of each release extends to every later acquire.
//! - `release` and [`LimitWord::abandon`] are AcqRel, so the thread that recycles the slot has acquired the writes of
//!   all other calls. The free list publishes them to the next owner, whose [`LimitWord::reset`] can be Relaxed.
//! - Loads before a compare-exchange are Relaxed: a stale value makes the compare-exchange fail. A stale `waiting > 0`
//!   or `in flight == limit` in `try_acquire` leads to `join_queue`, which decides by a compare-exchange of its own.
//! - The limit is ordered by the lock where it matters, as stated above. The other settings are independent values and
//!   are Relaxed.
//!
//! # What a change must preserve
//!
//! - Both counts and ABANDONED stay in one word, and every change of it is a read-modify-write.
//! - A change of `waiting` and that of the queue are under one lock hold.
//! - A permit whose release needs the limiter holds a counted reference: [`NEEDS_LIMITER`](super::tag::NEEDS_LIMITER).
//! - [`LimitWord::reset`] resets each setting of the word, and nothing that a call of a former owner uses.

#[cfg(all(test, buttress_loom))]
mod loom_models;
mod partitioned;
mod settings;
#[cfg(all(test, not(buttress_loom)))]
mod tests;
mod word;

use std::{
    fmt,
    task::{Context, Waker},
    time::Duration,
};

use tokio::time::Instant;

use self::word::AfterRelease;
pub(super) use self::word::LimitWord;
use super::{
    adaptive::{ChangeReason, LimitStep, Sampler},
    partition::Priority,
    queue::{EntryId, Position, Queue, Registered},
    tag::{EXEMPT, HEALTH_CHECK, HEALTH_WATCH, MARKS, SHADOW, of_partition, partition},
};
use crate::{
    event::event,
    fault::NameCell,
    outcome::{LayerKind, Outcome, Rejected, RejectedKind, TimeoutPhase, report_rejection},
    permit::{FreeSlots, Slot, SlotOwner, Token},
    sync::modelled::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{WaitResult, WaitTimes},
};

const LAYER: &str = LayerKind::ConcurrencyLimit.as_str();

/// One concurrency limit: its queue, settings and counters. The counts of its permits are in the word of its slot.
pub(crate) struct Limiter {
    slot: &'static Slot<Self>,
    limit: AtomicU32,
    adaptive: Option<Sampler>,
    /// Whether the limit has partitions or priorities, so that each admission takes the lock.
    is_partitioned: AtomicBool,
    queue: Mutex<Queue>,
    /// The maximum length of the queue; 0 is no queue.
    max_queue: AtomicU32,
    /// The maximum wait of a queue entry.
    max_wait_ms: AtomicU64,
    retry_after_ms: AtomicU64,
    shadow: AtomicBool,
    /// Whether health calls are exempt.
    exempts_health: AtomicBool,
    /// The number of exempt `Check` calls of `grpc.health.v1` in flight.
    health_checks: AtomicU32,
    /// The number of exempt `Watch` streams of `grpc.health.v1` in flight.
    health_watches: AtomicU32,
    counters: LimitCounters,
    label: NameCell,
    /// The waits that the queue counts. Shared with the queue, so that they are exported and read without its lock.
    wait_times: WaitTimes,
    /// Whether a layer has built a service with this limiter.
    is_in_use: AtomicBool,
}

/// The counters of rejections and of calls without a permit. On a cache line of its own, so that a rejection does not
/// invalidate the line that admitted calls read.
#[derive(Default)]
#[repr(align(128))]
struct LimitCounters {
    full: AtomicU64,
    waited_too_long: AtomicU64,
    deadline_passed: AtomicU64,
    outranked: AtomicU64,
    misconfigured: AtomicU64,
    shadowed: AtomicU64,
    exempt: AtomicU64,
    exempt_in_flight: AtomicU32,
    unread: AtomicU64,
}

/// The result of an attempt to acquire a permit or to join the queue.
pub(crate) enum Acquisition {
    Admitted(Token),
    Queued(EntryId),
}

/// The default of the `Retry-After` hint of rejections.
const RETRY_AFTER_MS: u64 = 1000;
/// The maximum number of exempt checks of one limit at a time. They end fast, because a health registry responds at
/// once.
const MAX_HEALTH_CHECKS: u32 = 1024;
/// The maximum number of exempt `Watch` streams of one limit.
const MAX_HEALTH_WATCHES: u32 = 64;

impl SlotOwner for Limiter {
    type Word = LimitWord;

    fn free_slots() -> &'static FreeSlots<Self> {
        static FREE: FreeSlots<Limiter> = FreeSlots::new();
        &FREE
    }
}

impl Limiter {
    /// Returns a limiter that is not registered in its slot yet. The owner registers it.
    pub(super) fn new(limit: u32, adaptive: Option<Sampler>) -> Self {
        let slot = Slot::<Self>::allocate();
        slot.word().reset();
        let queue = Queue::default();
        let wait_times = queue.wait_times.clone();
        Self {
            slot,
            limit: AtomicU32::new(limit),
            adaptive,
            is_partitioned: AtomicBool::new(false),
            queue: Mutex::new(queue),
            max_queue: AtomicU32::new(0),
            max_wait_ms: AtomicU64::new(0),
            retry_after_ms: AtomicU64::new(RETRY_AFTER_MS),
            shadow: AtomicBool::new(false),
            exempts_health: AtomicBool::new(true),
            health_checks: AtomicU32::new(0),
            health_watches: AtomicU32::new(0),
            counters: LimitCounters::default(),
            label: NameCell::default(),
            wait_times,
            is_in_use: AtomicBool::new(false),
        }
    }

    #[inline]
    pub(super) fn slot(&self) -> &'static Slot<Self> {
        self.slot
    }

    #[inline]
    fn word(&self) -> &'static LimitWord {
        self.slot.word()
    }

    // ===== Acquiring a permit =====

    #[inline]
    pub(crate) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Stores the limit, and returns the previous limit.
    fn store(&self, limit: u32) -> u32 {
        self.limit.swap(limit, Ordering::SeqCst)
    }

    pub(in super::super) fn is_shadow(&self) -> bool {
        self.shadow.load(Ordering::Relaxed)
    }

    /// Returns the maximum length of the queue. It is 0 in shadow mode, in which no call waits.
    pub(in crate::limit) fn max_queue(&self) -> u32 {
        if self.is_shadow() { 0 } else { self.max_queue.load(Ordering::Relaxed) }
    }

    /// Returns whether a call would be admitted at once. The result may be outdated at once.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.word().counts().has_room(self.limit()) || self.is_shadow()
    }

    /// Acquires a permit, if one is free and no call waits. For calls without partitions and priorities.
    #[inline]
    pub(super) fn try_acquire(&self) -> Option<Token> {
        self.word().try_acquire(|| self.limit()).map(|in_flight| self.start(in_flight))
    }

    /// Returns the token of an admitted call. `in_flight` includes the call. The token of a fixed limit is empty: only
    /// an algorithm uses the number.
    #[inline]
    fn start(&self, in_flight: u32) -> Token {
        self.adaptive.as_ref().map_or(Token::default(), |adaptive| adaptive.start(in_flight))
    }

    /// Joins the queue, or acquires a permit that has become free. For calls without partitions and priorities.
    pub(super) fn join_queue(&self) -> Result<Acquisition, RejectedKind> {
        let max = self.max_queue();
        if max == 0 || self.limit() == 0 {
            return Err(RejectedKind::Full);
        }
        let mut queue = self.lock();
        let mut counts = self.word().counts();
        loop {
            let has_room = counts.has_room(self.limit());
            if !has_room && counts.waiting() >= max {
                return Err(RejectedKind::Full);
            }
            let next = if has_room { counts.with_call() } else { counts.with_waiting() };
            match self.word().change(counts, next) {
                Ok(()) if has_room => {
                    return Ok(Acquisition::Admitted(self.start(next.in_flight())));
                }
                Ok(()) => {
                    let entry = queue.join(0, Priority::NORMAL, Instant::now());
                    return Ok(Acquisition::Queued(entry));
                }
                Err(current) => counts = current,
            }
        }
    }

    /// Returns the state of this queue entry. If it waits, the waker of `cx` is woken when the state changes.
    ///
    /// `is_new`: no waker has been registered for the entry yet.
    pub(super) fn poll_position(&self, entry: EntryId, is_new: bool, cx: &Context<'_>) -> Position {
        // A waker is user code. It is cloned and dropped without the lock: the last waker of a task drops the task,
        // which may hold permits of this limit.
        let mut waker = is_new.then(|| cx.waker().clone());
        loop {
            let mut queue = self.lock();
            let (position, before) = queue.position(entry, cx.waker(), waker.take());
            drop(queue);
            match before {
                Registered::Done(before) => {
                    drop(before);
                    return position;
                }
                Registered::NeedsWaker => waker = Some(cx.waker().clone()),
            }
        }
    }

    /// Removes a queue entry, or releases the permit that it has received. Returns the last state of the entry.
    pub(super) fn leave_queue(&self, entry: EntryId) -> Position {
        let mut queue = self.lock();
        let (position, waker) = queue.leave(entry, Instant::now);
        match position {
            Position::Queued => self.word().remove_waiting(),
            Position::Granted => queue.shares.record_release(entry.0),
            Position::Displaced => {}
        }
        drop(queue);
        if position == Position::Granted {
            self.release_permit();
        }
        drop(waker);
        position
    }

    /// Exports the wait of a queue entry that has ended. The queue has counted it.
    pub(super) fn export_wait(&self, result: WaitResult, since: Instant) {
        self.wait_times.export(result, || since.elapsed());
    }

    // ===== Releasing a permit =====

    /// Releases the permit of a call that has ended.
    #[inline]
    pub(super) fn release(&self, token: Token) {
        if token.tag & MARKS == 0 {
            self.release_permit();
        } else {
            self.release_marked(token);
        }
    }

    /// Releases a permit of the word, and passes it on if a call waits. The limiter exists, so its slot is not
    /// abandoned.
    #[inline]
    fn release_permit(&self) {
        if self.word().release() == AfterRelease::GrantNext {
            self.grant_next();
        }
    }

    /// Releases the permit of a call that holds no reference to the limiter, and passes it on if a call waits.
    #[inline]
    pub(super) fn release_in(slot: &Slot<Self>) {
        let next = slot.word().release();
        if next != AfterRelease::Nothing {
            Self::released_in(slot, next);
        }
    }

    #[cold]
    fn released_in(slot: &Slot<Self>, next: AfterRelease) {
        if next == AfterRelease::Recycle {
            slot.recycle();
        } else if let Some(limiter) = slot.owner() {
            limiter.grant_next();
        }
    }

    // ===== Adaptive limits =====

    /// Records the response head of a call with the algorithm, and admits waiting calls if the limit was raised.
    #[inline]
    pub(super) fn record_head(&self, token: &mut Token, so_far: Outcome) {
        let Some(adaptive) = &self.adaptive else { return };
        // The algorithm gets a token without the marks, which only the release needs. The token of the call keeps its
        // marks even if the algorithm panics, so that the release stays correct.
        let mut unmarked = Token { tag: token.tag & !MARKS, ..*token };
        let step =
            adaptive.record_head(self.name(), &mut unmarked, so_far, |limit| self.store(limit));
        *token = Token { tag: token.tag & MARKS | unmarked.tag, ..unmarked };
        self.follow(step);
    }

    /// Records the end of a call with the algorithm, and admits waiting calls if the limit was raised.
    #[inline]
    pub(super) fn record_end(&self, mut token: Token, outcome: Outcome) {
        if let Some(adaptive) = &self.adaptive {
            token.tag &= !MARKS;
            self.follow(adaptive.record(self.name(), token, outcome, |limit| self.store(limit)));
        }
    }

    /// Grants permits after a change of the limit by its algorithm, and emits the event of the change.
    #[inline]
    fn follow(&self, step: Option<LimitStep>) {
        if let Some(step) = step {
            self.grant_next();
            self.notify_of(step);
        }
    }

    /// Emits the event of a change of the limit. Must be called without a lock.
    #[cold]
    fn notify_of(&self, LimitStep { from, limit, reason }: LimitStep) {
        macro_rules! emit {
            ($level:ident) => {
                event!(
                    limit,
                    $level,
                    LAYER,
                    self.name(),
                    limit = limit,
                    from = from,
                    reason = reason.as_str(),
                    "limit changed",
                )
            };
        }
        match reason {
            _ if from == limit => {}
            ChangeReason::ByHand => emit!(INFO),
            _ => emit!(DEBUG),
        }
    }

    // ===== Passing permits to waiting calls =====

    /// Passes permits to queue entries while there are free permits. Each waker is woken without the lock.
    pub(super) fn grant_next(&self) {
        loop {
            let mut queue = self.lock();
            let mut counts = self.word().observed();
            let granted = loop {
                let index = queue.next_index(self.limit(), counts.in_flight(), Instant::now);
                let Some(index) = index else { break None };
                // Both counts change in one step; see the invariants of the module.
                match self.word().change(counts, counts.with_grant()) {
                    Ok(()) => break Some(queue.grant(index, Instant::now())),
                    Err(current) => counts = current,
                }
            };
            drop(queue);
            match granted {
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
    pub(super) fn reject(&self, kind: RejectedKind) -> Result<Token, Rejected> {
        if !self.is_shadow() {
            self.counter(kind).fetch_add(1, Ordering::Relaxed);
            return Err(self.rejection(kind).labelled(self.label.get().cloned()).reported());
        }
        self.counters.shadowed.fetch_add(1, Ordering::Relaxed);
        report_rejection(
            LayerKind::ConcurrencyLimit,
            self.name(),
            kind,
            self.rejection(kind).retry_after(),
            true,
        );
        Ok(Token::unmeasured(SHADOW))
    }

    fn counter(&self, kind: RejectedKind) -> &AtomicU64 {
        match kind {
            RejectedKind::WaitedTooLong => &self.counters.waited_too_long,
            RejectedKind::DeadlinePassed => &self.counters.deadline_passed,
            RejectedKind::Outranked => &self.counters.outranked,
            RejectedKind::Misconfigured => &self.counters.misconfigured,
            _ => &self.counters.full,
        }
    }

    /// Counts a call that is rejected because a setting of the layer cannot work.
    #[cold]
    pub(super) fn count_misconfigured(&self) {
        self.counters.misconfigured.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns a rejection with the hint of the limit.
    fn rejection(&self, kind: RejectedKind) -> Rejected {
        let rejected = Rejected::by(LayerKind::ConcurrencyLimit, kind);
        if kind == RejectedKind::DeadlinePassed {
            // A call whose deadline has passed has no use for a later response, so there is no hint.
            return rejected;
        }
        rejected.with_retry_after(self.retry_after())
    }

    /// Releases the permit of an unread response.
    pub(super) fn release_unread(&self, token: Token) {
        self.counters.unread.fetch_add(1, Ordering::Relaxed);
        event!(
            limit,
            DEBUG,
            LAYER,
            self.name(),
            reason = TimeoutPhase::Unread.as_str(),
            "response not read, permit released",
        );
        self.release(token);
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.slot.unregister();
        if self.word().abandon() {
            self.slot.recycle();
        }
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
