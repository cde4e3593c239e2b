//! Request bodies that are boxes anyway: they can be watched and stay of their type.

use std::{any::Any, sync::Arc};

#[cfg(any(feature = "axum", feature = "tonic-health"))]
use http_body::Body;

#[cfg(any(feature = "axum", feature = "tonic-health"))]
use super::sending::SendingBody;
use super::{body_rate::BodyRate, sending::Sending, watch::Watch};
#[cfg(any(feature = "axum", feature = "tonic-health"))]
use crate::BoxError;

/// Watches this body if it is axum's or tonic's, with that feature.
pub(super) fn watched<B: 'static>(
    body: &mut B,
    watch: &Watch,
    rate: BodyRate,
) -> Option<Arc<Sending>> {
    let body: &mut dyn Any = body;
    #[cfg(feature = "axum")]
    if let Some(body) = body.downcast_mut() {
        return within(body, watch, rate, axum::body::Body::new);
    }
    #[cfg(feature = "tonic-health")]
    if let Some(body) = body.downcast_mut() {
        return within(body, watch, rate, tonic::body::Body::new);
    }
    let _ = (body, watch, rate);
    None
}

#[cfg(any(feature = "axum", feature = "tonic-health"))]
fn within<B: Body<Error: Into<BoxError>> + Default>(
    body: &mut B,
    watch: &Watch,
    rate: BodyRate,
    boxed: impl FnOnce(SendingBody<B>) -> B,
) -> Option<Arc<Sending>> {
    if body.is_end_stream() || !Sending::is_needed(watch, rate) {
        return None;
    }
    let mut watched = SendingBody::unwatched(std::mem::take(body));
    let sending = watched.watch(watch, rate);
    *body = boxed(watched);
    sending
}
