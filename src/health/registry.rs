use std::{
    fmt, mem,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::timeout};

use super::entry::{CheckEntry, CheckSnapshot, CheckState, HealthStatus};
use crate::{
    error::ConfigError,
    redact,
    report::{ReportCell, StateChange},
    sync::Mutex,
};

/// Maximum length of the name of a check in bytes.
const MAX_NAME_LENGTH: usize = 64;
/// Maximum number of checks of a registry. Code adds checks, not requests, so the limit only stops a faulty loop.
const MAX_CHECKS: usize = 1000;

/// The health registry of a process: named checks, and the endpoints that report them.
///
/// Clones share the checks. The process is ready while no critical check fails or is unknown, so it is also ready
/// without checks. Liveness does not depend on the checks.
#[derive(Clone, Default)]
pub struct Health(Arc<CheckRegistry>);

#[derive(Default)]
pub(super) struct CheckRegistry {
    /// In the order in which they were added. No user code runs under this lock.
    checks: Mutex<Vec<Arc<CheckEntry>>>,
    /// The number of changes.
    version: AtomicU64,
    /// Notifies the watchers after each change of the version.
    changed: Notify,
    /// The process stops, so `Watch` streams end.
    ended: AtomicBool,
    /// The observing registries that receive the changes of the checks.
    pub(super) reports: ReportCell,
}

impl Health {
    /// Returns a registry without checks. It is ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes a check that was [added](Self::add), and aborts its task at once. Returns `false` if there is no such
    /// check. The check of a [reporter](Self::reporter) is not removed.
    pub fn remove(&self, name: &str) -> bool {
        let found = {
            let checks = self.0.checks.lock();
            let mut added = checks.iter().filter(|entry| entry.has_task());
            added.find(|entry| entry.name() == name).cloned()
        };
        if let Some(entry) = &found {
            self.0.remove(entry);
        }
        found.is_some()
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
        let worst = self.0.checks.lock().iter().map(|entry| entry.status()).max();
        worst.unwrap_or(HealthStatus::Pass)
    }

    /// Returns the names and states of all checks, in the order in which they were added.
    #[must_use]
    pub fn checks(&self) -> Vec<(String, CheckState)> {
        self.0.checks.lock().iter().map(|entry| (entry.name().to_owned(), entry.state())).collect()
    }

    /// Returns the state of the check with this name, if there is one.
    #[must_use]
    pub fn check(&self, name: &str) -> Option<CheckState> {
        self.find(name, CheckEntry::state)
    }

    /// Returns snapshots of all checks, in the order in which they were added.
    #[must_use]
    pub fn snapshot(&self) -> Vec<CheckSnapshot> {
        self.0.checks.lock().iter().map(|entry| entry.snapshot()).collect()
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
            let overdue_in = self.0.check_overdue();
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

    pub(super) fn check_snapshot(&self, name: &str) -> Option<CheckSnapshot> {
        self.find(name, CheckEntry::snapshot)
    }

    pub(super) fn registry(&self) -> &Arc<CheckRegistry> {
        &self.0
    }

    /// Applies a closure to the check with this name, under the lock.
    ///
    /// The closure borrows the entry. A clone of its `Arc` would count as a reporter that is alive: see
    /// [`CheckRegistry::add_entry`].
    fn find<T>(&self, name: &str, read: impl FnOnce(&CheckEntry) -> T) -> Option<T> {
        self.0.checks.lock().iter().find(|entry| entry.name() == name).map(|entry| read(entry))
    }
}

pub(super) fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_LENGTH).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl CheckRegistry {
    /// Returns the name and the state of each check, and whether it is critical, in the order in which they were added.
    #[cfg(feature = "observe")]
    pub(super) fn states(&self) -> Vec<(String, CheckState, bool)> {
        // The names are copied without the lock.
        let checks = self.checks.lock().clone();
        let read =
            |entry: &Arc<CheckEntry>| (entry.name().to_owned(), entry.state(), entry.is_critical());
        checks.iter().map(read).collect()
    }

    /// Notifies the watchers of a change of this check, and reports it. It runs wakers, so no lock may be held.
    pub(super) fn notify_of(&self, entry: &CheckEntry) {
        self.notify();
        self.reports.report(|| StateChange {
            event: if entry.state() == CheckState::Pass { "check passed" } else { "check failed" },
            reason: None,
            why: entry.name().to_owned(),
        });
    }

    /// Increments the version and notifies the watchers. It runs wakers, so no lock may be held.
    pub(super) fn notify(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    /// Notifies the watchers if a check has become overdue. Returns the time until the next check becomes overdue, or
    /// `None` if no check can.
    fn check_overdue(&self) -> Option<Duration> {
        let checks = self.checks.lock();
        let is_changed = checks.iter().filter(|entry| entry.mark_overdue()).count() > 0;
        let next = checks.iter().filter_map(|entry| entry.overdue_in()).min();
        drop(checks);
        if is_changed {
            self.notify();
        }
        next
    }

    /// Ends all `Watch` streams, because the process stops.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.notify();
    }

    /// Adds an entry with this name, in place of an abandoned entry with the same name.
    ///
    /// An entry is abandoned if only this list owns it: its reporter or its task is gone. Therefore only reporters and
    /// tasks may own a clone of an entry's `Arc` ([`Health::remove`] does for the moment of the removal).
    pub(super) fn add_entry(&self, name: &str) -> Result<Arc<CheckEntry>, ConfigError> {
        if !is_name(name) {
            let remedy = "use 1 to 64 of `A`-`Z`, `a`-`z`, `0`-`9`, `.`, `_` and `-`";
            return Err(ConfigError::new("check.name", redact::Value(name), remedy));
        }
        // Declared before the lock guard, so that the removed entry is dropped after the lock is released.
        let _removed;
        let mut checks = self.checks.lock();
        if let Some(at) = checks.iter().position(|entry| entry.name() == name) {
            // A count of 1 is this list: the entry is abandoned.
            if Arc::strong_count(&checks[at]) > 1 {
                let remedy = "another check has this name: give this one a name of its own";
                return Err(ConfigError::new("check.name", name, remedy));
            }
            _removed = checks.remove(at);
        }
        if checks.len() >= MAX_CHECKS {
            return Err(ConfigError::new("check.name", name, "use at most 1000 checks"));
        }
        let entry = Arc::new(CheckEntry::new(name));
        checks.push(entry.clone());
        drop(checks);
        self.notify();
        Ok(entry)
    }

    pub(super) fn remove(&self, entry: &Arc<CheckEntry>) {
        self.checks.lock().retain(|other| !Arc::ptr_eq(other, entry));
        entry.stop();
        self.notify();
    }
}

