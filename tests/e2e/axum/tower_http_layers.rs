//! The positions of tower-http's layers among those of this crate, over a real server on TCP.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{Router, body::Body, routing::get};
use buttress::{ConcurrencyLimitLayer, TimeoutLayer};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use tower_http::{
    auth::AsyncRequireAuthorizationLayer, compression::CompressionLayer, cors::CorsLayer,
    trace::TraceLayer,
};

use crate::support::net::{Answer, Stage, client, serve, soon, until};

const ORIGIN: &str = "https://app.example";

async fn send(at: SocketAddr, method: Method, headers: &[(&str, &str)]) -> Answer {
    let mut request = Request::builder().method(method).uri(format!("http://{at}/"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Body::empty()).unwrap();
    let (head, body) = soon(client().request(request)).await.unwrap().into_parts();
    let body = soon(body.collect()).await.unwrap().to_bytes();
    Answer { status: head.status, headers: head.headers, body }
}

/// Sends a request as a script of another origin does.
async fn cross_origin(at: SocketAddr) -> Answer {
    send(at, Method::GET, &[("origin", ORIGIN)]).await
}

async fn preflight(at: SocketAddr) -> Answer {
    let headers = [("origin", ORIGIN), ("access-control-request-method", "PUT")];
    send(at, Method::OPTIONS, &headers).await
}

fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(http::HeaderValue::from_static(ORIGIN))
        .allow_methods([Method::PUT])
        .expose_headers([header::RETRY_AFTER])
}

fn app(stage: &Stage) -> Router {
    let stage = stage.clone();
    Router::new().route("/", get(|| stage.plain()))
}

/// Returns a limit of one call.
fn limit() -> ConcurrencyLimitLayer<buttress::classify::Http, buttress::respond::Respond> {
    ConcurrencyLimitLayer::new(1).respond()
}

/// Occupies the only permit of a limit.
async fn fill(at: SocketAddr, stage: &Stage, headers: &'static [(&str, &str)]) {
    tokio::spawn(send(at, Method::GET, headers));
    until(|| stage.inside.now() == 1).await;
}

fn allows_origin(headers: &HeaderMap) -> bool {
    headers.get("access-control-allow-origin").is_some_and(|origin| origin == ORIGIN)
}

#[tokio::test]
async fn rejection_outside_of_cors_is_hidden_from_scripts_and_preflights_are_rejected() {
    let stage = Stage::default();
    let at = serve(app(&stage).layer(cors()).layer(limit())).await;
    fill(at, &stage, &[]).await;
    let rejected = cross_origin(at).await;
    assert_eq!(rejected.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(!allows_origin(&rejected.headers), "{:?}", rejected.headers);
    assert_eq!(preflight(at).await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn rejection_inside_of_cors_is_readable_by_scripts_and_preflights_need_no_permit() {
    let stage = Stage::default();
    let layer = limit();
    let handle = layer.handle();
    let at = serve(app(&stage).layer(layer).layer(cors())).await;
    fill(at, &stage, &[]).await;
    let rejected = cross_origin(at).await;
    assert_eq!(rejected.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(allows_origin(&rejected.headers), "{:?}", rejected.headers);
    assert_eq!(rejected.headers["access-control-expose-headers"], "retry-after");
    assert_eq!(rejected.headers["retry-after"], "1");
    let allowed = preflight(at).await;
    assert_eq!(allowed.status, StatusCode::OK);
    assert!(allows_origin(&allowed.headers));
    assert_eq!(allowed.headers["access-control-allow-methods"], "PUT");
    assert_eq!(handle.snapshot().rejected_full, 1, "the preflight was rejected");
}

/// Accepts requests with a token.
#[derive(Clone, Copy)]
struct Token;

impl<B: Send + 'static> tower_http::auth::AsyncAuthorizeRequest<B> for Token {
    type RequestBody = B;
    type ResponseBody = Body;
    type Future = std::future::Ready<Result<Request<B>, Response<Body>>>;

    fn authorize(&mut self, request: Request<B>) -> Self::Future {
        let is_known = request.headers().get("authorization").is_some_and(|it| it == "Bearer it");
        std::future::ready(match is_known {
            true => Ok(request),
            false => {
                let response = Response::builder().status(StatusCode::UNAUTHORIZED);
                Err(response.body(Body::empty()).unwrap())
            }
        })
    }
}

#[tokio::test]
async fn callers_without_credentials_acquire_permits_unless_authorization_is_outside_of_the_limit()
{
    let auth = || AsyncRequireAuthorizationLayer::new(Token);
    for auth_is_outside in [true, false] {
        let (stage, layer) = (Stage::default(), limit());
        let handle = layer.handle();
        let app = match auth_is_outside {
            true => app(&stage).layer(layer).layer(auth()).layer(cors()),
            false => app(&stage).layer(auth()).layer(layer).layer(cors()),
        };
        let at = serve(app).await;
        fill(at, &stage, &[("authorization", "Bearer it")]).await;
        let expected = if auth_is_outside { 401 } else { 503 };
        assert_eq!(cross_origin(at).await.status, expected);
        assert_eq!(handle.snapshot().rejected_full, u64::from(!auth_is_outside));
        // A preflight has no credentials (Fetch standard, "CORS-preflight request").
        assert_eq!(preflight(at).await.status, 200);
    }
}

#[tokio::test]
async fn tracing_sees_rejections_only_from_outside_of_the_layers_that_reject() {
    for trace_is_outside in [true, false] {
        let (stage, seen) = (Stage::default(), Arc::new(AtomicUsize::new(0)));
        let counted = seen.clone();
        let trace =
            TraceLayer::new_for_http().on_request(move |_: &Request<Body>, _: &tracing::Span| {
                counted.fetch_add(1, SeqCst);
            });
        let app = match trace_is_outside {
            true => app(&stage).layer(limit()).layer(trace),
            false => app(&stage).layer(trace).layer(limit()),
        };
        let at = serve(app).await;
        fill(at, &stage, &[]).await;
        assert_eq!(cross_origin(at).await.status, 503);
        assert_eq!(seen.load(SeqCst), if trace_is_outside { 2 } else { 1 });
    }
}

#[tokio::test]
async fn compression_on_either_side_of_the_limit_holds_the_permit_to_the_end_of_the_body() {
    for compression_is_outside in [true, false] {
        let stage = Stage::default();
        let layer = limit();
        let handle = layer.handle();
        let streaming = stage.clone();
        let app = Router::new().route("/", get(|| streaming.streaming()));
        let timeout = TimeoutLayer::server().respond();
        let app = match compression_is_outside {
            true => app.layer(timeout).layer(layer).layer(CompressionLayer::new()),
            false => app.layer(timeout).layer(CompressionLayer::new()).layer(layer),
        };
        let at = serve(app).await;
        let call = tokio::spawn(send(at, Method::GET, &[("accept-encoding", "gzip")]));
        until(|| stage.inside.now() == 1).await;
        let rejected = send(at, Method::GET, &[("accept-encoding", "gzip")]).await;
        assert_eq!(rejected.status, 503);
        // A problem document has more than 32 bytes, from which on the layer compresses.
        let is_compressed = rejected.headers.contains_key("content-encoding");
        assert_eq!(is_compressed, compression_is_outside);
        assert_eq!(rejected.headers["retry-after"], "1");
        stage.open();
        let response = soon(call).await.unwrap();
        assert_eq!(response.headers["content-encoding"], "gzip");
        until(|| handle.in_flight() == 0).await;
        assert_eq!(cross_origin(at).await.body, "hello");
    }
}
