//! The clients of this crate, hyper-util, tonic and reqwest over the layer, over real sockets.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use buttress::{
    Attempts, BoxError, RetryBudget, RetryLayer,
    connect::{Client, ConnectLayer, TcpConnector},
    outcome::RejectedKind,
};
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::{
    client::legacy::connect::HttpConnector,
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::support::{
    alone,
    net::{self, Gauge, listener, soon, until},
    rejection, rpc,
};

const CALLERS: usize = 200;
const CAP: usize = 50;

/// Starts a server that counts its open connections.
async fn serve(router: Router) -> (SocketAddr, Gauge) {
    let ((listener, addr), open) = (listener().await, Gauge::default());
    let gauge = open.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let (inside, router) = (gauge.enter(), router.clone());
            tokio::spawn(async move {
                let _inside = inside;
                let service = TowerToHyperService::new(router);
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    (addr, open)
}

fn hello() -> Router {
    Router::new().route("/", get(|| async { "hello" }))
}

async fn ask<S, B>(client: &S, addr: SocketAddr) -> Result<(), BoxError>
where
    S: Service<Request<Empty<Bytes>>, Response = http::Response<B>> + Clone,
    S::Error: Into<BoxError>,
    B: http_body::Body<Error: Into<BoxError>>,
{
    let response = client.clone().oneshot(net::get(addr, "/")).await.map_err(Into::into)?;
    assert_eq!(response.status(), 200);
    assert_eq!(response.into_body().collect().await.map_err(Into::into)?.to_bytes(), "hello");
    Ok(())
}

#[test]
fn auto_traits() {
    fn all<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send + 'static>(_: T) {}
    let layer = ConnectLayer::new();
    all(&layer);
    all(&layer.handle());
    all(&layer.layer(HttpConnector::new()));
    all(&layer.clone().untracked());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _inside = runtime.enter();
    let client = Client::builder(layer.clone()).build_http::<Empty<Bytes>>();
    all(&client);
    sent(client.request(net::get(([127, 0, 0, 1], 1).into(), "/")));
    sent(layer.layer(HttpConnector::new()).oneshot(http::Uri::from_static("http://a/")));
}

// ===== hyper-util =====

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_hundred_callers_never_open_more_than_fifty_connections() {
    let _alone = alone().await;
    let (addr, open) = serve(hello()).await;
    let layer = ConnectLayer::new().max_per_host(CAP);
    let handle = layer.handle();
    let client = Client::builder(layer).build_http();
    let callers = (0..CALLERS).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                ask(&client, addr).await.unwrap();
            }
        })
    });
    for caller in soon(join_all(callers)).await {
        caller.unwrap();
    }
    until(|| handle.snapshot().in_use == 0 && handle.snapshot().waiting == 0).await;
    let seen = handle.snapshot();
    // hyper-util's pool drops a connection that is returned for a caller which has just received another one. The
    // server observes this close shortly after the layer has released the permit, so its own count may exceed the cap.
    let dropped = seen.closed as usize;
    assert!(dropped <= CAP / 10 && seen.open <= CAP, "{seen:?}");
    assert!(open.total() <= CAP + dropped, "{seen:?}");
    assert!(open.peak() <= CAP + dropped, "{} connections: {seen:?}", open.peak());
    assert_eq!((seen.saturated, seen.failed, seen.timed_out, seen.connecting), (0, 0, 0, 0));
    assert_eq!(seen.open, open.now());
    assert!(seen.reused >= (CALLERS * 20 - CAP - dropped) as u64, "{seen:?}");
}

#[tokio::test]
async fn requests_in_a_row_use_one_connection() {
    let (addr, open) = serve(hello()).await;
    let layer = ConnectLayer::new();
    let handle = layer.handle();
    let client = Client::builder(layer).build_http();
    for _ in 0..1000 {
        soon(ask(&client, addr)).await.unwrap();
    }
    let seen = handle.snapshot();
    assert!(seen.reused >= 990 && open.total() <= 10, "{seen:?}");
}

#[tokio::test]
async fn callers_that_cancel_at_random_leave_no_permit_in_use() {
    let (addr, _) = serve(hello()).await;
    let layer = ConnectLayer::new().max_per_host(5).queue(CALLERS, Duration::from_secs(9));
    let handle = layer.handle();
    let client = Client::builder(layer).build_http();
    let mut random = fastrand::Rng::with_seed(8);
    for _ in 0..20 {
        let calls: Vec<_> = (0..100)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { ask(&client, addr).await })
            })
            .collect();
        for call in calls {
            for _ in 0..random.u32(0..5) {
                tokio::task::yield_now().await;
            }
            if random.bool() {
                call.abort();
            } else {
                soon(call).await.unwrap().unwrap();
            }
        }
        until(|| {
            let seen = handle.snapshot();
            (seen.in_use, seen.waiting, seen.connecting) == (0, 0, 0)
        })
        .await;
        assert!(handle.snapshot().open <= 5);
    }
    drop(client);
    until(|| handle.snapshot().open == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_connections_are_recycled_continually() {
    let connections = || ConnectLayer::new().max_per_host(5);
    renewed_all_the_time(Client::builder(connections()).build_http()).await;
    renewed_all_the_time(Client::builder(connections()).http2_only().build_http()).await;
}

async fn renewed_all_the_time(client: Client<TcpConnector, Empty<Bytes>>) {
    let (addr, open) = serve(hello()).await;
    let handle = client.connections();
    let renewing = tokio::spawn(async move {
        loop {
            handle.recycle();
            tokio::task::yield_now().await;
        }
    });
    let callers = (0..10).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            while client.connections().snapshot().created < 100 {
                ask(&client, addr).await.unwrap();
            }
        })
    });
    for caller in soon(join_all(callers)).await {
        caller.unwrap();
    }
    renewing.abort();
    assert!(open.total() >= 100);
}

