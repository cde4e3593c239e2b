//! Counts the results of calls, and asserts that all of them succeeded.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use buttress::{
    Attempts, BoxError, Rejected,
    breaker::{CircuitBreakerHandle, CircuitState},
    outcome::Reason,
};

/// The results of the calls of one test. Clones share the counters.
#[derive(Clone, Default)]
pub struct Report(Arc<Mutex<Counters>>);

#[derive(Default)]
struct Counters {
    good: usize,
    lost: usize,
    rejected: usize,
    retried_attempts: BTreeMap<&'static str, usize>,
    errors: BTreeMap<String, usize>,
}

impl Report {
    fn counters(&self) -> MutexGuard<'_, Counters> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn record(&self, result: &Result<Attempts, BoxError>) {
        match result {
            Ok(attempts) => {
                self.counters().good += 1;
                self.record_attempts(attempts);
            }
            Err(error) => {
                if let Some(attempts) = Attempts::find(&**error) {
                    self.record_attempts(&attempts);
                }
                self.record_error(&**error);
            }
        }
    }

    pub fn record_good(&self) {
        self.counters().good += 1;
    }

    pub fn record_error(&self, error: &(dyn std::error::Error + 'static)) {
        let rejected = Rejected::find(error);
        // The text of a rejection states the time that is left, which is different for each call.
        let text =
            rejected.map_or_else(|| chain(error), |rejected| rejected.kind().as_str().to_owned());
        let mut counters = self.counters();
        counters.lost += 1;
        counters.rejected += usize::from(rejected.is_some());
        *counters.errors.entry(text).or_default() += 1;
    }

    pub fn record_attempts(&self, attempts: &Attempts) {
        let mut counters = self.counters();
        for attempt in attempts.records() {
            *counters.retried_attempts.entry(attempt.outcome.reason().as_str()).or_default() += 1;
        }
    }

    /// Number of attempts that met a connection which the server had closed.
    ///
    /// The retry layer lists every attempt of a call that it repeated. An attempt on a closed connection ends with one
    /// of three reasons, depending on how far the close had progressed: the client had seen it before it wrote
    /// (`NeverSent`), it saw the end of the stream in place of the response (`StaleConnection`), or the server's kernel
    /// reset the connection after the write (`Reset`). The servers of these tests do nothing else that produces these
    /// reasons.
    ///
    /// hyper-util itself repeats some requests that were never sent. Those are not counted.
    pub fn stale_connections(&self) -> usize {
        self.repeated(&[Reason::NeverSent, Reason::StaleConnection, Reason::Reset])
    }

    /// Number of attempts that ended for one of these reasons and were repeated.
    pub fn repeated(&self, reasons: &[Reason]) -> usize {
        let counters = self.counters();
        reasons.iter().filter_map(|reason| counters.retried_attempts.get(reason.as_str())).sum()
    }

    /// Asserts that all calls succeeded, that no circuit opened, and that no circuit rejected a call.
    pub fn assert_all_good(&self, calls: usize, circuits: &[CircuitBreakerHandle]) {
        let snapshots = circuits.iter().map(CircuitBreakerHandle::snapshot);
        let (opened, refused) = snapshots.fold((0, 0), |(opened, refused), circuit| {
            (opened + circuit.opened, refused + circuit.rejected)
        });
        let are_closed = circuits.iter().all(|circuit| circuit.state() == CircuitState::Closed);
        let counters = self.counters();
        let Counters { good, lost, rejected, .. } = *counters;
        assert!(
            (good, lost, rejected) == (calls, 0, 0) && (opened, refused) == (0, 0) && are_closed,
            "of {calls} calls, {counters}; circuits opened {opened} times and rejected {refused} attempts",
        );
    }
}

/// The error and its sources.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counters().fmt(f)
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { good, lost, rejected, retried_attempts, errors } = self;
        write!(
            f,
            "{good} good, {lost} lost, {rejected} of them rejected; attempts of repeated calls: {retried_attempts:?}"
        )?;
        let mut errors: Vec<_> = errors.iter().collect();
        errors.sort_by_key(|(_, times)| std::cmp::Reverse(**times));
        errors.iter().take(5).try_for_each(|(error, times)| write!(f, "; {times} x {error}"))
    }
}
