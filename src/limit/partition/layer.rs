use std::fmt;

use tower_layer::Layer;

use super::{
    super::{
        handle::ConcurrencyLimitHandle, layer::ConcurrencyLimitLayer, limiter::Limiter,
        shared::SharedLimiter,
    },
    class::{ClassifyCall, ExemptPaths, Priority},
    shares::Shares,
};
use crate::{
    admission::{Plan, admission_layer},
    error::ConfigError,
};

/// The policy of a limit that distinguishes calls.
#[derive(Clone)]
pub(crate) struct PartitionedPolicy<K> {
    pub(crate) classifier: K,
    pub(crate) limiter: SharedLimiter,
}

impl<K> fmt::Debug for PartitionedPolicy<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limiter.fmt(f)
    }
}

admission_layer! {
    /// A concurrency limit that distinguishes calls, made by
    /// [`ConcurrencyLimitLayer::classify_by`](super::super::layer::ConcurrencyLimitLayer::classify_by) or
    /// [`exempt_paths`](super::super::layer::ConcurrencyLimitLayer::exempt_paths). See the [module](super).
    layer PartitionedLimitLayer {}
    /// The service of a [`PartitionedLimitLayer`].
    service PartitionedLimit [K]
    future PartitionedLimitFuture
    policy PartitionedPolicy<K>
    where K: ClassifyCall<Req>
}

impl<M, R> ConcurrencyLimitLayer<M, R> {
    /// Classifies calls by a closure over the request that returns a [`CallClass`](super::class::CallClass). Call the
    /// methods that set the limit, its queue and the other settings before this one.
    pub fn classify_by<K>(self, classifier: K) -> PartitionedLimitLayer<K, M, R> {
        let Plan { policy: limiter, protocol, reject, fault } = self.into_plan();
        PartitionedLimitLayer {
            plan: Plan {
                policy: PartitionedPolicy { classifier, limiter },
                protocol,
                reject,
                fault,
            },
        }
    }

    /// Exempts the calls of these paths from the limit, and counts them separately. A path matches exactly; a path that
    /// ends in `/*`, such as `/grpc.health.v1.Health/*`, matches all paths below it. Paths are compared as the layer
    /// receives them: inside of a router that axum nests, without the prefix of the nest. A path with dot segments or
    /// with encoded dots, slashes or percent signs is never exempt, because a server behind the layer may read it as
    /// another path.
    pub fn exempt_paths(
        self,
        paths: impl IntoIterator<Item = impl Into<String>>,
    ) -> PartitionedLimitLayer<ExemptPaths, M, R> {
        let paths = ExemptPaths::new(paths);
        let checked = paths.check();
        let mut layer = self.classify_by(paths);
        layer.plan.accept(checked);
        layer
    }
}

impl<K, M, R> PartitionedLimitLayer<K, M, R> {
    /// Applies a valid setting. If a service uses the state of the layer, the layer gets a state of its own first.
    fn set(mut self, checked: Result<(), ConfigError>, set: impl FnOnce(&Limiter)) -> Self {
        let checked = checked.and_then(|()| self.plan.policy.limiter.detach());
        if self.plan.accept(checked).is_some() {
            set(&self.plan.policy.limiter);
        }
        self
    }

    /// Sets the shares of the limit for the partitions 0, 1 and so on. Each share is above 0, their sum is 1 or less,
    /// and there are 64 or fewer.
    pub fn partitions(self, shares: &[f64]) -> Self {
        self.set(Shares::check(shares), |limiter| limiter.set_shares(shares))
    }

    /// Turns on rejection by priority: under overload, the calls of the lowest priority are rejected, and every server
    /// rejects the same ones. See [`Priority`](super::class::Priority).
    pub fn reject_by_priority(self) -> Self {
        self.set(Ok(()), |limiter| limiter.set_reject_by_priority(true))
    }

    /// Returns a handle that observes and changes the limit.
    #[must_use]
    pub fn handle(&self) -> PartitionedLimitHandle {
        PartitionedLimitHandle(ConcurrencyLimitHandle(self.plan.policy.limiter.clone()))
    }
}

impl<S, K: Clone, M: Clone, R: Clone> Layer<S> for PartitionedLimitLayer<K, M, R> {
    type Service = PartitionedLimit<S, K, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.plan.policy.limiter.set_in_use();
        PartitionedLimit { admission: self.plan.service(inner) }
    }
}

/// A handle that observes and changes the partitions and priorities of a limit, and the [limit](Self::limit) itself.
#[derive(Clone, Debug)]
pub struct PartitionedLimitHandle(ConcurrencyLimitHandle);

/// A snapshot of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Partition {
    /// The number of permits of its share.
    pub share: u32,
    /// The number of its calls in flight, including those with borrowed permits.
    pub in_flight: u32,
    /// The number of its calls that were rejected because no permit was free, at once or after waiting.
    pub rejected: u64,
}

impl PartitionedLimitHandle {
    /// Returns the handle of the limit.
    #[must_use]
    pub fn limit(&self) -> &ConcurrencyLimitHandle {
        &self.0
    }

    /// Returns a snapshot of each partition, in the order of their numbers.
    #[must_use]
    pub fn partitions(&self) -> Vec<Partition> {
        let each = self.0.0.partitions().into_iter();
        each.map(|(share, in_flight, rejected)| Partition { share, in_flight, rejected }).collect()
    }

    /// Returns the priority below which calls are rejected now, with
    /// [`reject_by_priority`](PartitionedLimitLayer::reject_by_priority). `None` while no priority is rejected.
    #[must_use]
    pub fn reject_below(&self) -> Option<Priority> {
        self.0.0.reject_below()
    }

    /// Sets the shares of the partitions at run time, as [`PartitionedLimitLayer::partitions`] does.
    ///
    /// # Errors
    ///
    /// Returns an error for the shares that [`PartitionedLimitLayer::partitions`] rejects.
    pub fn set_partitions(&self, shares: &[f64]) -> Result<(), ConfigError> {
        Shares::check(shares)?;
        self.0.0.set_shares(shares);
        Ok(())
    }

    /// Turns rejection by priority on or off, as [`reject_by_priority`](PartitionedLimitLayer::reject_by_priority)
    /// does.
    pub fn set_reject_by_priority(&self, on: bool) {
        self.0.0.set_reject_by_priority(on);
    }
}