/// The layer alone, under a client that another crate builds.
#[tokio::test]
async fn a_client_of_another_crate_is_bounded_as_well() {
    let (addr, open) = serve(hello()).await;
    let layer = ConnectLayer::new().max_per_host(3);
    let client = hyper_util::client::legacy::Client::builder(buttress::connect::Executor)
        .build(layer.layer(HttpConnector::new()));
    for _ in 0..20 {
        soon(try_join_all((0..40).map(|_| ask(&client, addr)))).await.unwrap();
    }
    let seen = layer.handle().snapshot();
    assert!(open.peak() <= 3 && seen.created <= 3, "{seen:?}");
    until(|| layer.handle().snapshot().waiting == 0).await;
}

// ===== tonic =====

#[tokio::test]
async fn tonic_channels_over_the_layer_share_its_cap() {
    use tonic::transport::Endpoint;
    use tonic_health::pb::{health_client::HealthClient, health_server::HealthServer};

    let (incoming, addr) = rpc::incoming().await;
    let server = tonic::transport::Server::builder()
        .add_service(HealthServer::new(rpc::Obedient::default()))
        .serve_with_incoming(incoming);
    tokio::spawn(server);
    let layer = ConnectLayer::new().max_per_host(1).queue(0, Duration::from_secs(1));
    let endpoint = || Endpoint::from_shared(format!("http://{addr}")).unwrap();
    let connector = layer.layer(HttpConnector::new());
    let channel = soon(endpoint().connect_with_connector(connector.clone())).await.unwrap();
    let calls = (0..50).map(|_| {
        let mut client = HealthClient::new(channel.clone());
        async move { client.check(rpc::ask("")).await }
    });
    soon(try_join_all(calls)).await.unwrap();
    let seen = layer.handle().snapshot();
    assert_eq!((seen.created, seen.open, seen.in_use), (1, 1, 0));

    // Another channel is rejected, because the first channel holds the only permit. The error states the cause.
    let error = soon(endpoint().connect_with_connector(connector.clone())).await.unwrap_err();
    let error: BoxError = error.into();
    assert_eq!(rejection(&error).kind(), RejectedKind::Saturated);
    drop(channel);
    until(|| layer.handle().snapshot().open == 0).await;
    let channel = soon(endpoint().connect_with_connector(connector)).await.unwrap();
    soon(HealthClient::new(channel).check(rpc::ask(""))).await.unwrap();
}

// ===== reqwest =====

#[tokio::test]
async fn reqwest_connects_under_the_layer_timed_and_counted() {
    let (addr, open) = serve(hello()).await;
    let layer = ConnectLayer::new().connect_timeout(Duration::from_secs(5));
    let client = reqwest::Client::builder().no_proxy().connector_layer(layer.clone().untracked());
    let client = client.build().unwrap();
    for _ in 0..20 {
        let response = soon(client.get(format!("http://{addr}/")).send()).await.unwrap();
        assert_eq!(soon(response.bytes()).await.unwrap(), "hello");
    }
    let seen = layer.handle().snapshot();
    assert_eq!((seen.created, seen.failed, open.total()), (1, 0, 1));
    // The layer observes connects only. reqwest does not report when a connection ends.
    assert_eq!((seen.open, seen.connecting), (0, 0));

    let nobody = net::closed_address().await;
    let error = soon(client.get(format!("http://{nobody}/")).send()).await.unwrap_err();
    assert!(error.is_connect());
    assert_eq!(layer.handle().snapshot().failed, 1);

    let layer = ConnectLayer::new().connect_timeout(Duration::ZERO);
    let client = reqwest::Client::builder().no_proxy().connector_layer(layer.untracked());
    let error = client.build().unwrap().get(format!("http://{addr}/")).send().await.unwrap_err();
    let error: BoxError = error.into();
    assert_eq!(rejection(&error).kind(), RejectedKind::Misconfigured);
}

// ===== TLS =====

mod tls {
    use std::sync::Arc;

