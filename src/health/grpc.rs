//! `grpc.health.v1` from the same registry.

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
use crate::call::grpc;

/// `grpc.health.v1.Health`, Check and Watch, for a tonic server: made by [`Health::grpc`].
///
/// | asked for | serving |
/// |---|---|
/// | nothing, `readiness`, or a name given to [`service`](Self::service) | while the process is ready |
/// | `liveness` | always |
/// | the name of a check | while that check passes |
/// | anything else | `NOT_FOUND`; `SERVICE_UNKNOWN` where it is watched, until there is such a check |
#[derive(Clone, Debug)]
pub struct GrpcHealth {
    health: Health,
    services: Vec<String>,
}

impl Health {
    /// A tonic service that answers `grpc.health.v1` from this registry.
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
    /// One more name for the whole: what clients ask who check the service that they call.
    #[must_use]
    pub fn service(mut self, name: impl Into<String>) -> Self {
        self.services.push(name.into());
        self
    }

    /// Returns the service for a tonic server.
    ///
    /// After this call the concurrency limits of this process exempt health calls: 1024 `Check` calls and 64 `Watch`
    /// streams for each limit. [`exempt_grpc_health`](crate::ConcurrencyLimitLayer::exempt_grpc_health) turns this off.
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
        // What can be no name never will be one: a stream need not remember it.
        if !service.is_empty() && !is_name(&service) && !self.services.contains(&service) {
            service = "?".to_owned();
        }
        Ok(Response::new(HealthWatch { of: self.clone(), service, told: None, wait: None }))
    }
}

/// A Watch: the status at once, and again whenever it is another. It ends when the process stops.
pub struct HealthWatch {
    of: GrpcHealth,
    service: String,
    told: Option<ServingStatus>,
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
            // Before the look: what changes after it is not missed.
            let version = self.of.health.version();
            let now = self.of.status(&self.service).unwrap_or(ServingStatus::ServiceUnknown);
            if self.told != Some(now) {
                self.told = Some(now);
                return Poll::Ready(Some(Ok(HealthCheckResponse { status: now.into() })));
            }
            if self.of.health.has_ended() {
                return Poll::Ready(None);
            }
            let health = self.of.health.clone();
            self.wait = Some(Box::pin(async move { health.changed_since(version).await }));
        }
    }
}

impl fmt::Debug for HealthWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthWatch")
            .field("service", &self.service)
            .field("told", &self.told)
            .finish_non_exhaustive()
    }
}
