use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Notify;

use crate::{error::ConfigError, sync::Mutex};

/// A set of health gates that admit calls although they are down, while too many gates of the set are down.
///
/// The gates of a set usually belong to the replicas behind one balancer. All probes can fail for a reason that does
/// not affect calls, such as a fault of the network or a bad release of the health endpoint. Then it is better to send
/// calls to upstreams that may be healthy than to reject all calls. Envoy calls this the panic threshold.
///
/// A set needs two gates or more: a single gate would admit calls whenever it is down.
#[derive(Clone)]
pub struct FailOpen(Arc<GateSet>);

struct GateSet {
    /// The set is active below this share of gates that are not down, in millionths. 0: only when all gates are down.
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
    /// Returns a set that admits calls while all gates of the set are down.
    #[must_use]
    pub fn new() -> Self {
        Self::at(0)
    }

    /// Returns a set that admits calls while the share of gates that are not down is below this ratio. Envoy's
    /// default is 0.5.
    ///
    /// # Errors
    ///
    /// Returns an error if the ratio is not from 0 to 1.
    pub fn below(ratio: f64) -> Result<Self, ConfigError> {
        match ratio {
            0.0..=1.0 => Ok(Self::at((ratio * WHOLE as f64) as usize)),
            _ => Err(ConfigError::new("fail_open.below", ratio, "use a ratio from 0 to 1")),
        }
    }

    fn at(share: usize) -> Self {
        Self(Arc::new(GateSet {
            share,
            members: AtomicUsize::new(0),
            down: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
        }))
    }

    /// Returns whether the gates of the set admit calls although they are down.
    #[must_use]
    pub fn is_active(&self) -> bool {
        let members = self.0.members.load(Ordering::Acquire);
        let down = self.0.down.load(Ordering::Acquire).min(members);
        let (up, needed) =
            ((members - down).saturating_mul(WHOLE), members.saturating_mul(self.0.share));
        down > 0 && (up < needed || down == members)
    }

    /// Wakes the callers of all gates of the set.
    pub(super) fn notify(&self) {
        // The lock is released first: a waker is user code, and may drop a gate, which locks the list.
        let waiting = self.0.waiting.lock().clone();
        for notify in waiting {
            notify.notify_waiters();
        }
    }
}

/// The membership of a gate in a set. It ends when the gate is dropped.
pub(super) struct Membership {
    set: FailOpen,
    down: bool,
    changed: Arc<Notify>,
}

impl Membership {
    pub(super) fn new(set: &FailOpen, changed: &Arc<Notify>) -> Self {
        set.0.members.fetch_add(1, Ordering::AcqRel);
        set.0.waiting.lock().push(changed.clone());
        Self { set: set.clone(), down: false, changed: changed.clone() }
    }

    /// Records whether the gate is down. Returns the set if that changed: the caller then
    /// [notifies](FailOpen::notify) the gates without a lock, because that wakes callers.
    #[must_use]
    pub(super) fn set_down(&mut self, down: bool) -> Option<FailOpen> {
        if std::mem::replace(&mut self.down, down) == down {
            return None;
        }
        if down {
            self.set.0.down.fetch_add(1, Ordering::AcqRel);
        } else {
            self.set.0.down.fetch_sub(1, Ordering::AcqRel);
        }
        Some(self.set.clone())
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.set.0.waiting.lock().retain(|other| !Arc::ptr_eq(other, &self.changed));
        // The set is not used: all gates are notified below.
        let _ = self.set_down(false);
        self.set.0.members.fetch_sub(1, Ordering::AcqRel);
        self.set.notify();
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

    fn members_of(set: &FailOpen, all: usize, down: usize) -> Vec<Membership> {
        let mut members: Vec<_> =
            (0..all).map(|_| Membership::new(set, &Arc::new(Notify::new()))).collect();
        for member in members.iter_mut().take(down) {
            let _ = member.set_down(true);
        }
        members
    }

    #[test]
    fn set_is_active_while_all_or_too_many_gates_are_down() {
        for (share, all, down, is_active) in [
            (0.0, 3, 2, false),
            (0.0, 3, 3, true),
            (0.0, 0, 0, false),
            (0.5, 4, 2, false),
            (0.5, 4, 3, true),
            (1.0, 4, 1, true),
            (1.0, 4, 0, false),
        ] {
            let set = FailOpen::below(share).unwrap();
            let members = members_of(&set, all, down);
            assert_eq!(set.is_active(), is_active, "{down} of {all} below {share}");
            drop(members);
            assert!(!set.is_active() && set.0.waiting.lock().is_empty());
        }
        for bad in [-0.1, 1.1, f64::NAN] {
            assert_eq!(FailOpen::below(bad).unwrap_err().field, "fail_open.below");
        }
    }
}
