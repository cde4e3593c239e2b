//! Rolling restarts: two servers behind a TCP balancer restart in turn, while clients call without a pause.

use std::{
    error::Error,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, routing::post};
use buttress::{Health, Lifecycle, lifecycle::Drained};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{
    io::AsyncReadExt,
    process::{Child, Command},
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::pb::health_server::HealthServer;

use crate::support::{
    alone,
    net::{balancer::Balancer, listener, raw, soon},
    programs::skip,
    rpc::Obedient,
};

const RESTARTS: usize = 20;
const DELAY: Duration = Duration::from_millis(300);
/// Time from the begin of the drain to the moment at which the balancer removes the server from rotation.
const ROUTED_FOR: Duration = Duration::from_millis(100);
/// Number of clients that call one after another.
const LANES: usize = 10;
/// Minimum number of calls: below that, too few calls meet the end of a server.
const MIN_CALLS: usize = 1_000;

// ===== Servers =====

/// A running server: its address, and its task, which begins to drain by the lifecycle.
struct Running {
    addr: SocketAddr,
    lifecycle: Lifecycle,
    task: JoinHandle<Drained>,
}

#[derive(Clone, Copy)]
enum Kind {
    Serve,
    Axum,
    ServeTonicRoutes,
    Tonic,
}

/// Responds with the body of the request.
fn app() -> Router {
    Router::new().route("/", post(async |body: Bytes| body))
}

impl Running {
    async fn start(kind: Kind) -> Self {
        let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap().drain_delay(DELAY);
        let ((listener, addr), server) = (listener().await, lifecycle.clone());
        let service = HealthServer::new(Obedient::default());
        let task = match kind {
            Kind::Serve => tokio::spawn(async move { server.serve(listener, app()).await }),
            Kind::ServeTonicRoutes => {
                tokio::spawn(
                    async move { server.serve(listener, Routes::new(service).prepare()).await },
                )
            }
            Kind::Axum => {
                let app = app().layer(lifecycle.layer());
                let serve = axum::serve(listener, app).with_graceful_shutdown(lifecycle.stopping());
                tokio::spawn(async move { server.run(async { serve.await }).await.unwrap() })
            }
            Kind::Tonic => {
                let serve = Server::builder()
                    .layer(lifecycle.layer())
                    .add_service(service)
                    .serve_with_incoming_shutdown(
                        TcpIncoming::from(listener),
                        lifecycle.stopping(),
                    );
                tokio::spawn(async move { server.run(serve).await.unwrap() })
            }
        };
        lifecycle.ready();
        Self { addr, lifecycle, task }
    }
}

/// Restarts two servers in turn while `calls` runs against the balancer.
async fn roll(kind: Kind, calls: impl AsyncFnOnce(SocketAddr, Calls)) {
    let _alone = alone().await;
    let (balancer, calls_made) = (Balancer::default(), Calls::default());
    let mut servers = Vec::new();
    for _ in 0..2 {
        let server = Running::start(kind).await;
        balancer.insert(server.addr);
        servers.push(server);
    }
    let addr = balancer.start().await;
    let stop = calls_made.clone();
    let restarts = tokio::spawn(async move {
        for _ in 0..RESTARTS {
            let new = Running::start(kind).await;
            balancer.insert(new.addr);
            servers.push(new);
            let old = servers.remove(0);
            old.lifecycle.drain();
            sleep(ROUTED_FOR).await;
            balancer.remove(old.addr);
            let drained = soon(old.task).await.unwrap();
            assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
        }
        stop.is_over.store(true, SeqCst);
        // The last servers remain until the calls have ended.
        servers
    });
    calls(addr, calls_made.clone()).await;
    let _servers = restarts.await.unwrap();
    let (made, lost) = (calls_made.made.load(SeqCst), calls_made.lost.load(SeqCst));
    let repeated = calls_made.repeated.load(SeqCst);
    println!("{made} calls, {lost} lost, {repeated} repeated, {RESTARTS} restarts");
    assert_eq!(lost, 0, "of {made}");
    assert!(made >= MIN_CALLS, "only {made} calls");
}

// ===== Clients =====

/// Counts calls. Clones share the counters.
#[derive(Clone, Default)]
struct Calls {
    is_over: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    /// Calls that the server has certainly not served.
    repeated: Arc<AtomicUsize>,
}

impl Calls {
    fn is_over(&self) -> bool {
        self.is_over.load(SeqCst)
    }

    fn record(&self, result: Result<(), String>) {
        self.made.fetch_add(1, SeqCst);
        if let Err(error) = result {
            self.lost.fetch_add(1, SeqCst);
            eprintln!("lost: {error}");
        }
    }
}

/// Posts without any retry: each client uses its connection until a response carries `Connection: close`.
async fn http1_clients(addr: SocketAddr, calls: Calls) {
    let mut lanes = JoinSet::new();
    for _ in 0..LANES {
        let calls = calls.clone();
        lanes.spawn(async move {
            let mut kept = None;
            while !calls.is_over() {
                let mut tcp = match kept.take() {
                    Some(tcp) => tcp,
                    None => raw::Client::connect(addr).await,
                };
                let result = soon(async {
                    use tokio::io::AsyncWriteExt;
                    let request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello";
                    tcp.0.write_all(request).await.map_err(|error| error.to_string())?;
                    let mut response = Vec::new();
                    while !response.ends_with(b"hello") {
                        match tcp.0.read_buf(&mut response).await {
                            Ok(0) => return Err("closed".to_owned()),
                            Ok(_) => {}
                            Err(error) => return Err(error.to_string()),
                        }
                    }
                    Ok(String::from_utf8(response).unwrap())
                })
                .await;
                if let Ok(response) = &result {
                    assert!(response.starts_with("HTTP/1.1 200"), "{response}");
                    if !response.contains("connection: close") {
                        kept = Some(tcp);
                    }
                }
                calls.record(result.map(drop));
            }
        });
    }
    lanes.join_all().await;
}

/// Posts over one connection that all clients share. Repeats requests that the server has not received or not served
/// (RFC 9113 §8.7): hyper reads GOAWAY and PING together, and can write the acknowledgement before the requests that
/// it has in its queue.
async fn http2_clients(addr: SocketAddr, calls: Calls) {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<_, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).http2_only(true).build(connector);
    let mut lanes = JoinSet::new();
    for _ in 0..LANES {
        let (client, calls) = (client.clone(), calls.clone());
        lanes.spawn(async move {
            while !calls.is_over() {
                let result = soon(async {
                    let response = loop {
                        let request = Request::post(format!("http://{addr}/")).body("hello".into());
                        match client.request(request.unwrap()).await {
                            Err(error) if is_above_last_stream(&error) => {
                                calls.repeated.fetch_add(1, SeqCst);
                            }
                            response => break response.map_err(|error| format!("{error:?}"))?,
                        }
                    };
                    let status = response.status();
                    let body = response.into_body().collect().await;
                    let body = body.map_err(|error| format!("{error:?}"))?.to_bytes();
                    match status.as_u16() {
                        200 if body == "hello" => Ok(()),
                        status => Err(format!("{status} {body:?}")),
                    }
                });
                calls.record(result.await);
            }
        });
    }
    lanes.join_all().await;
}

