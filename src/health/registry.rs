use std::{
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
};

use tokio::sync::Notify;

use super::{
    endpoints::{HealthEndpointsLayer, HealthService},
    threshold::ProbeState,
};
use crate::ConfigError;

/// Names longer than this are no names any more.
const LONGEST_NAME: usize = 64;
/// Checks are made by code, not by requests; still, there is an end to them.
const MOST_CHECKS: usize = 1000;

/// What this process can do now: named checks, and the endpoints that tell of them.
///
/// Clones share the checks. It is ready when every check passes (and so without any), and it is alive as
/// long as it answers: liveness never asks a dependency.
#[derive(Clone, Default)]
pub struct Health(Arc<Registry>);

#[derive(Default)]
struct Registry {
    /// In the order they were added.
    checks: Mutex<Vec<Arc<Check>>>,
    /// Counts the changes.
    version: AtomicU64,
    changed: Notify,
}

struct Check {
    name: Box<str>,
    state: AtomicU8,
}

/// What a check says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CheckState {
    /// Nothing yet: not ready.
    #[default]
    Unknown,
    /// All is well.
    Pass,
    /// Not well: not ready.
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

impl Health {
    /// A registry without any checks: ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check, unknown until its reporter says more.
    ///
    /// It is there until the last clone of its reporter is dropped. One that is dropped by a panic
    /// leaves its check behind as failed, until a new reporter of that name takes it over.
    ///
    /// # Errors
    ///
    /// A name that is not 1 to 64 of `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_` and `-`, or that another
    /// reporter has, or more than 1000 checks.
    pub fn reporter(&self, name: &str) -> Result<Reporter, ConfigError> {
        if !is_name(name) {
            // What is far too long need not be repeated.
            let shown: String = name.chars().take(LONGEST_NAME + 1).collect();
            let remedy = "use 1 to 64 of `A`-`Z`, `a`-`z`, `0`-`9`, `.`, `_` and `-`";
            return Err(ConfigError::new("check.name", shown, remedy));
        }
        let mut checks = self.0.lock();
        if let Some(at) = checks.iter().position(|check| *check.name == *name) {
            // Only this list has it: its reporter is gone.
            if Arc::strong_count(&checks[at]) > 1 {
                let remedy = "another check has this name: give this one a name of its own";
                return Err(ConfigError::new("check.name", name, remedy));
            }
            checks.remove(at);
        }
        if checks.len() >= MOST_CHECKS {
            return Err(ConfigError::new("check.name", name, "use at most 1000 checks"));
        }
        let check = Arc::new(Check { name: name.into(), state: AtomicU8::new(0) });
        checks.push(check.clone());
        drop(checks);
        self.0.tell();
        Ok(Reporter(Arc::new(Reporting { registry: self.0.clone(), check })))
    }

    /// Whether every check passes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.0.lock().iter().all(|check| check.state() == CheckState::Pass)
    }

    /// All checks, in the order they were added.
    #[must_use]
    pub fn checks(&self) -> Vec<(String, CheckState)> {
        let mut checks = Vec::new();
        self.look(|name, state| checks.push((name.to_owned(), state)));
        checks
    }

    /// The state of one check, if there is one of this name.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<CheckState> {
        self.0.lock().iter().find(|check| *check.name == *name).map(|check| check.state())
    }

    /// Waits until a check changes, comes or goes, and tells whether all pass then. Dropping the future
    /// is harmless.
    pub async fn changed(&self) -> bool {
        let before = self.0.version.load(Ordering::Acquire);
        loop {
            let mut notified = pin!(self.0.changed.notified());
            // From here on no change is missed.
            notified.as_mut().enable();
            if self.0.version.load(Ordering::Acquire) != before {
                return self.is_ready();
            }
            notified.await;
        }
    }

    /// A layer that answers `/livez`, `/readyz` and `/healthz` before anything behind it is asked: put
    /// it outermost. See the [module](crate::health).
    pub fn endpoints(&self) -> HealthEndpointsLayer {
        HealthEndpointsLayer::new(self.clone())
    }

    /// A service that answers `/livez`, `/readyz` and `/healthz`, and 404 anywhere else: for a port of
    /// its own.
    #[must_use]
    pub fn service(&self) -> HealthService {
        HealthService::new(self.clone())
    }

    pub(super) fn look(&self, mut see: impl FnMut(&str, CheckState)) {
        for check in &*self.0.lock() {
            see(&check.name, check.state());
        }
    }
}

