//! Starting the prober, once, where there is a runtime to start it in.

use std::{
    mem,
    sync::{MutexGuard, PoisonError, atomic::Ordering},
};

use tokio::{runtime::Handle, task::AbortHandle};

use super::{ARMED, Gate, TAKEN};

/// Spawns the prober.
pub(in crate::health) type Starter = Box<dyn FnOnce(&Handle) -> AbortHandle + Send>;

pub(super) enum Start {
    /// Nothing is wrapped yet.
    Idle,
    /// Waits for a runtime.
    Armed(Starter),
    /// Being spawned at this moment, outside of the lock.
    Starting,
    Running(AbortHandle),
    /// It panicked, which takes a runtime without timers.
    Dead,
}

impl Gate {
    fn start(&self) -> MutexGuard<'_, Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a prober, unless there is one, and starts it if there is a runtime to start it in.
    pub(in crate::health) fn arm(&self, prober: impl FnOnce() -> Starter) {
        if self.word.load(Ordering::Acquire) & TAKEN == 0 {
            // A user's clone runs in it: outside of the lock.
            let starter = prober();
            let mut start = self.start();
            if matches!(*start, Start::Idle) {
                *start = Start::Armed(starter);
                self.word.fetch_or(ARMED | TAKEN, Ordering::AcqRel);
            }
        }
        if self.word.load(Ordering::Acquire) & ARMED != 0 {
            self.start_if_possible();
        }
    }

    #[cold]
    pub(super) fn start_if_possible(&self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let starter = {
            let mut start = self.start();
            if !matches!(*start, Start::Armed(_)) {
                return;
            }
            self.word.fetch_and(!ARMED, Ordering::AcqRel);
            match mem::replace(&mut *start, Start::Starting) {
                Start::Armed(starter) => starter,
                _ => return,
            }
        };
        // Outside of the lock: a runtime that shuts down drops the prober at once, which arms again.
        let running = starter(&runtime);
        let mut start = self.start();
        if matches!(*start, Start::Starting) {
            *start = Start::Running(running);
        }
    }

    /// The prober's runtime has ended before the gate: from here on nothing is known any more. With a
    /// starter, the next call starts it in its own runtime.
    pub(in crate::health) fn stopped(&self, starter: Option<Starter>) {
        let mut probing = self.probing();
        probing.threshold.reset();
        self.publish(probing);
        // Only now: the next prober's verdict must not be overwritten.
        let mut start = self.start();
        let next = match starter {
            Some(starter) => {
                self.word.fetch_or(ARMED, Ordering::AcqRel);
                Start::Armed(starter)
            }
            None => Start::Dead,
        };
        let before = mem::replace(&mut *start, next);
        drop(start);
        // A starter owns the service and the probe of the user.
        drop(before);
    }

    pub(super) fn stop(&self) {
        // The abort may drop the prober, which owns the service and the probe of the user.
        let running = match &*self.start() {
            Start::Running(prober) => Some(prober.clone()),
            _ => None,
        };
        if let Some(prober) = running {
            prober.abort();
        }
    }
}
