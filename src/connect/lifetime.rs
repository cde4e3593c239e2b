//! The limits of age and idle time of a connection. Pure functions, which take the time as an argument.

use crate::time::Nanos;

/// The value that means no limit.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// Why a connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseReason {
    /// It has reached its maximum age.
    Age,
    /// It has been unused for its maximum idle time.
    Idle,
    /// A caller of another host needs its permit of the total.
    NeededElsewhere,
    /// [`recycle`](super::handle::ConnectHandle::recycle) was called, or a response was a 421 (Misdirected Request).
    Requested,
    /// It is closed already, for example by the peer.
    Closed,
}

impl CloseReason {
    /// Returns the reason in `snake_case`, as in metrics and events.
    pub(super) const fn as_str(self) -> &'static str {
        Self::LABELS[self as usize]
    }

    /// The labels of the reasons, in the order of the variants.
    pub(super) const LABELS: [&'static str; 5] = ["age", "idle", "make_way", "requested", "closed"];
}

/// The limits of one connection: those of its layer, shortened by jitter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetime {
    /// The time at which the connection reaches its maximum age.
    ends: Nanos,
    /// The maximum idle time.
    idle: Nanos,
}

/// The decision whether to close a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LifetimeVerdict {
    Close(CloseReason),
    /// Leave the connection open, and decide again at this time.
    Keep(Nanos),
}

impl Lifetime {
    /// Returns the limits of a connection that is opened at `opened_at`. `jitter` is the maximum share by which they
    /// are shortened, in thousandths, and `random` a random number from 0 to 1.
    pub(super) fn new(opened_at: Nanos, age: Nanos, idle: Nanos, jitter: u32, random: f64) -> Self {
        let off = f64::from(jitter) / 1000.0 * random;
        let shorter = |limit: Nanos| match limit {
            NEVER => NEVER,
            limit => limit - (limit as f64 * off) as Nanos,
        };
        Self { ends: opened_at.saturating_add(shorter(age)), idle: shorter(idle) }
    }

    /// Decides whether a limit has been reached. `idle_since` is `None` while the connection is in use: the maximum age
    /// applies then too, and the owner closes the connection at the end of the use.
    pub(super) fn verdict(&self, now: Nanos, idle_since: Option<Nanos>) -> LifetimeVerdict {
        if self.ends <= now {
            return LifetimeVerdict::Close(CloseReason::Age);
        }
        let unused = idle_since.unwrap_or(now).saturating_add(self.idle);
        if unused <= now {
            return LifetimeVerdict::Close(CloseReason::Idle);
        }
        LifetimeVerdict::Keep(self.ends.min(unused))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_closes_at_its_maximum_idle_time_or_age() {
        let lifetime = Lifetime::new(100, 1000, 50, 0, 0.0);
        assert_eq!(lifetime.verdict(100, Some(100)), LifetimeVerdict::Keep(150));
        assert_eq!(lifetime.verdict(149, Some(100)), LifetimeVerdict::Keep(150));
        assert_eq!(lifetime.verdict(150, Some(100)), LifetimeVerdict::Close(CloseReason::Idle));
        assert_eq!(lifetime.verdict(1090, Some(1080)), LifetimeVerdict::Keep(1100));
        assert_eq!(lifetime.verdict(1100, Some(1099)), LifetimeVerdict::Close(CloseReason::Age));
    }

    #[test]
    fn connection_in_use_is_not_idle_and_closes_at_its_maximum_age() {
        let lifetime = Lifetime::new(0, 1000, 50, 0, 0.0);
        assert_eq!(lifetime.verdict(10, None), LifetimeVerdict::Keep(60));
        assert_eq!(lifetime.verdict(990, None), LifetimeVerdict::Keep(1000));
        assert_eq!(lifetime.verdict(5000, None), LifetimeVerdict::Close(CloseReason::Age));
        assert_eq!(
            Lifetime::new(0, 1000, NEVER, 0, 0.0).verdict(500, None),
            LifetimeVerdict::Keep(1000)
        );
        assert_eq!(
            Lifetime::new(0, NEVER, NEVER, 0, 0.0).verdict(500, None),
            LifetimeVerdict::Keep(NEVER)
        );
    }

    #[test]
    fn jitter_only_shortens_the_limits() {
        for random in [0.0, 0.3, 1.0] {
            let lifetime = Lifetime::new(0, 1000, 100, 200, random);
            assert!((800..=1000).contains(&lifetime.ends) && (80..=100).contains(&lifetime.idle));
        }
        let lifetime = Lifetime::new(u64::MAX - 1, NEVER, NEVER, 1000, 1.0);
        assert_eq!((lifetime.ends, lifetime.idle), (NEVER, NEVER));
        assert_eq!(lifetime.verdict(NEVER - 1, Some(0)), LifetimeVerdict::Keep(NEVER));
    }
}
