use std::time::Duration;

use tower_layer::Layer;

use super::{
    adaptive::{Algorithm, Teller},
    handle::{ConcurrencyLimitHandle, checked, checked_max_unread, checked_order, checked_queue},
    lasting::Limit,
    queue::QueueOrder,
    upgrade::Upgrades,
};
use crate::{
    ConfigError,
    admission::{Plan, admission_layer},
    call::{AsError, Http, catch_panic},
};

admission_layer! {
    /// Lets so many calls be in flight at once, each to the end of its response body.
    ///
    /// One limit belongs to one layer and all its clones, however often the layer is applied. See the
    /// [module](crate::limit).
    layer ConcurrencyLimitLayer {}
    /// The service of a [`ConcurrencyLimitLayer`].
    service ConcurrencyLimit []
    policy Limit
}

impl ConcurrencyLimitLayer {
    /// At most `limit` calls at once, 1 or more. What comes beyond is refused at once, unless
    /// [`queue`](Self::queue) lets it wait.
    pub fn new(limit: usize) -> Self {
        let checked = checked(limit);
        let policy = Limit::fixed(*checked.as_ref().unwrap_or(&0));
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err().into() } }
    }

    /// As many calls at once as `algorithm` finds right: [`Knee`](super::adaptive::Knee), if in doubt.
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
    /// Lets up to `length` calls wait for their turn, first come first served unless
    /// [`queue_order`](Self::queue_order) says otherwise, each for `longest_wait`
    /// (1 ms or more, in whole milliseconds) and no longer. A length of 0 is the default: nobody waits. More than
    /// 2147483647 cannot.
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

    /// Whose turn it is, of those who wait: who came first by default. The time of an adaptive order is
    /// above zero.
    pub fn queue_order(mut self, order: QueueOrder) -> Self {
        if let Some(order) = self.plan.accept(checked_order(order)) {
            self.plan.policy.set_order(order);
        }
        self
    }

    /// What a refused call is told of when to come back: 1 s by default.
    pub fn retry_after(self, after: Duration) -> Self {
        self.plan.policy.set_retry_after(after);
        self
    }

    /// Frees a call's place when its response head is here, instead of at the end of the body.
    pub fn release_at_head(self) -> Self {
        self.plan.policy.release_at_head();
        self
    }

    /// Lets an adaptive limit measure calls to the end of the response body, instead of to its head: where
    /// the body is the work, and for streams that go on for much longer than their heads take. A fixed limit
    /// measures nothing.
    pub fn until_body_end(self) -> Self {
        if let Some(adaptive) = self.plan.policy.adaptive() {
            adaptive.until_body_end();
        }
        self
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a drop for an
    /// adaptive limit. The time starts when the upstream has the complete request, and only a call without a response
    /// head counts. Before this time such a call is neutral. 1 s by default; must be above zero. `None` never counts
    /// such a call.
    ///
    /// A fixed limit does not use outcomes, so a time is a [`ConfigError`](crate::ConfigError) there.
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

    /// Sets the time after which a response that its client does not read releases its permit; above zero, in whole
    /// milliseconds. `None`, which is the default: a response holds its permit for as long as it is not read.
    ///
    /// The time runs while the transport does not poll a response body that has more to give: its buffers are full. It
    /// may be exceeded by a quarter. A body without a frame for its reader waits for its producer, so that an idle
    /// stream that the client reads stays open. A frame of more than 1 MiB has the time once more for each MiB. For a
    /// client that reads slowly, the time must be longer than it takes to read the buffers of the transport: up to a
    /// few megabytes for HTTP/1, and a stream's window for HTTP/2.
    ///
    /// The call then counts in [`unread`](super::ConcurrencyLimitSnapshot::unread). The connection remains open, and
    /// with it the response: only the server can close it, as `Lifecycle::serve` does. If the client reads on, an
    /// inner [`TimeoutLayer`](crate::TimeoutLayer) fails the body; without one the response continues without a permit.
    ///
    /// The setting holds for responses that begin from now on, up to about a million at once. It has no effect with
    /// [`release_at_head`](Self::release_at_head), [`upgrades`](Self::upgrades) and services whose responses have no
    /// body. A task on the runtime of the calls watches the responses. It ends when there are none.
    pub fn max_unread(mut self, time: impl Into<Option<Duration>>) -> Self {
        if let Some(time) = self.plan.accept(checked_max_unread(time.into())) {
            self.plan.policy.set_max_unread(time);
        }
        self
    }

    /// Sets whether health calls of `grpc.health.v1.Health` need no permit: at most 1024 `Check` calls and 64 `Watch`
    /// streams at a time. Further ones take permits as any call does. On by default, and without effect until a
    /// [health registry](crate::Health) of this process serves the protocol.
    ///
    /// An exempt call is counted in [`exempt`](super::ConcurrencyLimitSnapshot::exempt). The layer recognises it by
    /// method, content type and path, as it recognises [exempt paths](Self::exempt_paths). Turn it off for a client,
    /// and for a server that serves something else at these paths.
    pub fn exempt_grpc_health(self, on: bool) -> Self {
        self.plan.policy.set_exempts_health(on);
        self
    }

    /// Begins in [shadow mode](ConcurrencyLimitHandle::shadow): refuses nobody, and counts who would be.
    pub fn shadow(self) -> Self {
        self.plan.policy.set_shadow(true);
        self
    }

    /// Lets handlers take their call's place along, as a [`Held`](super::Held) in the request's extensions,
    /// and hold it as long as what the call was upgraded to: a WebSocket, a tunnel. Costs an allocation a
    /// call, and what the extensions take. How calls are judged is said before.
    pub fn upgrades(self) -> ConcurrencyLimitLayer<Upgrades<M>, R> {
        let Plan { policy, protocol, reject, fault } = self.plan;
        ConcurrencyLimitLayer { plan: Plan { policy, protocol: Upgrades(protocol), reject, fault } }
    }

    pub(super) fn into_plan(self) -> Plan<Limit, M, R> {
        self.plan
    }

    /// A name for refusals and events. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
    }

    /// Looks at the limit and resizes it.
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
