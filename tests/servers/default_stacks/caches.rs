//! Caching proxies in front of a server whose layers reject calls. A proxy that stores a rejection would repeat it to
//! other clients after the server has recovered.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::ready,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::{MethodRouter, any, any_service},
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, DeadlineLayer, Health, HealthProbeLayer,
    Lifecycle, Rejected, RespondLayer, TimeoutLayer, Timeouts, Trip,
    config::ServerConfig,
    health::ProbeState,
    limit::OwnedPermit,
    outcome::{RejectedKind, TimeoutPhase},
};
use http_body_util::BodyExt;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::net::TcpListener;
use tower::ServiceBuilder;

use super::varnish::{self, Varnish};
use crate::support::{
    net::until,
    programs::{
        nginx::{self, Nginx},
        skip,
    },
};

/// The paths of requests that the server rejects, beside those of [`KINDS`].
const LAYERS: [&str; 9] = [
    "/limit",
    "/queue",
    "/circuit",
    "/health",
    "/lifecycle",
    "/deadline",
    "/timeout",
    "/misconfigured",
    "/server_stack",
];

/// Every kind of rejection, from a service that creates it and a [`RespondLayer`].
const KINDS: [RejectedKind; 14] = [
    RejectedKind::Open,
    RejectedKind::Probing,
    RejectedKind::Recovering,
    RejectedKind::ForcedOpen,
    RejectedKind::Full,
    RejectedKind::Outranked,
    RejectedKind::WaitedTooLong,
    RejectedKind::DeadlinePassed,
    RejectedKind::Saturated,
    RejectedKind::TimedOut(TimeoutPhase::Head),
    RejectedKind::Unhealthy,
    RejectedKind::Quota,
    RejectedKind::ShuttingDown,
    RejectedKind::Misconfigured,
];

const DEADLINE_HEADER: &str = "x-request-timeout-ms";

/// A form of request. A rejection has the same form as its request.
#[derive(Clone, Copy, Debug)]
enum Form {
    Plain,
    Json,
    Grpc,
    GrpcByGet,
    Head,
}

const FORMS: [Form; 5] = [Form::Plain, Form::Json, Form::Grpc, Form::GrpcByGet, Form::Head];

impl Form {
    /// The request carries a deadline that has passed.
    fn request(self, uri: &str) -> Request {
        let builder = Request::builder().uri(uri);
        let grpc = "application/grpc";
        let builder = match self {
            Self::Plain => builder.header(header::ACCEPT, "text/html"),
            Self::Json => builder.header(header::ACCEPT, "application/json"),
            Self::Grpc => builder.method("POST").header(header::CONTENT_TYPE, grpc),
            Self::GrpcByGet => builder.header(header::CONTENT_TYPE, grpc),
            Self::Head => builder.method("HEAD"),
        };
        builder
            .header("grpc-timeout", "0n")
            .header(DEADLINE_HEADER, "0")
            .body(Body::empty())
            .unwrap()
    }
}

// ===== The server =====

/// Number of requests that reached the server, by path.
#[derive(Clone, Default)]
struct Arrivals(Arc<Mutex<HashMap<String, usize>>>);

impl Arrivals {
    fn of(&self, path: &str) -> usize {
        let arrivals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.get(path).copied().unwrap_or_default()
    }

    async fn count(State(arrivals): State<Self>, request: Request, next: Next) -> Response {
        let path = request.uri().path().to_owned();
        *arrivals.0.lock().unwrap_or_else(PoisonError::into_inner).entry(path).or_default() += 1;
        next.run(request).await
    }
}

struct Server {
    addr: SocketAddr,
    arrivals: Arrivals,
    _held: Vec<OwnedPermit>,
}

fn hello() -> MethodRouter {
    any(async || "hello")
}

