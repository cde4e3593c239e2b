//! Detection of unread responses: responses whose client does not read them.
//!
//! A transport polls a response body only when it can write. If the client stops reading, the buffers fill up and the
//! body is not polled again. Over HTTP/2 without a window it is never polled. No code of this crate runs on the call
//! then, so only another task can release the permit.
//!
//! # Mechanism
//!
//! A watched body claims a [`ReaderSlot`] at its response head and frees it at its end. Each poll of the body increases the
//! slot's `polls` by two; the lowest bit is set if the last poll returned `Pending`. The sweeper, one task for each
//! limit, reads all slots every eighth of the maximum time, and every [`MAX_PERIOD`] if that is shorter. If `state` and
//! `polls` have not changed for the maximum time, and the last poll was not `Pending`, the response has waited for its
//! reader for that time: the sweeper releases the permit. A body whose last poll was `Pending` waits for its producer
//! and keeps its permit.
//!
//! A transport takes a frame as a whole and polls again when it is nearly written, so a long frame has the maximum time
//! once more for each [`LONG_FRAME`] bytes.
//!
//! A watched call costs two atomic read-modify-write operations on its own slot and two plain stores per poll. It
//! allocates nothing, takes no lock and reads no clock; only the sweeper reads the clock. A call of a limit without the
//! setting costs one relaxed load. Two rare events cost more: if no sweeper runs, the next watched call spawns one, and
//! a claim that finds no free slot allocates a chunk.
//!
//! # Claiming a slot
//!
//! Slots are in chunks, each twice as long as the one before. A claim tries [`PROBES`] random slots of the last chunk;
//! if none of them is free, it adds a chunk. So the claims of different threads rarely meet in one cache line, no free
//! list is needed, and a chunk is added only when the last one is nearly full. A token refers to its slot by number, in
//! the bits [`SLOT`] of its tag.
//!
//! # Invariants
//!
//! - `state` is `generation << 2 | stage`. The stages are free → claimed → held → free, or free → claimed → held →
//!   released → free. Claims increase the generation. A claim writes the other fields while the stage is claimed, in
//!   which the sweeper ignores the slot. Only the sweeper changes held to released, by compare-exchange with the whole word that
//!   it has observed, so it never releases the permit of a later body in the same slot. The body frees the slot by one
//!   read-modify-write, whose old stage states whether the body still has the permit. So a permit is released once.
//! - `tag`, `polls` and `times` are written only by the owner of the slot: the thread that claims it, then the body.
//! - The sweeper uses `polls` and `times` only after it has observed the same `state` and `polls` for the maximum time.
//! - The sweeper reads `tag` after it has observed the stage held and before its compare-exchange. A later claim writes
//!   `tag` only after it has changed `state`, so if the compare-exchange succeeds, the tag is that of the body.
//! - Slots are not deallocated while the limit exists. A fixed limit lives forever and may be
//!   [renewed](super::Limiter::renew) while a body of its former use still owns a released slot: the body frees the
//!   slot at its end and touches nothing else.
//! - There is at most one sweeper. `is_sweeping` is set by the thread that spawns it, and cleared by the sweeper when
//!   it ends.
//!
//! # Memory orderings
//!
//! - A claim stores `tag` before it stores the stage held with Release. The sweeper loads `state` with Acquire before it
//!   reads `tag`. Its compare-exchange has Release as well, so that it stays behind the read of `tag`.
//! - A poll stores `times` before it stores `polls` with Release. The sweeper loads `polls` with Acquire before it reads
//!   `times`.
//! - The Release of the body in [`ReaderSlot::free`] pairs with the compare-exchange of the next claim.
//! - The end of the sweeper and a claim are a store-buffering pair. The sweeper clears `is_sweeping` and then reads all
//!   slots; a claim writes its slot and then reads `is_sweeping`. All four operations are SeqCst, so at least one of
//!   the two observes the write of the other: the sweeper continues, or the claim spawns a new one. Weaker orderings
//!   would allow that neither does, and the body would not be watched.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::Handle,
    task::yield_now,
    time::{Instant, sleep},
};

