use std::fmt;

/// The state of a health gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProbeState {
    /// No result yet. Calls are admitted, but the check in the registry is not ready.
    #[default]
    Unknown,
    /// Calls are admitted.
    Up,
    /// Calls are rejected.
    Down,
}

impl ProbeState {
    /// Returns the name of the state: `unknown`, `up` or `down`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

impl fmt::Display for ProbeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Derives a state from single results. The thresholds prevent it from changing with every result.
#[derive(Debug)]
pub(super) struct Threshold {
    pub(super) rise: u32,
    pub(super) fall: u32,
    state: ProbeState,
    successes: u32,
    failures: u32,
}

impl Threshold {
    pub(super) const fn new(rise: u32, fall: u32) -> Self {
        Self { rise, fall, state: ProbeState::Unknown, successes: 0, failures: 0 }
    }

    /// Records a result. Returns the new state if it has changed.
    pub(super) fn record(&mut self, passed: bool) -> Option<ProbeState> {
        (self.successes, self.failures) = if passed {
            (self.successes.saturating_add(1), 0)
        } else {
            (0, self.failures.saturating_add(1))
        };
        let next = match self.state {
            // The first success is sufficient: no failure has taken the upstream down before it.
            ProbeState::Unknown if passed => ProbeState::Up,
            ProbeState::Unknown | ProbeState::Up if self.failures >= self.fall => ProbeState::Down,
            ProbeState::Down if self.successes >= self.rise => ProbeState::Up,
            same => same,
        };
        let changed = next != self.state;
        self.state = next;
        changed.then_some(next)
    }

    /// Records a failure that takes the state down regardless of `fall`. Returns [`ProbeState::Down`] if the state has
    /// changed.
    pub(super) fn fail_immediately(&mut self) -> Option<ProbeState> {
        (self.successes, self.failures) = (0, self.failures.saturating_add(1));
        let before = std::mem::replace(&mut self.state, ProbeState::Down);
        (before != ProbeState::Down).then_some(ProbeState::Down)
    }

    /// Discards all results, so that the state is unknown.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.rise, self.fall);
    }

    pub(super) fn state(&self) -> ProbeState {
        self.state
    }

    /// Returns the numbers of consecutive successes and failures. One of them is 0.
    pub(super) fn consecutive(&self) -> (u32, u32) {
        (self.successes, self.failures)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn states(rise: u32, fall: u32, results: &[bool]) -> Vec<ProbeState> {
        let mut threshold = Threshold::new(rise, fall);
        results
            .iter()
            .map(|passed| {
                let before = threshold.state();
                let changed = threshold.record(*passed);
                assert_eq!(changed, (threshold.state() != before).then_some(threshold.state()));
                threshold.state()
            })
            .collect()
    }

    /// Computes the state from the whole history. The last sequence of `fall` failures takes it down, unless `rise`
    /// successes in a row follow. Before the first such sequence, one success takes it up.
    fn model(rise: u32, fall: u32, results: &[bool]) -> ProbeState {
        let ends_with = |end: usize, value: bool, n: u32| {
            let n = n as usize;
            end >= n && results[end - n..end].iter().all(|r| *r == value)
        };
        let last_fall = (1..=results.len()).rev().find(|end| ends_with(*end, false, fall));
        match last_fall {
            None if results.contains(&true) => ProbeState::Up,
            None => ProbeState::Unknown,
            Some(fall_end) => {
                let after = &results[fall_end..];
                let has_risen = after.windows(rise as usize).any(|run| run.iter().all(|r| *r));
                if has_risen { ProbeState::Up } else { ProbeState::Down }
            }
        }
    }

    #[test]
    fn first_success_is_sufficient_and_first_failures_count_to_fall() {
        use ProbeState::{Down, Unknown, Up};
        assert_eq!(states(3, 3, &[true]), [Up]);
        assert_eq!(states(3, 3, &[false, true]), [Unknown, Up]);
        assert_eq!(states(3, 2, &[false, false]), [Unknown, Down]);
        assert_eq!(states(2, 2, &[false, false, true, true]), [Unknown, Down, Down, Up]);
    }

    #[test]
    fn result_of_the_other_kind_restarts_the_count() {
        use ProbeState::{Down, Up};
        assert_eq!(states(2, 2, &[true, false, true, false]), [Up; 4]);
        let down = [false, false, true, false, true, false];
        assert_eq!(states(2, 2, &down)[1..], [Down; 5]);
    }

    #[test]
    fn immediate_failure_ignores_fall_and_recovery_follows_rise() {
        use ProbeState::{Down, Up};
        let mut threshold = Threshold::new(2, 3);
        assert_eq!(threshold.fail_immediately(), Some(Down));
        assert_eq!((threshold.fail_immediately(), threshold.consecutive()), (None, (0, 2)));
        assert_eq!((threshold.record(true), threshold.record(true)), (None, Some(Up)));
        assert_eq!((threshold.record(false), threshold.fail_immediately()), (None, Some(Down)));
    }

    proptest! {
        #[test]
        fn state_equals_the_model_of_the_whole_history(
            rise in 1u32..5,
            fall in 1u32..5,
            results in prop::collection::vec(any::<bool>(), 0..60),
        ) {
            let seen = states(rise, fall, &results);
            for (n, state) in seen.iter().enumerate() {
                prop_assert_eq!(*state, model(rise, fall, &results[..=n]), "after {}", n + 1);
            }
        }

        #[test]
        fn state_never_changes_faster_than_its_thresholds(
            rise in 1u32..5,
            fall in 1u32..5,
            results in prop::collection::vec(prop::bool::weighted(0.7), 0..200),
        ) {
            let mut threshold = Threshold::new(rise, fall);
            let mut last = None;
            for (n, passed) in results.iter().enumerate() {
                let Some(now) = threshold.record(*passed) else { continue };
                if let Some(before) = last.replace(n) {
                    let min = if now == ProbeState::Up { rise } else { fall };
                    prop_assert!(n - before >= min as usize);
                }
            }
        }
    }
}
