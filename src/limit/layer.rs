use std::time::Duration;

use tower_layer::Layer;

use super::{
    adaptive::{Algorithm, Sampler},
    check::{
        checked_cancelled_after, checked_limit, checked_max_unread, checked_order, checked_queue,
    },
    handle::ConcurrencyLimitHandle,
    limiter::Limiter,
    queue::QueueOrder,
    shared::SharedLimiter,
    upgrade::Upgrades,
};
use crate::{
    admission::{Plan, admission_layer},
    classify::Http,
    error::ConfigError,
    respond::AsError,
    user_code::catch_panic,
};

admission_layer! {
    /// Limits the number of calls in flight. Each call holds its permit to the end of its response body.
    ///
    /// A layer and all its clones share one limit, however often the layer is applied. A setter after the layer has
    /// built a service returns a layer with state of its own; use the [handle](ConcurrencyLimitHandle) to change a
    /// running layer. See the [module](super).
    layer ConcurrencyLimitLayer {}
    /// The service of a [`ConcurrencyLimitLayer`].
    service ConcurrencyLimit []
    future ConcurrencyLimitFuture
    policy SharedLimiter
}

impl ConcurrencyLimitLayer {
    /// Creates a layer with a fixed limit: the maximum number of calls in flight, 1 or more. Further calls are rejected
    /// at once, unless there is a [`queue`](Self::queue).
    pub fn new(limit: usize) -> Self {
        let checked = checked_limit(limit);
        let policy = SharedLimiter::new(*checked.as_ref().unwrap_or(&0), None);
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err().into() } }
    }

    /// Creates a layer whose limit is determined by `algorithm`. [`Knee`](super::adaptive::Knee) is recommended.
    ///
    /// An admitted call reads the clock twice and takes a short lock once.
    ///
    /// A panic of the algorithm is caught, and the limit keeps its value. An algorithm that panics here is a
    /// [`ConfigError`].
    pub fn adaptive(algorithm: impl Algorithm + Clone) -> Self {
        let limit = catch_panic(|| algorithm.limit());
        let policy = SharedLimiter::new(limit.unwrap_or(1).max(1), Some(Sampler::new(algorithm)));
        let fault = limit.is_none().then(|| {
            let remedy = "use an algorithm that does not panic";
            ConfigError::new("adaptive", format_args!("a panic in `limit`"), remedy)
        });
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: fault.into() } }
    }
}

impl<M, R> ConcurrencyLimitLayer<M, R> {
    /// Applies a valid setting. If a service uses the state of the layer, the layer gets a state of its own first.
    fn set<T>(mut self, value: Result<T, ConfigError>, set: impl FnOnce(&Limiter, T)) -> Self {
        let value = value.and_then(|value| self.plan.policy.detach().map(|()| value));
        if let Some(value) = self.plan.accept(value) {
            set(&self.plan.policy, value);
        }
        self
    }

    /// Sets the maximum number of calls in the queue and the maximum time that each of them waits. The queue is first
    /// in, first out, unless [`queue_order`](Self::queue_order) sets another order.
    ///
    /// `length` is 0 to 2147483647; 0, the default, means no queue. With a queue, `max_wait` must be 1 ms or more;
    /// it is rounded down to whole milliseconds.
    ///
    /// # Panics
    ///
    /// A call that has to wait panics outside of a Tokio runtime with timers.
    pub fn queue(self, length: usize, max_wait: Duration) -> Self {
        self.set(checked_queue(length, max_wait), |limiter, length| {
            limiter.set_queue(length, max_wait);
        })
    }

    /// Sets the order in which queued calls acquire permits: first in, first out by default. The time of an adaptive
    /// order must be above zero.
    pub fn queue_order(self, order: QueueOrder) -> Self {
        self.set(checked_order(order), Limiter::set_order)
    }

    /// Sets the `Retry-After` hint of rejections; 1 s by default. A rejection for a passed deadline carries no hint.
    pub fn retry_after(self, after: Duration) -> Self {
        self.set(Ok(after), Limiter::set_retry_after)
    }

    /// Releases the permit of a call at its response head, instead of at the end of the body.
    pub fn release_at_head(self) -> Self {
        self.set(Ok(true), Limiter::set_release_at_head)
    }