use super::{EXEMPT, Limiter, SHADOW};
use crate::{event::event, fault::LayerName, permit::Token, user_code::catch_panic};

/// The maximum time between two sweeps. A changed setting takes effect within it.
const MAX_PERIOD: Duration = Duration::from_secs(5);

/// The frame length in bytes that a client has to read within the maximum time.
const LONG_FRAME: usize = 1024 * 1024;

const FIRST_CHUNK: usize = 256;
/// The maximum number of chunks. They double in length, which gives 1,048,320 slots; further bodies are not watched.
const MAX_CHUNKS: usize = 12;
/// The number of slots that a claim tries in a chunk.
const PROBES: usize = 16;
/// The number of slots that the sweeper reads without yielding.
const MAX_SLOTS_PER_YIELD: usize = 4096;

const STAGE: u64 = 0b11;
/// The slot has no body.
const FREE: u64 = 0;
/// The slot has a body, and the body has its permit.
const HELD: u64 = 1;
/// The slot has a body whose permit the sweeper has released.
const RELEASED: u64 = 2;
/// A claim writes the slot; the body has its permit.
const CLAIMED: u64 = 3;
/// The step of the generation in `state`.
const GENERATION: u64 = 0b100;

/// The last poll returned `Pending`; a bit of `polls`.
const PENDING: u32 = 1;
/// The step of the count in `polls`.
const POLL: u32 = 2;

/// The bits of a token's tag that contain the number of its slot, counted from 1.
pub(crate) const SLOT: u64 = (1 << 60) - (1 << SLOT_SHIFT);
const SLOT_SHIFT: u32 = 40;

/// The state of a watched body; see the module.
struct ReaderSlot {
    /// `generation << 2 | stage`.
    state: AtomicU64,
    /// The number of polls, times two, and [`PENDING`].
    polls: AtomicU32,
    /// The multiple of the maximum time that the client has for the last frame.
    times: AtomicU32,
    /// The tag of the token with which the sweeper releases the permit.
    tag: AtomicU64,
}

impl ReaderSlot {
    fn new() -> Self {
        Self {
            state: AtomicU64::new(FREE),
            polls: AtomicU32::new(0),
            times: AtomicU32::new(1),
            tag: AtomicU64::new(0),
        }
    }

    /// Claims the slot. Returns `false` if it is not free.
    fn claim(&self, tag: u64) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        let generation = (state & !STAGE).wrapping_add(GENERATION);
        let claimed = generation | CLAIMED;
        if state & STAGE != FREE
            || self
                .state
                .compare_exchange(state, claimed, Ordering::SeqCst, Ordering::Relaxed)
                .is_err()
        {
            return false;
        }
        self.tag.store(tag, Ordering::Relaxed);
        self.record_poll(Some(0));
        self.state.store(generation | HELD, Ordering::Release);
        true
    }

    /// Records a poll of the body, with the length of the frame, or `None` if the body was pending. Only the owner of
    /// the slot calls this, so the load and the store of `polls` need no read-modify-write.
    fn record_poll(&self, frame: Option<usize>) {
        let times = 1 + frame.unwrap_or(0) / LONG_FRAME;
        self.times.store(u32::try_from(times).unwrap_or(u32::MAX), Ordering::Relaxed);
        let polls = self.polls.load(Ordering::Relaxed) & !PENDING;
        let next = polls.wrapping_add(POLL) | u32::from(frame.is_none());
        self.polls.store(next, Ordering::Release);
    }

    fn is_released(&self) -> bool {
        self.state.load(Ordering::Relaxed) & STAGE == RELEASED
    }

    /// Frees the slot. Returns whether its body still had the permit.
    fn free(&self) -> bool {
        self.state.fetch_and(!STAGE, Ordering::AcqRel) & STAGE == HELD
    }

    /// Marks the permit as released, if `state` is still the observed one. Returns the token to release it with.
    fn release(&self, observed: u64) -> Option<Token> {
        let released = observed & !STAGE | RELEASED;
        // Before the exchange: after it, the body may free the slot, and another claim overwrite the tag.
        let tag = self.tag.load(Ordering::Relaxed);
        self.state
            .compare_exchange(observed, released, Ordering::AcqRel, Ordering::Relaxed)
            .ok()
            .map(|_| Token::unmeasured(tag))
    }
}

