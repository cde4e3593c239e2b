//! The gRPC status of a rejection. tonic finds it among the sources of an error.

use std::{collections::HashMap, error::Error, sync::LazyLock};

use tonic::{Code, Status};

use super::{grpc, rejected_kind::RejectedKind};
use crate::error;
use crate::sync::Mutex;

/// Returns the status of a rejection of this kind, with the code and the message that a response would have.
///
/// A [`Rejected`](super::rejected::Rejected) is too small to contain a status. The process therefore has one status per
/// kind, made when it is first needed and never freed. The number of kinds bounds the map.
pub(crate) fn of(kind: RejectedKind) -> &'static Status {
    static STATUSES: LazyLock<Mutex<HashMap<RejectedKind, &'static Status>>> =
        LazyLock::new(Mutex::default);

    let mut statuses = STATUSES.lock();
    statuses.entry(kind).or_insert_with(|| {
        let code = Code::from_i32(grpc::of_rejected(kind).into());
        Box::leak(Box::new(Status::new(code, kind.public_reason())))
    })
}

/// Returns whether the error or one of its sources is that of a timer of tonic, which expires by `grpc-timeout` or
/// `Endpoint::timeout`.
pub(crate) fn is_timeout_of_tonic(error: &(dyn Error + 'static)) -> bool {
    error::chain(error).any(|error| error.is::<tonic::TimeoutExpired>())
}
