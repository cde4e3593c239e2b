use std::{fmt, pin::pin, sync::Arc, time::Duration};

use super::{
    circuit::Circuit,
    machine::{CallCounts, SavedState},
    open_duration::OpenDuration,
    state::{CircuitSettings, CircuitState, HalfOpenProgress},
    trip::{CallStats, Trip, TripReason},
};
use crate::{
    error::ConfigError,
    event::settings_changed,
    indicator::Indicator,
    outcome::{LayerKind, Outcome},
};

/// The maximum number of half-open probes.
const MAX_PROBES: u16 = 1000;

/// Reads and controls a circuit.
///
/// Clones refer to the same circuit, and so do all services that the layer or a clone of it made.
#[derive(Clone)]
pub struct CircuitBreakerHandle(pub(super) Arc<Circuit>);

/// A snapshot of a circuit.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct CircuitBreakerSnapshot {
    /// The state.
    pub state: CircuitState,
    /// The time for which an open circuit still rejects calls. `None` in all other states.
    pub open_for: Option<Duration>,
    /// The number of [isolations](CircuitBreakerHandle::isolate) that hold the circuit open.
    pub isolations: u32,
    /// The counts of the rules since the circuit closed.
    pub seen: CallStats,
    /// The number of half-open probes in flight.
    pub probes: usize,
    /// The results of the half-open probes so far. `None` if the circuit is not half-open.
    pub half_open: Option<HalfOpenProgress>,
    /// The number of trips.
    pub opened: u64,
    /// The reason of the last trip. `None` before the first one.
    pub last_trip: Option<TripReason>,
    /// The index of the rule that caused the last trip, in the order in which the rules were given. `None` before the
    /// first trip, and if half-open probes opened the circuit again.
    pub last_rule: Option<usize>,
    /// The number of rejected calls.
    pub rejected: u64,
    /// The number of calls that would have been rejected without [shadow mode](CircuitBreakerHandle::set_shadow).
    pub shadowed: u64,
    saved: SavedState,
}

impl CircuitBreakerHandle {
    // ===== Queries =====

    /// Returns the state. It is current, even if no call has arrived since the open time passed.
    #[must_use]
    pub fn state(&self) -> CircuitState {
        self.0.state().0
    }

    /// Returns the state with all counts and results.
    #[must_use]
    pub fn snapshot(&self) -> CircuitBreakerSnapshot {
        let (rejected, shadowed) = (self.0.rejected().iter().sum(), self.0.shadowed());
        self.0.read(|machine, times, now| {
            let state = machine.state();
            let left = Duration::from_nanos(machine.until().saturating_sub(now));
            CircuitBreakerSnapshot {
                state,
                open_for: (state == CircuitState::Open).then_some(left),
                isolations: machine.isolations(),
                seen: machine.call_stats(now, times),
                probes: machine.probes_in_flight(),
                half_open: machine.half_open_progress(),
                opened: machine.opened(),
                last_trip: machine.last_trip(),
                last_rule: machine.last_rule(),
                rejected,
                shadowed,
                saved: machine.saved_state(now, times),
            }
        })
    }

    /// Waits until the state differs from the state at the time of this call, and returns it.
    ///
    /// The change from open to half-open by the passage of time counts, too, and needs no traffic. Dropping the future
    /// cancels the wait and has no other effect.
    pub fn changed(&self) -> impl Future<Output = CircuitState> + Send + use<> {
        let circuit = self.0.clone();
        let before = self.state();
        async move {
            loop {
                let mut notified = pin!(circuit.changed().notified());
                // Enabled before the state is read, so that no change in between is missed.
                notified.as_mut().enable();
                let (state, lasts) = circuit.state();
                if state != before {
                    return state;
                }
                match lasts {
                    Some(left) => {
                        let _ = tokio::time::timeout(left, notified).await;
                    }
                    None => notified.await,
                }
            }
        }
    }

    // ===== Manual control =====

    /// Rejects all calls until the state is set again, for example by [`reset`](Self::reset).
    pub fn force_open(&self) {
        self.force(CircuitState::ForcedOpen);
    }