    use http_body_util::Full;
    use hyper_rustls::HttpsConnectorBuilder;
    use rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::{CryptoProvider, ring},
        pki_types::PrivateKeyDer,
    };
    use tokio_rustls::TlsAcceptor;

    use buttress::{Outcome, outcome::Reason};

    use super::*;
    use crate::support::net::Stage;

    /// Starts a server that speaks these protocols. Returns a client configuration that trusts it.
    async fn serve(alpn: &[&[u8]], stage: Stage) -> (SocketAddr, Gauge, ClientConfig) {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let provider: Arc<CryptoProvider> = ring::default_provider().into();
        let key = PrivateKeyDer::Pkcs8(own.signing_key.serialize_der().into());
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let mut roots = RootCertStore::empty();
        roots.add(own.cert.der().clone()).unwrap();
        let trusts = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();

        let router = Router::new()
            .route("/", get(|| async { "hello" }))
            .route("/slow", get(move || stage.clone().plain()));
        let ((listener, addr), open) = (listener().await, Gauge::default());
        let (gauge, acceptor) = (open.clone(), TlsAcceptor::from(Arc::new(config)));
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tcp.set_nodelay(true).unwrap();
                tcp.set_nodelay(true).unwrap();
                let (acceptor, router) = (acceptor.clone(), router.clone());
                let inside = gauge.enter();
                tokio::spawn(async move {
                    let _inside = inside;
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let service = TowerToHyperService::new(router);
                    let server = auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        (addr, open, trusts)
    }

    fn request(addr: SocketAddr, path: &str) -> Request<Full<Bytes>> {
        let uri = format!("https://localhost:{}{path}", addr.port());
        Request::get(uri).body(Full::default()).unwrap()
    }

    #[tokio::test]
    async fn protocol_is_negotiated_over_tls_within_the_cap() {
        for (alpn, protocols) in
            [("h2", &[b"h2".as_slice()] as &[&[u8]]), ("http/1.1", &[b"http/1.1"])]
        {
            let stage = Stage::default();
            let (addr, open, trusts) = serve(protocols, stage.clone()).await;
            let layer = ConnectLayer::new().max_per_host(4);
            let handle = layer.handle();
            let https = HttpsConnectorBuilder::new()
                .with_tls_config(trusts)
                .https_only()
                .enable_all_versions()
                .build();
            let client = Client::builder(layer).build(https);
            soon(client.request(request(addr, "/"))).await.unwrap().collect().await.unwrap();
            let calls: Vec<_> =
                (0..20).map(|_| tokio::spawn(client.request(request(addr, "/slow")))).collect();
            let at_once = if alpn == "h2" { 20 } else { 4 };
            until(|| stage.inside.now() == at_once).await;
            let seen = handle.snapshot();
            assert_eq!((seen.open, seen.in_use), if alpn == "h2" { (1, 1) } else { (4, 4) });
            stage.open();
            for call in calls {
                let response = soon(call).await.unwrap().unwrap();
                assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
            }
            assert!(open.total() <= 4);
            until(|| handle.snapshot().in_use == 0).await;
        }
    }

    #[tokio::test]
    async fn connect_to_a_server_that_the_system_does_not_trust_fails() {
        let (addr, _, _) = serve(&[b"h2"], Stage::default()).await;
        let layer = ConnectLayer::new();
        let handle = layer.handle();
        // On a machine without root certificates the client cannot be built, so it trusts no server either.
        let Ok(client) = Client::builder(layer).build_https() else { return };
        let error = soon(client.request(request(addr, "/"))).await.unwrap_err();
        assert_eq!(Outcome::of_error(&*error).reason(), Reason::ConnectFailed);
        assert_eq!((handle.snapshot().failed, handle.snapshot().open), (1, 0));
    }
}

/// Responds 421 to every request of the first connection.
async fn misdirecting() -> (SocketAddr, Arc<AtomicUsize>) {
    let ((listener, addr), connections) = (listener().await, Arc::new(AtomicUsize::new(0)));
    let count = connections.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let is_first = count.fetch_add(1, SeqCst) == 0;
            let status = if is_first { StatusCode::MISDIRECTED_REQUEST } else { StatusCode::OK };
            let router = Router::new().fallback(move || async move { (status, "text") });
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                let service = TowerToHyperService::new(router);
                let _ = server.serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    (addr, connections)
}

#[tokio::test]
async fn misdirected_request_is_retried_over_another_connection_for_any_method() {
    for is_http2 in [false, true] {
        let (addr, connections) = misdirecting().await;
        let builder = Client::builder(ConnectLayer::new());
        let client = if is_http2 { builder.http2_only() } else { builder }.build_http();
        let budget = RetryBudget::with(1.0, 0, 9);
        let retry = RetryLayer::http().budget(budget.clone());
        let client = ServiceBuilder::new().layer(retry).service(client);
        let post = Request::post(format!("http://{addr}/")).body(Full::<Bytes>::from("x"));
        let response = soon(client.clone().oneshot(post.unwrap())).await.unwrap();
        assert_eq!(response.status(), 200, "HTTP/2: {is_http2}");
        assert_eq!(Attempts::of(&response).made, 2, "HTTP/2: {is_http2}");
        assert_eq!(connections.load(SeqCst), 2, "HTTP/2: {is_http2}");
        assert_eq!(budget.balance(), 1.0, "HTTP/2: {is_http2}: no withdrawal");
    }
}
