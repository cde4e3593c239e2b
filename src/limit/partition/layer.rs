use std::{fmt, ops::Deref};

use tower_layer::Layer;

use super::super::{handle::ConcurrencyLimitHandle, layer::ConcurrencyLimitLayer, reuse::Limit};
use super::{
    class::{ExemptPaths, Priority},
    shares::Shares,
};
use crate::{
    admission::{Plan, admission_layer},
    error::ConfigError,
};

/// The policy of a limit that distinguishes calls.
#[derive(Clone)]
pub struct Sorted<K> {
    pub(crate) sort: K,
    pub(crate) limiter: Limit,
}

impl<K> fmt::Debug for Sorted<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limiter.fmt(f)
    }
}

admission_layer! {
    /// A concurrency limit that distinguishes calls, made by
    /// [`ConcurrencyLimitLayer::sorted_by`](super::super::layer::ConcurrencyLimitLayer::sorted_by) or
    /// [`exempt_paths`](super::super::layer::ConcurrencyLimitLayer::exempt_paths). See the [module](super).
    layer SortedLimitLayer {}
    /// The service of a [`SortedLimitLayer`].
    service SortedLimit [K]
    policy Sorted<K>
}

impl<M, R> ConcurrencyLimitLayer<M, R> {
    /// Classifies calls by a closure over the request that returns a [`Claim`](super::class::Claim). Call the methods that set
    /// the limit, its queue and the other settings before this one.
    pub fn sorted_by<K>(self, sort: K) -> SortedLimitLayer<K, M, R> {
        let Plan { policy: limiter, protocol, reject, fault } = self.into_plan();
        SortedLimitLayer {
            plan: Plan { policy: Sorted { sort, limiter }, protocol, reject, fault },
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
    ) -> SortedLimitLayer<ExemptPaths, M, R> {
        let paths = ExemptPaths::new(paths);
        let checked = paths.check();
        let mut layer = self.sorted_by(paths);
        layer.plan.accept(checked);
        layer
    }
}

impl<K, M, R> SortedLimitLayer<K, M, R> {
    /// Sets the shares of the limit for the partitions 0, 1 and so on. Each share is above 0, their sum is 1 or less,
    /// and there are 64 or fewer.
    pub fn partitions(mut self, shares: &[f64]) -> Self {
        if self.plan.accept(Shares::check(shares)).is_some() {
            self.plan.policy.limiter.set_shares(shares);
        }
        self
    }

    /// Turns on rejection by priority: under overload, the calls of the lowest priority are rejected, and every server
    /// rejects the same ones. See [`Priority`](super::class::Priority).
    pub fn shed_by_priority(self) -> Self {
        self.plan.policy.limiter.shed_by_priority();
        self
    }

    /// Returns a handle that observes and changes the limit.
    #[must_use]
    pub fn handle(&self) -> SortedLimitHandle {
        SortedLimitHandle(ConcurrencyLimitHandle(self.plan.policy.limiter.clone()))
    }
}

impl<S, K: Clone, M: Clone, R: Clone> Layer<S> for SortedLimitLayer<K, M, R> {
    type Service = SortedLimit<S, K, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        SortedLimit { admission: self.plan.service(inner) }
    }
}

/// A [`ConcurrencyLimitHandle`] with the partitions and the cutoff of priorities.
#[derive(Clone, Debug)]
pub struct SortedLimitHandle(ConcurrencyLimitHandle);

/// A snapshot of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Partition {
    /// The number of permits of its share.
    pub share: u32,
    /// The number of its calls in flight, including those with borrowed permits.
    pub in_flight: u32,
    /// The number of its calls that were rejected because no permit was free, at once or after waiting.
    pub refused: u64,
}

impl SortedLimitHandle {
    /// Returns a snapshot of each partition, in the order of their numbers.
    #[must_use]
    pub fn partitions(&self) -> Vec<Partition> {
        let each = self.0.0.partitions().into_iter();
        each.map(|(share, in_flight, refused)| Partition { share, in_flight, refused }).collect()
    }

    /// Returns the priority below which calls are rejected now, with
    /// [`shed_by_priority`](SortedLimitLayer::shed_by_priority). `None` while no priority is rejected.
    #[must_use]
    pub fn shed_below(&self) -> Option<Priority> {
        self.0.0.shed_below()
    }

    /// Sets the shares of the partitions at run time, as [`SortedLimitLayer::partitions`] does.
    ///
    /// # Errors
    ///
    /// Returns an error for the shares that [`SortedLimitLayer::partitions`] rejects.
    pub fn set_partitions(&self, shares: &[f64]) -> Result<(), ConfigError> {
        Shares::check(shares)?;
        self.0.0.set_shares(shares);
        Ok(())
    }
}

impl Deref for SortedLimitHandle {
    type Target = ConcurrencyLimitHandle;

    fn deref(&self) -> &ConcurrencyLimitHandle {
        &self.0
    }
}
