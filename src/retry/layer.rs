use std::{fmt, time::Duration};

use http::{Method, StatusCode};
use tower_layer::Layer;

use super::{
    handle::{RetryHandle, checked_unprocessed},
    overrides::{AttemptContext, Failure},
    policy::RetryPolicy,
    service::Retry,
    settings::RetrySettings,
};
use crate::{
    attempt::{Backoff, Core, FailureKind, RetryBudget, SafeRequests},
    classify::{Classify, Http},
    error::ConfigError,
    fault::Fault,
    outcome::{LayerKind, Outcome},
};

/// Retries failed calls if a retry is safe, useful and within the budget.
///
/// The layer and its clones share the settings, the counts and the budget, also if the layer is applied several times.
/// A setter after the layer has built a service returns a layer with settings and counts of its own, and the same
/// budget: the services that are built keep their settings. Use the [handle](Self::handle) to change a running layer.
/// See the [module](super).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct RetryLayer<M = Http> {
    handle: RetryHandle,
    protocol: M,
    fault: Fault,
}

/// The protocol of [`RetryLayer::new`], until [`classify`](RetryLayer::classify) replaces it. A service with this
/// protocol accepts no requests.
#[derive(Clone, Copy, Debug)]
pub struct Unclassified;

impl RetryLayer<Unclassified> {
    /// Returns a layer for requests of any type. It has the defaults of [`http`](RetryLayer::http), but no rules for
    /// statuses, methods and headers. [`classify`](Self::classify) completes it.
    ///
    /// ```
    /// use buttress::{Outcome, RetryLayer};
    ///
    /// #[derive(Clone)]
    /// struct Query(String);
    /// struct Rows(Vec<String>);
    ///
    /// let retry = RetryLayer::new().attempts(4).classify(|result: Result<&Rows, &std::io::Error>| match result {
    ///     Ok(_) => Outcome::success(),
    ///     Err(_) => Outcome::failure(),
    /// });
    /// # let _ = (retry, Query(String::new()), Rows(Vec::new()));
    /// ```
    #[allow(clippy::new_without_default)] // `Default` is the layer for HTTP.
    pub fn new() -> Self {
        Self::of(Unclassified)
    }
}

impl Default for RetryLayer {
    /// Returns the layer of [`http`](Self::http).
    fn default() -> Self {
        Self::http()
    }
}

impl<M> RetryLayer<M> {
    fn of(protocol: M) -> Self {
        let handle = RetryHandle(RetrySettings::new().into());
        Self { handle, protocol, fault: Fault::default() }
    }

    /// Gives this layer state of its own if a service has been built with its state.
    fn fork_if_in_use(&mut self) {
        if self.handle.0.is_in_use() {
            self.handle = RetryHandle(self.handle.0.fork().into());
        }
    }

    pub(super) fn set(mut self, set: impl FnOnce(&RetryHandle)) -> Self {
        self.fork_if_in_use();
        set(&self.handle);
        self
    }

    /// Changes settings that other setters may contradict, or make consistent again.
    fn set_policy(self, set: impl FnOnce(&mut RetryPolicy)) -> Self {
        self.set(|handle| handle.0.set_unchecked(set))
    }

    fn try_set(mut self, set: impl FnOnce(&RetryHandle) -> Result<(), ConfigError>) -> Self {
        self.fork_if_in_use();
        self.fault.accept(set(&self.handle));
        self
    }

    /// Returns a layer with the same state and another protocol. It is no fork, because a service that was built before
    /// keeps its protocol.
    fn with_protocol<N>(self, protocol: N) -> RetryLayer<N> {
        RetryLayer { handle: self.handle, protocol, fault: self.fault }
    }
}

impl RetryLayer {
    /// Returns a layer with three attempts, full jitter, a budget of 20 %, and hints such as `Retry-After`, for safe
    /// methods.
    pub fn http() -> Self {
        Self::of(Http)
    }

