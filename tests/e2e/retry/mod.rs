//! Retry over breaker over limit, over hyper-util, reqwest and tonic, against an upstream that fails on request.

mod clients;
mod rules;
mod wire;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Path, State as Shared},
    response::{IntoResponse, Response},
    routing::any,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, RetryLayer, Trip,
    breaker::CircuitState,
    outcome::RejectedKind,
    retry::{Attempts, Backoff, GiveUpReason},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use tokio::time::Instant;
use tonic::{Code, transport::Server};
use tonic_health::pb::{health_client::HealthClient, health_server::HealthServer};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

use crate::support::{
    net::{self, HALF, client, closed_address, closes_after, serve_counting, soon, until},
    rpc::{Obedient, ask, channel, incoming},
};

const KIB: usize = 1024;

/// Returns a retry layer with short delays and without a retry budget.
fn retry() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(Duration::from_millis(1))).without_budget()
}

// ===== The upstream =====

/// The request bodies of all attempts that the upstream has received.
#[derive(Clone, Default)]
struct Heard(Arc<std::sync::Mutex<Vec<Bytes>>>);

impl Heard {
    fn attempts(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn bodies(&self) -> Vec<Bytes> {
        self.0.lock().unwrap().clone()
    }
}

/// `/{status}/{failures}/{size}` responds to the first `failures` attempts with this status and a body of this size,
/// and echoes the bodies of later ones. Returns the address, the received bodies, and the gauge of the connections.
async fn upstream() -> (SocketAddr, Heard, net::Gauge) {
    let heard = Heard::default();
    let answer = |Shared(heard): Shared<Heard>,
                  Path((status, failures, size)): Path<(u16, usize, usize)>,
                  headers: HeaderMap,
                  body: Bytes| async move {
        let attempt = {
            let mut heard = heard.0.lock().unwrap();
            heard.push(body.clone());
            heard.len()
        };
        if attempt > failures {
            return body.into_response();
        }
        let mut response: Response =
            (StatusCode::from_u16(status).unwrap(), vec![b'x'; size]).into_response();
        if let Some(after) = headers.get("x-say-retry-after") {
            response.headers_mut().insert("retry-after", after.clone());
        }
        response
    };
    let app =
        Router::new().route("/{status}/{failures}/{size}", any(answer)).with_state(heard.clone());
    let (addr, connections) = serve_counting(app).await;
    (addr, heard, connections)
}

fn request(
    method: Method,
    addr: SocketAddr,
    path: &str,
    body: &'static str,
) -> Request<Full<Bytes>> {
    let request = Request::builder().method(method).uri(format!("http://{addr}{path}"));
    request.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap()
}

async fn read<B>(response: http::Response<B>) -> Bytes
where
    B: http_body::Body,
    B::Error: std::fmt::Debug,
{
    soon(response.into_body().collect()).await.unwrap().to_bytes()
}