pub(super) fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Check>>> {
        // Nothing of a user's runs under it; were it poisoned, the list is still whole.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }
}

impl Check {
    fn state(&self) -> CheckState {
        match self.state.load(Ordering::Acquire) {
            0 => CheckState::Unknown,
            1 => CheckState::Pass,
            _ => CheckState::Fail,
        }
    }
}

// ===== Reporting =====

/// Says how one check of a [`Health`] is. Clones speak for the same check; it goes with the last of them.
#[derive(Clone)]
pub struct Reporter(Arc<Reporting>);

struct Reporting {
    registry: Arc<Registry>,
    check: Arc<Check>,
}

impl Reporter {
    /// The check's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.check.name
    }

    /// What was said last.
    #[must_use]
    pub fn state(&self) -> CheckState {
        self.0.check.state()
    }

    /// From now on the check says this.
    pub fn report(&self, state: CheckState) {
        self.0.report(state);
    }

    /// All is well.
    pub fn pass(&self) {
        self.report(CheckState::Pass);
    }

    /// Not well.
    pub fn fail(&self) {
        self.report(CheckState::Fail);
    }
}

impl Reporting {
    fn report(&self, state: CheckState) {
        if self.check.state.swap(state as u8, Ordering::AcqRel) != state as u8 {
            self.registry.tell();
        }
    }
}

impl Drop for Reporting {
    fn drop(&mut self) {
        if thread::panicking() {
            return self.report(CheckState::Fail);
        }
        self.registry.lock().retain(|check| !Arc::ptr_eq(check, &self.check));
        self.registry.tell();
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checks = self.checks();
        f.debug_map().entries(checks.iter().map(|(name, state)| (name, state))).finish()
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter")
            .field("name", &self.name())
            .field("state", &self.state())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "search-1.eu_West", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", " ", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn ready_is_when_every_check_passes() {
        let health = Health::new();
        assert!(health.is_ready());
        let (db, search) = (health.reporter("db").unwrap(), health.reporter("search").unwrap());
        db.pass();
        assert!(!health.is_ready(), "unknown is not ready");
        search.pass();
        assert!(health.is_ready());
        search.fail();
        assert!(!health.is_ready());
        let clone = search.clone();
        drop(search);
        assert_eq!(health.check("search"), Some(CheckState::Fail));
        drop(clone);
        assert_eq!(health.checks(), [("db".to_owned(), CheckState::Pass)]);
        assert!(health.is_ready());
    }

    #[test]
    fn a_name_is_given_once() {
        let health = Health::new();
        let first = health.reporter("db").unwrap();
        let error = health.reporter("db").unwrap_err();
        assert_eq!((error.field, &*error.value), ("check.name", "\"db\""));
        drop(first);
        assert!(health.reporter("db").is_ok());
    }

    #[test]
    fn a_panicked_reporter_leaves_a_failed_check_that_can_be_taken_over() {
        let health = Health::new();
        let reporter = health.reporter("worker").unwrap();
        reporter.pass();
        let worker = thread::spawn(move || {
            let _mine = reporter;
            std::panic::resume_unwind(Box::new("stop"));
        });
        assert!(worker.join().is_err());
        assert_eq!(health.check("worker"), Some(CheckState::Fail));
        health.reporter("worker").unwrap().pass();
        assert_eq!(health.check("worker"), None, "and went with its second reporter");
    }
}
