//! The settings of each layer, and the conversion into the layer.

use std::time::Duration;

use http::StatusCode;

use super::{
    group::{SettingRow, SettingsGroup, group},
    value::{Setting, SettingValue},
};
#[cfg(feature = "connect")]
use crate::connect::{self, ClientBuilder, ConnectHandle, ConnectLayer};
use crate::{
    attempt::{Backoff, RetryBudget},
    breaker::{CircuitBreakerHandle, CircuitBreakerLayer, OpenDuration, Trip},
    deadline::{DeadlineHandle, DeadlineLayer},
    error::ConfigError,
    health::{Get, HealthProbeLayer},
    hedge::HedgeLayer,
    limit::{ConcurrencyLimitHandle, ConcurrencyLimitLayer},
    retry::{RetryHandle, RetryLayer},
    timeout::{TimeoutLayer, Timeouts},
};

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

// ===== Time =====

group! {
    /// The settings of a [`DeadlineLayer`].
    DeadlineConfig for "DeadlineLayer", prefix "deadline_", on |_| true;
    /// The time of a call from its start to its deadline, if no header sets one; it is also the maximum of a header,
    /// unless `deadline_max` is set.
    live default: Option<Duration> = None;
    /// The maximum time that a header can set; off: the default.
    live max: Option<Duration> = None;
    /// The time reserved for sending the response back.
    live reserve: Option<Duration> = None;
    /// The header that states the time left in milliseconds; that of gRPC is read and written in any case.
    fixed header: Option<String> = None;
}

impl DeadlineConfig {
    /// Returns the layer.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<DeadlineLayer, ConfigError> {
        let mut layer = self.forward();
        if let Some(time) = self.default {
            layer = layer.default_of(time);
        }
        if let Some(time) = self.max {
            layer = layer.max(time);
        }
        if let Some(time) = self.reserve {
            layer = layer.reserve(time);
        }
        layer.checked()
    }

    /// Applies the settings that can change while the layer is in use.
    pub(crate) fn update(&self, handle: &DeadlineHandle) -> Result<(), ConfigError> {
        handle.set_default(self.default)?;
        handle.set_max(self.max)?;
        handle.set_reserve(self.reserve);
        Ok(())
    }

    /// Returns the layer with the header only, which writes the time left for the next hop.
    pub(crate) fn forward(&self) -> DeadlineLayer {
        let layer = DeadlineLayer::new();
        match &self.header {
            Some(name) => layer.header(name),
            None => layer,
        }
    }
}

group! {
    /// The settings of a [`TimeoutLayer`].
    TimeoutConfig for "TimeoutLayer", prefix "timeout_", on |this| *this != Self::OFF;
    /// The timeout of the response head, from when the request has been sent.
    live head: Option<Duration> = Some(secs(30));
    /// The timeout of the first frame of the response body, while the body is polled.
    live first_frame: Option<Duration> = Some(secs(60));
    /// The timeout from one frame of the response body to the next, while the body is polled.
    live response_idle: Option<Duration> = Some(secs(60));
    /// The timeout of each frame of the request body, while the body is polled.
    live request_idle: Option<Duration> = Some(secs(60));
    /// The maximum time for which a request body is not polled; off: a server uses `timeout_head`.
    live request_stall: Option<Duration> = Some(secs(300));
    /// The minimum rate of a request body, in bytes per second.
    live min_body_rate: Option<u32> = None;
    /// The time for which a request body may keep its reader waiting before the minimum rate counts.
    live body_grace: Duration = Timeouts::DEFAULT_BODY_GRACE;
    /// Whether gRPC requests have to keep the minimum rate, too.
    live min_body_rate_for_grpc: bool = false;
    /// The timeout of the whole call, to the end of the response body; in a client it applies to each attempt.
    live total: Option<Duration> = None;
    /// The timeout of the whole response, from when the request has been sent to the end of the response body; in a
    /// client it applies to each attempt.
    live response_total: Option<Duration> = None;
}

impl TimeoutConfig {
    const OFF: Self = Self {
        head: None,
        first_frame: None,
        response_idle: None,
        request_idle: None,
        request_stall: None,
        min_body_rate: None,
        body_grace: Timeouts::DEFAULT_BODY_GRACE,
        min_body_rate_for_grpc: false,
        total: None,
        response_total: None,
    };