async fn server() -> Server {
    let limit = ConcurrencyLimitLayer::new(1);
    let queue = ConcurrencyLimitLayer::new(1).queue(8, Duration::from_millis(1));
    let held = vec![limit.handle().try_acquire().unwrap(), queue.handle().try_acquire().unwrap()];

    let circuit = CircuitBreakerLayer::new(Trip::consecutive(1));
    circuit.handle().force_open();

    let probe = HealthProbeLayer::check(async || Err::<(), _>("down")).thresholds(1, 1);
    let probe_handle = probe.handle();
    // The layer starts its probe with the first request.
    let health = hello().layer(probe.respond());

    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    // The layer rejects at once.
    let lifecycle = lifecycle.drain_delay(Duration::ZERO).grace(Duration::ZERO);
    lifecycle.drain();

    let hangs = any(async || std::future::pending::<()>().await);
    let timeout = Timeouts::server().head(Duration::from_millis(1));
    let deadline = DeadlineLayer::new().header(DEADLINE_HEADER);
    let mut config = ServerConfig::default();
    config.deadline.header = Some(DEADLINE_HEADER.to_owned());
    let stack = buttress::server(&config).unwrap();

    let layers = Router::new()
        .route("/limit", hello().layer(limit.respond()))
        .route("/queue", hello().layer(queue.respond()))
        .route("/circuit", hello().layer(circuit.respond()))
        .route("/health", health)
        .route("/lifecycle", hello().layer(lifecycle.layer()))
        .route("/deadline", hello().layer(deadline.respond()))
        .route("/timeout", hangs.layer(TimeoutLayer::new(timeout).as_is().respond()))
        .route("/misconfigured", hello().layer(ConcurrencyLimitLayer::new(0).respond()))
        .route("/server_stack", hello().layer(stack));
    let kinds = KINDS.into_iter().fold(layers, |router, kind| {
        let rejects = ServiceBuilder::new()
            .map_err(|error: BoxError| -> Infallible { panic!("not a rejection: {error}") })
            .layer(RespondLayer::new())
            .service_fn(move |_: Request| {
                ready(Err::<Response, _>(BoxError::from(Rejected::new(kind))))
            });
        router.route(&format!("/kind/{}", kind.as_str()), any_service(rejects))
    });

    let arrivals = Arrivals::default();
    let app = kinds
        // Without `no-store` each cache stores this one: it shows that the caches work.
        .route(
            "/stored",
            any(async || ([(header::CACHE_CONTROL, "max-age=60")], StatusCode::NOT_FOUND)),
        )
        .layer(middleware::from_fn_with_state(arrivals.clone(), Arrivals::count));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    client.request(Form::Plain.request(&format!("http://{addr}/health"))).await.unwrap();
    until(|| probe_handle.state() == ProbeState::Down).await;
    Server { addr, arrivals, _held: held }
}

// ===== The scenario =====

async fn assert_stores_no_rejection(server: &Server, port: u16) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let send = async |form: Form, path: &str| {
        let request = form.request(&format!("http://127.0.0.1:{port}{path}"));
        let response = client.request(request).await.unwrap();
        let status = response.status();
        response.into_body().collect().await.unwrap();
        status
    };
    let kinds = KINDS.map(|kind| format!("/kind/{}", kind.as_str()));
    for path in LAYERS.into_iter().chain(kinds.iter().map(String::as_str)) {
        for form in FORMS {
            let before = server.arrivals.of(path);
            for _ in 0..3 {
                let status = send(form, path).await;
                let is_rejection = match form {
                    Form::Grpc => status == 200,
                    _ => status.is_server_error() || status == 429,
                };
                assert!(is_rejection, "{path} {form:?}: {status}");
            }
            let arrived = server.arrivals.of(path) - before;
            assert_eq!(arrived, 3, "{path} {form:?}: the cache stored a rejection");
        }
    }
    for _ in 0..3 {
        assert_eq!(send(Form::Plain, "/stored").await, 404);
    }
    assert_eq!(server.arrivals.of("/stored"), 1, "the cache stores nothing at all");
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_that_caches_every_status_stores_no_rejection() {
    let server = server().await;
    // Every status and method, regardless of the request's headers.
    let location = format!(
        "location / {{
            proxy_pass http://{};
            proxy_pass_request_headers on;
            proxy_cache cache;
            proxy_cache_valid any 1m;
            proxy_cache_methods GET HEAD POST;
            proxy_cache_convert_head off;
            proxy_cache_key $request_method$uri$http_accept$http_content_type;
        }}",
        server.addr
    );
    let Some(nginx) = Nginx::start("", &location) else { return skip(nginx::BINARY) };
    assert_stores_no_rejection(&server, nginx.port()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn varnish_with_its_defaults_stores_no_rejection() {
    let server = server().await;
    let Some(varnish) = Varnish::start(server.addr) else { return skip(varnish::BINARY) };
    assert_stores_no_rejection(&server, varnish.port()).await;
}
