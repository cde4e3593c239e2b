use std::{
    fmt,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, task::AbortHandle};

use super::{
    check::Check,
    endpoints::{HealthEndpointsLayer, HealthService},
    reporter::Reporter,
    threshold::ProbeState,
};
use crate::{
    ConfigError,
    call::{Clock, Nanos, nanos},
};

/// Names longer than this are no names any more.
const LONGEST_NAME: usize = 64;
/// Checks are made by code, not by requests; still, there is an end to them.
const MOST_CHECKS: usize = 1000;
/// Reasons are cut after so many bytes.
const LONGEST_REASON: usize = 256;

/// What this process can do now: named checks, and the endpoints that tell of them.
///
/// Clones share the checks. It is ready while no critical check fails or is still unknown (and so without
/// any), and it is alive as long as it answers: liveness never asks a dependency.
#[derive(Clone, Default)]
pub struct Health(Arc<Registry>);

#[derive(Default)]
pub(super) struct Registry {
    /// In the order they were added.
    checks: Mutex<Vec<Arc<Entry>>>,
    /// Counts the changes.
    version: AtomicU64,
    changed: Notify,
    /// The process stops: who watches is told no more.
    ended: AtomicBool,
}

/// One check, as the registry has it.
pub(super) struct Entry {
    name: Box<str>,
    state: AtomicU8,
    degrading: AtomicBool,
    /// A look whose result is not there by then hangs, and takes its runtime along.
    overdue_at: AtomicU64,
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
    /// Why the last look failed, if it did and if that was said.
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

impl Health {
    /// A registry without any checks: ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check that is asked in the background, on its own schedule, from now on: see [`Check`].
    ///
    /// It goes with the last clone of this registry, its endpoints and its reporters, or when it is
    /// [removed](Self::remove). What the check itself holds must not be a clone of this registry: neither would
    /// ever go.
    ///
    /// # Errors
    ///
    /// A setting of the check's that cannot work, a name as for [`reporter`](Self::reporter), or no Tokio runtime
    /// to ask it in.
    pub fn add(&self, check: Check) -> Result<(), ConfigError> {
        check.start(self)
    }

    /// Takes out a check that was [added](Self::add), and ends its asking at once; `false` if there is none of
    /// this name. A reporter's check stays.
    pub fn remove(&self, name: &str) -> bool {
        let found = {
            let checks = self.0.lock();
            let mut added = checks.iter().filter(|entry| entry.runner.get().is_some());
            added.find(|entry| *entry.name == *name).cloned()
        };
        if let Some(entry) = &found {
            self.0.remove(entry);
        }
        found.is_some()
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
        Ok(Reporter::new(self.0.clone(), self.0.enter(name)?))
    }

    /// Whether no critical check fails or is still unknown.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status() != HealthStatus::Fail
    }

    /// What all checks come to.
    #[must_use]
    pub fn status(&self) -> HealthStatus {
        let worst = self.0.lock().iter().map(|entry| entry.status()).max();
        worst.unwrap_or(HealthStatus::Pass)
    }

    /// All checks, in the order they were added.
    #[must_use]
    pub fn checks(&self) -> Vec<(String, CheckState)> {
        self.0.lock().iter().map(|entry| (entry.name.to_string(), entry.state())).collect()
    }

    /// The state of one check, if there is one of this name.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<CheckState> {
        self.find(name, Entry::state)
    }

    /// All there is to know at this moment, in the order the checks were added.
    #[must_use]
    pub fn snapshot(&self) -> Vec<CheckSnapshot> {
        self.0.lock().iter().map(|entry| entry.snapshot()).collect()
    }

    /// Waits until a check changes, comes or goes, and tells whether the process is ready then. Dropping the
    /// future is harmless.
    pub async fn changed(&self) -> bool {
        let before = self.version();
        self.changed_since(before).await;
        self.is_ready()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.0.ended.load(Ordering::Acquire)
    }

    pub(super) fn version(&self) -> u64 {
        self.0.version.load(Ordering::Acquire)
    }

    pub(super) async fn changed_since(&self, before: u64) {
        loop {
            let mut notified = pin!(self.0.changed.notified());
            // From here on no change is missed.
            notified.as_mut().enable();
            if self.version() != before {
                return;
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
    /// its own, or for routes.
    #[must_use]
    pub fn service(&self) -> HealthService {
        HealthService::new(self.clone())
    }

    pub(super) fn one(&self, name: &str) -> Option<CheckSnapshot> {
        self.find(name, Entry::snapshot)
    }

    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.0
    }

    /// Under the lock: who has a clone seems to report.
    fn find<T>(&self, name: &str, see: impl FnOnce(&Entry) -> T) -> Option<T> {
        self.0.lock().iter().find(|entry| *entry.name == *name).map(|entry| see(entry))
    }
}

pub(super) fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        // Nothing of a user's runs under it; were it poisoned, the list is still whole.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.tell();
    }

    pub(super) fn enter(&self, name: &str) -> Result<Arc<Entry>, ConfigError> {
        if !is_name(name) {
            // What is far too long need not be repeated.
            let shown: String = name.chars().take(LONGEST_NAME + 1).collect();
            let remedy = "use 1 to 64 of `A`-`Z`, `a`-`z`, `0`-`9`, `.`, `_` and `-`";
            return Err(ConfigError::new("check.name", shown, remedy));
        }
        let mut checks = self.lock();
        if let Some(at) = checks.iter().position(|entry| *entry.name == *name) {
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
        let entry = Arc::new(Entry::new(name));
        checks.push(entry.clone());
        drop(checks);
        self.tell();
        Ok(entry)
    }

    pub(super) fn remove(&self, entry: &Arc<Entry>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, entry));
        entry.stop();
        self.tell();
    }
}

