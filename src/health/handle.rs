use std::{fmt, pin::pin, time::Duration};

use super::{gate::Gate, probe::ProbeFailure, threshold::ProbeState};
use crate::call::{Indicator, Shared};

/// Looks at a health gate from outside of the stack.
///
/// Clones see the same gate, and so do all services that the layer or a clone of it made. A handle keeps
/// the probes going: they end with the last layer, service and handle.
#[derive(Clone)]
pub struct HealthProbeHandle(pub(super) Shared<Gate>);

/// A health gate at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HealthProbeSnapshot {
    /// Where it is.
    pub state: ProbeState,
    /// The last probe that came to its end.
    pub last: Option<LastProbe>,
    /// The text of the error that the last probe ended with, and of its causes: of a boxed error, and of hyper's,
    /// reqwest's and `io`'s. At most 512 bytes, without [secrets](crate#secrets).
    pub last_error: Option<Box<str>>,
    /// Probes passed in a row.
    pub consecutive_successes: u32,
    /// Probes failed in a row.
    pub consecutive_failures: u32,
    /// Probes begun, all in all.
    pub probes: u64,
    /// Probes that were [spared](super::HealthProbeLayer::passive), because calls had proved health.
    pub spared: u64,
    /// How many calls it refused.
    pub refused: u64,
}

/// The last probe that came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastProbe {
    /// How it ended.
    pub result: Result<(), ProbeFailure>,
    /// How long ago.
    pub age: Duration,
    /// How long it took.
    pub took: Duration,
}

impl HealthProbeHandle {
    /// Where the gate is.
    #[must_use]
    pub fn state(&self) -> ProbeState {
        self.0.state()
    }

    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> HealthProbeSnapshot {
        let now = self.0.now();
        let refused = self.0.refused();
        self.0.with(|probing| {
            let (consecutive_successes, consecutive_failures) = probing.threshold.in_a_row();
            HealthProbeSnapshot {
                state: probing.threshold.state(),
                last: probing.last.map(|last| LastProbe {
                    result: last.result,
                    age: Duration::from_nanos(now.saturating_sub(last.ended)),
                    took: last.took,
                }),
                last_error: probing.last_error.clone(),
                consecutive_successes,
                consecutive_failures,
                probes: probing.probes,
                spared: probing.spared,
                refused,
            }
        })
    }

    /// Waits until the state is another than now, and tells it. Dropping the future is harmless.
    pub async fn changed(&self) -> ProbeState {
        let before = self.state();
        loop {
            let mut notified = pin!(self.0.changed().notified());
            // From here on no change is missed.
            notified.as_mut().enable();
            let state = self.state();
            if state != before {
                return state;
            }
            notified.await;
        }
    }
}

impl Indicator for HealthProbeHandle {
    /// Well while it is up.
    fn indicate(&self) -> Result<(), String> {
        match self.state() {
            ProbeState::Up => Ok(()),
            state => Err(format!("health probe says {state}")),
        }
    }
}

impl fmt::Debug for HealthProbeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HealthProbeHandle").field(&*self.0).finish()
    }
}
