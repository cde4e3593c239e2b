use std::time::Duration;

use tower_layer::Layer;

use super::{
    adaptive::{Algorithm, Teller},
    handle::{ConcurrencyLimitHandle, checked, checked_max_unread, checked_order, checked_queue},
    queue::QueueOrder,
    reuse::Limit,
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
    /// A layer and all its clones share one limit, however often the layer is applied. See the [module](super).
    layer ConcurrencyLimitLayer {}
    /// The service of a [`ConcurrencyLimitLayer`].
    service ConcurrencyLimit []
    policy Limit
}

impl ConcurrencyLimitLayer {
    /// Creates a layer with a fixed limit: the maximum number of calls in flight, 1 or more. Further calls are rejected
    /// at once, unless there is a [`queue`](Self::queue).
    pub fn new(limit: usize) -> Self {
        let checked = checked(limit);
        let policy = Limit::fixed(*checked.as_ref().unwrap_or(&0));
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err().into() } }
    }

    /// Creates a layer whose limit is determined by `algorithm`. [`Knee`](super::adaptive::Knee) is recommended.
    ///
    /// An admitted call reads the clock twice and takes a short lock once.
    ///
    /// A panic of the algorithm is caught, and the limit keeps its value. An algorithm that panics here is a
    /// [`ConfigError`].
    pub fn adaptive(algorithm: impl Algorithm) -> Self {
        let limit = catch_panic(|| algorithm.limit());
        let policy = Limit::adaptive(limit.unwrap_or(1).max(1), Teller::new(algorithm));
        let fault = limit.is_none().then(|| {
            let remedy = "use an algorithm that does not panic";
            ConfigError::new("adaptive", format_args!("a panic in `limit`"), remedy)
        });
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: fault.into() } }
    }
}

impl<M, R> ConcurrencyLimitLayer<M, R> {
    /// Sets the maximum number of calls in the queue and the maximum time that each of them waits. The queue is first
    /// in, first out, unless [`queue_order`](Self::queue_order) sets another order.
    ///
    /// `length` is 0 to 2147483647; 0, the default, means no queue. With a queue, `longest_wait` must be 1 ms or more;
    /// it is rounded down to whole milliseconds.
    ///
    /// # Panics
    ///
    /// A call that has to wait panics outside of a Tokio runtime with timers.
    pub fn queue(mut self, length: usize, longest_wait: Duration) -> Self {
        let checked = checked_queue(length, longest_wait);
        if let Some(length) = self.plan.accept(checked) {
            self.plan.policy.set_queue(length, longest_wait);
        }
        self
    }

    /// Sets the order in which queued calls acquire permits: first in, first out by default. The time of an adaptive
    /// order must be above zero.
    pub fn queue_order(mut self, order: QueueOrder) -> Self {
        if let Some(order) = self.plan.accept(checked_order(order)) {
            self.plan.policy.set_order(order);
        }
        self
    }

    /// Sets the `Retry-After` hint of rejections; 1 s by default. A rejection for a passed deadline carries no hint.
    pub fn retry_after(self, after: Duration) -> Self {
        self.plan.policy.set_retry_after(after);
        self
    }

    /// Releases the permit of a call at its response head, instead of at the end of the body.
    pub fn release_at_head(self) -> Self {
        self.plan.policy.release_at_head();
        self
    }

    /// Lets an adaptive limit measure calls to the end of the response body, instead of to the response head. Use it
    /// where the body is the main work, and for streams that last much longer than their heads take. It has no effect
    /// on a fixed limit, which measures nothing.
    pub fn until_body_end(self) -> Self {
        if let Some(adaptive) = self.plan.policy.adaptive() {
            adaptive.until_body_end();
        }
        self
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a drop for an
    /// adaptive limit. The time starts when the upstream has the complete request, and only a call without a response
    /// head counts. Before this time such a call is neutral. 1 s by default; must be above zero. With `None`, such a
    /// call never counts.
    ///
    /// A fixed limit does not use outcomes, so a time is a [`ConfigError`](crate::error::ConfigError) there.
    pub fn count_cancelled_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        let time = time.into();
        let checked = match (time, self.plan.policy.adaptive()) {
            (Some(time), None) => {
                let remedy = "leave it out, or use an adaptive limit";
                Err(ConfigError::new("count_cancelled_after", time, remedy))
            }
            (Some(time), _) => ConfigError::above_zero("count_cancelled_after", time).map(Some),
            (None, _) => Ok(None),
        };
        if let (Some(time), Some(adaptive)) =
            (self.plan.accept(checked), self.plan.policy.adaptive())
        {
            adaptive.set_count_cancelled_after(time);
        }
        self
    }

