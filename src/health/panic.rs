use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

use crate::ConfigError;

/// Believes no longer that what is down is down, when too much of a set is: several health gates, say one for each
/// replica behind a balancer, share one and let calls through all the same.
///
/// Probes can be wrong all at once: the network between here and there, a bad release of the health endpoint. Then
/// sending calls to who may be well is better than refusing all of them. Envoy calls it the panic threshold.
///
/// A set of one would let everything through that its gate is there to refuse: give it more.
#[derive(Clone)]
pub struct PanicGuard(Arc<Set>);

struct Set {
    /// Below this share of members that are not down, in millionths; 0 is when all are down.
    share: usize,
    members: AtomicUsize,
    down: AtomicUsize,
    /// Who waits for a gate to let calls through, of each.
    waiting: Mutex<Vec<Arc<Notify>>>,
}

const WHOLE: usize = 1_000_000;

impl Default for PanicGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl PanicGuard {
    /// Lets calls through when all of the set are down.
    #[must_use]
    pub fn new() -> Self {
        Self::at(0)
    }

    /// Lets calls through when less than this share of the set is not down: Envoy's default is 0.5.
    ///
    /// # Errors
    ///
    /// A ratio that is not from 0 to 1.
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

    /// Whether what is down is let through.
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
        // Out of the lock: who is woken may leave.
        let waiting = self.waiting().clone();
        for notify in waiting {
            notify.notify_waiters();
        }
    }
}

/// One gate's place in a set, until it goes.
pub(super) struct Member {
    guard: PanicGuard,
    down: bool,
    changed: Arc<Notify>,
}

impl Member {
    pub(super) fn of(guard: &PanicGuard, changed: &Arc<Notify>) -> Self {
        guard.0.members.fetch_add(1, Ordering::AcqRel);
        guard.waiting().push(changed.clone());
        Self { guard: guard.clone(), down: false, changed: changed.clone() }
    }

    pub(super) fn guard(&self) -> &PanicGuard {
        &self.guard
    }

    /// Records whether the gate is down. Returns the guard if that changed: the caller then
    /// [notifies](PanicGuard::tell) the gates without a lock, because that wakes callers.
    #[must_use]
    pub(super) fn is_now(&mut self, down: bool) -> Option<PanicGuard> {
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
        // All gates are notified below.
        let _ = self.is_now(false);
        self.guard.0.members.fetch_sub(1, Ordering::AcqRel);
        self.guard.tell();
    }
}

impl fmt::Debug for PanicGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PanicGuard")
            .field("members", &self.0.members)
            .field("down", &self.0.down)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(guard: &PanicGuard, all: usize, down: usize) -> Vec<Member> {
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
            let guard = PanicGuard::below(share).unwrap();
            let members = set(&guard, all, down);
            assert_eq!(guard.panics(), panics, "{down} of {all} below {share}");
            drop(members);
            assert!(!guard.panics() && guard.waiting().is_empty());
        }
        for bad in [-0.1, 1.1, f64::NAN] {
            assert_eq!(PanicGuard::below(bad).unwrap_err().field, "panic_guard.below");
        }
    }
}
