use std::{fmt, sync::Arc, time::Duration};

use http::{Method, StatusCode};
use tower_layer::Layer;

use super::{
    backoff::Backoff,
    budget::RetryBudget,
    core::{Core, Settings},
    handle::RetryHandle,
    policy::{Hint, Safe},
    rules::{Failure, FailureKind, Seen},
    series::Waits,
    service::Retry,
};
use crate::{
    ConfigError,
    call::{Classify, Http, Outcome, Shared},
    error::Fault,
};

/// Retries failed calls if a retry is safe, useful and within the budget.
///
/// Its settings and its budget belong to one layer and all its clones, however often the layer is
/// applied. See the [module](crate::retry).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct RetryLayer<M = Http> {
    pub(super) settings: Shared<Settings>,
    protocol: M,
    fault: Fault,
}

/// The protocol of [`RetryLayer::new`]. Its services accept no requests before [`classify`](RetryLayer::classify) has
/// replaced it.
#[derive(Clone, Copy, Debug)]
pub struct Unclassified;

impl RetryLayer<Unclassified> {
    /// Returns a layer for requests of any type: the defaults of [`http`](RetryLayer::http) without its rules for
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
    pub fn new() -> Self {
        Self::of(Unclassified)
    }
}

impl Default for RetryLayer<Unclassified> {
    fn default() -> Self {
        Self::new()
    }
}

impl<M> RetryLayer<M> {
    fn of(protocol: M) -> Self {
        Self { settings: Shared::new(Settings::new()), protocol, fault: Fault::default() }
    }
}

impl RetryLayer {
    /// Returns a layer with three attempts, full jitter, a budget of 20 %, and hints such as `Retry-After`, for safe
    /// methods.
    pub fn http() -> Self {
        Self::of(Http)
    }

    /// The same for gRPC, whose calls are all `POST`: a status of `UNAVAILABLE`, or `RESOURCE_EXHAUSTED` with pushback,
    /// is retried for all of them, as gRPC's own retry policy (gRFC A6) has it. This includes an `UNAVAILABLE` that was
    /// mapped from an HTTP status (429, 502, 503, 504; see [`Http`](crate::call::Http)). A timeout or a connection that
    /// breaks is not retried: the call may have had its effect.
    pub fn grpc() -> Self {
        let layer = Self::http();
        layer.settings.set(|policy| policy.trust_grpc = true);
        layer
    }
}

impl RetryLayer {
    /// Tries this failure again too: a status, a gRPC status or a reason. What is not safe to repeat stays so.
    ///
    /// An HTTP status matches calls that are not gRPC. A gRPC call matches by its gRPC status, also where that is
    /// mapped from the HTTP status: list `Failure::Grpc(14)` for a 503 from a proxy.
    ///
    /// ```
    /// # use buttress::{RetryLayer, call::Reason, retry::Failure};
    /// use http::StatusCode;
    ///
    /// let retry = RetryLayer::http()
    ///     .retry_on(StatusCode::INTERNAL_SERVER_ERROR)
    ///     .retry_on(Failure::Grpc(10))
    ///     .never_on(Reason::Timeout);
    /// # let _ = retry;
    /// ```
    pub fn retry_on(self, failure: impl Into<Failure>) -> Self {
        self.settings.say(|say| say.list(failure.into(), true));
        self
    }

    /// Does not try this failure again.
    pub fn never_on(self, failure: impl Into<Failure>) -> Self {
        self.settings.say(|say| say.list(failure.into(), false));
        self
    }

