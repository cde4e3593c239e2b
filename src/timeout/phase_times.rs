//! The times of the phases, in the compact form in which layers and calls store them.

use std::time::Duration;

use crate::outcome::TimeoutPhase;

/// The value of a setting that is not set.
pub(super) const UNSET: u32 = u32::MAX;
/// The value of a timeout or a rate that is off.
pub(super) const OFF: u32 = 0;

/// The time of each phase, in milliseconds, [`OFF`] or [`UNSET`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PhaseTimes(pub(super) [u32; 7]);

impl PhaseTimes {
    pub(super) fn get(&self, phase: TimeoutPhase) -> Option<Duration> {
        self.limit(phase).time()
    }

    pub(super) fn limit(&self, phase: TimeoutPhase) -> PhaseLimit {
        PhaseLimit(self.0.get(phase as usize).copied().unwrap_or(OFF))
    }

    /// Returns whether a phase depends on the progress of the request.
    pub(super) fn depend_on_the_request(&self) -> bool {
        const PHASES: [TimeoutPhase; 4] = [
            TimeoutPhase::Head,
            TimeoutPhase::Sending,
            TimeoutPhase::Taking,
            TimeoutPhase::ResponseTotal,
        ];
        PHASES.iter().any(|phase| self.get(*phase).is_some())
    }

    /// Sets `request_stall` to the time of the head if it has none. Without it, a handler that never reads its request
    /// would have no timeout, because the timeout of the head begins when the request has been sent.
    pub(super) fn default_request_stall_to_head(&mut self) {
        if self.get(TimeoutPhase::Taking).is_none() {
            self.0[TimeoutPhase::Taking as usize] = self.0[TimeoutPhase::Head as usize];
        }
    }
}

/// The timeout of one phase: a time in milliseconds, [`OFF`] or [`UNSET`]. Four bytes, because every timed body
/// contains two of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct PhaseLimit(pub(super) u32);

impl PhaseLimit {
    #[inline]
    pub(super) fn is_set(self) -> bool {
        !matches!(self.0, OFF | UNSET)
    }

    pub(super) fn time(self) -> Option<Duration> {
        self.is_set().then(|| Duration::from_millis(self.0.into()))
    }
}

/// Returns whole milliseconds, rounded up and at least 1.
pub(super) fn millis(time: Duration) -> u32 {
    let ms = u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(UNSET);
    ms.clamp(1, UNSET - 1)
}

/// Returns the name of the setter of a phase, which errors and `Debug` use. The label of the phase can differ: see the
/// [table](super#labels).
pub(super) const fn setter(phase: TimeoutPhase) -> &'static str {
    match phase {
        TimeoutPhase::Idle => "response_idle",
        TimeoutPhase::Sending => "request_idle",
        TimeoutPhase::Taking => "request_stall",
        TimeoutPhase::BodyRate => "min_body_rate",
        phase => phase.as_str(),
    }
}
