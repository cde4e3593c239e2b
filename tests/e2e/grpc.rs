//! The recommended gRPC client, made in one call, under a generated client and over real sockets.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use buttress::{
    breaker::CircuitState,
    config::{ClientConfig, ConfigPreset},
    stack::{ClientHandle, GrpcClient},
};
use futures_util::{Stream, stream};
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};
use tower::ServiceExt;

use crate::support::{
    net::{closed_address, soon, until},
    rpc::{Obedient, ask, channel, incoming},
};

/// Fails the first calls with `UNAVAILABLE`. Never responds to `hang`.
#[derive(Clone, Default)]
struct Flaky {
    calls: Arc<AtomicUsize>,
    failures_left: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl Health for Flaky {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.calls.fetch_add(1, SeqCst);
        if request.into_inner().service == "hang" {
            std::future::pending::<()>().await;
        }
        match self.failures_left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Err(Status::unavailable("starting")),
            Err(_) => Ok(Response::new(HealthCheckResponse { status: 1 })),
        }
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(stream::empty())))
    }
}

async fn serve(service: impl Health) -> SocketAddr {
    let (incoming, addr) = incoming().await;
    let server = Server::builder().add_service(HealthServer::new(service));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    addr
}

fn client(addr: SocketAddr, settings: &str) -> (HealthClient<GrpcClient>, ClientHandle) {
    let settings = format!("retry_backoff = '1ms'\n{settings}");
    let config = ClientConfig::load("search").toml(&settings).finish().unwrap();
    let service = buttress::grpc(&config, channel(addr)).unwrap();
    let handle = service.handle();
    (HealthClient::new(service), handle)
}

#[tokio::test]
async fn generated_client_retries_unavailable() {
    let service = Flaky::default();
    service.failures_left.store(2, SeqCst);
    let (mut client, handle) = client(serve(service.clone()).await, "");
    let task = tokio::spawn(async move { client.check(ask("")).await });
    assert_eq!(soon(task).await.unwrap().unwrap().into_inner().status, 1);
    assert_eq!(service.calls.load(SeqCst), 3);
    assert_eq!((handle.snapshot().retries, handle.snapshot().successes), (2, 1));
}

/// Always fails, with these values of `grpc-retry-pushback-ms`.
#[derive(Clone)]
struct Forbidding {
    calls: Arc<AtomicUsize>,
    code: Code,
    pushbacks: &'static [&'static str],
}

#[tonic::async_trait]
impl Health for Forbidding {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.calls.fetch_add(1, SeqCst);
        let mut status = Status::new(self.code, "no");
        for pushback in self.pushbacks {
            status.metadata_mut().append("grpc-retry-pushback-ms", pushback.parse().unwrap());
        }
        Err(status)
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(stream::empty())))
    }
}

/// The rules of gRFC A6 and of grpc-go's `shouldRetry`.
#[tokio::test]
async fn pushback_of_a_server_decides_about_retries() {
    // The status, its pushbacks, and the number of calls.
    let rows: [(Code, &[&str], usize); 7] = [
        (Code::Unavailable, &[], 3),
        (Code::Unavailable, &["1"], 3),
        (Code::Unavailable, &["-1"], 1),
        (Code::Unavailable, &["1", "1"], 1),
        (Code::ResourceExhausted, &["1"], 3),
        (Code::ResourceExhausted, &[], 1),
        (Code::InvalidArgument, &["-1"], 1),
    ];
    for (code, pushbacks, calls) in rows {
        let service = Forbidding { calls: Arc::default(), code, pushbacks };
        let (mut client, handle) = client(serve(service.clone()).await, "");
        let status = soon(client.check(ask(""))).await.unwrap_err();
        assert_eq!(status.code(), code, "{pushbacks:?}");
        assert_eq!(service.calls.load(SeqCst), calls, "{code:?} {pushbacks:?}");
        assert_eq!(handle.snapshot().retries, calls as u64 - 1, "{code:?} {pushbacks:?}");
    }
}

