//! Checks that the registry runs in the background: one task for each check, one run at a time.

use std::{
    fmt,
    future::{Future, ready},
    pin::Pin,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep, timeout_at},
};

use super::{
    catch_panic::CatchPanic,
    entry::{CheckEntry, CheckState, MAX_REASON},
    registry::{CheckRegistry, Health},
    schedule::{Schedule, checked_jitter, checked_thresholds},
    threshold::Threshold,
};
use crate::{
    error::ConfigError,
    event::{event, ms},
    fault::Fault,
    indicator::Indicator,
    outcome::LayerKind,
    redact,
    time::Nanos,
    user_code::catch_panic,
};

impl Health {
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
    pub fn add(&self, mut check: Check) -> Result<(), ConfigError> {
        if let Some(error) = check.fault.take() {
            return Err(error);
        }
        let Ok(runtime) = Handle::try_current() else {
            let remedy = "add it inside a Tokio runtime, which runs it";
            return Err(ConfigError::new("check", redact::Value(&check.name), remedy));
        };
        let registry = self.registry();
        let entry = registry.add_entry(&check.name)?;
        if check.degrading {
            entry.set_degrading();
            registry.notify();
        }
        let (rise, fall) = check.thresholds;
        let runner = CheckRunner {
            registry: Arc::downgrade(registry),
            entry: entry.clone(),
            make: check.make,
            schedule: check.schedule,
            threshold: Threshold::new(rise, fall),
            failed_at: None,
        };
        entry.set_task(runtime.spawn(runner.run()).abort_handle());
        Ok(())
    }
}

type CheckFuture = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// A check that a [`Health`] registry runs in the background. The endpoints report its last result.
///
/// The first run begins at once, and each later one `every` after the end of the previous one. Runs never overlap. A
/// run that takes longer than `timeout`, or panics, fails.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), buttress::ConfigError> {
/// use std::{io, time::Duration};
/// use buttress::{Health, health::Check};
///
/// async fn ping() -> io::Result<()> { Ok(()) }
///
/// let health = Health::new();
/// health.add(Check::new("db", ping))?;
/// health.add(Check::new("search", || async { ping().await }).degrading().every(Duration::from_secs(30)))?;
/// # Ok(()) }
/// ```
#[must_use = "a check does nothing until it is added to a registry"]
pub struct Check {
    name: String,
    make: Box<dyn FnMut() -> CheckFuture + Send>,
    degrading: bool,
    schedule: Schedule,
    thresholds: (u32, u32),
    fault: Fault,
}

impl Check {
    /// Returns a check by a closure that makes a future for each run. The text of its error becomes the reason, with a
    /// maximum of 256 bytes and without [secrets](crate#secrets).
    ///
    /// A run that exceeds the timeout is dropped. A run must not block its thread, because it could not be dropped
    /// then. Such a check fails when its result is overdue: after the sum of `timeout` and `every` (1 s if `every` is
    /// shorter).
    pub fn new<F, Fut, E>(name: &str, mut make: F) -> Self
    where
        F: FnMut() -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display,
    {
        let make = move || -> CheckFuture {
            let run = make();
            Box::pin(async move { run.await.map_err(|error| redact::display(&error, MAX_REASON)) })
        };
        Self {
            name: name.to_owned(),
            make: Box::new(make),
            degrading: false,
            schedule: Schedule::DEFAULT,
            thresholds: (1, 3),
            fault: Fault::default(),
        }
    }

    /// Returns a check of an indicator, which reports its state without waiting.
    ///
    /// An indicator is a closure, or the handle of a layer. The handle of a circuit breaker passes unless the circuit
    /// is open, that of a concurrency limit unless the limit is full, and that of a health probe while its gate is up.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), buttress::ConfigError> {
    /// use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, Health, health::Check};
    ///
    /// let health = Health::new();
    /// let (breaker, limit) = (CircuitBreakerLayer::http(), ConcurrencyLimitLayer::new(100));
    /// health.add(Check::watch("search", breaker.handle()).degrading())?;
    /// let room = limit.handle();
    /// health.add(Check::watch("queue", move || match room.snapshot().waiting {
    ///     0..50 => Ok(()),
    ///     waiting => Err(format!("{waiting} are waiting")),
    /// }))?;
    /// # Ok(()) }
    /// ```
    pub fn watch(name: &str, indicator: impl Indicator) -> Self {
        Self::new(name, move || ready(indicator.indicate()))
    }

    /// Makes the check degrading: while it fails, the process is degraded but remains ready. By default a check is
    /// critical.
    pub fn degrading(mut self) -> Self {
        self.degrading = true;
        self
    }

    /// Sets the delay from the end of one run to the start of the next: 5 s by default, above zero.
    pub fn every(mut self, delay: Duration) -> Self {
        if let Some(delay) = self.fault.accept(ConfigError::above_zero("every", delay)) {
            self.schedule.every = delay;
        }
        self
    }

