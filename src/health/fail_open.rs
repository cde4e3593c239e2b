use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

use crate::error::ConfigError;

/// A set of health gates that admit calls although they are down, while too many gates of the set are down.
///
/// The gates of a set usually belong to the replicas behind one balancer. All probes can fail for a reason that does
/// not affect calls, such as a fault of the network or a bad release of the health endpoint. Then it is better to send
/// calls to upstreams that may be healthy than to reject all calls. Envoy calls this the panic threshold.
///
/// A set needs two gates or more: a single gate would admit calls whenever it is down.
#[derive(Clone)]
pub struct FailOpen(Arc<Set>);

struct Set {
    /// The set panics below this share of gates that are not down, in millionths. 0: only when all gates are down.
    share: usize,
    members: AtomicUsize,
    down: AtomicUsize,
    /// The `Notify` of each gate. It wakes the callers that wait for the gate to admit calls.
    waiting: Mutex<Vec<Arc<Notify>>>,
}

/// A share of 1, in millionths.
const WHOLE: usize = 1_000_000;

impl Default for FailOpen {
    fn default() -> Self {
        Self::new()
    }
}

impl FailOpen {
    /// Returns a guard that admits calls while all gates of the set are down.
    #[must_use]
    pub fn new() -> Self {
        Self::at(0)
    }

    /// Returns a guard that admits calls while the share of gates that are not down is below this ratio. Envoy's
    /// default is 0.5.
    ///
    /// # Errors
    ///
    /// Returns an error if the ratio is not from 0 to 1.
    pub fn below(ratio: f64) -> Result<Self, ConfigError> {
        match ratio {
            0.0..=1.0 => Ok(Self::at((ratio * WHOLE as f64) as usize)),
            _ => Err(ConfigError::new("panic_guard.below", ratio, "use a ratio from 0 to 1")),
        }
    }

    fn at(share: usize) -> Self {
        Self(Arc::new(Set {
            share,
            members: AtomicUsize::new(0),
            down: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
        }))
    }

    /// Returns whether the gates of the set admit calls although they are down.
    #[must_use]
    pub fn panics(&self) -> bool {
        let members = self.0.members.load(Ordering::Acquire);
        let down = self.0.down.load(Ordering::Acquire).min(members);
        let (up, needed) =
            ((members - down).saturating_mul(WHOLE), members.saturating_mul(self.0.share));
        down > 0 && (up < needed || down == members)
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Arc<Notify>>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the callers of all gates of the set.
    pub(super) fn tell(&self) {
        // The lock is released first: a waker is user code, and may drop a gate, which locks the list.
        let waiting = self.waiting().clone();
        for notify in waiting {
            notify.notify_waiters();
        }
    }
}

/// The membership of a gate in a set. It ends when the gate is dropped.
pub(super) struct Member {
    guard: FailOpen,
    down: bool,
    changed: Arc<Notify>,
}

impl Member {
    pub(super) fn of(guard: &FailOpen, changed: &Arc<Notify>) -> Self {
        guard.0.members.fetch_add(1, Ordering::AcqRel);
        guard.waiting().push(changed.clone());
        Self { guard: guard.clone(), down: false, changed: changed.clone() }
    }

    pub(super) fn guard(&self) -> &FailOpen {
        &self.guard
    }

    /// Records whether the gate is down. Returns the guard if that changed: the caller then
    /// [notifies](FailOpen::tell) the gates without a lock, because that wakes callers.
    #[must_use]
    pub(super) fn is_now(&mut self, down: bool) -> Option<FailOpen> {
        if std::mem::replace(&mut self.down, down) == down {
            return None;
        }
        if down {
            self.guard.0.down.fetch_add(1, Ordering::AcqRel);
        } else {
            self.guard.0.down.fetch_sub(1, Ordering::AcqRel);
        }
        Some(self.guard.clone())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.guard.waiting().retain(|other| !Arc::ptr_eq(other, &self.changed));
        // The guard is not used: all gates are notified below.
        let _ = self.is_now(false);
        self.guard.0.members.fetch_sub(1, Ordering::AcqRel);
        self.guard.tell();
    }
}

impl fmt::Debug for FailOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailOpen")
            .field("members", &self.0.members)
            .field("down", &self.0.down)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(guard: &FailOpen, all: usize, down: usize) -> Vec<Member> {
        let mut members: Vec<_> =
            (0..all).map(|_| Member::of(guard, &Arc::new(Notify::new()))).collect();
        for member in members.iter_mut().take(down) {
            let _ = member.is_now(true);
        }
        members
    }

    #[test]
    fn when_all_or_too_many_are_down() {
        for (share, all, down, panics) in [
            (0.0, 3, 2, false),
            (0.0, 3, 3, true),
            (0.0, 0, 0, false),
            (0.5, 4, 2, false),
            (0.5, 4, 3, true),
            (1.0, 4, 1, true),
            (1.0, 4, 0, false),
        ] {
            let guard = FailOpen::below(share).unwrap();
            let members = set(&guard, all, down);
            assert_eq!(guard.panics(), panics, "{down} of {all} below {share}");
            drop(members);
            assert!(!guard.panics() && guard.waiting().is_empty());
        }
        for bad in [-0.1, 1.1, f64::NAN] {
            assert_eq!(FailOpen::below(bad).unwrap_err().field, "panic_guard.below");
        }
    }
}
