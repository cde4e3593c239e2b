use std::{fmt, time::Duration};

use tower_layer::Layer;

use super::{
    handle::HedgeHandle,
    service::Hedge,
    settings::{HedgeDelay, HedgeSettings},
};
use crate::{
    attempt::{Core, RetryBudget},
    classify::{Classify, Http},
    error::ConfigError,
    fault::Fault,
    outcome::{LayerKind, Outcome},
};

/// Sends hedge attempts of a slow call, and returns the first good response.
///
/// The layer and its clones share the settings, the counts and the budget, also if the layer is applied several times.
/// A setter after the layer has built a service returns a layer with settings and counts of its own, and the same
/// budget: the services that are built keep their settings. Use the [handle](Self::handle) to change a running layer.
/// See the [module](super).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct HedgeLayer<M = Http> {
    handle: HedgeHandle,
    protocol: M,
    fault: Fault,
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
        Self::with(HedgeDelay::Fixed(delay), fault)
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
        let latency = super::percentile::LatencyPercentile::new(share);
        Self::with(HedgeDelay::Percentile(Box::new(latency)), fault)
    }

    /// Returns a layer that never sends a hedge attempt, for stacks whose type contains this layer.
    #[cfg(feature = "config")]
    pub(crate) fn off() -> Self {
        Self::with(HedgeDelay::Off, None).without_budget()
    }

    fn with(delay: HedgeDelay, fault: Option<ConfigError>) -> Self {
        let settings = HedgeSettings::new(delay, Some(RetryBudget::ratio(0.05)));
        Self { handle: HedgeHandle(settings.into()), protocol: Http, fault: fault.into() }
    }
}

impl<M> HedgeLayer<M> {
    /// Gives this layer state of its own if a service has been built with its state.
    fn fork_if_in_use(&mut self) {
        if self.handle.0.is_in_use() {
            self.handle = HedgeHandle(self.handle.0.fork().into());
        }
    }

    fn set(mut self, set: impl FnOnce(&HedgeHandle)) -> Self {
        self.fork_if_in_use();
        set(&self.handle);
        self
    }

    fn try_set(mut self, set: impl FnOnce(&HedgeHandle) -> Result<(), ConfigError>) -> Self {
        self.fork_if_in_use();
        self.fault.accept(set(&self.handle));
        self
    }

    /// Sets a closure that classifies results. The layer then hedges requests of any type that is `Clone` or
    /// [`Replay`](crate::attempt::Replay). All of them count as safe to repeat.
    ///
    /// The closure receives the result of the wrapped service as `Result<&Response, &Error>`. Only a success is a good
    /// response. The error type stays the same.
    pub fn classify<C, Res, E>(self, classify: C) -> HedgeLayer<Classify<C>>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
    {
        HedgeLayer { handle: self.handle, protocol: Classify(classify), fault: self.fault }
    }

    /// Sets the budget of hedge attempts: [`RetryBudget::ratio(0.05)`](RetryBudget::ratio) by default. Pass clones of
    /// one budget to several layers to share it. If an outer retry layer shares the budget, both layers make a deposit
    /// for a call, which permits twice the ratio.
    ///
    /// Services that the layer has already made keep their budget.
    pub fn budget(self, budget: RetryBudget) -> Self {
        self.try_set(|handle| {
            budget.check()?;
            handle.0.set_budget(Some(budget));
            Ok(())
        })
    }

    /// Removes the budget. If all calls are slow, each hedge attempt that a call may have then adds the load of a call.
    pub fn without_budget(self) -> Self {
        self.set(|handle| handle.0.set_budget(None))
    }

    /// Sets the maximum number of hedge attempts of a call, from 1 to 10. 1 by default.
    ///
    /// A hedge attempt is sent if no attempt has a response when the delay has passed since the previous attempt. Each
    /// makes a withdrawal from the budget and passes the inner layers as a call of its own. The first good response is
    /// returned, and the other attempts are dropped. No hedge attempt is sent after a bad response: the attempts in
    /// flight decide.
    ///
    /// gRPC's hedging policy (gRFC A6) and Polly's hedging strategy have the same setting.
    ///
    /// [`HedgeHandle::set_max_hedges`] changes it while the layer runs.
    pub fn max_hedges(self, hedges: u32) -> Self {
        self.try_set(|handle| handle.set_max_hedges(hedges))
    }

    /// Sets the maximum number of bytes of a request body that are saved for a replay: 64 KiB by default. A request
    /// with a larger body is sent and not hedged.
    ///
    /// [`HedgeHandle::set_max_replay_bytes`] changes it while the layer runs.
    pub fn max_replay_bytes(self, bytes: u64) -> Self {
        self.set(|handle| handle.set_max_replay_bytes(bytes))
    }

    /// Declares every request safe to be sent more than once at the same time: also `POST` and `PATCH`, and thus all of
    /// gRPC.
    ///
    /// [`HedgeHandle::set_assume_idempotent`] changes it while the layer runs.
    pub fn assume_idempotent(self) -> Self {
        self.set(|handle| handle.set_assume_idempotent(true))
    }

    /// Sets the name of the layer in events. The first name that is set stays.
    pub fn name(self, name: &str) -> Self {
        self.set(|handle| handle.0.name.set(name))
    }

    /// Returns a handle that reads the counts of the layer and changes its settings while it runs.
    #[must_use]
    pub fn handle(&self) -> HedgeHandle {
        self.handle.clone()
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
        let settings = self.handle.0.clone();
        settings.set_in_use();
        let name = settings.name();
        self.fault.report(LayerKind::Hedge.as_str(), name, "nothing is hedged");
        let (budget, is_off) = (settings.budget(), self.fault.is_some() || settings.is_off());
        let core = Core::new(settings, budget, inner.clone(), is_off);
        Hedge::new(inner, core, self.protocol.clone())
    }
}

impl<M> fmt::Debug for HedgeLayer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeLayer")
            .field("settings", &*self.handle.0)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
