//! A gRPC service whose requests select its responses, and an address to serve it on. Needs no `protoc`: the messages
//! are those of `grpc.health.v1`.

use std::{net::SocketAddr, pin::Pin};

use futures_util::{Stream, StreamExt, stream};
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint, server::TcpIncoming},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_server::Health};

use super::net::{Gauge, listener};

/// The service name in the request selects the response. The number of a status code fails with this code, and any
/// other name succeeds. In `watch`, `cut 14` fails after the first message, and `late 14` fails without a message.
/// `hold` never ends, in either method.
#[derive(Clone, Debug, Default)]
pub struct Obedient {
    pub inside: Gauge,
}

type Messages = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

fn fails(service: &str) -> Option<Status> {
    let code = Code::from(service.parse::<i32>().ok()?);
    Some(Status::new(code, "as asked for"))
}

#[tonic::async_trait]
impl Health for Obedient {
    type WatchStream = Messages;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let _inside = self.inside.enter();
        let service = request.into_inner().service;
        if service == "hold" {
            std::future::pending::<()>().await;
        }
        match fails(&service) {
            Some(status) => Err(status),
            None => Ok(Response::new(HealthCheckResponse { status: 1 })),
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Messages>, Status> {
        let inside = self.inside.enter();
        let service = request.into_inner().service;
        if let Some(status) = fails(&service) {
            return Err(status);
        }
        let well = (!service.starts_with("late")).then_some(Ok(HealthCheckResponse { status: 1 }));
        let first = stream::iter(well);
        let rest: Messages = match service.split_once(' ') {
            Some((_, code)) => Box::pin(stream::iter(fails(code).map(Err))),
            None if service == "hold" => Box::pin(stream::pending()),
            None => Box::pin(stream::empty()),
        };
        let messages = first.chain(rest).map(move |message| {
            let _inside = &inside;
            message
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

pub fn ask(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

/// Returns a listener on a loopback port, and its address.
pub async fn incoming() -> (TcpIncoming, SocketAddr) {
    let (listener, addr) = listener().await;
    (TcpIncoming::from(listener), addr)
}

/// Returns a channel that connects at its first call.
pub fn channel(addr: SocketAddr) -> Channel {
    Endpoint::from_shared(format!("http://{addr}")).unwrap().connect_lazy()
}