/// The watched bodies of a limit.
#[derive(Default)]
pub(crate) struct Unread {
    /// The maximum time in milliseconds; 0 is off.
    max_ms: AtomicU64,
    chunks: [OnceLock<Box<[ReaderSlot]>>; MAX_CHUNKS],
    /// The chunk in which slots are claimed: the last one.
    last: AtomicUsize,
    /// A sweeper runs, or is about to be spawned.
    is_sweeping: AtomicBool,
    /// The number of permits that the sweeper has released.
    released: AtomicU64,
    /// The name of the limit, for events.
    label: Mutex<Option<Arc<LayerName>>>,
    /// The reference by which the sweeper finds an adaptive limit. A fixed limit has `home`.
    owner: OnceLock<Weak<Limiter>>,
}

impl Unread {
    #[inline]
    fn max(&self) -> Option<Duration> {
        match self.max_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    /// Resets the settings and counters for another owner. Slots stay as they are.
    pub(crate) fn renew(&self) {
        self.max_ms.store(0, Ordering::Relaxed);
        self.released.store(0, Ordering::Relaxed);
        drop(self.set_label(None));
    }

    fn set_label(&self, label: Option<Arc<LayerName>>) -> Option<Arc<LayerName>> {
        let mut current = self.label.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut current, label)
    }

    /// Returns a chunk, and allocates it if needed.
    fn chunk(&self, number: usize) -> &[ReaderSlot] {
        let slots = || (0..FIRST_CHUNK << number).map(|_| ReaderSlot::new()).collect();
        self.chunks[number].get_or_init(slots)
    }

    /// Returns the slot of a token.
    fn slot(&self, tag: u64) -> Option<&ReaderSlot> {
        let index = ((tag & SLOT) >> SLOT_SHIFT).checked_sub(1)? as usize;
        let number = (index / FIRST_CHUNK + 1).ilog2();
        let first = FIRST_CHUNK * ((1 << number) - 1);
        self.chunks.get(number as usize)?.get()?.get(index - first)
    }

