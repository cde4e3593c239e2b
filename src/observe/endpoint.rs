use http::{Response, StatusCode, header, request::Parts};

use super::{
    registry::Registry,
    text::{self, Format},
};
use crate::{
    endpoint::{Endpoint, EndpointBody, EndpointLayer, EndpointService, Serve, typed},
    sealed::Sealed,
};

/// Serves `GET` and `HEAD` of `/metrics`. Other requests pass through. Made by [`Registry::endpoints`].
pub type MetricsEndpointLayer = EndpointLayer<Registry>;

/// The service of a [`MetricsEndpointLayer`].
pub type MetricsEndpoint<S> = Endpoint<S, Registry>;

/// Serves `/metrics`. Made by [`Registry::service`].
pub type MetricsService = EndpointService<Registry>;

impl Registry {
    /// Returns a layer that serves `/metrics` without a call of the wrapped service. It should be outside of every layer
    /// that rejects, so that a full server can still be scraped.
    ///
    /// The format is that of Prometheus, or OpenMetrics if the `Accept` header names it. The page is as public as the
    /// routes beside it: use [`service`](Self::service) for a port of its own.
    pub fn endpoints(&self) -> MetricsEndpointLayer {
        EndpointLayer { endpoints: self.clone() }
    }

    /// Returns a service that serves `/metrics` and responds with 404 to other paths. For a separate port, or for routes.
    #[must_use]
    pub fn service(&self) -> MetricsService {
        EndpointService { endpoints: self.clone() }
    }
}

impl Sealed for Registry {}

impl Serve for Registry {
    #[inline]
    fn serves(&self, path: &str) -> bool {
        path == "/metrics"
    }

    fn respond(&self, request: &Parts) -> Response<EndpointBody> {
        let accept = request.headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
        let format = Format::accepted(accept.unwrap_or_default());
        typed(format.content_type(), StatusCode::OK, text::render(self, format).into())
    }
}
