//! The slots of watched bodies: response bodies whose polls a limit with `max_unread` records.
//!
//! A watched body claims a [`ReaderSlot`] at its response head and frees it at its end. Each poll of the body increases
//! the slot's `polls` by two; the lowest bit is set if the last poll returned `Pending`. The sweeper (`sweeper.rs`)
//! reads the slots and releases the permits of unread responses.
//!
//! A watched call costs two atomic read-modify-write operations on its own slot and two plain stores per poll. It
//! allocates nothing, takes no lock and reads no clock. A claim that finds no free slot allocates a chunk.
//!
//! # Claiming a slot
//!
//! Slots are in chunks, each twice as long as the one before. A claim tries [`PROBES`] random slots of the last chunk;
//! if none of them is free, it adds a chunk. So the claims of different threads rarely meet in one cache line, no free
//! list is needed, and a chunk is added only when the last one is nearly full. A token refers to its slot by number, in
//! the bits [`READER_SLOT`] of its tag.
//!
//! # Invariants
//!
//! - `state` is `generation << 2 | stage`. The stages are free → claimed → held → free, or free → claimed → held →
//!   released → free. Claims increase the generation. A claim writes the other fields while the stage is claimed, in
//!   which the sweeper ignores the slot. Only the sweeper changes held to released, by compare-exchange with the whole
//!   word that it has observed, so it never releases the permit of a later body in the same slot. The body frees the
//!   slot by one read-modify-write, whose old stage states whether the body still has the permit. So a permit is
//!   released once.
//! - `tag`, `polls` and `times` are written only by the owner of the slot: the thread that claims it, then the body.
//! - The sweeper uses `polls` and `times` only after it has observed the same `state` and `polls` for the maximum time.
//! - The sweeper reads `tag` after it has observed the stage held and before its compare-exchange. A later claim writes
//!   `tag` only after it has changed `state`, so if the compare-exchange succeeds, the tag is that of the body.
//! - Slots are never deallocated, because they lie in the leaked slot of the limit. Another limit may own that slot
//!   while a body of the former owner still has a released reader slot: the body frees it at its end and touches
//!   nothing else.
//!
//! # Memory orderings
//!
//! - A claim stores `tag` before it stores the stage held with Release. The sweeper loads `state` with Acquire before
//!   it reads `tag`. Its compare-exchange has Release as well, so that it stays behind the read of `tag`.
//! - A poll stores `times` before it stores `polls` with Release. The sweeper loads `polls` with Acquire before it
//!   reads `times`.
//! - The Release of the body in [`ReaderSlot::free`] pairs with the compare-exchange of the next claim.
//! - The end of the sweeper and a claim are a store-buffering pair; see `sweeper.rs`. The claim and
//!   [`ReaderSlots::has_held`] are SeqCst for it.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::tag::{READER_SLOT, READER_SLOT_SHIFT};
use crate::permit::Token;

/// The frame length in bytes that a client has to read within the maximum time.
const LONG_FRAME: usize = 1024 * 1024;

const FIRST_CHUNK: usize = 256;
/// The maximum number of chunks. They double in length, which gives 1,048,320 slots; further bodies are not watched.
pub(super) const MAX_CHUNKS: usize = 12;
/// The number of slots that a claim tries in a chunk.
const PROBES: usize = 16;
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

/// The `state` and the `polls` of a held slot.
pub(super) type SlotObservation = (u64, u32);

