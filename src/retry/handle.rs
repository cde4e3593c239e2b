use std::{sync::Arc, time::Duration};

use http::{Method, StatusCode};

use super::{
    overrides::{AttemptContext, Failure},
    policy::HintMode,
    settings::RetrySettings,
};
use crate::{
    attempt::{Backoff, DelaySource, FailureKind, SafeRequests},
    error::ConfigError,
    event::settings_changed,
    outcome::LayerKind,
};

/// A handle that reads the counts of a retry layer and changes its settings while it runs.
///
/// The setters have the values and the errors of the layer's setters. They also change the services that the layer has
/// built. A change applies to a call in flight from the end of its current attempt. Budget, name and protocol cannot
/// change.
#[derive(Clone, Debug)]
pub struct RetryHandle(pub(super) Arc<RetrySettings>);

/// A snapshot of a retry layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RetrySnapshot {
    /// The number of attempts that were not the first of their call, including transparent retries.
    pub retries: u64,
    /// The number of calls that ended with a [`GiveUpReason`](crate::attempt::GiveUpReason) other than `Answered` and
    /// `NotRetryable`.
    pub gave_up: u64,
    /// The number of retries of this layer that the budget denied.
    pub budget_denied: u64,
    /// The number of retries that the budget permits now. `None` without a budget.
    pub budget_balance: Option<f64>,
}

impl RetryHandle {
    /// Returns the current counts.
    #[must_use]
    pub fn snapshot(&self) -> RetrySnapshot {
        let [retries, gave_up, budget_denied] = self.0.counts();
        let budget = self.0.budget();
        RetrySnapshot {
            retries,
            gave_up,
            budget_denied,
            budget_balance: budget.as_ref().map(|budget| budget.balance()),
        }
    }

    // ===== Changes at run time =====

    /// Sets the maximum number of attempts, as [`attempts`](super::layer::RetryLayer::attempts) does.
    ///
    /// # Errors
    ///
    /// The number is zero.
    pub fn set_attempts(&self, attempts: u32) -> Result<(), ConfigError> {
        if attempts == 0 {
            return Err(ConfigError::new("attempts", attempts, "use 1 or more"));
        }
        self.0.set_unchecked(|policy| policy.attempts = attempts);
        self.report_setting("attempts");
        Ok(())
    }

    /// Sets the delays between attempts, as [`backoff`](super::layer::RetryLayer::backoff) does.
    ///
    /// # Errors
    ///
    /// The errors of [`Backoff::check`].
    pub fn set_backoff(&self, backoff: Backoff) -> Result<(), ConfigError> {
        backoff.check()?;
        self.0.set_unchecked(|policy| policy.delays = backoff.into());
        self.report_setting("backoff");
        Ok(())
    }