#[tokio::test]
async fn open_circuit_is_unavailable_and_sends_nothing() {
    let service = Flaky::default();
    service.failures_left.store(usize::MAX, SeqCst);
    let (mut client, handle) = client(serve(service.clone()).await, "breaker_failures = 3");
    let status = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "starting"));
    assert_eq!((handle.breaker().state(), service.calls.load(SeqCst)), (CircuitState::Open, 3));
    let status = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "circuit_open"));
    assert!(status.metadata().contains_key("grpc-retry-pushback-ms"));
    assert_eq!((handle.snapshot().rejected, service.calls.load(SeqCst)), (1, 3));
}

#[tokio::test]
async fn stream_holds_its_permit_and_a_full_limit_is_unavailable() {
    let service = Obedient::default();
    let addr = serve(service.clone()).await;
    let (mut client, handle) = client(addr, "limit_max = 1\nlimit_queue = 0\nretry_attempts = 1");
    let mut watch = soon(client.watch(ask("hold"))).await.unwrap().into_inner();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status, 1);
    let status = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "limit_reached"));
    drop(watch);
    until(|| handle.snapshot().in_flight == 0).await;
    soon(client.check(ask(""))).await.unwrap();
}

#[tokio::test]
async fn timeout_is_deadline_exceeded() {
    let addr = serve(Flaky::default()).await;
    let (mut client, handle) = client(addr, "timeout_head = '50ms'\nconnect_timeout = '50ms'");
    let status = soon(client.check(ask("hang"))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::DeadlineExceeded, "timeout_head"));
    assert_eq!(handle.snapshot().timeouts, 1);
}

/// The connections are the channel's own, so their settings cannot conflict with the deadline.
#[tokio::test]
async fn short_default_deadline_is_deadline_exceeded_and_can_be_updated() {
    let addr = serve(Flaky::default()).await;
    let settings = "deadline_default = '200ms'\ntimeout_head = '150ms'\nconnect_timeout = '50ms'\n\
                    retry_attempts = 1\nlimit_queue_wait = '100ms'";
    for preset in ["", "preset = 'internal'\n", "preset = 'slow'\n"] {
        let (mut client, handle) = client(addr, &format!("{preset}{settings}"));
        let status = soon(client.check(ask("hang"))).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{preset}");
        handle.update(&handle.config()).unwrap();
    }
}

#[tokio::test]
async fn server_that_is_not_there_is_unavailable() {
    let (mut client, handle) = client(closed_address().await, "");
    let status = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!((handle.snapshot().retries, handle.snapshot().failures), (2, 1));
}

#[tokio::test]
async fn service_without_a_generated_client_fails_with_the_error_of_the_client() {
    let service =
        buttress::grpc(&ClientConfig::default(), channel(closed_address().await)).unwrap();
    let request = http::Request::post("http://search/").body(tonic::body::Body::empty()).unwrap();
    let error: anyhow::Error = soon(service.oneshot(request)).await.unwrap_err().into();
    assert!(error.is::<buttress::ClientError>());
}

#[tokio::test]
async fn settings_of_connections_are_errors_and_presets_are_not() {
    let service = || channel("127.0.0.1:1".parse().unwrap());
    for preset in [ConfigPreset::Internal, ConfigPreset::Slow, ConfigPreset::Llm] {
        buttress::grpc(&ClientConfig::preset(preset), service()).unwrap();
    }
    let settings = "connect_max_total = 3\nhealth_probe_uri = 'http://search/healthz'";
    let config =
        ClientConfig::load("").preset(ConfigPreset::Internal).toml(settings).finish().unwrap();
    let errors = buttress::grpc(&config, service()).unwrap_err().to_string();
    for key in ["connect_max_total", "health_probe_uri"] {
        assert!(errors.contains(&format!("`{key}`")), "{errors}");
    }
    assert!(!errors.contains("connect_timeout"), "{errors}");
    let settings = "retry_unprocessed = [429]\ncheck_health_uri = 'http://search/healthz'";
    let config = ClientConfig::load("").preset(ConfigPreset::Llm).toml(settings).finish().unwrap();
    let errors = buttress::grpc(&config, service()).unwrap_err().to_string();
    for key in ["retry_unprocessed", "check_health_uri"] {
        assert!(errors.contains(&format!("`{key}`")), "{errors}");
    }
    let mut config = ClientConfig::default();
    config.connect.http2_only = true;
    let errors = buttress::grpc(&config, service()).unwrap_err().to_string();
    assert!(errors.contains("`connect_http2_only` is true"), "{errors}");
}
