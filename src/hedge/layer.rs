use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tower_layer::Layer;

use super::service::Hedge;
use crate::{
    attempt::{Core, RetryBudget, Rules, SafeRequests, lock},
    classify::{Classify, Http},
    error::ConfigError,
    fault::Fault,
    outcome::Outcome,
};

/// Sends hedge attempts of a slow call, and returns the first good response.
///
/// The layer and all its clones share the settings and the budget, also if the layer is applied several times. See the
/// [module](super).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct HedgeLayer<M = Http> {
    settings: Arc<HedgeSettings>,
    protocol: M,
    fault: Fault,
}

/// The settings and the counts of one hedge layer.
pub(crate) struct HedgeSettings {
    delay: Delay,
    body_cap: AtomicU64,
    assume_idempotent: AtomicBool,
    max_hedges: AtomicU32,
    budget: Mutex<Option<RetryBudget>>,
    pub(crate) sent: AtomicU64,
    pub(crate) won: AtomicU64,
    pub(crate) denied: AtomicU64,
    name: OnceLock<Box<str>>,
}

/// The maximum of [`HedgeLayer::max_hedges`].
const MAX_HEDGES: u32 = 10;

enum Delay {
    /// No hedge attempt is sent.
    #[cfg(feature = "config")]
    Off,
    Fixed(Duration),
    Live(Box<super::percentile::Live>),
}

impl HedgeSettings {
    /// Returns the current delay. `None` if no hedge attempt is sent.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match &self.delay {
            #[cfg(feature = "config")]
            Delay::Off => None,
            Delay::Fixed(delay) => Some(*delay),
            Delay::Live(live) => live.delay(),
        }
    }

    pub(crate) fn max_hedges(&self) -> u32 {
        self.max_hedges.load(Ordering::Relaxed)
    }

    /// Returns whether the layer records the latency of calls.
    pub(crate) fn learns(&self) -> bool {
        matches!(self.delay, Delay::Live(_))
    }

    /// Returns whether every request passes unchanged.
    fn is_off(&self) -> bool {
        #[cfg(feature = "config")]
        return matches!(self.delay, Delay::Off);
        #[cfg(not(feature = "config"))]
        false
    }

    /// Records the latency of a call that has a good response. A call that fails fast is no reason for a shorter delay,
    /// and is not recorded.
    pub(crate) fn took(&self, began: Option<Instant>) {
        if let (Delay::Live(live), Some(began)) = (&self.delay, began) {
            live.record(began);
        }
    }

    pub(crate) fn rules<'a>(&self, only: &'a SafeRequests, never: bool, marks: bool) -> Rules<'a> {
        Rules { body_cap: self.body_cap.load(Ordering::Relaxed), only: Some(only), never, marks }
    }

    pub(crate) fn safe(&self) -> SafeRequests {
        if self.assume_idempotent.load(Ordering::Relaxed) {
            SafeRequests::All
        } else {
            SafeRequests::Idempotent
        }
    }

    #[cfg_attr(not(feature = "tracing"), allow(dead_code))] // Only events use it.
    pub(crate) fn name(&self) -> &str {
        self.name.get().map_or("", |name| name)
    }

    fn budget(&self) -> Option<RetryBudget> {
        lock(&self.budget).clone()
    }
}

impl HedgeLayer {
    /// Returns a layer that sends a hedge attempt if a call has no response after `delay`: for safe methods, with a
    /// budget of 5 % of the calls.
    ///
    /// The delay starts at the call, has a precision of 1 ms and needs tokio's timer. Begin near the 95th percentile of
    /// the latency. Zero would double every call, and is a [`ConfigError`] of [`checked`](Self::checked). After a delay
    /// beyond the range of the clock, no hedge attempt is sent.
    pub fn http(delay: Duration) -> Self {
        let fault = delay.is_zero().then(|| {
            let remedy = "use more than zero, such as the 95th percentile of the latency";
            ConfigError::new("delay", delay, remedy)
        });
        Self::with(Delay::Fixed(delay), fault)
    }

    /// Returns a layer whose delay is this percentile of the latency: with 0.95, about one call in twenty is hedged.
    ///
    /// The percentile is that of the calls of the last 30 s to 60 s, too high by less than 1 %. The delay is at
    /// least 1 ms. No hedge attempt is sent before 20 calls are recorded. A percentile that is not above 0 and below 1
    /// is a [`ConfigError`] of [`checked`](Self::checked).
    ///
    /// A call is recorded when it has a good response. If a hedge attempt has returned that response, the recorded time
    /// is shorter than that of the first attempt would have been, but both are beyond the percentile. Each call costs a
    /// clock read and a mutex.
    pub fn after_percentile(share: f64) -> Self {
        let fault = (!(share > 0.0 && share < 1.0)).then(|| {
            let remedy = "use a share above 0 and below 1, such as 0.95";
            ConfigError::new("after_percentile", share, remedy)
        });
        Self::with(Delay::Live(Box::new(super::percentile::Live::new(share))), fault)
    }

    /// Returns a layer that never sends a hedge attempt, for stacks whose type contains this layer.
    #[cfg(feature = "config")]
    pub(crate) fn off() -> Self {
        Self::with(Delay::Off, None).without_budget()
    }

    fn with(delay: Delay, fault: Option<ConfigError>) -> Self {
        let settings = HedgeSettings {
            delay,
            body_cap: AtomicU64::new(64 * 1024),
            assume_idempotent: AtomicBool::new(false),
            max_hedges: AtomicU32::new(1),
            budget: Mutex::new(Some(RetryBudget::ratio(0.05))),
            sent: AtomicU64::new(0),
            won: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            name: OnceLock::new(),
        };
        Self { settings: Arc::new(settings), protocol: Http, fault: fault.into() }
    }
}