    /// Admits all calls and counts no outcome until the state is set again, for example by [`reset`](Self::reset).
    pub fn force_closed(&self) {
        self.force(CircuitState::ForcedClosed);
    }

    /// Makes the circuit half-open: the next calls are probes.
    pub fn half_open(&self) {
        self.force(CircuitState::HalfOpen);
    }

    /// Closes the circuit and clears its counts. The outcomes of calls in flight are not counted.
    pub fn reset(&self) {
        self.force(CircuitState::Closed);
    }

    fn force(&self, to: CircuitState) {
        self.0.change(|machine, at| Some(machine.force(to, at.now, at.times)));
    }

    /// Holds the circuit open until the returned guard is dropped. Isolations are counted: calls are rejected while at
    /// least one guard exists. The state beneath continues to change.
    #[must_use = "the isolation ends when this is dropped"]
    pub fn isolate(&self) -> Isolation {
        self.0.change(|machine, at| machine.isolate(true, at.now));
        Isolation(self.clone())
    }

    /// Sets whether the layer is in shadow mode: it rejects no calls, and
    /// [`shadowed`](CircuitBreakerSnapshot::shadowed) counts those that it would reject. States, probes and counts are
    /// not affected.
    pub fn set_shadow(&self, on: bool) {
        self.0.set_configured();
        self.0.set_shadow(on);
        self.report_setting("shadow");
    }

    /// Records an outcome that does not come from a call of the layer, for example of a health probe.
    ///
    /// A closed circuit counts it like the outcome of a call, and a half-open circuit like that of a probe. In other
    /// states it has no effect.
    pub fn record(&self, outcome: Outcome) {
        self.0.record(outcome);
    }

    // ===== Settings at run time =====

    /// Sets new thresholds of the same rules, and keeps the counts.
    ///
    /// # Errors
    ///
    /// Returns the error of [`Trip::check`]. Also returns an error if the kinds, the windows or the order of the rules
    /// differ: they require a new layer.
    pub fn set_trip(&self, trip: &Trip) -> Result<(), ConfigError> {
        trip.check()?;
        let (mut new, mut fits) = (trip.clone(), false);
        let (mut counts, _) = CallCounts::new(trip);
        self.0.change(|machine, _| {
            fits = machine.adjust(&mut new, &mut counts);
            None
        });
        if fits {
            self.0.set_configured();
            self.report_setting("trip");
            return Ok(());
        }
        let remedy = "keep the kinds, the windows and the order of the rules, or build a new layer";
        Err(ConfigError::new("trip", trip, remedy))
    }

    /// Sets for how long an open circuit rejects calls. Takes effect at the next trip.
    ///
    /// # Errors
    ///
    /// Returns the error of [`OpenDuration::check`].
    pub fn set_open_for(&self, open_for: impl Into<OpenDuration>) -> Result<(), ConfigError> {
        let open_for = open_for.into();
        open_for.check()?;
        self.configure("open_for", |settings| settings.open_for = open_for);
        Ok(())
    }

    /// Sets the number of half-open probes, and how many of them must succeed. See
    /// [`half_open_of`](super::layer::CircuitBreakerLayer::half_open_of).
    ///
    /// # Errors
    ///
    /// Returns an error unless `probes` is 1 to 1000 and `needed` is 1 to `probes`.
    pub fn set_half_open_of(&self, needed: u16, probes: u16) -> Result<(), ConfigError> {
        if !(1..=MAX_PROBES).contains(&probes) {
            return Err(ConfigError::new("half_open", probes, "use 1 to 1000 probes"));
        }
        if !(1..=probes).contains(&needed) {
            let remedy = format!("use 1 to {probes} successes of {probes} probes");
            return Err(ConfigError::new("half_open_of.needed", needed, remedy));
        }
        let change = |settings: &mut CircuitSettings| {
            (settings.needed, settings.probes) = (needed, probes);
        };
        self.configure("half_open_of", change);
        Ok(())
    }