impl Drop for Registry {
    /// Nobody is left who could ask.
    fn drop(&mut self) {
        for entry in &*self.lock() {
            entry.stop();
        }
    }
}

impl Entry {
    fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            state: AtomicU8::new(CheckState::Unknown as u8),
            degrading: AtomicBool::new(false),
            overdue_at: AtomicU64::new(Nanos::MAX),
            seen: Mutex::new(None),
            runner: OnceLock::new(),
            clock: Clock::new(),
        }
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

    fn stop(&self) {
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

    /// When the next look is due, nothing is overdue before.
    pub(super) fn rests(&self, wait: Duration, patience: Nanos) {
        self.looks(nanos(wait).saturating_add(patience));
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

    fn is_overdue(&self) -> bool {
        let due = self.overdue_at.load(Ordering::Acquire);
        // Most are not asked in the background: they cost no look at the clock.
        due != Nanos::MAX && self.clock.now() > due
    }

    fn status(&self) -> HealthStatus {
        match (self.state(), self.degrading.load(Ordering::Acquire)) {
            (CheckState::Pass, _) => HealthStatus::Pass,
            (_, true) => HealthStatus::Warn,
            (_, false) => HealthStatus::Fail,
        }
    }

    fn snapshot(&self) -> CheckSnapshot {
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

/// One line of printable characters, not too long.
fn reason(said: String) -> Option<Arc<str>> {
    let mut end = said.len().min(LONGEST_REASON);
    while !said.is_char_boundary(end) {
        end -= 1;
    }
    let line: String = said[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let line = line.trim();
    (!line.is_empty()).then(|| line.into())
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checks = self.checks();
        f.debug_map().entries(checks.iter().map(|(name, state)| (name, state))).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

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
    fn reasons_are_one_short_line() {
        assert_eq!(reason(" \n ".into()), None);
        assert_eq!(reason("no\r\nroute\u{1b}[1m ".into()).as_deref(), Some("no  route [1m"));
        assert_eq!(reason("ä".repeat(200)).map(|line| line.len()), Some(LONGEST_REASON));
        assert_eq!(reason("a".to_owned() + &"ä".repeat(200)).map(|line| line.len()), Some(255));
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_blocks_its_thread_has_failed_once_it_is_overdue() {
        let (health, second) = (Health::new(), Duration::from_secs(1));
        let entry = health.0.enter("db").unwrap();
        entry.publish(CheckState::Pass);
        entry.looks(nanos(6 * second));
        tokio::time::advance(6 * second).await;
        assert!(health.is_ready());
        tokio::time::advance(second / 1000).await;
        assert_eq!((health.is_ready(), health.check("db")), (false, Some(CheckState::Fail)));
        let seen = health.snapshot().remove(0);
        assert_eq!((seen.state, seen.healthy), (CheckState::Fail, Some(false)));
        assert_eq!(seen.reason.as_deref(), Some("gives no result any more"));
        // It came back after all.
        entry.looked(Ok(()), Some(7 * second));
        entry.rests(5 * second, nanos(6 * second));
        tokio::time::advance(11 * second).await;
        assert!(health.is_ready());
        tokio::time::advance(second).await;
        assert!(!health.is_ready());
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
    fn what_degrades_warns_and_no_more() {
        let health = Health::new();
        let search = health.reporter("search").unwrap().degrading();
        assert_eq!((health.status(), health.is_ready()), (HealthStatus::Warn, true));
        search.fail_because("slow today");
        assert_eq!(health.status(), HealthStatus::Warn);
        let seen = health.snapshot().remove(0);
        assert_eq!(
            (seen.critical, seen.healthy, seen.status()),
            (false, Some(false), HealthStatus::Warn)
        );
        assert_eq!(seen.reason.as_deref(), Some("slow today"));
        search.pass();
        assert_eq!(health.status(), HealthStatus::Pass);
        let _db = health.reporter("db").unwrap();
        assert_eq!(health.status(), HealthStatus::Fail);
    }

    #[test]
    fn a_name_is_given_once() {
        let health = Health::new();
        let first = health.reporter("db").unwrap();
        let error = health.reporter("db").unwrap_err();
        assert_eq!((error.field, &*error.value), ("check.name", "\"db\""));
        assert!(!health.remove("db"), "a reporter's check stays");
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