impl<M> HedgeLayer<M> {
    /// Sets a closure that classifies results. The layer then hedges requests of any type that is `Clone` or
    /// [`Replay`](crate::attempt::Replay). All of them count as safe to repeat.
    ///
    /// The closure receives the result of the wrapped service as `Result<&Response, &Error>`. Only a success is a good
    /// response. The error type stays the same.
    pub fn classify<C, Res, E>(self, classify: C) -> HedgeLayer<Classify<C>>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
    {
        HedgeLayer { settings: self.settings, protocol: Classify(classify), fault: self.fault }
    }

    /// Sets the budget of hedge attempts: [`RetryBudget::ratio(0.05)`](RetryBudget::ratio) by default. Pass clones of
    /// one budget to several layers to share it. If an outer retry layer shares the budget, both layers make a deposit
    /// for a call, which permits twice the ratio.
    ///
    /// Services that the layer has already made keep their budget.
    pub fn budget(mut self, budget: RetryBudget) -> Self {
        match budget.check() {
            Ok(()) => *lock(&self.settings.budget) = Some(budget),
            Err(error) => {
                self.fault.get_or_insert(error);
            }
        }
        self
    }

    /// Removes the budget. If all calls are slow, each hedge attempt that a call may have then adds the load of a call.
    pub fn without_budget(self) -> Self {
        *lock(&self.settings.budget) = None;
        self
    }

    /// Sets the maximum number of hedge attempts of a call, from 1 to 10. 1 by default.
    ///
    /// A hedge attempt is sent if no attempt has a response when the delay has passed since the previous attempt. Each
    /// makes a withdrawal from the budget and passes the inner layers as a call of its own. The first good response is
    /// returned, and the other attempts are dropped. No hedge attempt is sent after a bad response: the attempts in
    /// flight decide.
    ///
    /// gRPC's hedging policy (gRFC A6) and Polly's hedging strategy have the same setting.
    pub fn max_hedges(mut self, hedges: u32) -> Self {
        match hedges {
            1..=MAX_HEDGES => self.settings.max_hedges.store(hedges, Ordering::Relaxed),
            _ => self.fault.get_or_insert_with(|| {
                ConfigError::new("max_hedges", hedges, "use 1 to 10 hedge attempts")
            }),
        }
        self
    }

    /// Sets the maximum number of bytes of a request body that are saved for a replay: 64 KiB by default. A request
    /// with a larger body is sent and not hedged.
    pub fn max_replay_bytes(self, bytes: u64) -> Self {
        self.settings.body_cap.store(bytes, Ordering::Relaxed);
        self
    }

    /// Declares every request safe to be sent more than once at the same time: also `POST` and `PATCH`, and thus all of
    /// gRPC.
    pub fn assume_idempotent(self) -> Self {
        self.settings.assume_idempotent.store(true, Ordering::Relaxed);
        self
    }

    /// Sets the name of the layer in events. The first name that is set stays.
    pub fn name(self, name: &str) -> Self {
        self.settings.name.get_or_init(|| name.into());
        self
    }

    /// Returns a handle to the counts of the layer.
    #[must_use]
    pub fn handle(&self) -> HedgeHandle {
        HedgeHandle(self.settings.clone())
    }

    /// Returns the layer if its settings can work. A layer with a fault that is used without this check never hedges.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] of the first setting that cannot work. It names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }
}

impl<S: Clone, M: Clone> Layer<S> for HedgeLayer<M> {
    type Service = Hedge<S, M>;

    fn layer(&self, inner: S) -> Self::Service {
        let (settings, budget) = (self.settings.clone(), self.settings.budget());
        self.fault.report("hedge", "nothing is hedged");
        let core = Core::new(
            settings,
            budget,
            inner.clone(),
            self.fault.is_some() || self.settings.is_off(),
        );
        Hedge::new(inner, core, self.protocol.clone())
    }
}

impl<M> fmt::Debug for HedgeLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeLayer")
            .field("settings", &*self.settings)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for HedgeSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeSettings")
            .field("delay", &self.delay())
            .field("budget", &self.budget())
            .finish_non_exhaustive()
    }
}

// ===== Handle =====

/// A handle to the counts of a hedge layer.
#[derive(Clone, Debug)]
pub struct HedgeHandle(Arc<HedgeSettings>);

/// A snapshot of a hedge layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct HedgeSnapshot {
    /// The number of hedge attempts that were sent. A call can have [several](HedgeLayer::max_hedges).
    pub sent: u64,
    /// The number of calls that returned the response of a hedge attempt, good or bad.
    pub won: u64,
    /// The number of hedge attempts of this layer that the budget denied.
    pub budget_denied: u64,
    /// The number of hedge attempts that the budget permits now. `None` without a budget.
    pub budget_balance: Option<f64>,
}

impl HedgeHandle {
    /// Returns the current counts.
    #[must_use]
    pub fn snapshot(&self) -> HedgeSnapshot {
        HedgeSnapshot {
            sent: self.0.sent.load(Ordering::Relaxed),
            won: self.0.won.load(Ordering::Relaxed),
            budget_denied: self.0.denied.load(Ordering::Relaxed),
            budget_balance: self.0.budget().map(|budget| budget.balance()),
        }
    }
}
