//! The limits of age and idle time of a connection. Pure functions, which take the time as an argument.

use std::time::Duration;

use crate::time::{Nanos, nanos};

/// The value that means no limit.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// Why a connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// It has reached its maximum age.
    Age,
    /// It has been unused for its maximum idle time.
    Idle,
    /// A caller of another host needs its permit of the total.
    Room,
    /// [`recycle`](super::handle::ConnectHandle::recycle) was called, or a response was a 421 (Misdirected Request).
    Asked,
    /// It is closed already, for example by the peer.
    Closed,
}

/// The limits of one connection: those of its layer, shortened by jitter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    /// The time at which the connection reaches its maximum age.
    ends: Nanos,
    /// The maximum idle time.
    idle: Nanos,
}

/// The decision whether to close a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LifetimeVerdict {
    Close(Over),
    /// Leave the connection open, and decide again at this time.
    Keep(Nanos),
}

impl Life {
    /// Returns the limits of a connection that is opened at `born`. `jitter` is the maximum share by which they are
    /// shortened, in thousandths, and `chance` a random number from 0 to 1.
    pub(super) fn new(born: Nanos, age: Nanos, idle: Nanos, jitter: u32, chance: f64) -> Self {
        let off = f64::from(jitter) / 1000.0 * chance;
        let shorter = |limit: Nanos| match limit {
            NEVER => NEVER,
            limit => limit - (limit as f64 * off) as Nanos,
        };
        Self { ends: born.saturating_add(shorter(age)), idle: shorter(idle) }
    }

    /// Applies the limits. `idle_since` is `None` while the connection is in use: the maximum age applies then too, and
    /// the owner closes the connection at the end of the use.
    pub(super) fn judge(&self, now: Nanos, idle_since: Option<Nanos>) -> LifetimeVerdict {
        if self.ends <= now {
            return LifetimeVerdict::Close(Over::Age);
        }
        let unused = idle_since.unwrap_or(now).saturating_add(self.idle);
        if unused <= now {
            return LifetimeVerdict::Close(Over::Idle);
        }
        LifetimeVerdict::Keep(self.ends.min(unused))
    }
}

/// Converts a limit to the form in which the settings store it.
pub(super) fn limit(time: Option<Duration>) -> Nanos {
    time.map_or(NEVER, nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_over_when_idle_for_too_long_or_old_and_idle() {
        let life = Life::new(100, 1000, 50, 0, 0.0);
        assert_eq!(life.judge(100, Some(100)), LifetimeVerdict::Keep(150));
        assert_eq!(life.judge(149, Some(100)), LifetimeVerdict::Keep(150));
        assert_eq!(life.judge(150, Some(100)), LifetimeVerdict::Close(Over::Idle));
        assert_eq!(life.judge(1090, Some(1080)), LifetimeVerdict::Keep(1100));
        assert_eq!(life.judge(1100, Some(1099)), LifetimeVerdict::Close(Over::Age));
    }

    #[test]
    fn in_use_is_never_idle_and_looked_at_no_more_often_than_it_can_be() {
        let life = Life::new(0, 1000, 50, 0, 0.0);
        assert_eq!(life.judge(10, None), LifetimeVerdict::Keep(60));
        assert_eq!(life.judge(990, None), LifetimeVerdict::Keep(1000));
        assert_eq!(life.judge(5000, None), LifetimeVerdict::Close(Over::Age));
        assert_eq!(Life::new(0, 1000, NEVER, 0, 0.0).judge(500, None), LifetimeVerdict::Keep(1000));
        assert_eq!(
            Life::new(0, NEVER, NEVER, 0, 0.0).judge(500, None),
            LifetimeVerdict::Keep(NEVER)
        );
    }

    #[test]
    fn jitter_only_takes_away() {
        for chance in [0.0, 0.3, 1.0] {
            let life = Life::new(0, 1000, 100, 200, chance);
            assert!((800..=1000).contains(&life.ends) && (80..=100).contains(&life.idle));
        }
        let life = Life::new(u64::MAX - 1, NEVER, NEVER, 1000, 1.0);
        assert_eq!((life.ends, life.idle), (NEVER, NEVER));
        assert_eq!(life.judge(NEVER - 1, Some(0)), LifetimeVerdict::Keep(NEVER));
    }
}