impl Drop for CheckRegistry {
    /// Aborts the tasks of all checks, because no handle is left that could read their results.
    fn drop(&mut self) {
        let checks = mem::take(&mut *self.checks.lock());
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
    fn names_have_1_to_64_of_the_permitted_characters() {
        for good in ["a", "search-1.eu_West", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", " ", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn check_that_blocks_its_thread_fails_when_it_is_overdue() {
        let (health, second) = (Health::new(), Duration::from_secs(1));
        let entry = health.0.add_entry("db").unwrap();
        entry.publish(CheckState::Pass);
        entry.start_check(nanos(6 * second));
        let mut watching = tokio_test::task::spawn(health.changed());
        assert!(watching.poll().is_pending());
        tokio::time::advance(6 * second).await;
        assert!(health.is_ready() && watching.poll().is_pending());
        tokio::time::advance(second / 1000).await;
        assert_eq!(watching.poll(), Poll::Ready(false));
        assert_eq!((health.is_ready(), health.check("db")), (false, Some(CheckState::Fail)));
        let check = health.snapshot().remove(0);
        assert_eq!((check.state, check.healthy), (CheckState::Fail, Some(false)));
        assert_eq!(check.reason.as_deref(), Some("its run is overdue"));
        // The run ends after all.
        entry.record(Ok(()), Some(7 * second));
        assert!(entry.schedule_next(5 * second, nanos(6 * second)), "watchers are notified");
        assert!(!entry.schedule_next(5 * second, nanos(6 * second)));
        tokio::time::advance(11 * second).await;
        assert!(health.is_ready());
        tokio::time::advance(second).await;
        assert!(!health.is_ready());
    }

    #[test]
    fn process_is_ready_while_every_check_passes() {
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
    fn degrading_check_that_fails_leaves_the_process_ready() {
        let health = Health::new();
        let search = health.reporter("search").unwrap().degrading();
        assert_eq!((health.status(), health.is_ready()), (HealthStatus::Warn, true));
        search.fail_because("slow today");
        assert_eq!(health.status(), HealthStatus::Warn);
        let check = health.snapshot().remove(0);
        assert_eq!(
            (check.critical, check.healthy, check.status()),
            (false, Some(false), HealthStatus::Warn)
        );
        assert_eq!(check.reason.as_deref(), Some("slow today"));
        search.pass();
        assert_eq!(health.status(), HealthStatus::Pass);
        let _db = health.reporter("db").unwrap();
        assert_eq!(health.status(), HealthStatus::Fail);
    }

    #[test]
    fn name_of_an_existing_check_is_rejected() {
        let health = Health::new();
        let first = health.reporter("db").unwrap();
        let error = health.reporter("db").unwrap_err();
        assert_eq!((error.field, &*error.value), ("check.name", "\"db\""));
        assert!(!health.remove("db"), "a reporter's check stays");
        drop(first);
        assert!(health.reporter("db").is_ok());
    }

    #[test]
    fn panicked_reporter_leaves_a_failed_check_that_a_new_reporter_replaces() {
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
        assert_eq!(health.check("worker"), None, "removed with its second reporter");
    }
}