/// Whether the stream of a request is above the last one of a GOAWAY without an error.
fn is_above_last_stream(error: &(dyn Error + 'static)) -> bool {
    let error = std::iter::successors(Some(error), |error| (*error).source())
        .find_map(|error| error.downcast_ref::<h2::Error>());
    error.is_some_and(|error| {
        error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR)
    })
}

/// Posts with curl over HTTP/1.1, several times over each of its connections. (Over HTTP/2, curl 7.88 fails when it
/// uses a connection again.)
async fn curl_clients(addr: SocketAddr, calls: Calls) {
    while !calls.is_over() {
        let output = Command::new("curl")
            .args([
                "--http1.1",
                "--silent",
                "--data",
                "hello",
                "--write-out",
                " %{http_code} %{exitcode} %{errormsg}\n",
            ])
            .arg(format!("http://{addr}/?[1-100]"))
            .output()
            .await
            .unwrap();
        let output = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.lines().count(), 100);
        for line in output.lines() {
            calls.record(if line == "hello 200 0 " { Ok(()) } else { Err(line.to_owned()) });
        }
    }
}

async fn grpcio_clients(addr: SocketAddr, calls: Calls) {
    let mut script = script("grpc_calls.py", addr);
    while !calls.is_over() {
        sleep(Duration::from_millis(10)).await;
    }
    drop(script.stdin.take());
    let output = script.wait_with_output().await.unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let (made, failures) = output.split_once('\n').unwrap();
    for failure in failures.lines().filter(|line| !line.is_empty()) {
        calls.lost.fetch_add(1, SeqCst);
        eprintln!("lost: {failure}");
    }
    calls.made.fetch_add(made.parse().unwrap(), SeqCst);
}

fn python() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers-venv/bin/python")
}

fn script(name: &str, addr: SocketAddr) -> Child {
    Command::new(python())
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/drain").join(name))
        .arg(addr.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Returns whether a peer is installed.
fn has(peer: &Path) -> bool {
    let found = peer.exists();
    if !found {
        skip(&peer.display().to_string());
    }
    found
}

fn has_curl() -> bool {
    has(Path::new("/usr/bin/curl"))
}

// ===== Tests =====

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_loses_no_http1_post_in_rolling_restarts() {
    roll(Kind::Serve, http1_clients).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_loses_no_http2_post_in_rolling_restarts() {
    roll(Kind::Serve, http2_clients).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_loses_no_post_of_curl_in_rolling_restarts() {
    if has_curl() {
        roll(Kind::Serve, curl_clients).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serve_loses_no_call_of_grpcio_in_rolling_restarts() {
    if has(&python()) {
        roll(Kind::ServeTonicRoutes, grpcio_clients).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tonic_server_with_the_layer_loses_no_call_of_grpcio_in_rolling_restarts() {
    if has(&python()) {
        roll(Kind::Tonic, grpcio_clients).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn axum_serve_with_the_layer_loses_no_post_in_rolling_restarts() {
    roll(Kind::Axum, async |addr, calls: Calls| {
        tokio::join!(http1_clients(addr, calls.clone()), http2_clients(addr, calls));
    })
    .await;
}
