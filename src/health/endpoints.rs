use http::{Response, request::Parts};

use super::{
    registry::Health,
    responder::{HealthRoute, HealthRoutes},
};
use crate::{
    endpoint::{Endpoint, EndpointBody, EndpointLayer, EndpointService, Serve},
    sealed::Sealed,
};

/// Serves `GET` and `HEAD` of `/livez`, `/readyz` and `/healthz`. Other requests pass through. Made by
/// [`Health::endpoints`].
pub type HealthEndpointsLayer = EndpointLayer<HealthRoutes>;

/// The service of a [`HealthEndpointsLayer`].
pub type HealthEndpoints<S> = Endpoint<S, HealthRoutes>;

/// Serves `/livez`, `/readyz` and `/healthz`. Made by [`Health::service`].
pub type HealthService = EndpointService<HealthRoutes>;

impl Health {
    /// Returns a layer that serves `/livez`, `/readyz` and `/healthz` without a call of the wrapped service. It should
    /// be the outermost layer. See the [module](super).
    pub fn endpoints(&self) -> HealthEndpointsLayer {
        EndpointLayer { endpoints: HealthRoutes::new(self.clone()) }
    }

    /// Returns a service that serves `/livez`, `/readyz` and `/healthz`, and responds with 404 to other paths. For a
    /// separate port, or for routes.
    #[must_use]
    pub fn service(&self) -> HealthService {
        EndpointService { endpoints: HealthRoutes::new(self.clone()) }
    }
}

impl EndpointLayer<HealthRoutes> {
    /// Includes the reason of each failed check, and the time and the duration of its last run.
    ///
    /// By default the response contains `reason withheld` and no times. The text of an error can contain names of hosts
    /// and paths, also without [secrets](crate#secrets), and times reveal the network behind the process.
    pub fn with_reasons(mut self) -> Self {
        self.endpoints.with_reasons = true;
        self
    }
}

impl EndpointService<HealthRoutes> {
    /// Includes the reason of each failed check, and the time and the duration of its last run, as
    /// [`HealthEndpointsLayer::with_reasons`] does. By default the response contains none of them.
    #[must_use]
    pub fn with_reasons(mut self) -> Self {
        self.endpoints.with_reasons = true;
        self
    }
}

impl Sealed for HealthRoutes {}

impl Serve for HealthRoutes {
    #[inline]
    fn serves(&self, path: &str) -> bool {
        HealthRoute::of(path).is_some()
    }

    fn respond(&self, request: &Parts) -> Response<EndpointBody> {
        let uri = &request.uri;
        match HealthRoute::of(uri.path()) {
            Some(route) => self.respond_to(route, uri.query(), &request.headers),
            None => crate::endpoint::plain(http::StatusCode::NOT_FOUND, "not found\n"),
        }
    }
}
