use std::{fmt, ops::Deref};

use tower_layer::Layer;

use super::{ExemptPaths, Priority, Shares};
use crate::{
    ConcurrencyLimitLayer, ConfigError,
    admission::{Plan, admission_layer},
    limit::{handle::ConcurrencyLimitHandle, lasting::Limit},
};

/// The policy of a limit that tells calls apart.
#[derive(Clone)]
pub struct Sorted<K> {
    pub(in crate::limit) sort: K,
    pub(in crate::limit) limiter: Limit,
}

impl<K> fmt::Debug for Sorted<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.limiter.fmt(f)
    }
}

admission_layer! {
    /// A concurrency limit that tells calls apart, made by
    /// [`ConcurrencyLimitLayer::sorted_by`](crate::ConcurrencyLimitLayer::sorted_by) or
    /// [`exempt_paths`](crate::ConcurrencyLimitLayer::exempt_paths). See the [module](crate::limit::sort).
    layer SortedLimitLayer {}
    /// The service of a [`SortedLimitLayer`].
    service SortedLimit [K]
    policy Sorted<K>
}

impl<M, R> ConcurrencyLimitLayer<M, R> {
    /// Tells calls apart by what a closure over the request says they ask: a
    /// [`Claim`](super::Claim). The limit itself, its queue and the rest are said before.
    pub fn sorted_by<K>(self, sort: K) -> SortedLimitLayer<K, M, R> {
        let Plan { policy: limiter, protocol, reject, fault } = self.into_plan();
        SortedLimitLayer {
            plan: Plan { policy: Sorted { sort, limiter }, protocol, reject, fault },
        }
    }

    /// Lets calls of these paths through in any case, and counts them apart: exact paths, or all below one
    /// that ends in `/*`, such as `/grpc.health.v1.Health/*`. As the layer sees them: in a router that axum nests,
    /// without what is above it. A path with dot segments or with encoded dots, slashes or percent signs is never exempt,
    /// because a server behind the layer may read it as another path.
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
    /// Partitions 0, 1, … with these shares of the limit: each above 0, all together 1 at most; at most 64.
    pub fn partitions(mut self, shares: &[f64]) -> Self {
        if self.plan.accept(Shares::check(shares)).is_some() {
            self.plan.policy.limiter.set_shares(shares);
        }
        self
    }

    /// When not all can be served, refuses those that are worth least, the same on every server: see
    /// [`Priority`](super::Priority).
    pub fn shed_by_priority(self) -> Self {
        self.plan.policy.limiter.shed_by_priority();
        self
    }

    /// Looks at the limit and resizes it.
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

/// A [`ConcurrencyLimitHandle`] that knows of partitions.
#[derive(Clone, Debug)]
pub struct SortedLimitHandle(ConcurrencyLimitHandle);

/// A partition at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Partition {
    /// How many places are its own.
    pub share: u32,
    /// How many calls of it are in flight, borrowed places included.
    pub in_flight: u32,
    /// How many were refused for want of room, at once or after a wait.
    pub refused: u64,
}

impl SortedLimitHandle {
    /// The partitions, in the order of their numbers.
    #[must_use]
    pub fn partitions(&self) -> Vec<Partition> {
        let each = self.0.0.partitions().into_iter();
        each.map(|(share, in_flight, refused)| Partition { share, in_flight, refused }).collect()
    }

    /// The least that is let in now, where [priorities](SortedLimitLayer::shed_by_priority) are shed; None
    /// while nothing is.
    #[must_use]
    pub fn shed_below(&self) -> Option<Priority> {
        self.0.0.shed_below()
    }

    /// Gives the partitions other shares, as [`SortedLimitLayer::partitions`] does, while calls are under way.
    ///
    /// # Errors
    ///
    /// Shares that are none.
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