    /// Retries these statuses for any method. None by default; 429 and 529 in the preset `llm` of the configuration.
    ///
    /// Use it for statuses with which the upstream declares that it has not processed the request.
    ///
    /// The maximum of attempts, the body and the budget bound these retries as all others. [`retry_if`](Self::retry_if)
    /// takes precedence. A status that is also in [`never_on`](Self::never_on), or below 400, is a [`ConfigError`]. The
    /// statuses of gRPC calls are unaffected: see [`grpc`](Self::grpc).
    ///
    /// ```
    /// # use buttress::RetryLayer;
    /// use http::StatusCode;
    ///
    /// let retry = RetryLayer::http().unprocessed([StatusCode::TOO_MANY_REQUESTS]);
    /// # let _ = retry;
    /// ```
    pub fn unprocessed(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        let statuses: Vec<_> = statuses.into_iter().collect();
        let is_error = |status: &StatusCode| status.is_client_error() || status.is_server_error();
        let checked = match statuses.iter().find(|status| !is_error(status)) {
            Some(status) => {
                Err(ConfigError::new("unprocessed", status.as_u16(), "use statuses of 400 or more"))
            }
            None => Ok(statuses),
        };
        if let Some(statuses) = self.accept(checked) {
            self.settings.say(|say| say.list_unprocessed(statuses));
        }
        self
    }

    /// These methods are the ones safe to repeat, instead of RFC 9110's. A request with an
    /// `Idempotency-Key` stays safe.
    pub fn methods(self, methods: impl IntoIterator<Item = Method>) -> Self {
        let methods = methods.into_iter().collect();
        self.settings.set(|policy| policy.safe = Safe::Methods(methods));
        self
    }

    /// How long an attempt may take up to its response head, or `None`: no limit, the default. One that takes longer is
    /// dropped, and fails as [`Timeout`](crate::call::Reason::Timeout): tried again if that is safe, or given out
    /// as an error. The last attempt has the same limit. To the millisecond.
    ///
    /// A [`Deadline`](crate::Deadline) or a timeout around this layer bounds the whole call.
    pub fn attempt_timeout(mut self, time: impl Into<Option<Duration>>) -> Self {
        let above_zero = |time| ConfigError::above_zero("attempt_timeout", time);
        if let Some(time) = self.accept(time.into().map(above_zero).transpose()) {
            self.settings.set_attempt_timeout(time);
        }
        self
    }

    /// Returns a layer with the same rules for a `reqwest::Client` itself, with reqwest's own requests and responses.
    ///
    /// A request whose body is a stream is sent once, the trailers of a response are not read, and requests carry no
    /// [`Deadline`](crate::Deadline). A layer around an [`HttpClient`](crate::reqwest::HttpClient) has no such limits.
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
    pub fn reqwest(self) -> RetryLayer<super::Reqwest> {
        RetryLayer { settings: self.settings, protocol: super::Reqwest, fault: self.fault }
    }

    /// Sets a closure that decides after every attempt, including successful ones. `Some(true)` retries for any method,
    /// `Some(false)` returns the result, and `None` leaves the decision to the other rules.
    ///
    /// The bounds of attempts, time, body and budget apply nevertheless. The closure cannot overrule a
    /// `grpc-retry-pushback-ms` that forbids a retry or a deadline that has passed. If it retries a rejection by an
    /// inner layer, the delay is at least the rejection's `retry_after`.
    ///
    /// ```
    /// # use buttress::RetryLayer;
    /// let retry = RetryLayer::http().retry_if(|seen| {
    ///     let again = seen.headers()?.get("x-should-retry")?;
    ///     Some(again == "true")
    /// });
    /// # let _ = retry;
    /// ```
    pub fn retry_if(self, ask: impl Fn(&Seen<'_>) -> Option<bool> + Send + Sync + 'static) -> Self {
        self.settings.say(|say| say.ask(Arc::new(ask)));
        self
    }
}

impl<M> RetryLayer<M> {
    /// Retries requests of any type that is `Clone` or [`Replay`](super::Replay), by a closure that classifies results.
    ///
    /// The closure receives the result of the wrapped service as `Result<&Response, &Error>`. Failures and throttled
    /// calls are retried. The error type stays the same.
    ///
    /// Settings for HTTP are a [`ConfigError`] of [`checked`](Self::checked) together with a closure:
    /// [`attempt_timeout`](RetryLayer::attempt_timeout), whose error would have no type, and the rules that the closure
    /// replaces.
    pub fn classify<C, Res, E>(mut self, classify: C) -> RetryLayer<Classify<C>>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
    {
        let has_methods = matches!(self.settings.policy().safe, Safe::Methods(_));
        if self.settings.says() || self.settings.attempt_timeout().is_some() || has_methods {
            let remedy = "remove attempt_timeout, methods, retry_on, never_on, unprocessed and retry_if, which are for HTTP";
            let error = ConfigError::new("classify", "a closure", remedy);
            self.fault.get_or_insert(error);
        }
        RetryLayer { settings: self.settings, protocol: Classify(classify), fault: self.fault }
    }