    /// Sets the timeout of half-open probes. Takes effect for probes that begin from now on, or whose request is sent
    /// from now on. See [`probe_timeout`](super::layer::CircuitBreakerLayer::probe_timeout).
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero.
    pub fn set_probe_timeout(&self, timeout: Duration) -> Result<(), ConfigError> {
        let timeout = ConfigError::above_zero("probe_timeout", timeout)?;
        self.configure("probe_timeout", |settings| settings.probe_timeout = timeout);
        Ok(())
    }

    /// Sets the time after which a call that its caller ended counts as a failure. See
    /// [`count_cancelled_after`](super::layer::CircuitBreakerLayer::count_cancelled_after).
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero.
    pub fn set_count_cancelled_after(
        &self,
        time: impl Into<Option<Duration>>,
    ) -> Result<(), ConfigError> {
        let check = |time| ConfigError::above_zero("count_cancelled_after", time);
        let time = time.into().map(check).transpose()?;
        let change = |settings: &mut CircuitSettings| settings.count_cancelled_after = time;
        self.configure("count_cancelled_after", change);
        Ok(())
    }

    /// Sets how many callers wait for the verdict of the half-open probes, and for how long. Takes effect for callers
    /// that arrive from now on. See [`half_open_queue`](super::layer::CircuitBreakerLayer::half_open_queue).
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero.
    pub fn set_half_open_queue(&self, callers: u32, max_wait: Duration) -> Result<(), ConfigError> {
        let max_wait = ConfigError::above_zero("half_open_queue.max_wait", max_wait)?;
        self.0.set_configured();
        self.0.set_half_open_queue(callers, max_wait);
        self.report_setting("half_open_queue");
        Ok(())
    }

    /// Sets whether calls are never half-open probes. See
    /// [`external_probes`](super::layer::CircuitBreakerLayer::external_probes).
    pub fn set_external_probes(&self, on: bool) {
        self.configure("external_probes", |settings| settings.external_probes = on);
    }

    /// Sets the duration of a ramp after closing. Zero is no ramp. See
    /// [`ramp`](super::layer::CircuitBreakerLayer::ramp).
    pub fn set_ramp(&self, duration: Duration) {
        self.configure("ramp", |settings| settings.ramp = duration);
    }

    fn configure(&self, key: &'static str, change: impl FnOnce(&mut CircuitSettings)) {
        self.0.set_configured();
        self.0.configure(change);
        self.report_setting(key);
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let layer = LayerKind::CircuitBreaker.as_str();
        settings_changed!(breaker, self.0.is_in_use(), layer, self.0.named(), key);
    }

    /// Replaces the state of the circuit by that of a snapshot.
    ///
    /// Restores the state beneath all isolations, the rest of the open time, the number of trips since they were last
    /// [forgotten](OpenDuration::reset_after), the run of failures and the windows. The circuit of the snapshot must
    /// have the same rules; a smaller window of calls gets the same share of bad calls. Half-open probes start again,
    /// and a ramp does not continue. Isolations and the counts of rejections stay as they are.
    pub fn restore(&self, snapshot: &CircuitBreakerSnapshot) {
        self.0.change(|machine, at| Some(machine.restore(&snapshot.saved, at.now, at.times)));
    }
}

impl Indicator for CircuitBreakerHandle {
    /// Returns an error while the circuit rejects all calls. A half-open circuit is healthy: a server that is not ready
    /// gets no calls, so its circuit would never close again.
    fn indicate(&self) -> Result<(), String> {
        match self.state() {
            CircuitState::Open => Err("circuit is open".into()),
            CircuitState::ForcedOpen => Err("circuit is held open".into()),
            CircuitState::Closed | CircuitState::HalfOpen | CircuitState::ForcedClosed => Ok(()),
        }
    }
}

/// A guard that holds a circuit open until it is dropped. Made by [`CircuitBreakerHandle::isolate`].
#[derive(Debug)]
pub struct Isolation(CircuitBreakerHandle);

impl Drop for Isolation {
    fn drop(&mut self) {
        self.0.0.change(|machine, at| machine.isolate(false, at.now));
    }
}

impl fmt::Debug for CircuitBreakerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CircuitBreakerHandle").field(&*self.0).finish()
    }
}
