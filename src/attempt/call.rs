use std::marker::PhantomData;

use super::protocol::ReplayRequest;
use crate::time::Deadline;

/// The saved request of one call, and the protocol by which it is replayed: a part of the types of
/// [`RetryFuture`](crate::retry::RetryFuture) and [`HedgeFuture`](crate::hedge::HedgeFuture).
pub struct SavedCall<Req, M, K> {
    pub(crate) protocol: M,
    /// The call is gRPC by its request.
    pub(crate) is_grpc: bool,
    /// `None` if the request is not saved.
    pub(crate) saved: Option<K>,
    _request: PhantomData<fn(Req)>,
}

impl<Req, M> SavedCall<Req, M, M::Saved>
where
    M: ReplayRequest<Req>,
{
    #[inline]
    pub(crate) fn new(protocol: M, is_grpc: bool, saved: Option<M::Saved>) -> Self {
        Self { protocol, is_grpc, saved, _request: PhantomData }
    }

    #[inline]
    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.saved.as_ref().and_then(M::deadline)
    }
}

impl<Req, M, K> std::fmt::Debug for SavedCall<Req, M, K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SavedCall").field("is_grpc", &self.is_grpc).finish_non_exhaustive()
    }
}
