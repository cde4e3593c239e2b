//! The status and headers of the responses of the endpoints.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};

/// Returns the status of a response of the endpoints.
pub(super) fn status(passed: bool) -> StatusCode {
    if passed { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

pub(super) fn with_status(mut response: Response<Bytes>, status: StatusCode) -> Response<Bytes> {
    *response.status_mut() = status;
    response
}

pub(super) fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<Bytes> {
    typed("text/plain; charset=utf-8", status, body.into())
}

pub(super) fn typed(content: &'static str, status: StatusCode, body: Bytes) -> Response<Bytes> {
    let mut response = with_status(Response::new(body), status);
    let length = HeaderValue::from(response.body().len());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Removes the body of a response to `HEAD`. The headers remain those of `GET`.
pub(super) fn without_body_for(method: &Method, response: Response<Bytes>) -> Response<Bytes> {
    if method == Method::HEAD { response.map(|_| Bytes::new()) } else { response }
}