    /// Sets the time after which a response that its client does not read releases its permit. The time must be above
    /// zero and is rounded down to whole milliseconds, to 1 ms or more. With `None`, the default, an unread response
    /// holds its permit.
    ///
    /// The time runs while the response body has not ended and the transport does not poll it, because its buffers are
    /// full. It may be exceeded by a quarter. While the body has no frame ready, it waits for its producer and the time
    /// does not run, so an idle stream that the client reads keeps its permit. A frame of more than 1 MiB has the time
    /// once more for each MiB. For a client that reads slowly, the time must be longer than it takes to read the
    /// buffers of the transport: up to a few megabytes for HTTP/1, and a stream's window for HTTP/2.
    ///
    /// The call is then counted in [`unread`](super::handle::ConcurrencyLimitSnapshot::unread). The connection and the response
    /// remain open: only the server can close the connection, as `Lifecycle::serve` does. If the client reads on, an
    /// inner [`TimeoutLayer`](crate::timeout::TimeoutLayer) fails the body; without one the response continues without a permit.
    ///
    /// The setting applies to responses that begin after it is set, to about a million at a time. It has no effect with
    /// [`release_at_head`](Self::release_at_head), with [`upgrades`](Self::upgrades), and for services whose responses
    /// have no body. A task on the runtime of the calls watches the responses; the task ends when there are none.
    pub fn max_unread(mut self, time: impl Into<Option<Duration>>) -> Self {
        if let Some(time) = self.plan.accept(checked_max_unread(time.into())) {
            self.plan.policy.set_max_unread(time);
        }
        self
    }

    /// Sets whether health calls of `grpc.health.v1.Health` need no permit: up to 1024 `Check` calls and 64 `Watch`
    /// streams at a time. Further ones acquire permits like any other call. On by default, and without effect until a
    /// [health registry](crate::health::Health) of this process serves the protocol.
    ///
    /// An exempt call is counted in [`exempt`](super::handle::ConcurrencyLimitSnapshot::exempt). The layer recognises it by
    /// method, content type and path, as it recognises [exempt paths](Self::exempt_paths). Turn it off for a client,
    /// and for a server that serves something else at these paths.
    pub fn exempt_grpc_health(self, on: bool) -> Self {
        self.plan.policy.set_exempts_health(on);
        self
    }

    /// Starts the limit in [shadow mode](ConcurrencyLimitHandle::shadow): it rejects no call, and counts the calls that
    /// it would have rejected.
    pub fn shadow(self) -> Self {
        self.plan.policy.set_shadow(true);
        self
    }

    /// Puts the permit of each call into the extensions of its request, as a [`CallPermit`](super::upgrade::CallPermit). A handler can take
    /// the permit and hold it for as long as the upgraded connection lives, such as a WebSocket or a tunnel.
    ///
    /// This costs each call an allocation and an entry in the extensions. Call the methods that set how calls are
    /// classified before this one.
    pub fn upgrades(self) -> ConcurrencyLimitLayer<Upgrades<M>, R> {
        let Plan { policy, protocol, reject, fault } = self.plan;
        ConcurrencyLimitLayer { plan: Plan { policy, protocol: Upgrades(protocol), reject, fault } }
    }

    pub(super) fn into_plan(self) -> Plan<Limit, M, R> {
        self.plan
    }

    /// Sets the name of the limit in rejections and events. Only the first name takes effect.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
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
        ConcurrencyLimit { admission: self.plan.service(inner) }
    }
}
