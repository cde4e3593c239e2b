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
    catch_panic::Caught,
    entry::{CheckState, Entry, MAX_REASON},
    registry::{Health, Registry},
    schedule::{Schedule, checked_jitter, checked_thresholds},
    threshold::Threshold,
};
use crate::{error::ConfigError, event::event, indicator::Indicator, redact, time::Nanos};

type Look = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

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
    ask: Box<dyn FnMut() -> Look + Send>,
    degrading: bool,
    schedule: Schedule,
    thresholds: (u32, u32),
    fault: Option<ConfigError>,
}

impl Check {
    /// Returns a check by a closure that makes a future for each run. The text of its error becomes the reason, with a
    /// maximum of 256 bytes and without [secrets](crate#secrets).
    ///
    /// A run that exceeds the timeout is dropped. A run must not block its thread, because it could not be dropped
    /// then. Such a check fails when its result is overdue: after the sum of `timeout` and `every` (1 s if `every` is
    /// shorter).
    pub fn new<F, Fut, E>(name: &str, mut ask: F) -> Self
    where
        F: FnMut() -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display,
    {
        let ask = move || -> Look {
            let look = ask();
            Box::pin(async move { look.await.map_err(|why| redact::display(&why, MAX_REASON)) })
        };
        Self {
            name: name.to_owned(),
            ask: Box::new(ask),
            degrading: false,
            schedule: Schedule::DEFAULT,
            thresholds: (1, 3),
            fault: None,
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
    pub fn watch(name: &str, what: impl Indicator) -> Self {
        Self::new(name, move || ready(what.indicate()))
    }

    /// Makes the check degrading: while it fails, the process is degraded but remains ready. By default a check is
    /// critical.
    pub fn degrading(mut self) -> Self {
        self.degrading = true;
        self
    }

    /// Sets the delay from the end of one run to the start of the next: 5 s by default, above zero.
    pub fn every(mut self, wait: Duration) -> Self {
        if let Some(wait) = self.accept(ConfigError::above_zero("every", wait)) {
            self.schedule.every = wait;
        }
        self
    }

    /// Sets another [`every`](Self::every) from the first failed run until the check passes and a run has passed: equal
    /// to `every` by default, above zero.
    pub fn every_while_down(mut self, wait: Duration) -> Self {
        if let Some(wait) = self.accept(ConfigError::above_zero("every_while_down", wait)) {
            self.schedule.every_while_down = Some(wait);
        }
        self
    }

    /// Sets the maximum random extension of a delay, as a share of the delay: 0.1 by default, from 0 to 1.
    pub fn jitter(mut self, ratio: f64) -> Self {
        if let Some(ratio) = self.accept(checked_jitter(ratio)) {
            self.schedule.jitter = ratio;
        }
        self
    }

    /// Sets the timeout of a run: 1 s by default, above zero.
    pub fn timeout(mut self, longest: Duration) -> Self {
        if let Some(longest) = self.accept(ConfigError::above_zero("timeout", longest)) {
            self.schedule.timeout = longest;
        }
        self
    }

    /// Sets the number of consecutive runs that must pass before a failed check passes again (1 by default), and the
    /// number that must fail before it fails (3 by default), each 1 or more.
    ///
    /// While the state is unknown, one success is sufficient.
    pub fn thresholds(mut self, rise: u32, fall: u32) -> Self {
        if let Some(thresholds) = self.accept(checked_thresholds(rise, fall)) {
            self.thresholds = thresholds;
        }
        self
    }

    /// Returns a valid setting, and stores the first fault.
    fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        setting.map_err(|fault| self.fault.get_or_insert(fault).clone()).ok()
    }

    pub(super) fn start(self, health: &Health) -> Result<(), ConfigError> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let Ok(runtime) = Handle::try_current() else {
            let remedy = "add it inside a Tokio runtime, which runs it";
            return Err(ConfigError::new("check", redact::Value(&self.name), remedy));
        };
        let registry = health.registry();
        let entry = registry.enter(&self.name)?;
        if self.degrading {
            entry.degrades();
            registry.tell();
        }
        let (rise, fall) = self.thresholds;
        let runner = Runner {
            registry: Arc::downgrade(registry),
            entry: entry.clone(),
            ask: self.ask,
            schedule: self.schedule,
            threshold: Threshold::new(rise, fall),
        };
        entry.runs_as(runtime.spawn(runner.run()).abort_handle());
        Ok(())
    }
}

/// The task of a check. It owns no reference to the registry, so that it ends with the registry.
struct Runner {
    registry: Weak<Registry>,
    entry: Arc<Entry>,
    ask: Box<dyn FnMut() -> Look + Send>,
    schedule: Schedule,
    threshold: Threshold,
}

impl Runner {
    async fn run(mut self) {
        let patience = self.schedule.patience();
        loop {
            self.entry.looks(patience);
            let began = Instant::now();
            let result = self.look().await;
            let took = Instant::now().saturating_duration_since(began);
            let failed = result.is_err();
            let change = self.threshold.told(!failed);
            if let (Some(_), Err(why)) = (change, &result) {
                event!(health, WARN, check = self.entry.name(), reason = &**why, "check failed");
                let _ = why;
            } else if change.is_some() {
                event!(health, INFO, check = self.entry.name(), "check passed");
            }
            let wait = self.schedule.wait(self.threshold.state(), failed);
            self.entry.looked(result, Some(took));
            let late = self.entry.rests(wait, patience);
            let changed = change.is_some_and(|to| self.entry.publish(CheckState::of(to)));
            if changed || late {
                self.tell();
            }
            sleep(wait).await;
        }
    }

    async fn look(&mut self) -> Result<(), String> {
        let timeout = self.schedule.timeout;
        let deadline = Schedule::deadline(timeout);
        let ask = &mut self.ask;
        let look = Caught::new(move || {
            let look = ask();
            async move { timeout_at(deadline, look).await }
        });
        match look.await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(format!("no result within {timeout:?}")),
            Err(_) => Err("panicked".to_owned()),
        }
    }

    fn tell(&self) {
        if let Some(registry) = self.registry.upgrade() {
            registry.tell();
        }
    }
}

impl Drop for Runner {
    /// Makes the check fail if it is still in the registry: its runtime has ended, or has no timers.
    fn drop(&mut self) {
        self.entry.looked(Err("is not asked any more".into()), None);
        self.entry.looks(Nanos::MAX);
        if self.entry.publish(CheckState::Fail) {
            self.tell();
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