    /// Returns the settings of a server: request bodies have a minimum rate, and response bodies have no timeout,
    /// because a stream may pause.
    #[must_use]
    pub fn server() -> Self {
        let (head, request_idle) = (Some(secs(30)), Some(secs(60)));
        let min_body_rate = Timeouts::server().get_min_body_rate();
        Self { head, request_idle, min_body_rate, ..Self::OFF }
    }

    /// Returns the timeouts.
    #[must_use]
    pub fn timeouts(&self) -> Timeouts {
        Timeouts::new()
            .head(self.head)
            .first_frame(self.first_frame)
            .response_idle(self.response_idle)
            .request_idle(self.request_idle)
            .request_stall(self.request_stall)
            .min_body_rate(self.min_body_rate)
            .body_grace(self.body_grace)
            .min_body_rate_for_grpc(self.min_body_rate_for_grpc)
            .total(self.total)
            .response_total(self.response_total)
    }

    /// Returns the layer.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<TimeoutLayer, ConfigError> {
        TimeoutLayer::new(self.timeouts()).checked()
    }
}

// ===== Retry =====

group! {
    /// The settings of a [`RetryLayer`].
    RetryConfig for "RetryLayer", prefix "retry_", on |this| this.attempts > 1;
    /// The maximum number of attempts of a call, the first included; 1: no retry.
    live attempts: u32 = 3;
    /// The delay before the first retry; it grows with each retry and has full jitter.
    live backoff: Duration = ms(50);
    /// The factor by which the delay grows with each retry; 1 or more.
    live backoff_factor: f64 = 2.0;
    /// The maximum delay of the backoff.
    live backoff_max: Duration = secs(5);
    /// The maximum delay, also for a hint of the server; off: 30 s without a deadline, no maximum with one.
    live max_wait: Option<Duration> = None;
    /// The maximum random delay above a hint of the server, as a share of the hint; 0 to 10.
    live hint_jitter: f64 = 0.5;
    /// Whether a call waits for the time that a rejection by an inner layer states, and is retried then.
    live wait_on_rejection: bool = false;
    /// HTTP statuses that are retried for any method, because the upstream has not processed the request.
    live unprocessed: Vec<StatusCode> = Vec::new();
    /// The maximum time from the start of an attempt to its response head, in addition to the timeouts.
    live attempt_timeout: Option<Duration> = None;
    /// The number of retries that each call deposits in the budget.
    fixed budget_ratio: f64 = 0.2;
    /// The number of retries per second that the budget permits in addition.
    fixed budget_per_second: u32 = 1;
    /// The maximum number of retries that the budget can hold.
    fixed budget_cap: u32 = 100;
    /// The maximum size in bytes of a request body that can be replayed.
    live max_replay_bytes: u64 = 64 * 1024;
    /// The maximum number of bytes that are drained from a discarded response, so that its connection can be reused.
    live max_drain_bytes: u64 = 64 * 1024;
}

impl RetryConfig {
    /// Returns the layer.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<RetryLayer, ConfigError> {
        self.layer_over(RetryLayer::http())
    }

    /// Returns the layer with these settings and the rules of `base`.
    pub(crate) fn layer_over(&self, base: RetryLayer) -> Result<RetryLayer, ConfigError> {
        self.apply(&base.handle())?;
        let Self { budget_ratio, budget_per_second, budget_cap, .. } = *self;
        let budget = RetryBudget::with(budget_ratio, budget_per_second, budget_cap);
        // Without retries, an invalid budget is not an error. A valid budget is set nevertheless, because the number of
        // attempts can increase while the layer is in use.
        let idle = self.attempts <= 1 && budget.check().is_err();
        if idle { base } else { base.budget(budget) }.checked()
    }

    /// Applies the settings that can change while the layer is in use.
    pub(crate) fn apply(&self, retry: &RetryHandle) -> Result<(), ConfigError> {
        let backoff = Backoff::exponential(self.backoff).factor(self.backoff_factor);
        retry.set_attempts(self.attempts)?;
        retry.set_backoff(backoff.max(self.backoff_max))?;
        retry.set_max_wait(self.max_wait);
        retry.set_hint_jitter(self.hint_jitter)?;
        retry.set_wait_on_rejection(self.wait_on_rejection)?;
        retry.set_unprocessed(self.unprocessed.iter().copied())?;
        retry.set_attempt_timeout(self.attempt_timeout)?;
        retry.set_max_replay_bytes(self.max_replay_bytes);
        retry.set_max_drain_bytes(self.max_drain_bytes);
        Ok(())
    }
}