    /// Sets the delays as an iterator, as [`backoff_with`](super::layer::RetryLayer::backoff_with) does.
    pub fn set_backoff_with<I>(&self, start: impl Fn() -> I + Send + Sync + 'static)
    where
        I: Iterator<Item = Duration> + Send + 'static,
    {
        let start = Arc::new(move || Box::new(start()) as Box<_>);
        self.0.set_unchecked(|policy| policy.delays = DelaySource::Custom(start));
        self.report_setting("backoff_with");
    }

    /// Sets the maximum number of retries for one kind of failure, as
    /// [`max_retries_for`](super::layer::RetryLayer::max_retries_for) does. `None` is no maximum.
    ///
    /// # Errors
    ///
    /// The setting contradicts another one.
    pub fn set_max_retries_for(
        &self,
        kind: FailureKind,
        retries: impl Into<Option<u32>>,
    ) -> Result<(), ConfigError> {
        let retries = retries.into();
        self.0.try_set(|policy| policy.max_retries[kind as usize] = retries)?;
        self.report_setting("max_retries_for");
        Ok(())
    }

    /// Sets the maximum random delay above a hint, as [`hint_jitter`](super::layer::RetryLayer::hint_jitter) does.
    ///
    /// # Errors
    ///
    /// The share is not within 0 to 10.
    pub fn set_hint_jitter(&self, share: f64) -> Result<(), ConfigError> {
        if !(0.0..=10.0).contains(&share) {
            return Err(ConfigError::new("hint_jitter", share, "use 0 to 10, such as 0.5"));
        }
        self.0.set_unchecked(|policy| policy.hint = HintMode::Above { jitter: share });
        self.report_setting("hint_jitter");
        Ok(())
    }

    /// Sets the maximum time by which a hint lengthens the delay, as
    /// [`max_hint_extension`](super::layer::RetryLayer::max_hint_extension) does.
    pub fn set_max_hint_extension(&self, max: Duration) {
        self.0.set_unchecked(|policy| policy.hint = HintMode::Within(max));
        self.report_setting("max_hint_extension");
    }

    /// Sets the maximum delay before an attempt, as [`max_wait`](super::layer::RetryLayer::max_wait) does.
    pub fn set_max_wait(&self, wait: impl Into<Option<Duration>>) {
        let wait = wait.into();
        self.0.set_unchecked(|policy| policy.max_wait = wait);
        self.report_setting("max_wait");
    }

    /// Sets the minimum time for an attempt, as [`min_attempt_time`](super::layer::RetryLayer::min_attempt_time) does.
    pub fn set_min_attempt_time(&self, time: Duration) {
        self.0.set_unchecked(|policy| policy.min_attempt_time = time);
        self.report_setting("min_attempt_time");
    }

    /// Sets whether a rejection by an inner layer is retried, as
    /// [`wait_on_rejection`](super::layer::RetryLayer::wait_on_rejection) does.
    ///
    /// # Errors
    ///
    /// The setting contradicts another one.
    pub fn set_wait_on_rejection(&self, wait: bool) -> Result<(), ConfigError> {
        self.0.try_set(|policy| policy.wait_on_rejection = wait)?;
        self.report_setting("wait_on_rejection");
        Ok(())
    }

    /// Sets the maximum size of a saved request body, as
    /// [`max_replay_bytes`](super::layer::RetryLayer::max_replay_bytes) does. It applies to calls that begin later.
    pub fn set_max_replay_bytes(&self, bytes: u64) {
        self.0.set_max_replay_bytes(bytes);
        self.report_setting("max_replay_bytes");
    }

    /// Sets the maximum number of bytes that are drained from a discarded response, as
    /// [`max_drain_bytes`](super::layer::RetryLayer::max_drain_bytes) does.
    pub fn set_max_drain_bytes(&self, bytes: u64) {
        self.0.set_unchecked(|policy| policy.max_drain_bytes = bytes);
        self.report_setting("max_drain_bytes");
    }

    /// Sets whether every request is safe to repeat, as
    /// [`assume_idempotent`](super::layer::RetryLayer::assume_idempotent) does. `false` restores the methods of RFC
    /// 9110 §9.2.2.
    pub fn set_assume_idempotent(&self, all: bool) {
        let safe = if all { SafeRequests::All } else { SafeRequests::Idempotent };
        self.0.set_unchecked(|policy| policy.safe_requests = safe);
        self.report_setting("assume_idempotent");
    }

    // ===== HTTP: without effect on a layer with a closure that classifies =====

    /// Sets the methods that are safe to repeat, as [`methods`](super::layer::RetryLayer::methods) does.
    pub fn set_methods(&self, methods: impl IntoIterator<Item = Method>) {
        let methods = methods.into_iter().collect();
        self.0.set_unchecked(|policy| policy.safe_requests = SafeRequests::Methods(methods));
        self.report_setting("methods");
    }

    /// Sets the maximum time of an attempt, as [`attempt_timeout`](super::layer::RetryLayer::attempt_timeout) does. It
    /// applies to attempts that begin later.
    ///
    /// # Errors
    ///
    /// The time is zero.
    pub fn set_attempt_timeout(
        &self,
        time: impl Into<Option<Duration>>,
    ) -> Result<(), ConfigError> {
        let above_zero = |time| ConfigError::above_zero("attempt_timeout", time);
        self.0.set_attempt_timeout(time.into().map(above_zero).transpose()?);
        self.report_setting("attempt_timeout");
        Ok(())
    }

    /// Adds a failure that is retried, as [`retry_on`](super::layer::RetryLayer::retry_on) does.
    ///
    /// # Errors
    ///
    /// The failure contradicts another setting.
    pub fn set_retry_on(&self, failure: impl Into<Failure>) -> Result<(), ConfigError> {
        let failure = failure.into();
        self.0.try_set(|policy| policy.overrides.set_override(failure, true))?;
        self.report_setting("retry_on");
        Ok(())
    }

    /// Adds a failure that is not retried, as [`never_on`](super::layer::RetryLayer::never_on) does.
    ///
    /// # Errors
    ///
    /// The failure contradicts another setting, such as an [`unprocessed`](super::layer::RetryLayer::unprocessed) status.
    pub fn set_never_on(&self, failure: impl Into<Failure>) -> Result<(), ConfigError> {
        let failure = failure.into();
        self.0.try_set(|policy| policy.overrides.set_override(failure, false))?;
        self.report_setting("never_on");
        Ok(())
    }

    /// Sets the statuses that are retried for any method, as
    /// [`unprocessed`](super::layer::RetryLayer::unprocessed) does.
    ///
    /// # Errors
    ///
    /// A status is below 400, or contradicts another setting.
    pub fn set_unprocessed(
        &self,
        statuses: impl IntoIterator<Item = StatusCode>,
    ) -> Result<(), ConfigError> {
        let statuses = checked_unprocessed(statuses)?;
        self.0.try_set(|policy| policy.overrides.set_unprocessed(statuses))?;
        self.report_setting("unprocessed");
        Ok(())
    }

    /// Sets the closure that decides after every attempt, as [`retry_if`](super::layer::RetryLayer::retry_if) does.
    pub fn set_retry_if(
        &self,
        decide: impl Fn(&AttemptContext<'_>) -> Option<bool> + Send + Sync + 'static,
    ) {
        self.0.set_unchecked(|policy| policy.overrides.set_closure(Arc::new(decide)));
        self.report_setting("retry_if");
    }

    /// Reports a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        let settings = &self.0;
        let (layer, name) = (LayerKind::Retry.as_str(), settings.name.as_str());
        settings_changed!(retry, settings.is_in_use(), layer, name, key);
    }
}

/// Returns the statuses of [`unprocessed`](super::layer::RetryLayer::unprocessed), or the error of one below 400.
pub(super) fn checked_unprocessed(
    statuses: impl IntoIterator<Item = StatusCode>,
) -> Result<Vec<StatusCode>, ConfigError> {
    let statuses: Vec<_> = statuses.into_iter().collect();
    let is_error = |status: &StatusCode| status.is_client_error() || status.is_server_error();
    match statuses.iter().find(|status| !is_error(status)) {
        Some(status) => {
            Err(ConfigError::new("unprocessed", status.as_u16(), "use statuses of 400 or more"))
        }
        None => Ok(statuses),
    }
}