    /// Sets the maximum random delay above a server's hint, as a share of the hint: 0.5 by default, 0 to 10.
    ///
    /// A hint is a lower bound: after `Retry-After: 10` the delay is 10 to 15 s by default. The jitter spreads clients that
    /// receive the same hint at the same time. A deadline cuts the jitter to half of the time between the hint and the
    /// deadline, so that a hint that fits the deadline is followed and its attempt has time.
    /// [`Backoff::without_jitter`] switches this jitter off, too.
    /// [`hint_reach`](Self::hint_reach) and [presets](Self::preset) replace the setting.
    pub fn hint_jitter(mut self, share: f64) -> Self {
        let checked = match (0.0..=10.0).contains(&share) {
            true => Ok(share),
            false => Err(ConfigError::new("hint_jitter", share, "use 0 to 10, such as 0.5")),
        };
        if let Some(jitter) = self.accept(checked) {
            self.settings.set(|policy| policy.hint = Hint::Above { jitter });
        }
        self
    }

    /// Sets whether a rejection by an inner layer is retried after its `retry_after`. Off by default.
    ///
    /// By default a rejection ends the call at once, because an open circuit or a full limit protects the upstream, and
    /// the caller can use another upstream. With this setting the call waits if the rejection states a time that fits
    /// [`max_wait`](Self::max_wait) and the deadline. Such a retry makes no withdrawal from the budget.
    pub fn wait_on_rejection(self, wait: bool) -> Self {
        self.settings.set(|policy| policy.wait_on_rejection = wait);
        self
    }

    /// Sets the maximum time by which a server's hint lengthens the delay of the backoff. A longer hint is cut, instead
    /// of [ending the call](Self::max_wait). A hint never shortens the delay. Replaces
    /// [`hint_jitter`](Self::hint_jitter).
    pub fn hint_reach(self, reach: Duration) -> Self {
        self.settings.set(|policy| policy.hint = Hint::Within(reach));
        self
    }

    /// How many attempts are made at most, the first one included: 3 by default, 1 or more.
    pub fn attempts(mut self, attempts: u32) -> Self {
        let checked = match attempts {
            0 => Err(ConfigError::new("attempts", attempts, "use 1 or more")),
            attempts => Ok(attempts),
        };
        if let Some(attempts) = self.accept(checked) {
            self.settings.set(|policy| policy.attempts = attempts);
        }
        self
    }

    /// How long is waited between attempts.
    pub fn backoff(mut self, backoff: Backoff) -> Self {
        if self.accept(backoff.check()).is_some() {
            self.settings.set(|policy| policy.waits = Waits::Backoff(backoff));
        }
        self
    }