    /// Returns a layer like [`http`](Self::http) for gRPC, whose calls are all `POST`.
    ///
    /// `UNAVAILABLE`, and `RESOURCE_EXHAUSTED` with pushback, is retried for every call, as gRPC's retry policy (gRFC
    /// A6) specifies. This includes an `UNAVAILABLE` that was mapped from an HTTP status (429, 502, 503, 504; see
    /// [`Http`](crate::classify::Http)). A timeout or a broken connection is not retried, because the call may have had
    /// an effect.
    pub fn grpc() -> Self {
        Self::http().set(|handle| handle.0.set_unchecked(|policy| policy.trusts_grpc_status = true))
    }
}

impl RetryLayer {
    /// Adds a failure that is retried: an HTTP status, a gRPC status or a reason. A request that is not safe to repeat
    /// is still not retried.
    ///
    /// An HTTP status matches calls that are not gRPC. A gRPC call matches by its gRPC status, also if that is mapped
    /// from the HTTP status: add `Failure::Grpc(14)` for a 503 from a proxy.
    ///
    /// ```
    /// # use buttress::{outcome::Reason, retry::Failure, RetryLayer};
    /// use http::StatusCode;
    ///
    /// let retry = RetryLayer::http()
    ///     .retry_on(StatusCode::INTERNAL_SERVER_ERROR)
    ///     .retry_on(Failure::Grpc(10))
    ///     .never_on(Reason::Timeout);
    /// # let _ = retry;
    /// ```
    ///
    /// [`RetryHandle::set_retry_on`] changes it while the layer runs.
    pub fn retry_on(self, failure: impl Into<Failure>) -> Self {
        let failure = failure.into();
        self.set_policy(|policy| policy.overrides.set_override(failure, true))
    }

    /// Adds a failure that is not retried.
    ///
    /// [`RetryHandle::set_never_on`] changes it while the layer runs.
    pub fn never_on(self, failure: impl Into<Failure>) -> Self {
        let failure = failure.into();
        self.set_policy(|policy| policy.overrides.set_override(failure, false))
    }

    /// Sets the statuses that are retried for any method. None by default; 429 and 529 in the preset `llm` of the
    /// configuration.
    ///
    /// Use it for statuses with which the upstream declares that it has not processed the request.
    ///
    /// The maximum number of attempts, the body and the budget bound these retries like all others.
    /// [`retry_if`](Self::retry_if) takes precedence. The setting does not affect gRPC calls: see [`grpc`](Self::grpc).
    ///
    /// A status below 400, and a status that is also in [`never_on`](Self::never_on), is a [`ConfigError`] of
    /// [`checked`](Self::checked).
    ///
    /// ```
    /// # use buttress::RetryLayer;
    /// use http::StatusCode;
    ///
    /// let retry = RetryLayer::http().unprocessed([StatusCode::TOO_MANY_REQUESTS]);
    /// # let _ = retry;
    /// ```
    ///
    /// [`RetryHandle::set_unprocessed`] changes it while the layer runs.
    pub fn unprocessed(self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.try_set(|handle| {
            let statuses = checked_unprocessed(statuses)?;
            handle.0.set_unchecked(|policy| policy.overrides.set_unprocessed(statuses));
            Ok(())
        })
    }

