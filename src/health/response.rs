//! The status and headers of the responses of the endpoints.

use bytes::Bytes;
use http::{Response, StatusCode};

/// Returns the status of a response of the endpoints.
pub(super) fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) fn with_status(mut response: Response<Bytes>, status: StatusCode) -> Response<Bytes> {
    *response.status_mut() = status;
    response
}
