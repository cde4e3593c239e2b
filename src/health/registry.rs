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
use crate::{error::ConfigError, redact};

/// Maximum length of the name of a check in bytes.
const LONGEST_NAME: usize = 64;
/// Maximum number of checks of a registry. Code adds checks, not requests, so the limit only stops a faulty loop.
const MOST_CHECKS: usize = 1000;

/// The health registry of a process: named checks, and the endpoints that report them.
///
/// Clones share the checks. The process is ready while no critical check fails or is unknown, so it is also ready
/// without checks. Liveness does not depend on the checks.
#[derive(Clone, Default)]
pub struct Health(Arc<Registry>);

#[derive(Default)]
pub(super) struct Registry {
    /// In the order in which they were added.
    checks: Mutex<Vec<Arc<Entry>>>,
    /// The number of changes.
    version: AtomicU64,
    /// Notifies the watchers after each change of the version.
    changed: Notify,
    /// The process stops, so `Watch` streams end.
    ended: AtomicBool,
}

impl Health {
    /// Returns a registry without checks. It is ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check, and runs it in the background on its own schedule from now on: see [`Check`].
    ///
    /// The check ends when it is [removed](Self::remove), or when the last clone of this registry, its last endpoint
    /// and its last reporter are dropped. The check must not own a clone of this registry: then neither is ever
    /// dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if a setting of the check is invalid, if its name is rejected as by
    /// [`reporter`](Self::reporter), or if there is no Tokio runtime.
    pub fn add(&self, check: Check) -> Result<(), ConfigError> {
        check.start(self)
    }

    /// Removes a check that was [added](Self::add), and aborts its task at once. Returns `false` if there is no such
    /// check. The check of a [reporter](Self::reporter) is not removed.
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

    /// Adds a check, and returns the reporter that sets its state. The state is unknown until then.
    ///
    /// The check is removed when the last clone of its reporter is dropped. If a panic drops this clone, the check
    /// remains and fails, until a new check with this name replaces it.
    ///
    /// # Errors
    ///
    /// Returns an error if the name does not consist of 1 to 64 of the characters `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_`
    /// and `-`, if another check has this name, or if the registry has 1000 checks.
    pub fn reporter(&self, name: &str) -> Result<Reporter, ConfigError> {
        Ok(Reporter::new(self.0.clone(), self.0.enter(name)?))
    }

    /// Returns whether the process is ready: no critical check fails or is unknown.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status() != HealthStatus::Fail
    }

    /// Returns the status of the process: the worst [status](CheckSnapshot::status) of its checks, `Pass` without
    /// checks.
    #[must_use]
    pub fn status(&self) -> HealthStatus {
        let worst = self.0.lock().iter().map(|entry| entry.status()).max();
        worst.unwrap_or(HealthStatus::Pass)
    }

    /// Returns the names and states of all checks, in the order in which they were added.
    #[must_use]
    pub fn checks(&self) -> Vec<(String, CheckState)> {
        self.0.lock().iter().map(|entry| (entry.name().to_owned(), entry.state())).collect()
    }

    /// Returns the state of the check with this name, if there is one.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<CheckState> {
        self.find(name, Entry::state)
    }

    /// Returns snapshots of all checks, in the order in which they were added.
    #[must_use]
    pub fn snapshot(&self) -> Vec<CheckSnapshot> {
        self.0.lock().iter().map(|entry| entry.snapshot()).collect()
    }

    /// Waits until a check changes, is added or is removed, and returns whether the process is then ready. Cancel safe.
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

    /// Waits until the version differs from `before`.
    pub(super) async fn changed_since(&self, before: u64) {
        loop {
            let mut notified = pin!(self.0.changed.notified());
            // Registered before the version is read, so that no later change is missed.
            notified.as_mut().enable();
            let overdue_in = self.0.look_at_the_clock();
            if self.version() != before {
                return;
            }
            match overdue_in {
                None => notified.await,
                // A check that hangs does not report a change, so the watcher reads the clock when it becomes overdue.
                Some(left) => {
                    let _ = timeout(left, notified).await;
                }
            }
        }
    }

    /// Returns a layer that serves `/livez`, `/readyz` and `/healthz` without a call of the wrapped service. It should
    /// be the outermost layer. See the [module](super).
    pub fn endpoints(&self) -> HealthEndpointsLayer {
        HealthEndpointsLayer::new(self.clone())
    }

    /// Returns a service that serves `/livez`, `/readyz` and `/healthz`, and responds with 404 to other paths. For a
    /// separate port, or for routes.
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

    /// Applies a closure to the check with this name, under the lock.
    ///
    /// The closure borrows the entry. A clone of its `Arc` would make the entry look as if its reporter were alive: see
    /// [`Registry::enter`].
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
        // No user code runs under this lock. A poisoned lock is used as it is: the list is never left half changed.
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Increments the version and notifies the watchers. It runs wakers, so no lock may be held.
    pub(super) fn tell(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    /// Notifies the watchers if a check has become overdue. Returns the time until the next check becomes overdue, or
    /// `None` if no check can.
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

    /// Ends all `Watch` streams, because the process stops.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.tell();
    }

    /// Adds an entry with this name, in place of an abandoned entry with the same name.
    ///
    /// An entry is abandoned if only this list owns it: its reporter or its task is gone. Therefore only reporters and
    /// tasks may own a clone of an entry's `Arc` ([`Health::remove`] does for the moment of the removal).
    pub(super) fn enter(&self, name: &str) -> Result<Arc<Entry>, ConfigError> {
        if !is_name(name) {
            let remedy = "use 1 to 64 of `A`-`Z`, `a`-`z`, `0`-`9`, `.`, `_` and `-`";
            return Err(ConfigError::new("check.name", redact::Value(name), remedy));
        }
        // Declared before the lock guard, so that the removed entry is dropped after the lock is released.
        let _removed;
        let mut checks = self.lock();
        if let Some(at) = checks.iter().position(|entry| entry.name() == name) {
            // A count of 1 is this list: the entry is abandoned.
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
    /// Aborts the tasks of all checks, because no handle is left that could read their results.
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
    use crate::time::nanos;

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
        // The run ends after all.
        entry.looked(Ok(()), Some(7 * second));
        assert!(entry.rests(5 * second, nanos(6 * second)), "watchers are notified");
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
