//! One check of the registry: its state, and the result of its last run.
//!
//! The state, the flags and the overdue time are separate atomics, and the result is behind a lock. Readers load them
//! one by one, so a snapshot is not atomic.
//!
//! # Overdue runs
//!
//! A run that blocks its thread cannot report a failure. Therefore the check stores the time by which the current run
//! must have ended ([`CheckEntry::start_check`], [`CheckEntry::schedule_next`]), and readers compare it with the clock.
//! After that time the check fails, whatever its stored state. Watchers wake at that time. The first watcher that
//! observes the overdue check notifies the others ([`CheckEntry::mark_overdue`]), and the end of the run notifies all
//! of them again ([`CheckEntry::schedule_next`]).

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::AbortHandle;

use super::threshold::ProbeState;
use crate::{
    redact,
    sync::Mutex,
    time::{Clock, Nanos, nanos},
};

/// Maximum length of a reason in bytes.
pub(super) const MAX_REASON: usize = 256;

/// The state of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CheckState {
    /// No result yet. The process is not ready, unless the check is degrading.
    #[default]
    Unknown,
    /// The check passes.
    Pass,
    /// The check fails. The process is not ready, unless the check is degrading.
    Fail,
}

impl CheckState {
    /// Returns the name of the state: `unknown`, `pass` or `fail`.
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

/// The health of the process, or the effect of one check on it, in the terms of `application/health+json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HealthStatus {
    /// Ready, and all checks pass.
    Pass,
    /// Ready, but a degrading check does not pass.
    Warn,
    /// Not ready.
    Fail,
}

impl HealthStatus {
    /// Returns the name of the status: `pass`, `warn` or `fail`.
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

/// A snapshot of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckSnapshot {
    /// The name of the check.
    pub name: String,
    /// The state, which follows from the results and the thresholds.
    pub state: CheckState,
    /// `true`: the process is not ready unless this check passes. `false`: the check is degrading.
    pub critical: bool,
    /// Whether the last run passed. `None` before the end of the first run.
    pub healthy: Option<bool>,
    /// The reason for which the last run failed, if there is one: one line of 256 bytes or less, without
    /// [secrets](crate#secrets).
    pub reason: Option<String>,
    /// The time since the end of the last run.
    pub age: Option<Duration>,
    /// The duration of the last run, if it is known.
    pub took: Option<Duration>,
}

impl CheckSnapshot {
    /// Returns the effect of the check on the status of the process.
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
pub(super) struct CheckEntry {
    name: Box<str>,
    state: AtomicU8,
    degrading: AtomicBool,
    /// The time by which the current run must have ended. `Nanos::MAX`: no task runs the check, so it is never overdue.
    overdue_at: AtomicU64,
    /// The watchers of the registry have been notified that the check is overdue.
    overdue_notified: AtomicBool,
    last_run: Mutex<Option<CheckResult>>,
    /// The task that runs the check. A reporter's check has none.
    task: OnceLock<AbortHandle>,
    clock: Clock,
}

/// The result of the last run.
#[derive(Clone, Debug)]
struct CheckResult {
    result: Result<(), Option<Arc<str>>>,
    at: Nanos,
    took: Option<Duration>,
}

impl CheckEntry {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            state: AtomicU8::new(CheckState::Unknown as u8),
            degrading: AtomicBool::new(false),
            overdue_at: AtomicU64::new(Nanos::MAX),
            overdue_notified: AtomicBool::new(false),
            last_run: Mutex::new(None),
            task: OnceLock::new(),
            clock: Clock::new(),
        }
    }

    /// Returns whether a task of the registry runs this check.
    pub(super) fn has_task(&self) -> bool {
        self.task.get().is_some()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn set_degrading(&self) {
        self.degrading.store(true, Ordering::Release);
    }

    pub(super) fn set_task(&self, task: AbortHandle) {
        let _ = self.task.set(task);
    }

    pub(super) fn stop(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    // ===== Writes =====

    /// Records the start of a run, which must end within `max_run_time`.
    pub(super) fn start_check(&self, max_run_time: Nanos) {
        self.overdue_at.store(self.clock.now().saturating_add(max_run_time), Ordering::Release);
    }

    /// Records the result of a run.
    pub(super) fn record(&self, result: Result<(), String>, took: Option<Duration>) {
        let result = result.map_err(reason);
        *self.last_run.lock() = Some(CheckResult { result, at: self.clock.now(), took });
    }

    /// Records the end of a run: the next one must end within the delay and `max_run_time`.
    ///
    /// Returns whether the watchers had been notified that the check is overdue. The caller then notifies them again,
    /// because it no longer is.
    pub(super) fn schedule_next(&self, delay: Duration, max_run_time: Nanos) -> bool {
        self.start_check(nanos(delay).saturating_add(max_run_time));
        self.overdue_notified.swap(false, Ordering::AcqRel)
    }

    /// Returns whether the check is overdue and the watchers have not been notified of it yet. The caller then notifies
    /// them.
    pub(super) fn mark_overdue(&self) -> bool {
        self.is_overdue() && !self.overdue_notified.swap(true, Ordering::AcqRel)
    }

    /// Sets the state. Returns whether it has changed.
    pub(super) fn publish(&self, state: CheckState) -> bool {
        self.state.swap(state as u8, Ordering::AcqRel) != state as u8
    }

    // ===== Reads =====

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

    /// Returns the time until the check becomes overdue. `None` if it already is, or if it never will be.
    pub(super) fn overdue_in(&self) -> Option<Duration> {
        let due = self.overdue_at.load(Ordering::Acquire);
        let left = (due != Nanos::MAX).then(|| due.checked_sub(self.clock.now())).flatten()?;
        Some(Duration::from_nanos(left.saturating_add(1)))
    }

    fn is_overdue(&self) -> bool {
        let due = self.overdue_at.load(Ordering::Acquire);
        // A check without a task, which is the usual case, does not cost a read of the clock.
        due != Nanos::MAX && self.clock.now() > due
    }

    /// Returns whether the process is not ready unless this check passes.
    pub(super) fn is_critical(&self) -> bool {
        !self.degrading.load(Ordering::Acquire)
    }

    pub(super) fn status(&self) -> HealthStatus {
        match (self.state(), self.is_critical()) {
            (CheckState::Pass, _) => HealthStatus::Pass,
            (_, false) => HealthStatus::Warn,
            (_, true) => HealthStatus::Fail,
        }
    }

    pub(super) fn snapshot(&self) -> CheckSnapshot {
        let overdue = self.is_overdue();
        let last = self.last_run.lock().clone();
        let failed = last.as_ref().and_then(|last| last.result.as_ref().err());
        let reason = if overdue {
            Some("its run is overdue".to_owned())
        } else {
            failed.and_then(|reason| reason.as_deref().map(str::to_owned))
        };
        CheckSnapshot {
            name: self.name.to_string(),
            state: self.state(),
            critical: self.is_critical(),
            healthy: if overdue {
                Some(false)
            } else {
                last.as_ref().map(|last| last.result.is_ok())
            },
            reason,
            age: last
                .as_ref()
                .map(|last| Duration::from_nanos(self.clock.now().saturating_sub(last.at))),
            took: last.and_then(|last| last.took),
        }
    }
}

/// Returns one line of at most [`MAX_REASON`] bytes of printable characters, without secrets.
fn reason(text: String) -> Option<Arc<str>> {
    // Secrets are redacted before the line breaks are replaced, because a URI may continue after a line break.
    let safe = redact::text(&text, MAX_REASON);
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