    /// Waits as an iterator says that `begin` makes anew for each call that is retried. Where it ends, the
    /// attempts are used up.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use buttress::RetryLayer;
    /// let waits = [10, 50, 250].map(Duration::from_millis);
    /// let retry = RetryLayer::http().attempts(9).backoff_with(move || waits.into_iter());
    /// # let _ = retry;
    /// ```
    pub fn backoff_with<I>(self, begin: impl Fn() -> I + Send + Sync + 'static) -> Self
    where
        I: Iterator<Item = Duration> + Send + 'static,
    {
        let begin = Arc::new(move || Box::new(begin()) as Box<_>);
        self.settings.set(|policy| policy.waits = Waits::Own(begin));
        self
    }

    /// How many retries one kind of failure may have, beside the total: no limit by default, 0 is none.
    ///
    /// ```
    /// # use buttress::{RetryLayer, retry::FailureKind};
    /// let retry = RetryLayer::http()
    ///     .attempts(6)
    ///     .at_most(FailureKind::Connect, 3)
    ///     .at_most(FailureKind::Read, 3);
    /// # let _ = retry;
    /// ```
    pub fn at_most(self, kind: FailureKind, retries: u32) -> Self {
        self.settings.set(|policy| policy.limits[kind as usize] = Some(retries));
        self
    }

    /// How many retries there may be for so many calls. Pass clones of one to several layers to share it.
    ///
    /// Services that the layer made before keep theirs.
    pub fn budget(mut self, budget: RetryBudget) -> Self {
        if self.accept(budget.check()).is_some() {
            self.settings.set_budget(Some(budget));
        }
        self
    }

    /// No budget: with everything failing, what is called gets `attempts` times the load.
    pub fn without_budget(self) -> Self {
        self.settings.set_budget(None);
        self
    }

    /// How many bytes of a request body are kept to be sent again: 64 KiB by default. A larger one is
    /// sent all the same, and not retried.
    pub fn replay_up_to(self, bytes: u64) -> Self {
        self.settings.set_body_cap(bytes);
        self
    }

    /// How many bytes of an answer that is tried again are read away, within 50 ms, so that its connection
    /// can be used again: 64 KiB by default. One that is longer is dropped, and over HTTP/1 its connection
    /// with it. 0 drops every answer that has a body.
    pub fn drain_up_to(self, bytes: u64) -> Self {
        self.settings.set(|policy| policy.drain_cap = bytes);
        self
    }

    /// Sets the maximum delay before an attempt. A longer delay of the backoff is cut. A longer hint of the server ends
    /// the call at once with the response, and so does every hint of 300 s or more. With
    /// [`hint_reach`](Self::hint_reach) a hint is cut instead.
    ///
    /// `None` is the default: 30 s for a call without a [`Deadline`](crate::Deadline), and no maximum for a call with
    /// one, since the deadline bounds the delay. The
    /// delay of a shorter hint may exceed the maximum by its [jitter](Self::hint_jitter), because clients whose jitter
    /// is cut there would return at the same time.
    pub fn max_wait(self, wait: impl Into<Option<Duration>>) -> Self {
        let wait = wait.into();
        self.settings.set(|policy| policy.max_wait = wait);
        self
    }

    /// Every request may be repeated although it may have had an effect: also `POST` and `PATCH`.
    pub fn assume_idempotent(self) -> Self {
        self.settings.set(|policy| policy.safe = Safe::All);
        self
    }

    /// The least time that an attempt needs to be of use: 10 ms by default. Where a [`Deadline`](crate::Deadline)
    /// in the request's extensions leaves less after the wait, the call ends with the answer that is there.
    pub fn least_attempt(self, time: Duration) -> Self {
        self.settings.set(|policy| policy.least_attempt = time);
        self
    }

    /// A name for events. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.settings.set(|policy| {
            policy.name.get_or_insert_with(|| name.into());
        });
        self
    }

    /// Looks at what the layer does.
    #[must_use]
    pub fn handle(&self) -> RetryHandle {
        RetryHandle::new(self.settings.clone())
    }

    /// The layer, or the first of its settings that cannot work. A layer with such a setting that is
    /// used all the same never retries, and says so in [`Attempts`](super::Attempts).
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.accept(self.settings.policy().check());
        self.fault.take().map_or(Ok(self), Err)
    }

    fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        setting.map_err(|error| self.fault.get_or_insert(error)).ok()
    }
}

impl<S: Clone, M: Clone> Layer<S> for RetryLayer<M> {
    type Service = Retry<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        let (settings, budget) = (self.settings.clone(), self.settings.budget());
        let mut fault = self.fault.clone();
        if let Err(error) = settings.policy().check() {
            fault.get_or_insert(error);
        }
        fault.report("retry", "nothing is retried");
        let core = Core::new(settings, budget, inner.clone(), fault.is_some());
        Retry::new(inner, core, self.protocol.clone())
    }
}

impl<M> fmt::Debug for RetryLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryLayer")
            .field("settings", &*self.settings)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
