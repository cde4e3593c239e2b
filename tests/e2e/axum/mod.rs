//! The layers under axum, over a real server on TCP.

mod breaker;
mod browsers;
mod connections;
mod errors;
mod limit;
mod long_lived;
mod open_loop;
mod other_layers;
mod tower_http_layers;

use std::{
    iter::repeat_n,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router, error_handling::HandleErrorLayer, extract::Request, middleware::Next, routing::get,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, Trip,
    breaker::{CircuitBreakerHandle, CircuitState},
    limit::ConcurrencyLimitHandle,
    respond::Respond,
};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::{
    catch_panic::CatchPanicLayer, compression::CompressionLayer, timeout::TimeoutLayer,
    trace::TraceLayer,
};

use crate::support::net::{self, Stage, answers, client, listener, send_all, serve, soon, until};

const CALLERS: usize = 20;

/// Returns a limit of two calls, in whose queue all further calls wait.
fn two() -> (ConcurrencyLimitLayer<buttress::classify::Http, Respond>, ConcurrencyLimitHandle) {
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    (limit.respond(), handle)
}

/// Sends twenty calls. Asserts that two are in flight while eighteen wait, and that all of them are served.
async fn two_of_twenty(
    addr: std::net::SocketAddr,
    stage: Stage,
    limit: ConcurrencyLimitHandle,
    paths: &[&'static str],
) {
    let mut calls = send_all(addr, paths.iter().copied().cycle().take(CALLERS));
    until(|| limit.snapshot().waiting as usize == CALLERS - 2).await;
    until(|| stage.inside.now() == 2).await;
    stage.open();
    for answer in answers(&mut calls, CALLERS).await {
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"hello"[..]));
    }
    assert_eq!((stage.inside.peak(), stage.inside.total()), (2, CALLERS));
    all_free(&stage, &limit).await;
    assert_eq!(limit.snapshot().rejected_full + limit.snapshot().rejected_waited, 0);
}

/// Waits until all permits are released: the client has received the last byte before the server drops the body.
async fn all_free(stage: &Stage, limit: &ConcurrencyLimitHandle) {
    until(|| stage.inside.now() == 0).await;
    until(|| limit.in_flight() == 0 && limit.snapshot().waiting == 0).await;
}

fn routes(stage: &Stage) -> Router {
    let (a, b, c, d) = (stage.clone(), stage.clone(), stage.clone(), stage.clone());
    Router::new()
        .route("/a", get(move || a.plain()))
        .route("/b", get(move || b.plain()))
        .route("/stream", get(move || c.streaming()))
        .route("/cut", get(move || d.breaking_off()))
}
