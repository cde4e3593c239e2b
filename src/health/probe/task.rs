//! The background task of a gate. It sends one probe at a time until the gate is dropped.

use std::{sync::Weak, thread};

use tokio::time::{Instant, sleep};

use super::super::{
    catch_panic::CatchPanic,
    gate::{Due, Gate, Starter},
    schedule::Schedule,
};
use super::{FailedProbe, Probe, ProbeFailure};
use crate::{event::event, outcome::LayerKind};

/// The parts of the task. It owns no strong reference to the gate, so that the task ends with the gate.
pub(in super::super) struct Prober<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    pub(in super::super) gate: Weak<Gate>,
    pub(in super::super) service: S,
    pub(in super::super) probe: P,
}

impl<S, P> Prober<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    pub(in super::super) fn starter(self) -> Starter {
        Box::new(move |runtime| runtime.spawn(RunningProber(self).run()).abort_handle())
    }

    /// Sends one probe. A panic of user code is a failed probe.
    fn probe_once(
        &self,
        deadline: Instant,
    ) -> impl Future<Output = Result<(), FailedProbe>> + Send + use<S, P> {
        // Each probe uses its own clone, so that a cancelled probe leaves no reservation in the service.
        let run = CatchPanic::new(|| self.probe.clone().run(self.service.clone(), deadline));
        async move { run.await.unwrap_or(Err(ProbeFailure::Panicked.into())) }
    }
}

/// A prober that runs on a runtime.
struct RunningProber<S, P>(Prober<S, P>)
where
    P: Probe<S>,
    S: Clone + Send + 'static;

impl<S, P> RunningProber<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    async fn run(self) {
        loop {
            let Some(gate) = self.0.gate.upgrade() else { return };
            let due = gate.due();
            drop(gate);
            let timeout = match due {
                Due::Probe(timeout) => timeout,
                Due::Wait(wait) => {
                    sleep(wait).await;
                    continue;
                }
            };
            let began = Instant::now();
            let deadline = Schedule::deadline(timeout);
            let mut result = self.0.probe_once(deadline).await;
            if result.as_ref().is_err_and(|failed| failed.is_housekeeping) {
                // Connection housekeeping ended the first probe. A second one is sent at once on another connection.
                result = self.0.probe_once(deadline).await;
            }
            let took = Instant::now().saturating_duration_since(began);
            let Some(gate) = self.0.gate.upgrade() else { return };
            let delay = gate.record(result, took);
            drop(gate);
            sleep(delay).await;
        }
    }
}

impl<S, P> Drop for RunningProber<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    /// Hands the prober back to the gate if the gate still exists: then the runtime has ended, or the task has panicked
    /// because the runtime has no timers.
    fn drop(&mut self) {
        let Some(gate) = self.0.gate.upgrade() else { return };
        if thread::panicking() {
            event!(
                health,
                ERROR,
                LayerKind::HealthProbe.as_str(),
                gate.name(),
                remedy = "enable the timers of the runtime",
                "health prober panicked",
            );
            gate.stopped(None);
        } else {
            let next = Prober {
                gate: self.0.gate.clone(),
                service: self.0.service.clone(),
                probe: self.0.probe.clone(),
            };
            gate.stopped(Some(next.starter()));
        }
    }
}
