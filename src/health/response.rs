//! The status and headers of the responses of the endpoints.

use http::{Response, StatusCode};

use crate::endpoint::EndpointBody;

/// Returns the status of a response of the endpoints.
pub(super) fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) fn with_status(
    mut response: Response<EndpointBody>,
    status: StatusCode,
) -> Response<EndpointBody> {
    *response.status_mut() = status;
    response
}
