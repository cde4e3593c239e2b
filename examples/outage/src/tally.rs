//! The results of the calls of one side.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::script::{self, Phase};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A 200 with its whole body.
    Good,
    Status(u16),
    /// A layer rejected the call.
    Refused(&'static str),
    NoConnection,
    ConnectionLost,
    TimedOut,
}

impl Answer {
    pub fn name(self) -> String {
        match self {
            Self::Good => "good".into(),
            Self::Status(status) => format!("HTTP {status}"),
            Self::Refused(kind) => format!("rejected: {}", kind.replace('_', " ")),
            Self::NoConnection => "connection refused".into(),
            Self::ConnectionLost => "connection lost".into(),
            Self::TimedOut => "timed out".into(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The planned time of the call.
    pub at: Duration,
    pub ended: Duration,
    pub answer: Answer,
}

impl Call {
    pub fn took(&self) -> Duration {
        self.ended.saturating_sub(self.at)
    }

    pub fn is_good(&self) -> bool {
        self.answer == Answer::Good
    }
}

/// All calls of one side, in the order in which they ended.
#[derive(Debug, Default)]
pub struct Tally {
    begun: AtomicUsize,
    ended: Mutex<Vec<Call>>,
    /// The attempts that the client sent in each phase, whether or not they reached the upstream.
    attempts: [AtomicUsize; Phase::ALL.len()],
    /// The health probes that the client sent in each phase.
    probes: [AtomicUsize; Phase::ALL.len()],
}

impl Tally {
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    pub fn end(&self, call: Call) {
        self.lock().push(call);
    }

    pub fn send(&self, phase: Phase, probe: bool) {
        let sent = if probe { &self.probes } else { &self.attempts };
        sent[phase as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn attempts(&self, phase: Phase) -> usize {
        self.attempts[phase as usize].load(Ordering::Relaxed)
    }

    /// Returns the number of attempts and health probes.
    pub fn sent(&self, phase: Phase) -> usize {
        self.attempts(phase) + self.probes[phase as usize].load(Ordering::Relaxed)
    }

    pub fn in_flight(&self) -> usize {
        let ended = self.lock().len();
        self.begun.load(Ordering::Relaxed).saturating_sub(ended)
    }

    /// Returns the calls except the first `known` that ended.
    pub fn since(&self, known: usize) -> Vec<Call> {
        self.lock()[known..].to_vec()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.since(0)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// ===== Statistics =====

/// Returns the calls that were made in a phase.
pub fn made_in(calls: &[Call], phase: Phase) -> Vec<Call> {
    calls.iter().filter(|call| Phase::at(call.at) == phase).copied().collect()
}

pub fn good(calls: &[Call]) -> usize {
    calls.iter().filter(|call| call.is_good()).count()
}

/// Returns a percentile of the durations of the calls, with any result.
pub fn percentile(calls: &[Call], share: f64) -> Duration {
    let mut took: Vec<_> = calls.iter().map(Call::took).collect();
    took.sort_unstable();
    let rank = (took.len() as f64 * share).ceil() as usize;
    took.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

pub fn errors(calls: &[Call]) -> BTreeMap<String, usize> {
    let mut errors = BTreeMap::new();
    for call in calls.iter().filter(|call| !call.is_good()) {
        *errors.entry(call.answer.name()).or_default() += 1;
    }
    errors
}

/// Returns the time from the recovery of the upstream to the first second in which nine of ten calls succeed within
/// 300 ms.
pub fn time_to_recover(calls: &[Call]) -> Option<Duration> {
    const SECOND: Duration = Duration::from_secs(1);
    const SOON: Duration = Duration::from_millis(300);
    let healthy = Phase::Recovered.begins();
    (0..)
        .map(|step| healthy + Duration::from_millis(50) * step)
        .take_while(|begin| *begin + SECOND <= script::length())
        .find(|begin| {
            let within = *begin..*begin + SECOND;
            let made = calls.iter().filter(|call| within.contains(&call.at));
            let (mut all, mut fine) = (0, 0);
            for call in made {
                all += 1;
                fine += usize::from(call.is_good() && call.took() <= SOON);
            }
            all > 0 && fine * 10 >= all * 9
        })
        .map(|begin| begin - healthy)
}