    /// Claims a slot for the token of this tag. Returns the tag with the slot.
    fn claim(&self, tag: u64) -> Option<u64> {
        loop {
            let last = self.last.load(Ordering::Relaxed).min(MAX_CHUNKS - 1);
            let (slots, first) = (self.chunk(last), FIRST_CHUNK * ((1 << last) - 1));
            for _ in 0..PROBES {
                let at = fastrand::usize(..slots.len());
                if slots[at].claim(tag) {
                    let number = (first + at + 1) as u64;
                    return Some(tag | (number << SLOT_SHIFT));
                }
            }
            if last + 1 == MAX_CHUNKS {
                return None;
            }
            let _ =
                self.last.compare_exchange(last, last + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Returns whether a body in any slot has its permit.
    fn has_held(&self) -> bool {
        let mut slots = self.chunks.iter().filter_map(OnceLock::get).flatten();
        slots.any(|slot| matches!(slot.state.load(Ordering::SeqCst) & STAGE, HELD | CLAIMED))
    }
}

impl Limiter {
    // ===== Settings =====

    pub(crate) fn set_max_unread(&self, max: Option<Duration>) {
        let millis = |max: Duration| u64::try_from(max.as_millis()).unwrap_or(u64::MAX).max(1);
        self.unread.max_ms.store(max.map_or(0, millis), Ordering::Relaxed);
    }

    pub(crate) fn unread(&self) -> u64 {
        self.unread.released.load(Ordering::Relaxed)
    }

    /// Names the limit in the sweeper's events.
    pub(crate) fn set_label(&self, label: Arc<LayerName>) {
        drop(self.unread.set_label(Some(label)));
    }

    pub(crate) fn set_owner(&self, owner: Weak<Self>) {
        let _ = self.unread.owner.set(owner);
    }

    // ===== A watched body =====

    /// Returns whether the response body of a call with this token has to be watched.
    #[inline]
    pub(crate) fn watches_reader(&self, token: Token) -> bool {
        self.unread.max_ms.load(Ordering::Relaxed) != 0 && token.tag & (EXEMPT | SHADOW) == 0
    }

    /// Starts to watch a response body, and records its slot in the token. Returns `false` if there is no slot.
    pub(crate) fn watch_reader(&self, token: &mut Token) -> bool {
        let Some(tag) = self.unread.claim(token.tag) else { return false };
        token.tag = tag;
        self.ensure_sweeper();
        true
    }

    /// Records a poll of a watched body. Returns whether its permit has been released.
    pub(crate) fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        let Some(slot) = self.unread.slot(token.tag) else { return false };
        slot.record_poll(frame);
        slot.is_released()
    }

    /// Stops watching. Returns the token without its slot; `None` if its permit has been released already.
    #[inline]
    pub(crate) fn unwatch(&self, token: Token) -> Option<Token> {
        if token.tag & SLOT == 0 {
            return Some(token);
        }
        let had_permit = self.unread.slot(token.tag).is_none_or(ReaderSlot::free);
        had_permit.then_some(Token { tag: token.tag & !SLOT, ..token })
    }

    // ===== The sweeper =====

    /// Spawns the sweeper if there is none and `max_unread` is set. The sweeper ends with the runtime that it was
    /// spawned on, so calls that queue or are rejected check it, too: if all permits are held by unread responses,
    /// there are no other calls.
    pub(crate) fn ensure_sweeper(&self) {
        if self.unread.max().is_none() || self.unread.is_sweeping.load(Ordering::SeqCst) {
            return;
        }
        self.spawn_sweeper();
    }

    #[cold]
    fn spawn_sweeper(&self) {
        let limiter = match (self.home.get(), self.unread.owner.get()) {
            (Some(limiter), _) => Reference::Static(limiter),
            (None, Some(owner)) => Reference::Weak(owner.clone()),
            (None, None) => return,
        };
        // Outside of a runtime no sweeper is spawned; a later call may be inside of one.
        let Ok(runtime) = Handle::try_current() else { return };
        if !self.unread.is_sweeping.swap(true, Ordering::SeqCst) {
            runtime.spawn(Sweeper { limiter, observed: Vec::new(), is_done: false }.run());
        }
    }

    /// Releases the permit of an unread response.
    fn release_unread(&self, token: Token) {
        self.unread.released.fetch_add(1, Ordering::Relaxed);
        let label = self.unread.label.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let _name = label.as_deref().map_or("", |label| &*label.name);
        event!(
            limit,
            DEBUG,
            resilience.name = _name,
            reason = "unread",
            "response not read, permit released"
        );
        self.end(token);
    }
}

/// The sweeper's reference to its limit.
enum Reference {
    Static(&'static Limiter),
    Weak(Weak<Limiter>),
}

impl Reference {
    /// Runs `run`, if the limit still exists.
    fn with<O>(&self, run: impl FnOnce(&Limiter) -> O) -> Option<O> {
        match self {
            Self::Static(limiter) => Some(run(limiter)),
            Self::Weak(limiter) => limiter.upgrade().map(|limiter| run(&limiter)),
        }
    }
}

struct Sweeper {
    limiter: Reference,
    /// The last observation of each slot, and the instant since which it has not changed.
    observed: Vec<(u64, u32, Instant)>,
    /// This sweeper has cleared `is_sweeping`, which may belong to another sweeper by now.
    is_done: bool,
}

impl Sweeper {
    /// Sweeps until the setting is off, the limit has been dropped, or no slot is held.
    async fn run(mut self) {
        while let Some(Some(max)) = self.limiter.with(|limiter| limiter.unread.max()) {
            sleep((max / 8).clamp(Duration::from_millis(1), MAX_PERIOD)).await;
            let mut number_held = 0;
            for number in 0..MAX_CHUNKS {
                for slice in 0..(FIRST_CHUNK << number).div_ceil(MAX_SLOTS_PER_YIELD) {
                    let held = self.sweep(number, slice * MAX_SLOTS_PER_YIELD, max);
                    let Some(Some(held)) = held else { break };
                    number_held += held;
                    yield_now().await;
                }
            }
            if number_held == 0 && self.try_end() {
                return;
            }
        }
    }

    /// Sweeps a slice of a chunk. Returns the number of slots that are held, or `None` if there is no such chunk.
    fn sweep(&mut self, number: usize, from: usize, max: Duration) -> Option<Option<usize>> {
        let (observed, now) = (&mut self.observed, Instant::now());
        self.limiter.with(|limiter| {
            let slots = limiter.unread.chunks[number].get()?;
            let first = FIRST_CHUNK * ((1 << number) - 1);
            observed.resize(observed.len().max(first + slots.len()), (FREE, 0, now));
            let mut held = 0;
            for at in from..slots.len().min(from + MAX_SLOTS_PER_YIELD) {
                let slot = &slots[at];
                let state = slot.state.load(Ordering::Acquire);
                if state & STAGE != HELD {
                    continue;
                }
                held += 1;
                let polls = slot.polls.load(Ordering::Acquire);
                let max = max.saturating_mul(slot.times.load(Ordering::Relaxed));
                let before = &mut observed[first + at];
                if (before.0, before.1) != (state, polls) {
                    *before = (state, polls, now);
                } else if polls & PENDING == 0 && now.saturating_duration_since(before.2) >= max {
                    if let Some(token) = slot.release(state) {
                        // The release wakes queued callers. If a waker panics, the sweeper continues.
                        let _ = catch_panic(|| limiter.release_unread(token));
                    }
                }
            }
            Some(held)
        })
    }

    /// Clears `is_sweeping`. Returns whether this sweeper ends; `false` if a slot is held after all.
    fn try_end(&mut self) -> bool {
        let is_done = |limiter: &Limiter| {
            let unread = &limiter.unread;
            unread.is_sweeping.store(false, Ordering::SeqCst);
            // Either this reads the slot of a concurrent claim, or the claim spawns a sweeper. If a slot is held, this
            // sweeper sets `is_sweeping` again and continues, unless a new sweeper has set it meanwhile.
            !unread.has_held() || unread.is_sweeping.swap(true, Ordering::SeqCst)
        };
        self.is_done = self.limiter.with(is_done).unwrap_or(true);
        self.is_done
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        // The setting is off, or the runtime has dropped the task: a later call may spawn a sweeper. A sweeper that
        // panics leaves `is_sweeping` set: the runtime has no timer, so the next one would panic, too.
        if !self.is_done && !thread::panicking() {
            self.limiter.with(|limiter| limiter.unread.is_sweeping.store(false, Ordering::SeqCst));
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::{collections::HashSet, thread::scope};

    use super::*;

    #[test]
    fn every_slot_has_a_number_of_its_own() {
        let unread = Unread::default();
        let tags: Vec<_> = (0..5000).map(|_| unread.claim(1 << 32 | 7).unwrap()).collect();
        let numbers: HashSet<_> = tags.iter().map(|tag| tag & SLOT).collect();
        assert_eq!(numbers.len(), tags.len());
        for tag in &tags {
            assert_eq!(tag & !SLOT, 1 << 32 | 7, "the rest of the tag is kept");
            assert!(unread.slot(*tag).unwrap().free());
        }
        assert!(!unread.has_held());
        // A tag without a slot, and the number of a slot that was never claimed, have no slot.
        assert!(unread.slot(7).is_none() && unread.slot(SLOT).is_none());
        // The largest number fits.
        let slots = FIRST_CHUNK * ((1 << MAX_CHUNKS) - 1);
        assert!((slots as u64) << SLOT_SHIFT & !SLOT == 0);
    }

    #[test]
    fn slot_that_was_claimed_anew_is_not_released_for_its_former_owner() {
        let slot = ReaderSlot::new();
        assert!(slot.claim(1) && !slot.claim(2));
        let observed = slot.state.load(Ordering::Acquire);
        assert!(slot.free() && slot.claim(3));
        assert_eq!(slot.release(observed), None);
        let observed = slot.state.load(Ordering::Acquire);
        assert_eq!(slot.release(observed).map(|token| token.tag), Some(3));
        assert!(slot.is_released() && !slot.claim(4));
        assert!(!slot.free(), "the sweeper has released the permit");
        assert!(slot.claim(5));
    }

    #[test]
    fn sweeper_releases_the_permit_of_the_body_that_loses_it() {
        const ROUNDS: u64 = 20_000;
        let (slot, is_done) = (ReaderSlot::new(), AtomicBool::new(false));
        let (lost, released) = scope(|scope| {
            let body = scope.spawn(|| {
                let mut lost = Vec::new();
                for tag in 1..=ROUNDS {
                    assert!(slot.claim(tag));
                    for _ in 0..fastrand::u8(..32) {
                        std::hint::spin_loop();
                    }
                    if !slot.free() {
                        lost.push(tag);
                    }
                }
                is_done.store(true, Ordering::Release);
                lost
            });
            let sweeper = scope.spawn(|| {
                let mut released = Vec::new();
                while !is_done.load(Ordering::Acquire) {
                    let observed = slot.state.load(Ordering::Acquire);
                    if observed & STAGE == HELD {
                        released.extend(slot.release(observed).map(|token| token.tag));
                    }
                }
                released
            });
            (body.join().unwrap(), sweeper.join().unwrap())
        });
        assert_eq!(lost, released);
    }

    #[test]
    fn permit_is_released_by_the_body_or_by_the_sweeper_and_never_by_both() {
        const ROUNDS: u32 = 20_000;
        let slot = ReaderSlot::new();
        let released = AtomicU32::new(0);
        scope(|scope| {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    assert!(slot.claim(1));
                    if slot.free() {
                        released.fetch_add(1, Ordering::Relaxed);
                    }
                }
                slot.tag.store(0, Ordering::Release);
            });
            scope.spawn(|| {
                while slot.tag.load(Ordering::Acquire) != 0
                    || slot.polls.load(Ordering::Acquire) == 0
                {
                    let observed = slot.state.load(Ordering::Acquire);
                    if observed & STAGE == HELD && slot.release(observed).is_some() {
                        released.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        });
        assert_eq!(released.into_inner(), ROUNDS);
    }

    #[test]
    fn long_frame_has_more_time() {
        let slot = ReaderSlot::new();
        for (frame, times) in [
            (None, 1),
            (Some(LONG_FRAME - 1), 1),
            (Some(50 * LONG_FRAME), 51),
            (Some(usize::MAX), u32::MAX),
        ] {
            slot.record_poll(frame);
            assert_eq!(slot.times.load(Ordering::Relaxed), times);
            assert_eq!(slot.polls.load(Ordering::Relaxed) & PENDING == PENDING, frame.is_none());
        }
    }
}
