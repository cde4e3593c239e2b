use std::{
    fmt,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tower_layer::Layer;

use super::{
    super::{
        budget::RetryBudget,
        core::{Core, lock},
        exchange::Rules,
        policy::Safe,
    },
    service::Hedge,
};
use crate::{
    ConfigError,
    call::{Classify, Http, Outcome, Shared},
    error::Fault,
};

/// Sends hedge attempts of a slow call, and returns the first good response.
///
/// Its settings and its budget belong to one layer and all its clones, however often the layer is
/// applied. See the [module](crate::retry::hedge).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct HedgeLayer<M = Http> {
    settings: Shared<Settings>,
    protocol: M,
    fault: Fault,
}

/// The settings and the counts of one hedge layer.
pub(super) struct Settings {
    delay: Delay,
    body_cap: AtomicU64,
    assume_idempotent: AtomicBool,
    max_hedges: AtomicU32,
    budget: Mutex<Option<RetryBudget>>,
    pub(super) sent: AtomicU64,
    pub(super) won: AtomicU64,
    pub(super) denied: AtomicU64,
    name: OnceLock<Box<str>>,
}

/// The maximum of [`HedgeLayer::max_hedges`].
const MAX_HEDGES: u32 = 10;

enum Delay {
    /// There is none to be.
    #[cfg(feature = "config")]
    Off,
    Fixed(Duration),
    #[cfg(feature = "percentile")]
    Live(Box<super::live::Live>),
}

impl Settings {
    /// None: there is to be no hedge.
    pub(super) fn delay(&self) -> Option<Duration> {
        match &self.delay {
            #[cfg(feature = "config")]
            Delay::Off => None,
            Delay::Fixed(delay) => Some(*delay),
            #[cfg(feature = "percentile")]
            Delay::Live(live) => live.delay(),
        }
    }

    pub(super) fn max_hedges(&self) -> u32 {
        self.max_hedges.load(Ordering::Relaxed)
    }

    /// Whether it is to be told how long calls take.
    pub(super) fn learns(&self) -> bool {
        #[cfg(feature = "percentile")]
        return matches!(self.delay, Delay::Live(_));
        #[cfg(not(feature = "percentile"))]
        false
    }

    /// Every request passes as it is.
    fn is_off(&self) -> bool {
        #[cfg(feature = "config")]
        return matches!(self.delay, Delay::Off);
        #[cfg(not(feature = "config"))]
        false
    }

    /// A call that began then has a good answer: one that fails fast is no reason to hedge sooner.
    pub(super) fn took(&self, _began: Option<Instant>) {
        #[cfg(feature = "percentile")]
        if let (Delay::Live(live), Some(began)) = (&self.delay, _began) {
            live.took(began.elapsed());
        }
    }

    pub(super) fn rules<'a>(&self, only: &'a Safe, never: bool, marks: bool) -> Rules<'a> {
        Rules { body_cap: self.body_cap.load(Ordering::Relaxed), only: Some(only), never, marks }
    }

    pub(super) fn safe(&self) -> Safe {
        if self.assume_idempotent.load(Ordering::Relaxed) { Safe::All } else { Safe::Idempotent }
    }

    #[cfg_attr(not(feature = "tracing"), allow(dead_code))] // Only events use it.
    pub(super) fn name(&self) -> &str {
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
    /// The delay is measured from the call, to the millisecond, and needs tokio's timer. Near the 95th
    /// percentile of the latency is where to begin. Zero is a fault that [`checked`](Self::checked) tells:
    /// it would double every call. One that is too long for a clock never ends.
    pub fn http(delay: Duration) -> Self {
        let fault = delay.is_zero().then(|| {
            let remedy = "use more than zero, such as the 95th percentile of the latency";
            ConfigError::new("delay", delay, remedy)
        });
        Self::with(Delay::Fixed(delay), fault)
    }

    /// Returns a layer whose delay is this percentile of the latency: with 0.95, at most one call in twenty is hedged.
    ///
    /// The percentile is that of the calls of the last 30 s to 60 s, with an error of at most 1 %. The delay is at
    /// least 1 ms. No hedge attempt is sent before 20 calls are recorded.
    ///
    /// A call is known when it has a good answer. One whose hedge was faster counts with what it took all the same:
    /// that is beyond the percentile, as its own time would be. Each call costs a clock read and a mutex.
    #[cfg(feature = "percentile")]
    #[cfg_attr(docsrs, doc(cfg(feature = "percentile")))]
    pub fn after_percentile(share: f64) -> Self {
        let fault = (!(share > 0.0 && share < 1.0)).then(|| {
            let remedy = "use a share above 0 and below 1, such as 0.95";
            ConfigError::new("after_percentile", share, remedy)
        });
        Self::with(Delay::Live(Box::new(super::live::Live::new(share))), fault)
    }

    /// Returns a layer that never sends a hedge attempt, for stacks whose type contains this layer.
    #[cfg(feature = "config")]
    pub(crate) fn off() -> Self {
        Self::with(Delay::Off, None).without_budget()
    }

    fn with(delay: Delay, fault: Option<ConfigError>) -> Self {
        let settings = Settings {
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
        Self { settings: Shared::new(settings), protocol: Http, fault: fault.into() }
    }
}

impl<M> HedgeLayer<M> {
    /// Hedges requests of any type that is `Clone` or [`Replay`](crate::retry::Replay), by a closure that says what failed. All of them count as safe
    /// to repeat.
    ///
    /// It gets exactly what the wrapped service gives, as `Result<&Response, &Error>`; only a success is a
    /// good answer. The error type is left alone.
    pub fn classify<C, Res, E>(self, classify: C) -> HedgeLayer<Classify<C>>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
    {
        HedgeLayer { settings: self.settings, protocol: Classify(classify), fault: self.fault }
    }

    /// How many hedges there may be for so many calls: [`RetryBudget::ratio(0.05)`](RetryBudget::ratio) by
    /// default. Pass clones of one to several layers to share it. A retry over this layer that shares it
    /// pays in for the same calls: their ratio is then met twice.
    ///
    /// Services that the layer made before keep theirs.
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

    /// How many bytes of a request body are kept to be sent again: 64 KiB by default. A larger one is
    /// sent all the same, and not hedged.
    pub fn replay_up_to(self, bytes: u64) -> Self {
        self.settings.body_cap.store(bytes, Ordering::Relaxed);
        self
    }

    /// Every request may be sent twice at the same time: also `POST` and `PATCH`, so all of gRPC.
    pub fn assume_idempotent(self) -> Self {
        self.settings.assume_idempotent.store(true, Ordering::Relaxed);
        self
    }

    /// A name for events. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.settings.name.get_or_init(|| name.into());
        self
    }

    /// Looks at what the layer does.
    #[must_use]
    pub fn handle(&self) -> HedgeHandle {
        HedgeHandle(self.settings.clone())
    }

    /// The layer, or the first of its settings that cannot work. A layer with such a setting that is
    /// used all the same never hedges.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
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

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("delay", &self.delay())
            .field("budget", &self.budget())
            .finish_non_exhaustive()
    }
}

// ===== From outside =====

/// Looks at a hedge layer, from outside of the stack.
#[derive(Clone, Debug)]
pub struct HedgeHandle(Shared<Settings>);

/// A hedge layer at one moment.
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
    /// All there is to know at this moment.
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
