//! The sweeper: a task that releases the permits of unread responses, whose client does not read them.
//!
//! A transport polls a response body only when it can write. If the client stops reading, the buffers fill up and the
//! body is not polled again. Over HTTP/2 without a window it is never polled. No code of this crate runs on the call
//! then, so only another task can release the permit.
//!
//! # Mechanism
//!
//! The sweeper, one task for each slot of a limit, reads all [reader slots](super::reader_slots) every eighth of the
//! maximum time, and every [`MAX_PERIOD`] if that is shorter. If a slot has not changed for the maximum time, and the
//! last poll was not `Pending`, the response has waited for its reader for that time: the sweeper releases the permit.
//! A body whose last poll was `Pending` waits for its producer and keeps its permit.
//!
//! A transport takes a frame as a whole and polls again when it is nearly written, so a frame of 1 MiB or more has the
//! maximum time once more for each whole MiB.
//!
//! The sweeper ends when the setting is off or no slot is held. If no sweeper runs, the next watched call spawns one.
//! It also ends if the slot has a new owner, because its runtime and its period are those of the previous one. A held
//! reader slot belongs to a call in flight, so the owner of the slot, if there is one, is the limiter that admitted that
//! call.
//!
//! # The end of the sweeper
//!
//! There is at most one current sweeper of a slot. Its number is in the word: the thread that spawns it writes the
//! number, and the sweeper replaces it by 0 when it ends. A sweeper whose number is not in the word is no longer current
//! and ends without a change. The end and a claim are a store-buffering pair: the sweeper clears the number and then
//! reads all slots; a claim writes its slot and then reads the number. All four operations are SeqCst, so at least one of
//! the two observes the write of the other: the sweeper continues, or the claim spawns a new one. Weaker orderings would
//! allow that neither does, and the body would not be watched.

use std::{thread, time::Duration};

use tokio::{
    runtime::Handle,
    task::yield_now,
    time::{Instant, sleep},
};

use super::{
    limiter::Limiter,
    reader_slots::{MAX_CHUNKS, ReaderSlots, SlotObservation},
};
use crate::{permit::Slot, user_code::catch_panic};

/// The maximum time between two sweeps. A changed setting takes effect within it.
const MAX_PERIOD: Duration = Duration::from_secs(5);
/// The number of slots that the sweeper reads without yielding.
const MAX_SLOTS_PER_YIELD: usize = 4096;

/// Spawns the sweeper if there is none and `max_unread` is set. The sweeper ends with the runtime that it was spawned
/// on, so calls that queue or are rejected check it, too: if all permits are held by unread responses, there are no
/// other calls.
#[inline]
pub(super) fn ensure_sweeper(slot: &Slot<Limiter>) {
    let readers = &slot.word().readers;
    if readers.is_on() && !readers.is_sweeping() {
        spawn(slot);
    }
}

#[cold]
fn spawn(slot: &Slot<Limiter>) {
    // Outside of a runtime no sweeper is spawned; a later call may be inside of one.
    let Ok(runtime) = Handle::try_current() else { return };
    // Also without a limiter, because the sweeper ends unread responses.
    let slot = slot.leaked();
    if let Some(number) = slot.word().readers.begin_sweeper() {
        runtime.spawn(Sweeper { slot, number, observed: Vec::new() }.run());
    }
}

struct Sweeper {
    slot: &'static Slot<Limiter>,
    number: u64,
    /// The last observation of each slot, and the instant since which it has not changed.
    observed: Vec<(SlotObservation, Instant)>,
}

impl Sweeper {
    fn readers(&self) -> &'static ReaderSlots {
        &self.slot.word().readers
    }

    /// Sweeps until the setting is off, no slot is held, or the sweeper is no longer current.
    async fn run(mut self) {
        while let Some(max) = self.readers().max() {
            sleep((max / 8).clamp(Duration::from_millis(1), MAX_PERIOD)).await;
            if !self.readers().is_sweeper(self.number) {
                return;
            }
            let mut number_held = 0;
            for chunk in 0..MAX_CHUNKS {
                let mut from = 0;
                while let Some(held) = self.sweep(chunk, from, max) {
                    number_held += held;
                    from += MAX_SLOTS_PER_YIELD;
                    yield_now().await;
                    if !self.readers().is_sweeper(self.number) {
                        return;
                    }
                }
            }
            if number_held == 0 && self.try_end() {
                return;
            }
        }
    }

    /// Sweeps a part of a chunk. Returns the number of slots that are held, or `None` if there is no such part.
    fn sweep(&mut self, chunk: usize, from: usize, max: Duration) -> Option<usize> {
        let (slots, first) = self.readers().allocated(chunk)?;
        let part = slots.get(from..slots.len().min(from + MAX_SLOTS_PER_YIELD))?;
        if part.is_empty() {
            return None;
        }
        let now = Instant::now();
        let len = self.observed.len().max(first + slots.len());
        self.observed.resize(len, (SlotObservation::default(), now));
        let mut held = 0;
        for (slot, last) in part.iter().zip(&mut self.observed[first + from..]) {
            let Some(current) = slot.observe() else { continue };
            held += 1;
            if last.0 != current {
                *last = (current, now);
            } else if slot
                .max_silence(current, max)
                .is_some_and(|max| now.saturating_duration_since(last.1) >= max)
            {
                if let Some(token) = slot.release(current.0) {
                    // The release wakes queued callers. If a waker panics, the sweeper continues.
                    let _ = catch_panic(|| match self.slot.owner() {
                        Some(limiter) => limiter.release_unread(token),
                        None => Limiter::release_in(self.slot),
                    });
                }
            }
        }
        Some(held)
    }

    /// Ends the sweeper. Returns `false` if a slot is held after all, and the sweeper continues.
    fn try_end(&self) -> bool {
        let readers = self.readers();
        // Either this reads the slot of a concurrent claim, or the claim spawns a sweeper. If a slot is held, this
        // sweeper becomes the current one again, unless there is a new one.
        !readers.end_sweeper(self.number)
            || !readers.has_held()
            || !readers.resume_sweeper(self.number)
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        // The setting is off, or the runtime has dropped the task: a later call may spawn a sweeper. A sweeper that
        // panics stays the current one: the runtime has no timer, so the next one would panic, too.
        if !thread::panicking() {
            self.readers().end_sweeper(self.number);
        }
    }
}
