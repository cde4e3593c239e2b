//! What a retry layer shares between all its services.

use std::{
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{backoff::Backoff, budget::RetryBudget, exchange::Rules, policy::Stop};
use crate::call::Shared;

/// The settings and the counts of one retry layer.
pub(super) struct Settings {
    attempts: AtomicU32,
    body_cap: AtomicU64,
    drain_cap: AtomicU64,
    longest_wait_ms: AtomicU64,
    assume_idempotent: AtomicBool,
    backoff: Mutex<Backoff>,
    budget: Mutex<Option<RetryBudget>>,
    retries: AtomicU64,
    gave_up: AtomicU64,
}

impl Settings {
    pub(super) fn new() -> Self {
        Self {
            attempts: AtomicU32::new(3),
            body_cap: AtomicU64::new(64 * 1024),
            drain_cap: AtomicU64::new(64 * 1024),
            longest_wait_ms: AtomicU64::new(30_000),
            assume_idempotent: AtomicBool::new(false),
            backoff: Mutex::new(Backoff::default()),
            budget: Mutex::new(Some(RetryBudget::default())),
            retries: AtomicU64::new(0),
            gave_up: AtomicU64::new(0),
        }
    }

    pub(super) fn set_attempts(&self, attempts: u32) {
        self.attempts.store(attempts, Ordering::Relaxed);
    }

    pub(super) fn set_body_cap(&self, bytes: u64) {
        self.body_cap.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn set_drain_cap(&self, bytes: u64) {
        self.drain_cap.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn drain_cap(&self) -> u64 {
        self.drain_cap.load(Ordering::Relaxed)
    }

    pub(super) fn set_longest_wait(&self, wait: Duration) {
        let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.longest_wait_ms.store(ms, Ordering::Relaxed);
    }

    pub(super) fn assume_idempotent(&self) {
        self.assume_idempotent.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_backoff(&self, backoff: Backoff) {
        *lock(&self.backoff) = backoff;
    }

    pub(super) fn set_budget(&self, budget: Option<RetryBudget>) {
        *lock(&self.budget) = budget;
    }

    pub(super) fn attempts(&self) -> u32 {
        self.attempts.load(Ordering::Relaxed)
    }

    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_millis(self.longest_wait_ms.load(Ordering::Relaxed))
    }

    pub(super) fn backoff(&self) -> Backoff {
        *lock(&self.backoff)
    }

    pub(super) fn budget(&self) -> Option<RetryBudget> {
        lock(&self.budget).clone()
    }

    pub(super) fn rules(&self, never: bool) -> Rules {
        Rules {
            body_cap: self.body_cap.load(Ordering::Relaxed),
            assume_idempotent: self.assume_idempotent.load(Ordering::Relaxed),
            safe_only: false,
            never: never || self.attempts() < 2,
        }
    }

    pub(super) fn count_retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_stop(&self, stop: Stop) {
        if stop != Stop::Answered {
            self.gave_up.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn counts(&self) -> (u64, u64) {
        (self.retries.load(Ordering::Relaxed), self.gave_up.load(Ordering::Relaxed))
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("attempts", &self.attempts())
            .field("backoff", &self.backoff())
            .field("budget", &self.budget())
            .finish_non_exhaustive()
    }
}

/// One service's share: everything that a call reaches through one pointer.
pub(super) struct Core<S, T = Settings> {
    pub(super) settings: Shared<T>,
    pub(super) budget: Option<RetryBudget>,
    /// What later attempts are cloned from: the wrapped service is not cloned for a call that needs one.
    template: Mutex<S>,
    pub(super) misconfigured: bool,
}

impl<S, T> Core<S, T> {
    pub(super) fn new(
        settings: Shared<T>,
        budget: Option<RetryBudget>,
        template: S,
        misconfigured: bool,
    ) -> Self {
        Self { settings, budget, template: Mutex::new(template), misconfigured }
    }

    pub(super) fn service(&self) -> S
    where
        S: Clone,
    {
        lock(&self.template).clone()
    }
}