group! {
    /// The settings of a [`HedgeLayer`]. In a whole stack the layer is off unless a delay or a percentile is set.
    HedgeConfig for "HedgeLayer", prefix "hedge_", on |this| this.after.is_some() || this.percentile.is_some();
    /// The delay before a hedge attempt; off: the percentile determines it.
    fixed after: Option<Duration> = None;
    /// The percentile of recent latencies that is the delay if none is set; both off: no hedge attempts.
    fixed percentile: Option<f64> = Some(0.95);
    /// The maximum number of hedge attempts of a call, each sent a delay after the previous attempt; 1 to 10.
    fixed max_hedges: u32 = 1;
    /// The number of hedge attempts that each call deposits in the budget.
    fixed budget_ratio: f64 = 0.05;
    /// The number of hedge attempts per second that the budget permits in addition.
    fixed budget_per_second: u32 = 1;
    /// The maximum number of hedge attempts that the budget can hold.
    fixed budget_cap: u32 = 100;
    /// The maximum size in bytes of a request body that can be replayed.
    fixed max_replay_bytes: u64 = 64 * 1024;
}

impl HedgeConfig {
    /// Returns settings without hedge attempts.
    #[must_use]
    pub fn off() -> Self {
        Self { after: None, percentile: None, ..Self::default() }
    }

    /// Returns the layer. Without a delay or a percentile it sends no hedge attempts.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<HedgeLayer, ConfigError> {
        let Self { budget_ratio, budget_per_second, budget_cap, .. } = *self;
        let layer = match (self.after, self.percentile) {
            (Some(time), _) => HedgeLayer::http(time),
            (None, Some(share)) => HedgeLayer::after_percentile(share),
            (None, None) => HedgeLayer::off(),
        };
        let budget = RetryBudget::with(budget_ratio, budget_per_second, budget_cap);
        let layer = layer
            .max_hedges(self.max_hedges)
            .budget(budget)
            .max_replay_bytes(self.max_replay_bytes);
        if self.is_on() { layer } else { layer.without_budget() }.checked()
    }
}

// ===== Health =====

group! {
    /// The settings of a [`HealthProbeLayer`] that sends `GET` requests. In a whole client the layer is off unless the
    /// URI is set; such a client is for a single service.
    HealthProbeConfig for "HealthProbeLayer", prefix "health_probe_", on |this| this.uri.is_some();
    /// The URI that is probed in the background, in a whole client an absolute one; calls are rejected while it is
    /// down.
    fixed uri: Option<String> = Some("/healthz".to_owned());
    /// The time from one probe to the next.
    fixed every: Duration = secs(5);
    /// The time from one probe to the next while the upstream is down; off: the same.
    fixed every_while_down: Option<Duration> = None;
    /// The maximum random share by which that time is longer.
    fixed jitter: f64 = 0.1;
    /// The timeout of a probe.
    fixed timeout: Duration = secs(1);
    /// The number of successive probes that must pass before the upstream is up again.
    fixed rise: u32 = 1;
    /// The number of successive probes that must fail before the upstream is down.
    fixed fall: u32 = 3;
    /// Whether a probe response with status 503 takes the upstream down at once; false: it counts towards `fall`.
    fixed immediate_failure: bool = true;
}

impl HealthProbeConfig {
    /// Returns settings without probes.
    #[must_use]
    pub fn off() -> Self {
        Self { uri: None, ..Self::default() }
    }

    /// Returns the layer for services with this request body. Without a URI it probes `/healthz`.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer<B>(&self) -> Result<HealthProbeLayer<Get<B>>, ConfigError> {
        let layer = HealthProbeLayer::get(self.uri.as_deref().unwrap_or("/healthz"))
            .every(self.every)
            .jitter(self.jitter)
            .timeout(self.timeout)
            .thresholds(self.rise, self.fall)
            .immediate_failure(self.immediate_failure);
        match self.every_while_down {
            Some(time) => layer.every_while_down(time),
            None => layer,
        }
        .checked()
    }
}

// ===== Breaker =====

