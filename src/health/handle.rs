use std::{fmt, pin::pin, sync::Arc, time::Duration};

use super::{gate::Gate, probe::ProbeFailure, threshold::ProbeState};
use crate::{
    error::ConfigError, event::settings_changed, indicator::Indicator, outcome::LayerKind,
};

/// A handle to the gate of a [`HealthProbeLayer`](super::layer::HealthProbeLayer).
///
/// Clones refer to the same gate, which all services of the layer and its clones share. The probes end when the last
/// layer, service and handle are dropped, so a handle keeps them running.
#[derive(Clone)]
pub struct HealthProbeHandle(pub(super) Arc<Gate>);

/// A snapshot of a health gate.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HealthProbeSnapshot {
    /// The state of the gate.
    pub state: ProbeState,
    /// The last probe that has ended.
    pub last: Option<LastProbe>,
    /// The text of the error of the last probe and of its sources, 512 bytes or less, without [secrets](crate#secrets).
    /// `None` if there was no error, or if its type is not a boxed error or an error of hyper, reqwest or `io`.
    pub last_error: Option<Box<str>>,
    /// Number of consecutive probes that passed.
    pub consecutive_successes: u32,
    /// Number of consecutive probes that failed.
    pub consecutive_failures: u32,
    /// Number of probes that have begun.
    pub probes: u64,
    /// Number of probes that were [skipped](super::layer::HealthProbeLayer::passive) because calls had proved health.
    pub skipped: u64,
    /// Number of calls that the gate has rejected.
    pub rejected: u64,
    /// Number of calls that would have been rejected without [shadow mode](super::layer::HealthProbeLayer::shadow).
    pub shadowed: u64,
}

/// The last probe that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastProbe {
    /// The result of the probe.
    pub result: Result<(), ProbeFailure>,
    /// The time since its end.
    pub age: Duration,
    /// The duration of the probe.
    pub took: Duration,
}

impl HealthProbeHandle {
    /// Returns the state of the gate.
    #[must_use]
    pub fn state(&self) -> ProbeState {
        self.0.state()
    }

    /// Returns a snapshot of the gate.
    #[must_use]
    pub fn snapshot(&self) -> HealthProbeSnapshot {
        let now = self.0.now();
        let (rejected, shadowed) = (self.0.rejected(), self.0.shadowed());
        self.0.with(|probing| {
            let (consecutive_successes, consecutive_failures) = probing.threshold.consecutive();
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
                skipped: probing.skipped,
                rejected,
                shadowed,
            }
        })
    }

    /// Waits until the state differs from the state at the first poll, and returns the new state. Cancel safe.
    pub async fn changed(&self) -> ProbeState {
        let before = self.state();
        loop {
            let mut notified = pin!(self.0.changed().notified());
            // Registered before the state is read, so that no later change is missed.
            notified.as_mut().enable();
            let state = self.state();
            if state != before {
                return state;
            }
            notified.await;
        }
    }
}

/// Settings of a running layer. The delay that has begun and the probe in flight are not affected.
impl HealthProbeHandle {
    /// Sets the [`every`](super::layer::HealthProbeLayer::every) of the layer.
    ///
    /// # Errors
    ///
    /// Returns an error if the delay is zero.
    pub fn set_every(&self, delay: Duration) -> Result<(), ConfigError> {
        self.0.set_every(delay)?;
        self.report_setting("every");
        Ok(())
    }

    /// Sets the [`every_while_down`](super::layer::HealthProbeLayer::every_while_down) of the layer.
    ///
    /// # Errors
    ///
    /// Returns an error if the delay is zero.
    pub fn set_every_while_down(&self, delay: Duration) -> Result<(), ConfigError> {
        self.0.set_every_while_down(delay)?;
        self.report_setting("every_while_down");
        Ok(())
    }

    /// Sets the [`jitter`](super::layer::HealthProbeLayer::jitter) of the layer.
    ///
    /// # Errors
    ///
    /// Returns an error if the ratio is not from 0 to 1.
    pub fn set_jitter(&self, ratio: f64) -> Result<(), ConfigError> {
        self.0.set_jitter(ratio)?;
        self.report_setting("jitter");
        Ok(())
    }

    /// Sets the [`timeout`](super::layer::HealthProbeLayer::timeout) of the layer.
    ///
    /// # Errors
    ///
    /// Returns an error if the timeout is zero.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), ConfigError> {
        self.0.set_timeout(timeout)?;
        self.report_setting("timeout");
        Ok(())
    }

    /// Sets the [`thresholds`](super::layer::HealthProbeLayer::thresholds) of the layer. The numbers of consecutive
    /// results are kept.
    ///
    /// # Errors
    ///
    /// Returns an error if a threshold is 0.
    pub fn set_thresholds(&self, rise: u32, fall: u32) -> Result<(), ConfigError> {
        self.0.set_thresholds(rise, fall)?;
        self.report_setting("thresholds");
        Ok(())
    }

    /// Sets the [`immediate_failure`](super::layer::HealthProbeLayer::immediate_failure) of the layer. Has no effect on
    /// probes without a status.
    pub fn set_immediate_failure(&self, on: bool) {
        self.0.set_immediate_failure(on);
        self.report_setting("immediate_failure");
    }

    /// Sets whether the layer is [`passive`](super::layer::HealthProbeLayer::passive).
    pub fn set_passive(&self, on: bool) {
        self.0.set_passive(on);
        self.report_setting("passive");
    }

    /// Sets whether the layer is in [shadow mode](super::layer::HealthProbeLayer::shadow).
    pub fn set_shadow(&self, on: bool) {
        self.0.set_shadow(on);
        self.report_setting("shadow");
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let layer = LayerKind::HealthProbe.as_str();
        settings_changed!(health, self.0.is_in_use(), layer, self.0.name(), key);
    }
}

impl Indicator for HealthProbeHandle {
    /// Returns `Ok` while the gate is up.
    fn indicate(&self) -> Result<(), String> {
        match self.state() {
            ProbeState::Up => Ok(()),
            state => Err(format!("health probe is {state}")),
        }
    }
}

impl fmt::Debug for HealthProbeHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HealthProbeHandle").field(&*self.0).finish()
    }
}
