//! Servers that reject every request, each by one layer.

use std::{future::pending, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::Request,
    response::{IntoResponse, Response},
    routing::post,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, DeadlineLayer, Health,
    Lifecycle, Rejected, RespondLayer, RetryLayer, TimeoutLayer, limit::OwnedPermit,
};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};

use crate::support::net::{listener, until};

/// How a router is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// `axum::serve`.
    Axum,
    /// `Lifecycle::serve`.
    Lifecycle,
}

pub const SERVED: [Served; 2] = [Served::Axum, Served::Lifecycle];

/// Why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejects {
    LimitFull,
    /// The call waits in the queue before it is rejected.
    QueueTimedOut,
    RespondWith,
    CircuitOpen,
    Stopping,
    DeadlinePassed,
    /// The handler reads a part of the body.
    TimedOut,
    /// The same, by a deadline.
    DeadlineDuringUpload,
    ServerStack,
    /// A gateway whose client stack rejects.
    RespondLayer,
}

pub const REJECTS: [Rejects; 10] = [
    Rejects::LimitFull,
    Rejects::QueueTimedOut,
    Rejects::RespondWith,
    Rejects::CircuitOpen,
    Rejects::Stopping,
    Rejects::DeadlinePassed,
    Rejects::TimedOut,
    Rejects::DeadlineDuringUpload,
    Rejects::ServerStack,
    Rejects::RespondLayer,
];

const SHORT: Duration = Duration::from_millis(30);

/// A running server. It rejects while this is held.
pub struct Server {
    pub addr: SocketAddr,
    _permit: Option<OwnedPermit>,
    _lifecycle: Option<Lifecycle>,
}

/// Starts a server that rejects every request.
pub async fn start(served: Served, rejects: Rejects) -> Server {
    let mut server = Server { addr: ([0; 4], 0).into(), _permit: None, _lifecycle: None };
    let routes = Router::new().route("/", post(async || "not rejected"));
    let full = ConcurrencyLimitLayer::new(1);
    let router = match rejects {
        Rejects::LimitFull => {
            server._permit = full.handle().try_acquire().ok();
            routes.layer(full.respond())
        }
        Rejects::QueueTimedOut => {
            let full = full.queue(64, SHORT);
            server._permit = full.handle().try_acquire().ok();
            routes.layer(full.respond())
        }
        Rejects::RespondWith => {
            server._permit = full.handle().try_acquire().ok();
            routes.layer(
                full.respond_with(|_: &Rejected| {
                    Ok(StatusCode::SERVICE_UNAVAILABLE.into_response())
                })
                .per_response(),
            )
        }
        Rejects::CircuitOpen => {
            let breaker = CircuitBreakerLayer::http();
            breaker.handle().force_open();
            routes.layer(breaker.respond())
        }
        Rejects::Stopping => {
            let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
            // The layer rejects at once.
            let lifecycle = lifecycle.drain_delay(Duration::ZERO).grace(Duration::ZERO);
            lifecycle.ready();
            lifecycle.drain();
            let layer = lifecycle.layer();
            let stopping = lifecycle.clone();
            server._lifecycle = Some(lifecycle);
            until(|| stopping.phase() >= buttress::lifecycle::LifecyclePhase::Stopping).await;
            routes.layer(layer)
        }
        Rejects::DeadlinePassed => routes.layer(DeadlineLayer::new().respond()).layer(
            tower::util::MapRequestLayer::new(|mut request: Request| {
                request.extensions_mut().insert(Deadline::after(Duration::ZERO));
                request
            }),
        ),
        Rejects::TimedOut => {
            Router::new().route("/", post(hang)).layer(TimeoutLayer::server().head(SHORT).respond())
        }
        Rejects::DeadlineDuringUpload => Router::new()
            .route("/", post(hang))
            .layer(DeadlineLayer::new().default_of(SHORT).respond()),
        Rejects::ServerStack => {
            let mut config = buttress::config::ServerConfig::default();
            config.timeout.head = Some(SHORT);
            Router::new().route("/", post(hang)).layer(buttress::server(&config).unwrap())
        }
        Rejects::RespondLayer => gateway(),
    };
    server.addr = serve(served, router).await;
    server
}

/// Serves a router for as long as the runtime lives.
pub async fn serve(served: Served, router: Router) -> SocketAddr {
    let (listener, addr) = listener().await;
    match served {
        Served::Axum => {
            tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        }
        Served::Lifecycle => {
            let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
            lifecycle.ready();
            tokio::spawn(async move { lifecycle.serve(listener, router).await });
        }
    }
    addr
}

/// Reads one frame of the request, and never responds.
async fn hang(request: Request) -> StatusCode {
    let mut body = request.into_body();
    let _ = body.frame().await;
    pending::<()>().await;
    drop(body);
    StatusCode::OK
}

/// Forwards to an upstream whose circuit is open.
fn gateway() -> Router {
    let breaker = CircuitBreakerLayer::http();
    breaker.handle().force_open();
    let upstream = ServiceBuilder::new()
        .map_response(IntoResponse::into_response)
        .layer(RespondLayer::new())
        .layer(RetryLayer::http())
        .layer(breaker)
        .service(Client::builder(TokioExecutor::new()).build_http());
    let upstream: BoxCloneSyncService<Request, Response, BoxError> =
        BoxCloneSyncService::new(upstream);
    Router::new().fallback(async move |request: Request| {
        let response = upstream.oneshot(request).await;
        response.unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
    })
}