group! {
    /// The settings of a [`CircuitBreakerLayer`].
    BreakerConfig for "CircuitBreakerLayer", prefix "breaker_",
        on |this| this.failures.is_some() || this.failure_ratio.is_some();
    /// The number of consecutive failures that opens the circuit.
    live failures: Option<u32> = Some(5);
    /// The share of failed calls in the window that opens the circuit.
    live failure_ratio: Option<f64> = None;
    /// The time window of the failure ratio.
    fixed window: Duration = secs(10);
    /// The minimum number of calls in the window for the failure ratio to open the circuit.
    live min_calls: u32 = 20;
    /// The time for which the circuit stays open before it is half-open.
    live open_for: Duration = secs(30);
    /// The maximum of that time, which doubles with each consecutive trip; off: the time does not grow.
    live open_for_max: Option<Duration> = None;
    /// The number of half-open probes; the circuit closes if all of them succeed.
    live half_open: u16 = 1;
    /// The maximum time of a half-open probe.
    live probe_timeout: Duration = secs(30);
    /// The time after which a call that its caller ended counts as a failure, measured from when the request has been
    /// sent; off: never.
    live count_cancelled_after: Option<Duration> = Some(secs(1));
    /// The time after the circuit has closed in which the share of admitted calls grows to 1.
    live ramp: Duration = Duration::ZERO;
}

impl BreakerConfig {
    /// Returns the layer. With neither a number nor a ratio of failures, its circuit is forced closed.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<CircuitBreakerLayer, ConfigError> {
        if !self.is_on() {
            let layer = CircuitBreakerLayer::http();
            layer.handle().force_closed();
            return Ok(layer);
        }
        CircuitBreakerLayer::new(self.trip())
            .open_for(self.open_duration())
            .half_open(self.half_open)
            .probe_timeout(self.probe_timeout)
            .count_cancelled_after(self.count_cancelled_after)
            .ramp(self.ramp)
            .checked()
    }

    fn trip(&self) -> Trip {
        let run = self.failures.map(Trip::consecutive);
        let share = self
            .failure_ratio
            .map(|ratio| Trip::failure_ratio(ratio).within(self.window).min_calls(self.min_calls));
        Trip::any(run.into_iter().chain(share))
    }

    /// Returns whether the rules have the same kinds and windows, so that the thresholds of one can replace those of
    /// the other.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let window = |this: &Self| this.failure_ratio.map(|_| this.window);
        let kinds = |this: &Self| (this.failures.is_some(), window(this));
        kinds(self) == kinds(other)
    }

    /// Applies the settings that can change while the layer is in use.
    ///
    /// # Errors
    ///
    /// Fails if the rules are of another kind, because they need a new layer.
    pub(crate) fn update(&self, circuit: &CircuitBreakerHandle) -> Result<(), ConfigError> {
        circuit.set_open_for(self.open_duration())?;
        circuit.set_half_open_of(self.half_open, self.half_open)?;
        circuit.set_probe_timeout(self.probe_timeout)?;
        circuit.set_count_cancelled_after(self.count_cancelled_after)?;
        circuit.set_ramp(self.ramp);
        if self.is_on() { circuit.set_trip(&self.trip()) } else { Ok(()) }
    }

    fn open_duration(&self) -> OpenDuration {
        match self.open_for_max {
            Some(max) => OpenDuration::backoff(self.open_for, max),
            None => OpenDuration::fixed(self.open_for),
        }
    }
}

// ===== Limit =====

group! {
    /// The settings of a [`ConcurrencyLimitLayer`].
    LimitConfig for "ConcurrencyLimitLayer", prefix "limit_", on |this| this.max.is_some();
    /// The maximum number of calls in flight.
    live max: Option<u32> = Some(256);
    /// The maximum number of calls that wait for a permit.
    live queue: u32 = 1024;
    /// The maximum time for which a call waits for a permit.
    live queue_wait: Duration = secs(5);
    /// The time after which a response that its client does not read releases its permit.
    live max_unread: Option<Duration> = None;
    /// Whether gRPC health calls need no permit, if a health registry of the process serves them.
    live exempt_grpc_health: bool = true;
}

impl LimitConfig {
    /// Returns the settings of a client: health calls need permits, because they are calls to another server.
    #[must_use]
    pub fn client() -> Self {
        Self { exempt_grpc_health: false, ..Self::default() }
    }

    /// Returns the settings of a server: a response that is not read for 60 s releases its permit.
    #[must_use]
    pub fn server() -> Self {
        Self { max_unread: Some(secs(60)), ..Self::default() }
    }

