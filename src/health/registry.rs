use std::{
    fmt, mem,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};

use super::{
    check::Check,
    endpoints::{HealthEndpointsLayer, HealthService},
    entry::{CheckSnapshot, CheckState, Entry, HealthStatus},
    reporter::Reporter,
};
use crate::{ConfigError, redact};

/// Names longer than this are no names any more.
const LONGEST_NAME: usize = 64;
/// Checks are made by code, not by requests; still, there is an end to them.
const MOST_CHECKS: usize = 1000;

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
            let mut added = checks.iter().filter(|entry| entry.runs());
            added.find(|entry| entry.name() == name).cloned()
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
        self.0.lock().iter().map(|entry| (entry.name().to_owned(), entry.state())).collect()
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
            let overdue_in = self.0.look_at_the_clock();
            if self.version() != before {
                return;
            }
            match overdue_in {
                None => notified.await,
                // Who hangs says nothing: whoever watches has to look.
                Some(left) => {
                    let _ = timeout(left, notified).await;
                }
            }
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
        self.0.lock().iter().find(|entry| entry.name() == name).map(|entry| see(entry))
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

    /// Tells of what has become overdue. In what time more will be, if it may.
    fn look_at_the_clock(&self) -> Option<Duration> {
        let checks = self.lock();
        let turned = checks.iter().filter(|entry| entry.turns_overdue()).count() > 0;
        let next = checks.iter().filter_map(|entry| entry.overdue_in()).min();
        drop(checks);
        if turned {
            self.tell();
        }
        next
    }

    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.tell();
    }

    pub(super) fn enter(&self, name: &str) -> Result<Arc<Entry>, ConfigError> {
        if !is_name(name) {
            let remedy = "use 1 to 64 of `A`-`Z`, `a`-`z`, `0`-`9`, `.`, `_` and `-`";
            return Err(ConfigError::new("check.name", redact::Value(name), remedy));
        }
        // Declared before the guard: an entry is dropped without the lock.
        let _removed;
        let mut checks = self.lock();
        if let Some(at) = checks.iter().position(|entry| entry.name() == name) {
            // Only this list has it: its reporter is gone.
            if Arc::strong_count(&checks[at]) > 1 {
                let remedy = "another check has this name: give this one a name of its own";
                return Err(ConfigError::new("check.name", name, remedy));
            }
            _removed = checks.remove(at);
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
        let checks = mem::take(&mut *self.lock());
        for entry in checks {
            entry.stop();
        }
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checks = self.checks();
        f.debug_map().entries(checks.iter().map(|(name, state)| (name, state))).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::{task::Poll, thread};

    use super::*;
    use crate::call::nanos;

    #[test]
    fn names() {
        for good in ["a", "search-1.eu_West", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", " ", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_that_blocks_its_thread_has_failed_once_it_is_overdue() {
        let (health, second) = (Health::new(), Duration::from_secs(1));
        let entry = health.0.enter("db").unwrap();
        entry.publish(CheckState::Pass);
        entry.looks(nanos(6 * second));
        let mut watching = tokio_test::task::spawn(health.changed());
        assert!(watching.poll().is_pending());
        tokio::time::advance(6 * second).await;
        assert!(health.is_ready() && watching.poll().is_pending());
        tokio::time::advance(second / 1000).await;
        assert_eq!(watching.poll(), Poll::Ready(false));
        assert_eq!((health.is_ready(), health.check("db")), (false, Some(CheckState::Fail)));
        let seen = health.snapshot().remove(0);
        assert_eq!((seen.state, seen.healthy), (CheckState::Fail, Some(false)));
        assert_eq!(seen.reason.as_deref(), Some("gives no result any more"));
        // It came back after all.
        entry.looked(Ok(()), Some(7 * second));
        assert!(entry.rests(5 * second, nanos(6 * second)), "who watches is told");
        assert!(!entry.rests(5 * second, nanos(6 * second)));
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