    /// Sets the methods that are safe to repeat, instead of those of RFC 9110 §9.2.2. A request with an
    /// `Idempotency-Key` stays safe.
    ///
    /// [`RetryHandle::set_methods`] changes it while the layer runs.
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.set(|handle| handle.set_methods(methods))
    }

    /// Sets the maximum time of an attempt until its response head. `None`, the default, is no maximum.
    ///
    /// An attempt that takes longer is dropped and fails with the reason [`Timeout`](crate::outcome::Reason::Timeout).
    /// It is retried if that is safe. Otherwise the call ends with an error. The timeout applies to the last attempt
    /// too. It is rounded down to a millisecond, but not below 1 ms. Zero is a [`ConfigError`] of
    /// [`checked`](Self::checked).
    ///
    /// To bound the whole call, use a [`Deadline`](crate::time::Deadline) or an outer timeout.
    ///
    /// [`RetryHandle::set_attempt_timeout`] changes it while the layer runs.
    pub fn attempt_timeout(self, time: impl Into<Option<Duration>>) -> Self {
        self.try_set(|handle| handle.set_attempt_timeout(time))
    }

    /// Returns a layer with the same rules for a bare `reqwest::Client`, with the requests and responses of reqwest.
    ///
    /// A request whose body is a stream is sent once and not retried. The trailers of a response are not read, and
    /// requests carry no [`Deadline`](crate::time::Deadline). A layer around an
    /// [`HttpClient`](crate::reqwest::HttpClient) does not have these limitations.
    ///
    /// ```no_run
    /// use buttress::RetryLayer;
    /// use tower::{ServiceBuilder, ServiceExt};
    ///
    /// # async fn run() -> Result<(), buttress::BoxError> {
    /// // Switches off reqwest's own retries, which would multiply with the attempts.
    /// let client = reqwest::Client::builder().retry(reqwest::retry::never()).build()?;
    /// let request = client.get("http://localhost:8080/").build()?;
    /// let client = ServiceBuilder::new().layer(RetryLayer::http().reqwest()).service(client);
    /// let text = client.oneshot(request).await?.text().await?;
    /// # let _ = text; Ok(()) }
    /// ```
    #[cfg(feature = "reqwest")]
    #[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
    pub fn reqwest(self) -> RetryLayer<crate::attempt::Reqwest> {
        self.with_protocol(crate::attempt::Reqwest)
    }

    /// Sets a closure that decides after every attempt, also after a successful one.
    ///
    /// `Some(true)` retries for any method, `Some(false)` returns the result, and `None` leaves the decision to the
    /// other rules. The maxima of attempts, time and body, and the budget, still apply. The closure cannot overrule a
    /// `grpc-retry-pushback-ms` that forbids a retry, a 422 for a request with an `Idempotency-Key` (the key was used
    /// for another request), or a deadline that has passed. If it retries a rejection by an inner layer, the delay is
    /// at least the rejection's `retry_after`.
    ///
    /// ```
    /// # use buttress::RetryLayer;
    /// let retry = RetryLayer::http().retry_if(|seen| {
    ///     let again = seen.headers()?.get("x-should-retry")?;
    ///     Some(again == "true")
    /// });
    /// # let _ = retry;
    /// ```
    ///
    /// [`RetryHandle::set_retry_if`] changes it while the layer runs.
    pub fn retry_if(
        self,
        decide: impl Fn(&AttemptContext<'_>) -> Option<bool> + Send + Sync + 'static,
    ) -> Self {
        self.set(|handle| handle.set_retry_if(decide))
    }
}

impl<M> RetryLayer<M> {
    /// Sets a closure that classifies results. The layer then retries requests of any type that is `Clone` or
    /// [`Replay`](crate::attempt::Replay).
    ///
    /// The closure receives the result of the wrapped service as `Result<&Response, &Error>`. Failures and throttled
    /// calls are retried. The error type stays the same.
    ///
    /// Settings for HTTP cannot be combined with a closure, and are a [`ConfigError`] of [`checked`](Self::checked):
    /// [`attempt_timeout`](RetryLayer::attempt_timeout), whose error would have no type, and the rules that the closure
    /// replaces.
    pub fn classify<C, Res, E>(mut self, classify: C) -> RetryLayer<Classify<C>>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
    {
        let settings = &self.handle.0;
        let has_methods = matches!(settings.policy().safe_requests, SafeRequests::Methods(_));
        if settings.has_overrides() || settings.attempt_timeout().is_some() || has_methods {
            let remedy = "remove attempt_timeout, methods, retry_on, never_on, unprocessed and retry_if, which are for HTTP";
            let error = ConfigError::new("classify", "a closure", remedy);
            self.fault.get_or_insert(error);
        }
        self.with_protocol(Classify(classify))
    }

    /// Sets the maximum random delay above a server's hint, as a share of the hint: 0.5 by default, 0 to 10.
    ///
    /// A hint is a lower bound: after `Retry-After: 10` the delay is 10 to 15 s by default. The jitter spreads clients
    /// that receive the same hint at the same time. A deadline cuts the jitter to half of the time between the hint and
    /// the deadline, so that a hint that fits the deadline is followed and its attempt has time.
    ///
    /// [`Backoff::without_jitter`] switches this jitter off too. [`max_hint_extension`](Self::max_hint_extension) and
    /// [presets](Self::preset) replace the setting.
    ///
    /// [`RetryHandle::set_hint_jitter`] changes it while the layer runs.
    pub fn hint_jitter(self, share: f64) -> Self {
        self.try_set(|handle| handle.set_hint_jitter(share))
    }

