//! The background task: one probe after the other, until the gate is gone.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Weak,
    task::{Poll, ready},
    thread,
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::{
    gate::{Gate, Starter},
    probe::{Probe, ProbeFailure},
};
use crate::event;

/// Keeps no gate alive: the gate's end is its own.
pub(super) struct Prober<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    pub(super) gate: Weak<Gate>,
    pub(super) service: S,
    pub(super) probe: P,
}

impl<S, P> Prober<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    pub(super) fn starter(self) -> Starter {
        Box::new(move |runtime| runtime.spawn(Running(self).run()).abort_handle())
    }

    /// A panic of the user's is a failed probe, wherever it comes from.
    fn probe_once(
        &self,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), ProbeFailure>> + Send + use<S, P> {
        // Beyond what a clock can tell there is no deadline to miss.
        let far = Duration::from_secs(86_400 * 365);
        let now = Instant::now();
        let deadline = now.checked_add(timeout.min(far)).unwrap_or(now);
        let attempt = catch_unwind(AssertUnwindSafe(|| {
            // A fresh instance each time: nothing that a probe reserved stays behind.
            Box::pin(self.probe.clone().run(self.service.clone(), deadline))
        }));
        async move {
            let Ok(mut attempt) = attempt else { return Err(ProbeFailure::Panicked) };
            let result = poll_fn(|cx| {
                let polled = catch_unwind(AssertUnwindSafe(|| attempt.as_mut().poll(cx)));
                Poll::Ready(match polled {
                    Ok(poll) => ready!(poll),
                    Err(_) => Err(ProbeFailure::Panicked),
                })
            })
            .await;
            match catch_unwind(AssertUnwindSafe(|| drop(attempt))) {
                Ok(()) => result,
                Err(_) => Err(ProbeFailure::Panicked),
            }
        }
    }
}

/// A prober given to a runtime.
struct Running<S, P>(Prober<S, P>)
where
    P: Probe<S>,
    S: Clone + Send + 'static;

impl<S, P> Running<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    async fn run(self) {
        loop {
            let Some(gate) = self.0.gate.upgrade() else { return };
            let timeout = gate.probe_begins();
            drop(gate);
            let began = Instant::now();
            let result = self.0.probe_once(timeout).await;
            let took = Instant::now().saturating_duration_since(began);
            let Some(gate) = self.0.gate.upgrade() else { return };
            let wait = gate.probe_ended(result, took);
            drop(gate);
            sleep(wait).await;
        }
    }
}

impl<S, P> Drop for Running<S, P>
where
    P: Probe<S>,
    S: Clone + Send + 'static,
{
    /// With the gate still there, this is the end of the runtime.
    fn drop(&mut self) {
        let Some(gate) = self.0.gate.upgrade() else { return };
        if thread::panicking() {
            event!(ERROR, "health probe: the prober panicked; is the runtime's timer enabled?");
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
