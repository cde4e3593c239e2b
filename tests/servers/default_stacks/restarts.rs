//! Two axum servers behind a TCP balancer. They restart in turn, with a graceful shutdown, while calls are in flight.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use buttress::breaker::CircuitBreakerHandle;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::sleep,
};

use super::{
    report::Report,
    stacks::{self, HttpClient},
};
use crate::support::{
    alone,
    net::{balancer::Balancer, listener, soon},
};

const CALLS: usize = 6_000;
/// Number of calls in flight.
const CONCURRENCY: usize = 20;
const CALL_TIME: Duration = Duration::from_millis(5);
/// Time from the moment at which the balancer stops to use a server to its shutdown. The server accepts the
/// connections that are already on their way.
const DRAIN_DELAY: Duration = Duration::from_millis(20);
/// Time from one restart to the next.
const PAUSE: Duration = Duration::from_millis(50);
/// Minimum number of restarts.
const MIN_RESTARTS: usize = 8;
/// Minimum number of attempts over HTTP/1.1 that met a connection which a server had closed. Over HTTP/2 a server that
/// shuts down completes the requests on its connections, so the client need not repeat any.
const MIN_STALE_CONNECTIONS: usize = 1;

#[tokio::test]
async fn ready_made_client_loses_no_call_when_servers_restart() {
    calls_through_restarts(stacks::ready_made(false), MIN_STALE_CONNECTIONS).await;
}

#[tokio::test]
async fn hand_built_stack_loses_no_call_when_servers_restart() {
    calls_through_restarts(stacks::hand_built(false), MIN_STALE_CONNECTIONS).await;
}

#[tokio::test]
async fn ready_made_client_over_http2_loses_no_call_when_servers_restart() {
    calls_through_restarts(stacks::ready_made(true), 0).await;
}

#[tokio::test]
async fn hand_built_stack_over_http2_loses_no_call_when_servers_restart() {
    calls_through_restarts(stacks::hand_built(true), 0).await;
}

async fn calls_through_restarts(
    (client, circuit): (impl HttpClient, CircuitBreakerHandle),
    min_stale_connections: usize,
) {
    let _alone = alone().await;
    let (balancer, mut servers) = (Balancer::default(), Vec::new());
    for _ in 0..2 {
        servers.push(Server::start(&balancer).await);
    }
    let uri = format!("http://{}/", balancer.start().await);
    let (report, left) = (Report::default(), Arc::new(AtomicUsize::new(CALLS)));
    let mut lanes = JoinSet::new();
    for _ in 0..CONCURRENCY {
        let (client, uri, report, left) =
            (client.clone(), uri.clone(), report.clone(), left.clone());
        lanes.spawn(async move {
            while left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                report.record(&stacks::get(client.clone(), &uri).await);
            }
        });
    }
    let mut restarts = 0;
    while left.load(SeqCst) > 0 {
        servers.remove(0).stop(&balancer).await;
        servers.push(Server::start(&balancer).await);
        restarts += 1;
        sleep(PAUSE).await;
    }
    lanes.join_all().await;
    println!("{report}; {restarts} restarts");
    report.assert_all_good(CALLS, &[circuit]);
    assert!(restarts >= MIN_RESTARTS, "only {restarts} restarts");
    let stale = report.stale_connections();
    assert!(stale >= min_stale_connections, "only {stale} attempts met a closed connection");
}

struct Server {
    addr: SocketAddr,
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Server {
    /// Starts a server and puts it into rotation.
    async fn start(balancer: &Balancer) -> Self {
        let handler = async || {
            sleep(CALL_TIME).await;
            "ok"
        };
        let app = Router::new().route("/", get(handler));
        let ((listener, addr), (shutdown, stopped)) = (listener().await, oneshot::channel());
        let server = axum::serve(listener, app).with_graceful_shutdown(async {
            let _ = stopped.await;
        });
        let task = tokio::spawn(async move { server.await.unwrap() });
        balancer.insert(addr);
        Self { addr, shutdown, task }
    }

    /// Takes the server out of rotation and waits for its graceful shutdown.
    async fn stop(self, balancer: &Balancer) {
        balancer.remove(self.addr);
        sleep(DRAIN_DELAY).await;
        self.shutdown.send(()).unwrap();
        soon(self.task).await.unwrap();
    }
}