    /// Returns the layer. Without a maximum it admits every call.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<ConcurrencyLimitLayer, ConfigError> {
        let layer = ConcurrencyLimitLayer::new(self.max_calls()).checked()?;
        self.update(&layer.handle())?;
        Ok(layer)
    }

    fn max_calls(&self) -> usize {
        self.max.unwrap_or(u32::MAX) as usize
    }

    /// Applies the settings that can change while the layer is in use.
    pub(crate) fn update(&self, handle: &ConcurrencyLimitHandle) -> Result<(), ConfigError> {
        handle.set_limit(self.max_calls())?;
        handle.set_queue(self.queue as usize, self.queue_wait)?;
        // A disabled limit has no permits that could be released.
        handle.set_max_unread(self.max_unread.filter(|_| self.max.is_some()))?;
        handle.set_exempt_grpc_health(self.exempt_grpc_health);
        Ok(())
    }
}

// ===== Connections =====

group! {
    /// The settings of a client's connections: of a `ConnectLayer` and of the client around it.
    ConnectConfig for "ConnectLayer", prefix "connect_", on |_| true;
    /// The maximum number of open connections in total.
    live max_total: Option<u32> = None;
    /// The maximum number of open connections to one host.
    live max_per_host: Option<u32> = Some(64);
    /// The maximum number of calls that wait for a connection.
    live queue: u32 = 1024;
    /// The maximum time for which a call waits for a connection.
    live queue_wait: Duration = secs(5);
    /// The timeout of a connect, including the DNS lookup and TLS.
    live timeout: Duration = secs(5);
    /// The maximum age of a connection.
    live max_age: Option<Duration> = Some(secs(300));
    /// The maximum idle time of a connection; must be less than the keep-alive time of the peer.
    live max_idle: Option<Duration> = Some(secs(4));
    /// The maximum random share by which the maximum age and the maximum idle time of a connection are shorter.
    live jitter: f64 = 0.2;
    /// The keep-alive time of the peer, if it is known: nginx 75 s, Node.js 5 s, AWS's ALB 60 s. Only checked.
    live peer_keep_alive: Option<Duration> = None;
    /// The idle time before the first TCP keepalive probe, and the time between probes; the connection ends after
    /// three.
    fixed tcp_keepalive: Option<Duration> = Some(secs(15));
    /// Whether connections are HTTP/2 from the first byte, as gRPC without TLS requires.
    fixed http2_only: bool = false;
    /// The time between PING frames of an HTTP/2 connection.
    fixed http2_keepalive: Option<Duration> = None;
    /// The timeout for the PING acknowledgement.
    fixed http2_keepalive_timeout: Duration = secs(20);
}

#[cfg(feature = "connect")]
impl ConnectConfig {
    /// Returns the layer.
    ///
    /// # Errors
    ///
    /// Returns the error of the first invalid setting.
    pub fn layer(&self) -> Result<ConnectLayer, ConfigError> {
        let layer = ConnectLayer::new();
        self.update(&layer.handle())?;
        Ok(layer)
    }

    /// Returns the builder of a client over the connections of this layer, for the connector of hyper-util or another
    /// one.
    pub fn client(&self, layer: ConnectLayer) -> ClientBuilder {
        let builder = connect::Client::builder(layer);
        let builder = match self.tcp_keepalive {
            Some(time) => builder.tcp_keepalive(time, time, 3),
            None => builder.no_tcp_keepalive(),
        };
        let builder = match self.http2_keepalive {
            Some(every) => builder.http2_keepalive(every, self.http2_keepalive_timeout),
            None => builder,
        };
        if self.http2_only { builder.http2_only() } else { builder }
    }

    /// Applies the settings that can change while the layer is in use.
    pub(crate) fn update(&self, handle: &ConnectHandle) -> Result<(), ConfigError> {
        let cap = |max: Option<u32>| max.map_or(usize::MAX, |max| max as usize);
        handle.set_max_total(cap(self.max_total))?;
        handle.set_max_per_host(cap(self.max_per_host))?;
        handle.set_queue(self.queue as usize, self.queue_wait)?;
        handle.set_connect_timeout(self.timeout)?;
        handle.set_max_age(self.max_age)?;
        handle.set_max_idle(self.max_idle)?;
        handle.set_jitter(self.jitter)
    }
}

// ===== Health checks and calls =====

group! {
    /// The settings of a client's `check_health`.
    CheckHealthConfig for "check_health", prefix "check_health_", on |this| this.uri.is_some();
    /// The absolute URI that `check_health` requests through the whole stack; off: that of the health probe.
    live uri: Option<String> = None;
}

group! {
    /// The properties of the calls.
    CallsConfig for "calls", prefix "", on |_| true;
    /// Whether responses are long streams, so that no setting may bound a whole call; if it is loaded as true,
    /// `timeout_min_body_rate` and `limit_max_unread` of a server are off unless they are set.
    live streaming: bool = false;
}