    /// Sets whether a rejection by an inner layer is retried after its `retry_after`. Off by default.
    ///
    /// By default a rejection ends the call at once, because an open circuit or a full limit protects the upstream, and
    /// the caller can use another upstream. With this setting the call waits if the rejection states a time that fits
    /// [`max_wait`](Self::max_wait) and the deadline. Such a retry makes no withdrawal from the budget.
    ///
    /// [`RetryHandle::set_wait_on_rejection`] changes it while the layer runs.
    pub fn wait_on_rejection(self, wait: bool) -> Self {
        self.set_policy(|policy| policy.wait_on_rejection = wait)
    }

    /// Sets the maximum time by which a server's hint lengthens the delay of the backoff. A longer hint is cut, instead
    /// of [ending the call](Self::max_wait). A hint never shortens the delay. Replaces
    /// [`hint_jitter`](Self::hint_jitter).
    ///
    /// [`RetryHandle::set_max_hint_extension`] changes it while the layer runs.
    pub fn max_hint_extension(self, max: Duration) -> Self {
        self.set(|handle| handle.set_max_hint_extension(max))
    }

    /// Sets the maximum number of attempts, including the first: 3 by default, 1 or more.
    ///
    /// [`RetryHandle::set_attempts`] changes it while the layer runs.
    pub fn attempts(self, attempts: u32) -> Self {
        self.try_set(|handle| handle.set_attempts(attempts))
    }

    /// Sets the delays between attempts. [`Backoff::default`] by default.
    ///
    /// [`RetryHandle::set_backoff`] changes it while the layer runs.
    pub fn backoff(self, backoff: Backoff) -> Self {
        self.try_set(|handle| handle.set_backoff(backoff))
    }

