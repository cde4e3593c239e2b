//! Watches the request bodies of axum and tonic. Both types are boxes of any body, so a watched body has the same type
//! as the original.

use std::sync::Arc;

use http::Request;
#[cfg(any(feature = "axum", feature = "tonic"))]
use {http_body::Body, std::any::Any};

#[cfg(any(feature = "axum", feature = "tonic"))]
use super::upload::{SendingBody, drains};
use super::{body_rate::BodyRate, timers::CallTimers, upload::Upload};
#[cfg(any(feature = "axum", feature = "tonic"))]
use crate::error::BoxError;

/// Watches the body of this request if it is axum's or tonic's, with that feature. If `responds`, the body is drained
/// when the call times out.
pub(super) fn watch<B: 'static>(
    request: &mut Request<B>,
    timers: &CallTimers,
    rate: BodyRate,
    responds: bool,
) -> Option<Arc<Upload>> {
    #[cfg(any(feature = "axum", feature = "tonic"))]
    {
        let request: &mut dyn Any = request;
        #[cfg(feature = "axum")]
        if let Some(request) = request.downcast_mut() {
            return watch_boxed(request, timers, rate, responds, axum::body::Body::new);
        }
        #[cfg(feature = "tonic")]
        if let Some(request) = request.downcast_mut() {
            return watch_boxed(request, timers, rate, responds, tonic::body::Body::new);
        }
    }
    let _ = (request, timers, rate, responds);
    None
}

#[cfg(any(feature = "axum", feature = "tonic"))]
fn watch_boxed<B: Body<Error: Into<BoxError>> + Default + 'static>(
    request: &mut Request<B>,
    timers: &CallTimers,
    rate: BodyRate,
    responds: bool,
    boxed: impl FnOnce(SendingBody<B>) -> B,
) -> Option<Arc<Upload>> {
    if request.body().is_end_stream() {
        return None;
    }
    let upload = timers.upload(rate, drains(request, responds))?;
    let body = request.body_mut();
    let mut watched = SendingBody::unwatched(std::mem::take(body));
    watched.watch(upload.clone());
    *body = boxed(watched);
    Some(upload)
}
