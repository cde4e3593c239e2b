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
//! It does not end with the limit: the next owner of the slot uses it. A held reader slot belongs to a call in flight,
//! so the owner of the slot, if there is one, is the limiter that admitted that call.
//!
//! # The end of the sweeper
//!
//! There is at most one sweeper of a slot. `is_sweeping` is set by the thread that spawns it, and cleared by the
//! sweeper when it ends. The end and a claim are a store-buffering pair: the sweeper clears `is_sweeping` and then
//! reads all slots; a claim writes its slot and then reads `is_sweeping`. All four operations are SeqCst, so at least
//! one of the two observes the write of the other: the sweeper continues, or the claim spawns a new one. Weaker
//! orderings would allow that neither does, and the body would not be watched.

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
    // Without a limiter no call waits for a permit.
    let Some(limiter) = slot.owner() else { return };
    // Outside of a runtime no sweeper is spawned; a later call may be inside of one.
    let Ok(runtime) = Handle::try_current() else { return };
    let slot = limiter.slot();
    if !slot.word().readers.set_sweeping(true) {
        runtime.spawn(Sweeper { slot, observed: Vec::new(), is_done: false }.run());
    }
}

struct Sweeper {
    slot: &'static Slot<Limiter>,
    /// The last observation of each slot, and the instant since which it has not changed.
    observed: Vec<(SlotObservation, Instant)>,
    /// This sweeper has cleared `is_sweeping`, which may belong to another sweeper by now.
    is_done: bool,
}

impl Sweeper {
    fn readers(&self) -> &'static ReaderSlots {
        &self.slot.word().readers
    }

    /// Sweeps until the setting is off or no slot is held.
    async fn run(mut self) {
        while let Some(max) = self.readers().max() {
            sleep((max / 8).clamp(Duration::from_millis(1), MAX_PERIOD)).await;
            let mut number_held = 0;
            for chunk in 0..MAX_CHUNKS {
                let mut from = 0;
                while let Some(held) = self.sweep(chunk, from, max) {
                    number_held += held;
                    from += MAX_SLOTS_PER_YIELD;
                    yield_now().await;
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

    /// Clears `is_sweeping`. Returns whether this sweeper ends; `false` if a slot is held after all.
    fn try_end(&mut self) -> bool {
        let readers = self.readers();
        readers.set_sweeping(false);
        // Either this reads the slot of a concurrent claim, or the claim spawns a sweeper. If a slot is held, this
        // sweeper sets `is_sweeping` again and continues, unless a new sweeper has set it meanwhile.
        self.is_done = !readers.has_held() || readers.set_sweeping(true);
        self.is_done
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        // The setting is off, or the runtime has dropped the task: a later call may spawn a sweeper. A sweeper that
        // panics leaves `is_sweeping` set: the runtime has no timer, so the next one would panic, too.
        if !self.is_done && !thread::panicking() {
            self.readers().set_sweeping(false);
        }
    }
}
