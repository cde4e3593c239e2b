//! The start of the prober, on the first runtime that is available.
//!
//! A layer is often built outside a runtime. [`Gate::arm`] then stores a [`Starter`], and the first call inside a
//! runtime runs it. The lock `start` protects the [`Start`]; the flag [`ARMED`] shows calls, without the lock, that a
//! starter is stored. `ARMED` is set and cleared under the lock, so it always agrees with `Start::Armed` there. Outside
//! the lock the flag can be outdated: [`Gate::start_if_possible`] checks the state again under the lock.
//!
//! ```text
//!  Idle ──arm──▶ Armed ──start──▶ Starting ──spawned──▶ Running
//!                  ▲                  │                    │
//!                  └──────────────────┴───runtime ended────┘──timers missing──▶ Dead
//! ```
//!
//! A starter owns the service and the probe of the user, so it runs, and is dropped, outside the lock. A runtime that
//! shuts down drops the prober during the spawn, and this drop changes the state from `Starting` to `Armed` before the
//! spawning thread locks again. That thread therefore sets `Running` only if the state is still `Starting`.

use std::{
    mem,
    sync::{MutexGuard, PoisonError, atomic::Ordering},
};

use tokio::{runtime::Handle, task::AbortHandle};

use super::{ARMED, Gate, TAKEN};

/// Spawns the prober.
pub(in super::super) type Starter = Box<dyn FnOnce(&Handle) -> AbortHandle + Send>;

pub(super) enum Start {
    /// The layer has not wrapped a service yet.
    Idle,
    /// The prober waits for a runtime.
    Armed(Starter),
    /// A thread spawns the prober at this moment, outside the lock.
    Starting,
    Running(AbortHandle),
    /// The prober has panicked, because its runtime has no timers. It is not started again.
    Dead,
}

impl Gate {
    fn start(&self) -> MutexGuard<'_, Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a prober, unless the gate has one, and starts it if the current thread is inside a runtime.
    pub(in super::super) fn arm(&self, prober: impl FnOnce() -> Starter) {
        if self.word.load(Ordering::Acquire) & TAKEN == 0 {
            // Outside the lock, because it clones the service of the user.
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

    /// Starts an armed prober, if the current thread is inside a runtime.
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
        // Outside the lock: a runtime that shuts down drops the prober at once, which locks and arms again.
        let running = starter(&runtime);
        let mut start = self.start();
        if matches!(*start, Start::Starting) {
            *start = Start::Running(running);
        }
    }

    /// Makes the state unknown, because the runtime of the prober has ended before the gate. With a starter, the next
    /// call starts the prober on its own runtime.
    pub(in super::super) fn stopped(&self, starter: Option<Starter>) {
        let mut probing = self.probing();
        probing.threshold.reset();
        self.publish(probing);
        // Armed after the state is published, so that this change cannot overwrite a result of the next prober.
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
        // Dropped outside the lock: a starter owns the service and the probe of the user.
        drop(before);
    }

    /// Aborts the prober.
    pub(super) fn stop(&self) {
        // The abort is outside the lock: it may drop the prober, which owns the service and the probe of the user.
        let running = match &*self.start() {
            Start::Running(prober) => Some(prober.clone()),
            _ => None,
        };
        if let Some(prober) = running {
            prober.abort();
        }
    }
}