    /// Sets the delays as an iterator. `start` creates one for each call that is retried. The attempts are used up when
    /// the iterator ends.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use buttress::RetryLayer;
    /// let delays = [10, 50, 250].map(Duration::from_millis);
    /// let retry = RetryLayer::http().attempts(9).backoff_with(move || delays.into_iter());
    /// # let _ = retry;
    /// ```
    ///
    /// [`RetryHandle::set_backoff_with`] changes it while the layer runs.
    pub fn backoff_with<I>(self, start: impl Fn() -> I + Send + Sync + 'static) -> Self
    where
        I: Iterator<Item = Duration> + Send + 'static,
    {
        self.set(|handle| handle.set_backoff_with(start))
    }

    /// Sets the maximum number of retries for one kind of failure, in addition to the total of
    /// [`attempts`](Self::attempts). No maximum by default. 0 prevents these retries.
    ///
    /// ```
    /// # use buttress::{RetryLayer, retry::FailureKind};
    /// let retry = RetryLayer::http()
    ///     .attempts(6)
    ///     .max_retries_for(FailureKind::Connect, 3)
    ///     .max_retries_for(FailureKind::Read, 3);
    /// # let _ = retry;
    /// ```
    ///
    /// [`RetryHandle::set_max_retries_for`] changes it while the layer runs.
    pub fn max_retries_for(self, kind: FailureKind, retries: u32) -> Self {
        self.set_policy(|policy| policy.max_retries[kind as usize] = Some(retries))
    }

    /// Sets the retry budget. [`RetryBudget::default`] by default. Pass clones of one budget to several layers to share
    /// it.
    ///
    /// Services that the layer has already made keep their budget.
    pub fn budget(self, budget: RetryBudget) -> Self {
        self.try_set(|handle| {
            budget.check()?;
            handle.0.set_budget(Some(budget));
            Ok(())
        })
    }

    /// Removes the budget. If all calls fail, the upstream then receives as many times the load as there are
    /// [`attempts`](Self::attempts).
    pub fn without_budget(self) -> Self {
        self.set(|handle| handle.0.set_budget(None))
    }

    /// Sets the maximum number of bytes of a request body that are saved for a replay: 64 KiB by default. A request
    /// with a larger body is sent and not retried.
    ///
    /// [`RetryHandle::set_max_replay_bytes`] changes it while the layer runs.
    pub fn max_replay_bytes(self, bytes: u64) -> Self {
        self.set(|handle| handle.set_max_replay_bytes(bytes))
    }

    /// Sets the maximum number of bytes that are drained from a discarded response body: 64 KiB by default.
    ///
    /// The connection can be reused after a complete drain. A body that is longer, or takes longer than 50 ms, is
    /// dropped. Over HTTP/1 this closes its connection. With 0, every response that has a body is dropped.
    ///
    /// [`RetryHandle::set_max_drain_bytes`] changes it while the layer runs.
    pub fn max_drain_bytes(self, bytes: u64) -> Self {
        self.set(|handle| handle.set_max_drain_bytes(bytes))
    }

    /// Sets the maximum delay before an attempt. A longer delay of the backoff is cut. A longer hint of the server ends
    /// the call at once with the response, and so does every hint of 300 s or more. With
    /// [`max_hint_extension`](Self::max_hint_extension) a hint is cut instead.
    ///
    /// `None` is the default: 30 s for a call without a [`Deadline`](crate::time::Deadline), and no maximum for a call
    /// with one, since the deadline bounds the delay. The delay of a shorter hint may exceed the maximum by its
    /// [jitter](Self::hint_jitter). Clients whose jitter is cut at the maximum would return at the same time.
    ///
    /// [`RetryHandle::set_max_wait`] changes it while the layer runs.
    pub fn max_wait(self, wait: impl Into<Option<Duration>>) -> Self {
        self.set(|handle| handle.set_max_wait(wait))
    }

    /// Declares every request safe to repeat, also `POST` and `PATCH`. A request may then take effect more than once.
    ///
    /// [`RetryHandle::set_assume_idempotent`] changes it while the layer runs.
    pub fn assume_idempotent(self) -> Self {
        self.set(|handle| handle.set_assume_idempotent(true))
    }

    /// Sets the minimum time for an attempt: 10 ms by default. If a [`Deadline`](crate::time::Deadline) in the
    /// extensions of the request leaves less after the delay, the call ends with the response or error of the last
    /// attempt.
    ///
    /// [`RetryHandle::set_min_attempt_time`] changes it while the layer runs.
    pub fn min_attempt_time(self, time: Duration) -> Self {
        self.set(|handle| handle.set_min_attempt_time(time))
    }

    /// Sets the name of the layer in events. The first name that is set stays.
    pub fn name(self, name: &str) -> Self {
        self.set(|handle| handle.0.name.set(name))
    }

    /// Returns a handle that reads the counts of the layer and changes its settings while it runs.
    #[must_use]
    pub fn handle(&self) -> RetryHandle {
        self.handle.clone()
    }

    /// Returns the layer if its settings can work. A layer with a fault that is used without this check never retries.
    /// A retryable failure then ends the call as [`Misconfigured`](crate::attempt::GiveUpReason::Misconfigured).
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] of the first setting that cannot work. It names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        let contradiction = self.handle.0.policy().check();
        self.fault.take().map_or(contradiction.map(|()| self), Err)
    }
}

impl<S: Clone, M: Clone> Layer<S> for RetryLayer<M> {
    type Service = Retry<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        let settings = self.handle.0.clone();
        settings.set_in_use();
        let mut fault = self.fault.clone();
        if let (true, Some(contradiction)) = (fault.is_none(), settings.contradiction()) {
            fault = contradiction.clone();
        }
        let name = settings.name.as_str();
        fault.report(LayerKind::Retry.as_str(), name, "nothing is retried");
        let budget = settings.budget();
        let core = Core::new(settings, budget, inner.clone(), fault.is_some());
        Retry::new(inner, core, self.protocol.clone())
    }
}

impl<M> fmt::Debug for RetryLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryLayer")
            .field("settings", &*self.handle.0)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