/// The state of a watched body; see the module.
#[derive(Debug)]
pub(super) struct ReaderSlot {
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
    const fn new() -> Self {
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

    /// Returns the observation of a held slot.
    pub(super) fn observe(&self) -> Option<SlotObservation> {
        let state = self.state.load(Ordering::Acquire);
        (state & STAGE == HELD).then(|| (state, self.polls.load(Ordering::Acquire)))
    }

    /// Returns the time without a poll after which the response is unread. `None`: its body waits for the producer.
    pub(super) fn max_silence(&self, observed: SlotObservation, max: Duration) -> Option<Duration> {
        let times = self.times.load(Ordering::Relaxed);
        (observed.1 & PENDING == 0).then(|| max.saturating_mul(times))
    }

    /// Marks the permit as released, if `state` is still the observed one. Returns the token to release it with.
    pub(super) fn release(&self, observed: u64) -> Option<Token> {
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
#[derive(Debug, Default)]
pub(super) struct ReaderSlots {
    /// The maximum time in milliseconds; 0 is off.
    max_ms: AtomicU64,
    chunks: [OnceLock<Box<[ReaderSlot]>>; MAX_CHUNKS],
    /// The chunk in which slots are claimed: the last one.
    last: AtomicUsize,
    /// The number of the sweeper that runs or is about to be spawned. 0: none.
    sweeper: AtomicU64,
    /// The number of the last sweeper.
    last_sweeper: AtomicU64,
}

impl ReaderSlots {
    pub(super) fn set_max(&self, max: Option<Duration>) {
        let millis = |max: Duration| u64::try_from(max.as_millis()).unwrap_or(u64::MAX).max(1);
        self.max_ms.store(max.map_or(0, millis), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn max(&self) -> Option<Duration> {
        match self.max_ms.load(Ordering::Relaxed) {
            0 => None,
            ms => Some(Duration::from_millis(ms)),
        }
    }

    /// Returns whether response bodies are watched.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.max_ms.load(Ordering::Relaxed) != 0
    }

    /// Returns a chunk, and allocates it if needed.
    fn chunk(&self, number: usize) -> &[ReaderSlot] {
        let slots = || (0..FIRST_CHUNK << number).map(|_| ReaderSlot::new()).collect();
        self.chunks[number].get_or_init(slots)
    }

    /// Returns the slot of a token.
    fn slot(&self, tag: u64) -> Option<&ReaderSlot> {
        let index = ((tag & READER_SLOT) >> READER_SLOT_SHIFT).checked_sub(1)? as usize;
        let number = (index / FIRST_CHUNK + 1).ilog2();
        let first = FIRST_CHUNK * ((1 << number) - 1);
        self.chunks.get(number as usize)?.get()?.get(index - first)
    }

    /// Claims a slot for the token of this tag. Returns the tag with the slot.
    pub(super) fn claim(&self, tag: u64) -> Option<u64> {
        loop {
            let last = self.last.load(Ordering::Relaxed).min(MAX_CHUNKS - 1);
            let (slots, first) = (self.chunk(last), FIRST_CHUNK * ((1 << last) - 1));
            for _ in 0..PROBES {
                let at = fastrand::usize(..slots.len());
                if slots[at].claim(tag) {
                    let number = (first + at + 1) as u64;
                    return Some(tag | (number << READER_SLOT_SHIFT));
                }
            }
            if last + 1 == MAX_CHUNKS {
                return None;
            }
            let _ =
                self.last.compare_exchange(last, last + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    // ===== A watched body =====

    /// Records a poll of the body of this token. Returns whether its permit has been released.
    pub(super) fn record_poll(&self, token: Token, frame: Option<usize>) -> bool {
        let Some(slot) = self.slot(token.tag) else { return false };
        slot.record_poll(frame);
        slot.is_released()
    }

    /// Frees the slot of a token, if it has one. Returns the token without it; `None` if the sweeper has released the
    /// permit.
    #[inline]
    pub(super) fn free(&self, token: Token) -> Option<Token> {
        if token.tag & READER_SLOT == 0 {
            return Some(token);
        }
        let had_permit = self.slot(token.tag).is_none_or(ReaderSlot::free);
        had_permit.then_some(Token { tag: token.tag & !READER_SLOT, ..token })
    }

    // ===== The sweeper =====

    /// Returns the slots of a chunk, and the number of the first one. `None` if the chunk is not allocated.
    pub(super) fn allocated(&self, chunk: usize) -> Option<(&[ReaderSlot], usize)> {
        Some((self.chunks.get(chunk)?.get()?, FIRST_CHUNK * ((1 << chunk) - 1)))
    }

    pub(super) fn is_sweeping(&self) -> bool {
        self.sweeper.load(Ordering::SeqCst) != 0
    }

    /// Returns the number of a new sweeper, unless there is a sweeper.
    pub(super) fn begin_sweeper(&self) -> Option<u64> {
        let number = self.last_sweeper.fetch_add(1, Ordering::Relaxed) + 1;
        self.resume_sweeper(number).then_some(number)
    }

    /// Makes this sweeper the current one, unless there is one.
    pub(super) fn resume_sweeper(&self, number: u64) -> bool {
        self.sweeper.compare_exchange(0, number, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Ends this sweeper. Returns whether it was the current one.
    pub(super) fn end_sweeper(&self, number: u64) -> bool {
        self.sweeper.compare_exchange(number, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Returns whether this sweeper is the current one.
    pub(super) fn is_sweeper(&self, number: u64) -> bool {
        self.sweeper.load(Ordering::SeqCst) == number
    }

    /// Removes the sweeper, whose runtime and period are those of the previous limit. Called for a new limit.
    pub(super) fn forget_sweeper(&self) {
        self.sweeper.store(0, Ordering::SeqCst);
    }

    /// Returns whether a body in any slot has its permit.
    pub(super) fn has_held(&self) -> bool {
        let mut slots = self.chunks.iter().filter_map(OnceLock::get).flatten();
        slots.any(|slot| matches!(slot.state.load(Ordering::SeqCst) & STAGE, HELD | CLAIMED))
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::{collections::HashSet, thread::scope};

    use super::*;

    #[test]
    fn slots_have_distinct_numbers() {
        let slots = ReaderSlots::default();
        let tags: Vec<_> = (0..5000).map(|_| slots.claim(1 << 32 | 7).unwrap()).collect();
        let numbers: HashSet<_> = tags.iter().map(|tag| tag & READER_SLOT).collect();
        assert_eq!(numbers.len(), tags.len());
        for tag in &tags {
            assert_eq!(tag & !READER_SLOT, 1 << 32 | 7, "the rest of the tag is kept");
            assert!(slots.slot(*tag).unwrap().free());
        }
        assert!(!slots.has_held());
        // A tag without a slot, and the number of a slot that was never claimed, have no slot.
        assert!(slots.slot(7).is_none() && slots.slot(READER_SLOT).is_none());
        // The largest number fits.
        let max = FIRST_CHUNK * ((1 << MAX_CHUNKS) - 1);
        assert!((max as u64) << READER_SLOT_SHIFT & !READER_SLOT == 0);
    }

    #[test]
    fn slot_claimed_again_is_not_released_for_former_body() {
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
    fn sweeper_releases_permit_of_body_that_loses_it() {
        const ROUNDS: u64 = 20_000;
        let (slot, is_done) = (ReaderSlot::new(), std::sync::atomic::AtomicBool::new(false));
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
    fn permit_is_released_once_by_body_or_sweeper() {
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
