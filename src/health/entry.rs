//! One check, as the registry has it: what it says, and what was seen last.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::AbortHandle;

use super::threshold::ProbeState;
use crate::{
    call::{Clock, Nanos, nanos},
    redact,
};

/// Maximum length of a reason in bytes.
pub(super) const MAX_REASON: usize = 256;

/// What a check says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CheckState {
    /// Nothing yet: not ready.
    #[default]
    Unknown,
    /// All is well.
    Pass,
    /// Not well: not ready, unless the check only degrades.
    Fail,
}

impl CheckState {
    /// `unknown`, `pass` or `fail`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Pass => "pass",
            Self::Fail => "fail",
        }
    }

    pub(super) const fn of(state: ProbeState) -> Self {
        match state {
            ProbeState::Unknown => Self::Unknown,
            ProbeState::Up => Self::Pass,
            ProbeState::Down => Self::Fail,
        }
    }
}

impl fmt::Display for CheckState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What all checks, or one, come to: the words of `application/health+json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HealthStatus {
    /// All is well.
    Pass,
    /// Ready, but not all that degrades passes.
    Warn,
    /// Not ready.
    Fail,
}

impl HealthStatus {
    /// `pass`, `warn` or `fail`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

impl fmt::Display for HealthStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One check at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckSnapshot {
    /// Its name.
    pub name: String,
    /// What it says, by its thresholds.
    pub state: CheckState,
    /// Whether the process is not ready without it.
    pub critical: bool,
    /// How the last look ended.
    pub healthy: Option<bool>,
    /// The reason for which the last run of the check failed, if there is one: one line of at most 256 bytes, without
    /// [secrets](crate#secrets).
    pub reason: Option<String>,
    /// How long ago the last look ended.
    pub age: Option<Duration>,
    /// How long the last look took, where that is known.
    pub took: Option<Duration>,
}

impl CheckSnapshot {
    /// What it does to the whole.
    #[must_use]
    pub const fn status(&self) -> HealthStatus {
        match (self.state, self.critical) {
            (CheckState::Pass, _) => HealthStatus::Pass,
            (_, false) => HealthStatus::Warn,
            (_, true) => HealthStatus::Fail,
        }
    }
}

/// One check.
pub(super) struct Entry {
    name: Box<str>,
    state: AtomicU8,
    degrading: AtomicBool,
    /// A look whose result is not there by then hangs, and takes its runtime along.
    overdue_at: AtomicU64,
    /// Who watches the registry was told that it is overdue.
    told_overdue: AtomicBool,
    seen: Mutex<Option<Seen>>,
    runner: OnceLock<AbortHandle>,
    clock: Clock,
}

/// The last look.
#[derive(Clone, Debug)]
struct Seen {
    result: Result<(), Option<Arc<str>>>,
    at: Nanos,
    took: Option<Duration>,
}

impl Entry {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            state: AtomicU8::new(CheckState::Unknown as u8),
            degrading: AtomicBool::new(false),
            overdue_at: AtomicU64::new(Nanos::MAX),
            told_overdue: AtomicBool::new(false),
            seen: Mutex::new(None),
            runner: OnceLock::new(),
            clock: Clock::new(),
        }
    }

    /// Whether the registry asks it by itself.
    pub(super) fn runs(&self) -> bool {
        self.runner.get().is_some()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn degrades(&self) {
        self.degrading.store(true, Ordering::Release);
    }

    pub(super) fn runs_as(&self, runner: AbortHandle) {
        let _ = self.runner.set(runner);
    }

    pub(super) fn stop(&self) {
        if let Some(runner) = self.runner.get() {
            runner.abort();
        }
    }

    // ===== Being told =====

    /// A look begins, and must be done after so long at the latest.
    pub(super) fn looks(&self, patience: Nanos) {
        self.overdue_at.store(self.clock.now().saturating_add(patience), Ordering::Release);
    }

    /// A look has ended.
    pub(super) fn looked(&self, result: Result<(), String>, took: Option<Duration>) {
        let result = result.map_err(reason);
        *self.seen() = Some(Seen { result, at: self.clock.now(), took });
    }

    /// When the next look is due, nothing is overdue before. Whether that takes back what was told.
    pub(super) fn rests(&self, wait: Duration, patience: Nanos) -> bool {
        self.looks(nanos(wait).saturating_add(patience));
        self.told_overdue.swap(false, Ordering::AcqRel)
    }

    /// Whether it is overdue, and nobody was told yet.
    pub(super) fn turns_overdue(&self) -> bool {
        self.is_overdue() && !self.told_overdue.swap(true, Ordering::AcqRel)
    }

    /// Whether that changed anything.
    pub(super) fn publish(&self, state: CheckState) -> bool {
        self.state.swap(state as u8, Ordering::AcqRel) != state as u8
    }

    fn seen(&self) -> MutexGuard<'_, Option<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ===== Being asked =====

    pub(super) fn state(&self) -> CheckState {
        if self.is_overdue() {
            return CheckState::Fail;
        }
        match self.state.load(Ordering::Acquire) {
            0 => CheckState::Unknown,
            1 => CheckState::Pass,
            _ => CheckState::Fail,
        }
    }

    /// In what time it will be overdue, unless it is so already or never will be.
    pub(super) fn overdue_in(&self) -> Option<Duration> {
        let due = self.overdue_at.load(Ordering::Acquire);
        let left = (due != Nanos::MAX).then(|| due.checked_sub(self.clock.now())).flatten()?;
        Some(Duration::from_nanos(left.saturating_add(1)))
    }

    fn is_overdue(&self) -> bool {
        let due = self.overdue_at.load(Ordering::Acquire);
        // Most are not asked in the background: they cost no look at the clock.
        due != Nanos::MAX && self.clock.now() > due
    }

    pub(super) fn status(&self) -> HealthStatus {
        match (self.state(), self.degrading.load(Ordering::Acquire)) {
            (CheckState::Pass, _) => HealthStatus::Pass,
            (_, true) => HealthStatus::Warn,
            (_, false) => HealthStatus::Fail,
        }
    }

    pub(super) fn snapshot(&self) -> CheckSnapshot {
        let overdue = self.is_overdue();
        let seen = self.seen().clone();
        let failed = seen.as_ref().and_then(|seen| seen.result.as_ref().err());
        let reason = if overdue {
            Some("gives no result any more".to_owned())
        } else {
            failed.and_then(|why| why.as_deref().map(str::to_owned))
        };
        CheckSnapshot {
            name: self.name.to_string(),
            state: self.state(),
            critical: !self.degrading.load(Ordering::Acquire),
            healthy: if overdue {
                Some(false)
            } else {
                seen.as_ref().map(|seen| seen.result.is_ok())
            },
            reason,
            age: seen
                .as_ref()
                .map(|seen| Duration::from_nanos(self.clock.now().saturating_sub(seen.at))),
            took: seen.and_then(|seen| seen.took),
        }
    }
}

/// Returns one line of at most [`MAX_REASON`] bytes of printable characters, without secrets.
fn reason(said: String) -> Option<Arc<str>> {
    // Before the line breaks are replaced, because a URI may continue after a line break.
    let safe = redact::text(&said, MAX_REASON);
    let line: String = safe.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = line.trim();
    (!line.is_empty()).then(|| line.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_one_short_line() {
        assert_eq!(reason(" \n ".into()), None);
        assert_eq!(reason("no\r\nroute\u{1b}[1m ".into()).as_deref(), Some("no  route [1m"));
        assert_eq!(reason("ä".repeat(128)).as_deref(), Some(&*"ä".repeat(128)));
        let long = reason("ä".repeat(200)).unwrap();
        assert!(long.len() <= MAX_REASON && long.ends_with("ä… (400 bytes)"), "{long}");
    }
}
