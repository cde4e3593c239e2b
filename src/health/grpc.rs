//! The service `grpc.health.v1.Health`, from the checks of the registry.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tonic::{Request, Response, Status, codegen::tokio_stream::Stream};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{self, HealthServer},
};

use super::{
    entry::CheckState,
    registry::{Health, is_name},
};
use crate::outcome::grpc;

/// The service `grpc.health.v1.Health` with `Check` and `Watch`, for a tonic server. Made by [`Health::grpc`].
///
/// | requested service | `SERVING` |
/// |---|---|
/// | the empty name, `readiness`, or a name of [`service`](Self::service) | while the process is ready |
/// | `liveness` | always |
/// | the name of a check | while that check passes |
/// | another name | `Check` returns `NOT_FOUND`; `Watch` reports `SERVICE_UNKNOWN` until such a check is added |
#[derive(Clone, Debug)]
pub struct GrpcHealth {
    health: Health,
    services: Vec<String>,
}

impl Health {
    /// Returns a tonic service that serves `grpc.health.v1` from this registry.
    ///
    /// ```
    /// # use buttress::Health;
    /// let health = Health::new();
    /// let router = tonic::transport::Server::builder()
    ///     .add_service(health.grpc().service("helloworld.Greeter").into_server());
    /// # let _ = router;
    /// ```
    #[must_use]
    pub fn grpc(&self) -> GrpcHealth {
        GrpcHealth { health: self.clone(), services: Vec::new() }
    }
}

impl GrpcHealth {
    /// Adds a service name whose status is the readiness of the process. Clients request the name of the service that
    /// they call.
    #[must_use]
    pub fn service(mut self, name: impl Into<String>) -> Self {
        self.services.push(name.into());
        self
    }

    /// Returns the service for a tonic server.
    ///
    /// After this call the concurrency limits of this process exempt health calls: 1024 `Check` calls and 64 `Watch`
    /// streams for each limit. [`exempt_grpc_health`](crate::limit::ConcurrencyLimitLayer::exempt_grpc_health) turns
    /// this off.
    #[must_use]
    pub fn into_server(self) -> HealthServer<Self> {
        grpc::set_serves_health();
        HealthServer::new(self)
    }

    fn status(&self, service: &str) -> Option<ServingStatus> {
        let serves = match service {
            "liveness" => true,
            "" | "readiness" => self.health.is_ready(),
            name if self.services.iter().any(|service| service == name) => self.health.is_ready(),
            name => self.health.check(name)? == CheckState::Pass,
        };
        Some(if serves { ServingStatus::Serving } else { ServingStatus::NotServing })
    }
}

#[tonic::async_trait]
impl health_server::Health for GrpcHealth {
    type WatchStream = HealthWatch;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.status(&request.get_ref().service) {
            Some(status) => Ok(Response::new(HealthCheckResponse { status: status.into() })),
            None => Err(Status::not_found("no such service")),
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthWatch>, Status> {
        let mut service = request.into_inner().service;
        // An invalid name never becomes a check, so the stream does not store it: its length has no limit.
        if !service.is_empty() && !is_name(&service) && !self.services.contains(&service) {
            service = "?".to_owned();
        }
        Ok(Response::new(HealthWatch { health: self.clone(), service, sent: None, wait: None }))
    }
}

/// The stream of a `Watch` call: the current status, then each change of it. It ends when the process stops.
pub struct HealthWatch {
    health: GrpcHealth,
    service: String,
    sent: Option<ServingStatus>,
    wait: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Stream for HealthWatch {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(wait) = &mut self.wait {
                ready!(wait.as_mut().poll(cx));
                self.wait = None;
            }
            // The version is read before the status, so that no later change is missed.
            let version = self.health.health.version();
            let now = self.health.status(&self.service).unwrap_or(ServingStatus::ServiceUnknown);
            if self.sent != Some(now) {
                self.sent = Some(now);
                return Poll::Ready(Some(Ok(HealthCheckResponse { status: now.into() })));
            }
            if self.health.health.has_ended() {
                return Poll::Ready(None);
            }
            let health = self.health.health.clone();
            self.wait = Some(Box::pin(async move { health.changed_since(version).await }));
        }
    }
}

impl fmt::Debug for HealthWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthWatch")
            .field("service", &self.service)
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}
