//! Connections that end as a matter of routine, and connections that do not work: over real sockets, under every
//! client.

mod http1;
mod http2;
mod probes;

use std::net::SocketAddr;

use buttress::{
    BoxError, CircuitBreakerLayer, RetryBudget, RetryLayer, Trip,
    connect::{Client as ConnectClient, ConnectLayer},
    reqwest::HttpClient,
};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::{client::legacy, rt::TokioExecutor};
use tower::{Service, ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_http::map_request_body::MapRequestBodyLayer;

use crate::support::net::{self, soon};

/// A client of any kind. It reads the response bodies, so that its connections return to their pool.
type Client = BoxCloneSyncService<Request<Empty<Bytes>>, Response<Full<Bytes>>, BoxError>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// This client does not reveal whether a connection was reused.
    HyperUtil,
    /// This client does not reveal whether a connection was reused.
    Reqwest,
    Connect,
}

const KINDS: [Kind; 3] = [Kind::HyperUtil, Kind::Reqwest, Kind::Connect];

impl Kind {
    fn http1(self) -> Client {
        match self {
            Self::HyperUtil => boxed(hyper_util(false)),
            Self::Reqwest => {
                let client = reqwest::Client::builder().no_proxy().build().unwrap();
                boxed(HttpClient::new(client))
            }
            Self::Connect => boxed(ConnectClient::builder(ConnectLayer::new()).build_http()),
        }
    }

    fn http2(self) -> Client {
        match self {
            Self::HyperUtil => boxed(hyper_util(true)),
            Self::Reqwest => unreachable!("built without HTTP/2"),
            Self::Connect => {
                boxed(ConnectClient::builder(ConnectLayer::new()).http2_only().build_http())
            }
        }
    }
}

fn hyper_util(http2: bool) -> net::HyperClient {
    legacy::Client::builder(TokioExecutor::new()).http2_only(http2).build_http()
}

fn boxed<S, B>(service: S) -> Client
where
    S: Service<Request<Empty<Bytes>>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    BoxCloneSyncService::new(tower::service_fn(move |request| {
        let service = service.clone();
        async move {
            let (head, body) = service.oneshot(request).await.map_err(Into::into)?.into_parts();
            let body = body.collect().await.map_err(Into::into)?.to_bytes();
            Ok(Response::from_parts(head, Full::new(body)))
        }
    }))
}

/// A breaker that opens at the first failure.
fn opens_at_first_failure() -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::consecutive(1))
}

/// A retry with defaults except for its budget, outside of a breaker, outside of a client.
fn stack(
    budget: &RetryBudget,
    breaker: CircuitBreakerLayer,
    client: Client,
) -> BoxCloneSyncService<
    Request<Empty<Bytes>>,
    Response<impl http_body::Body<Data = Bytes, Error = BoxError> + use<>>,
    BoxError,
> {
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::http().budget(budget.clone()))
        .layer(breaker)
        .layer(MapRequestBodyLayer::new(|_| Empty::new()))
        .service(client);
    BoxCloneSyncService::new(stack.map_response(|response: Response<_>| {
        response.map(|body| BodyExt::map_err(body, Into::into))
    }))
}

fn request<B: Default>(method: Method, addr: SocketAddr) -> Request<B> {
    let request = Request::builder().method(method).uri(format!("http://{addr}/"));
    request.body(B::default()).unwrap()
}

/// Returns the error of a call that must fail.
async fn fails(client: &Client, method: Method, addr: SocketAddr) -> BoxError {
    soon(client.clone().oneshot(request(method, addr))).await.unwrap_err()
}