    /// Sets another [`every`](Self::every) from the first failed run until the check passes and a run has passed: equal
    /// to `every` by default, above zero.
    pub fn every_while_down(mut self, delay: Duration) -> Self {
        if let Some(delay) = self.fault.accept(ConfigError::above_zero("every_while_down", delay)) {
            self.schedule.every_while_down = Some(delay);
        }
        self
    }

    /// Sets the maximum random extension of a delay, as a share of the delay: 0.1 by default, from 0 to 1.
    pub fn jitter(mut self, ratio: f64) -> Self {
        if let Some(ratio) = self.fault.accept(checked_jitter(ratio)) {
            self.schedule.jitter = ratio;
        }
        self
    }

    /// Sets the timeout of a run: 1 s by default, above zero.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        if let Some(timeout) = self.fault.accept(ConfigError::above_zero("timeout", timeout)) {
            self.schedule.timeout = timeout;
        }
        self
    }

    /// Sets the number of consecutive runs that must pass before a failed check passes again (1 by default), and the
    /// number that must fail before it fails (3 by default), each 1 or more.
    ///
    /// While the state is unknown, one success is sufficient.
    pub fn thresholds(mut self, rise: u32, fall: u32) -> Self {
        if let Some(thresholds) = self.fault.accept(checked_thresholds(rise, fall)) {
            self.thresholds = thresholds;
        }
        self
    }
}

/// A run of a check that failed.
struct FailedCheck {
    /// The cause: `error`, `timeout` or `panicked`.
    reason: &'static str,
    why: String,
}

/// The task of a check. It owns no reference to the registry, so that it ends with the registry.
struct CheckRunner {
    registry: Weak<CheckRegistry>,
    entry: Arc<CheckEntry>,
    make: Box<dyn FnMut() -> CheckFuture + Send>,
    schedule: Schedule,
    threshold: Threshold,
    /// The time since which the check fails.
    failed_at: Option<Instant>,
}

impl CheckRunner {
    async fn run(mut self) {
        let max_run_time = self.schedule.max_run_time();
        loop {
            self.entry.start_check(max_run_time);
            let began = Instant::now();
            let result = self.run_once().await;
            let took = Instant::now().saturating_duration_since(began);
            let failed = result.is_err();
            let change = self.threshold.record(!failed);
            if change.is_some() {
                // A panic of the subscriber does not end the checks.
                let _ = catch_panic(|| self.notify_of(&result));
            }
            let delay = self.schedule.delay(self.threshold.state(), failed);
            self.entry.record(result.map_err(|failed| failed.why), Some(took));
            let was_overdue = self.entry.schedule_next(delay, max_run_time);
            let changed = change.is_some_and(|to| self.entry.publish(CheckState::of(to)));
            if changed || was_overdue {
                self.notify();
            }
            sleep(delay).await;
        }
    }

    /// Emits the event of a change of the state.
    fn notify_of(&mut self, result: &Result<(), FailedCheck>) {
        let (layer, name) = (LayerKind::HealthCheck.as_str(), self.entry.name());
        match result {
            Err(FailedCheck { reason, why }) => {
                self.failed_at = Some(Instant::now());
                let is_critical = self.entry.is_critical();
                event!(
                    health,
                    WARN,
                    layer,
                    name,
                    reason = *reason,
                    why = why.as_str(),
                    critical = is_critical,
                    "check failed",
                );
            }
            Ok(()) => {
                let down = self.failed_at.take().map(|since| since.elapsed());
                event!(health, INFO, layer, name, down_ms = down.map(ms), "check passed");
            }
        }
    }

    async fn run_once(&mut self) -> Result<(), FailedCheck> {
        let timeout = self.schedule.timeout;
        let deadline = Schedule::deadline(timeout);
        let make = &mut self.make;
        let run = CatchPanic::new(move || {
            let run = make();
            async move { timeout_at(deadline, run).await }
        });
        match run.await {
            Ok(Ok(result)) => result.map_err(|why| FailedCheck { reason: "error", why }),
            Ok(Err(_)) => {
                let why = format!("no result within {timeout:?}");
                Err(FailedCheck { reason: "timeout", why })
            }
            Err(_) => Err(FailedCheck { reason: "panicked", why: "panicked".to_owned() }),
        }
    }

    fn notify(&self) {
        if let Some(registry) = self.registry.upgrade() {
            registry.notify_of(&self.entry);
        }
    }
}

impl Drop for CheckRunner {
    /// Makes the check fail if it is still in the registry: its runtime has ended, or has no timers.
    fn drop(&mut self) {
        self.entry.record(Err("its task has ended".into()), None);
        self.entry.start_check(Nanos::MAX);
        if self.entry.publish(CheckState::Fail) {
            self.notify();
        }
    }
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check")
            .field("name", &redact::Value(&self.name))
            .field("degrading", &self.degrading)
            .field("schedule", &self.schedule)
            .field("thresholds", &self.thresholds)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
