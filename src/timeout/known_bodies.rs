//! Watches the request bodies of axum and tonic. Both types are boxes of any body, so a watched body has the same type
//! as the original.

use std::sync::Arc;

use http::Request;
#[cfg(any(feature = "axum", feature = "tonic-health"))]
use {http_body::Body, std::any::Any};

use super::{body_rate::BodyRate, timers::Watch, upload::Sending};
#[cfg(any(feature = "axum", feature = "tonic-health"))]
use super::{protocol::drains, upload::SendingBody};
#[cfg(any(feature = "axum", feature = "tonic-health"))]
use crate::error::BoxError;

/// Watches the body of this request if it is axum's or tonic's, with that feature. If `responds`, the body is drained
/// when the call times out.
pub(super) fn watched<B: 'static>(
    request: &mut Request<B>,
    watch: &Watch,
    rate: BodyRate,
    responds: bool,
) -> Option<Arc<Sending>> {
    #[cfg(any(feature = "axum", feature = "tonic-health"))]
    {
        let request: &mut dyn Any = request;
        #[cfg(feature = "axum")]
        if let Some(request) = request.downcast_mut() {
            return within(request, watch, rate, responds, axum::body::Body::new);
        }
        #[cfg(feature = "tonic-health")]
        if let Some(request) = request.downcast_mut() {
            return within(request, watch, rate, responds, tonic::body::Body::new);
        }
    }
    let _ = (request, watch, rate, responds);
    None
}

#[cfg(any(feature = "axum", feature = "tonic-health"))]
fn within<B: Body<Error: Into<BoxError>> + Default + 'static>(
    request: &mut Request<B>,
    watch: &Watch,
    rate: BodyRate,
    responds: bool,
    boxed: impl FnOnce(SendingBody<B>) -> B,
) -> Option<Arc<Sending>> {
    if request.body().is_end_stream() {
        return None;
    }
    let drains = drains(request, responds);
    if !Sending::is_needed(watch, rate, drains) {
        return None;
    }
    let body = request.body_mut();
    let mut watched = SendingBody::unwatched(std::mem::take(body));
    let sending = watched.watch(watch, rate, drains);
    *body = boxed(watched);
    sending
}