    /// Lets an adaptive limit measure calls to the end of the response body, instead of to the response head. Use it
    /// where the body is the main work, and for streams that last much longer than their heads take. It has no effect
    /// on a fixed limit, which measures nothing.
    pub fn until_body_end(self) -> Self {
        self.set(Ok(true), |limiter, on| {
            limiter.adaptive().into_iter().for_each(|adaptive| adaptive.set_until_body_end(on));
        })
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a drop for an
    /// adaptive limit. The time starts when the upstream has the complete request, and only a call without a response
    /// head counts. Before this time such a call is neutral. 1 s by default; must be above zero. With `None`, such a
    /// call never counts.
    ///
    /// A fixed limit does not use outcomes, so a time is a [`ConfigError`](crate::error::ConfigError) there.
    pub fn count_cancelled_after(self, time: impl Into<Option<Duration>>) -> Self {
        let checked = checked_cancelled_after(time.into(), self.plan.policy.adaptive().is_some());
        self.set(checked, |limiter, time| {
            let adaptive = limiter.adaptive().into_iter();
            adaptive.for_each(|adaptive| adaptive.set_count_cancelled_after(time));
        })
    }

    /// Sets the time after which a response that its client does not read releases its permit. The time must be above
    /// zero and is rounded down to whole milliseconds, to 1 ms or more. With `None`, the default, an unread response
    /// holds its permit.
    ///
    /// The time runs while the response body has not ended and the transport does not poll it, because its buffers are
    /// full. It may be exceeded by a quarter. While the body has no frame ready, it waits for its producer and the time
    /// does not run, so an idle stream that the client reads keeps its permit. A frame of 1 MiB or more has the time
    /// once more for each whole MiB. For a client that reads slowly, the time must be longer than it takes to read the
    /// buffers of the transport: up to a few megabytes for HTTP/1, and a stream's window for HTTP/2.
    ///
    /// The call is then counted in [`unread`](super::handle::ConcurrencyLimitSnapshot::unread). The connection and the
    /// response remain open: only the server can close the connection, as `Lifecycle::serve` does. If the client reads
    /// on, an inner [`TimeoutLayer`](crate::timeout::TimeoutLayer) fails the body; without one the response continues
    /// without a permit.
    ///
    /// The setting applies to responses that begin after it is set, to about a million at a time. It has no effect with
    /// [`release_at_head`](Self::release_at_head), with [`upgrades`](Self::upgrades), and for services whose responses
    /// have no body. A task on the runtime of the calls watches the responses; the task ends when there are none.
    pub fn max_unread(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(checked_max_unread(time.into()), Limiter::set_max_unread)
    }

    /// Sets whether health calls of `grpc.health.v1.Health` need no permit: up to 1024 `Check` calls and 64 `Watch`
    /// streams at a time. Further ones acquire permits like any other call. On by default, and without effect until a
    /// [health registry](crate::health::Health) of this process serves the protocol.
    ///
    /// An exempt call is counted in [`exempt`](super::handle::ConcurrencyLimitSnapshot::exempt). The layer recognises
    /// it by method, content type and path, as it recognises [exempt paths](Self::exempt_paths). Turn it off for a
    /// client, and for a server that serves something else at these paths.
    pub fn exempt_grpc_health(self, on: bool) -> Self {
        self.set(Ok(on), Limiter::set_exempts_health)
    }

    /// Starts the limit in [shadow mode](ConcurrencyLimitHandle::set_shadow): it rejects no call, and counts the calls
    /// that it would have rejected.
    pub fn shadow(self) -> Self {
        self.set(Ok(true), Limiter::set_shadow)
    }

    /// Puts the permit of each call into the extensions of its request, as a
    /// [`CallPermit`](super::upgrade::CallPermit). A handler can take the permit and hold it for as long as the
    /// upgraded connection lives, such as a WebSocket or a tunnel.
    ///
    /// This costs each call an allocation and an entry in the extensions. Call the methods that set how calls are
    /// classified before this one.
    pub fn upgrades(self) -> ConcurrencyLimitLayer<Upgrades<M>, R> {
        let Plan { policy, protocol, reject, fault } = self.plan;
        ConcurrencyLimitLayer { plan: Plan { policy, protocol: Upgrades(protocol), reject, fault } }
    }

    pub(super) fn into_plan(self) -> Plan<SharedLimiter, M, R> {
        self.plan
    }

    /// Sets the name of the limit in rejections and events. Only the first name takes effect.
    pub fn name(self, name: &str) -> Self {
        self.set(Ok(name), Limiter::set_name)
    }

    /// Returns a handle that observes and changes the limit.
    #[must_use]
    pub fn handle(&self) -> ConcurrencyLimitHandle {
        ConcurrencyLimitHandle(self.plan.policy.clone())
    }
}

impl<S, M: Clone, R: Clone> Layer<S> for ConcurrencyLimitLayer<M, R> {
    type Service = ConcurrencyLimit<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.plan.policy.set_in_use();
        ConcurrencyLimit { admission: self.plan.service(inner) }
    }
}
