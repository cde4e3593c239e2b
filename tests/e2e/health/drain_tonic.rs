//! A tonic service that drains: under tonic's own server with the parts of a `Lifecycle`, and under `Lifecycle::serve`.

use std::{net::SocketAddr, pin::Pin, time::Duration};

use buttress::{
    Health, Lifecycle,
    lifecycle::{Drain, Drained, LifecyclePhase},
};
use futures_util::{Stream, StreamExt, stream};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};
use tonic::{
    Code, Request, Response, Status,
    service::Routes,
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_client::HealthClient,
    health_server::{self, HealthServer},
};

use crate::support::net::{Gauge, Stage, listener, soon, until};

// ===== The service =====

/// `check` responds when the gate opens, and at once for `quick`. `watch` ends at *stopping*, and never for `deaf`.
#[derive(Clone, Default)]
struct Slow {
    stage: Stage,
    streams: Gauge,
}

#[tonic::async_trait]
impl health_server::Health for Slow {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if request.get_ref().service != "quick" {
            self.stage.clone().plain().await;
        }
        Ok(Response::new(HealthCheckResponse { status: 1 }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let drain = Drain::of(request.extensions()).expect("the layer inserts the drain").clone();
        let deaf = request.get_ref().service == "deaf";
        let inside = self.streams.enter();
        let first = stream::iter([Ok(HealthCheckResponse { status: 1 })]);
        let last = stream::once(async move {
            if deaf {
                std::future::pending::<()>().await;
            }
            drain.stopping().await;
            drop(inside);
            Ok(HealthCheckResponse { status: 2 })
        });
        Ok(Response::new(Box::pin(first.chain(last))))
    }
}

fn asking(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

fn client(addr: SocketAddr) -> HealthClient<Channel> {
    HealthClient::new(Endpoint::from_shared(format!("http://{addr}")).unwrap().connect_lazy())
}

/// Calls `check`, again if the call was not sent. hyper's client of HTTP/2 detects a GOAWAY when it is given the next
/// request: it cancels this request, and tonic does not repeat it.
async fn check_again(mut client: HealthClient<Channel>) {
    let result = client.check(asking("quick")).await;
    match result {
        Err(status) if status.code() == Code::Cancelled => {
            client.check(asking("quick")).await.unwrap();
        }
        result => drop(result.unwrap()),
    }
}

// ===== The servers =====

type Serving = JoinHandle<Drained>;

async fn by_tonic(lifecycle: &Lifecycle, service: Slow) -> (SocketAddr, Serving) {
    let (listener, addr) = listener().await;
    let server = Server::builder()
        .layer(lifecycle.layer())
        .add_service(HealthServer::new(service))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), lifecycle.stopping());
    let lifecycle = lifecycle.clone();
    (addr, tokio::spawn(async move { lifecycle.run(server).await.unwrap() }))
}

async fn by_us(lifecycle: &Lifecycle, service: Slow) -> (SocketAddr, Serving) {
    let (listener, addr) = listener().await;
    let routes = Routes::new(HealthServer::new(service)).prepare();
    let lifecycle = lifecycle.clone();
    (addr, tokio::spawn(async move { lifecycle.serve(listener, routes).await }))
}

async fn nothing_is_lost(lifecycle: &Lifecycle, service: Slow, addr: SocketAddr, task: Serving) {
    let Slow { stage, streams } = service;
    let clients: Vec<_> = (0..10).map(|_| client(addr)).collect();
    let mut calls = JoinSet::new();
    for n in 0..200 {
        let mut client = clients[n % clients.len()].clone();
        calls.spawn(async move { client.check(asking("slow")).await });
    }
    let mut open = JoinSet::new();
    for n in 0..20 {
        let mut client = clients[n % clients.len()].clone();
        open.spawn(async move {
            let messages = client.watch(asking("")).await?.into_inner();
            let told: Vec<_> = messages.map(|message| message.map(|it| it.status)).collect().await;
            told.into_iter().collect::<Result<Vec<_>, Status>>()
        });
    }
    // Clients whose connections are idle during the drain.
    let idles: Vec<_> = (0..10).map(|_| client(addr)).collect();
    for idle in &idles {
        soon(idle.clone().check(asking("quick"))).await.unwrap();
    }
    until(|| stage.inside.now() == 200 && streams.now() == 20).await;
    assert_eq!(lifecycle.in_flight(), 220);

    let began = Instant::now();
    lifecycle.drain();
    until(|| lifecycle.phase() == LifecyclePhase::Draining).await;
    // Calls are served, over a new connection and over one that may have received GOAWAY.
    soon(client(addr).check(asking("quick"))).await.unwrap();
    soon(check_again(clients[0].clone())).await;
    let mut load = JoinSet::new();
    for _ in 0..4 {
        let (mut client, lifecycle) = (client(addr), lifecycle.clone());
        load.spawn(async move {
            for _ in 0..100_000 {
                if let Err(status) = client.check(asking("quick")).await {
                    assert!(lifecycle.phase() >= LifecyclePhase::Stopping, "lost: {status}");
                    return;
                }
            }
            panic!("the delay never ended")
        });
    }
    stage.gate.add_permits(100);
    for _ in 0..100 {
        assert!(soon(calls.join_next()).await.unwrap().unwrap().is_ok());
    }
    soon(lifecycle.stopping()).await;
    while let Some(told) = soon(open.join_next()).await {
        assert_eq!(told.unwrap().unwrap(), [1, 2], "a stream was cut");
    }
    // The server has accepted the connections of its backlog and closed its listener; tonic's own server keeps the
    // listener open until it has ended, without accepting connections.
    sleep(Duration::from_millis(200)).await;
    let mut newcomer = client(addr);
    let newcomer = tokio::spawn(async move { newcomer.check(asking("quick")).await });
    assert!(!task.is_finished());
    stage.gate.add_permits(100);
    while let Some(call) = soon(calls.join_next()).await {
        assert!(call.unwrap().is_ok());
    }
    // The server ends although no client closes its connection.
    let drained = soon(task).await.unwrap();
    drop((clients, idles));
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
    assert!(soon(newcomer).await.unwrap().is_err(), "accepted after the delay");
    while let Some(done) = soon(load.join_next()).await {
        done.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!((lifecycle.in_flight(), stage.inside.total()), (0, 200));
}

fn lifecycle(delay: u64, longest: u64) -> Lifecycle {
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    lifecycle
        .drain_delay(Duration::from_millis(delay))
        .drain_timeout(Duration::from_millis(longest))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_of_tonic_loses_no_call() {
    let (lifecycle, service) = (lifecycle(800, 10_000), Slow::default());
    let (addr, task) = by_tonic(&lifecycle, service.clone()).await;
    nothing_is_lost(&lifecycle, service, addr, task).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_of_tonic_under_serve_lose_no_call() {
    let (lifecycle, service) = (lifecycle(800, 10_000), Slow::default());
    let (addr, task) = by_us(&lifecycle, service.clone()).await;
    nothing_is_lost(&lifecycle, service, addr, task).await;
}

#[tokio::test]
async fn a_stream_that_ignores_the_drain_is_cut_at_the_drain_timeout_and_counted() {
    for ours in [false, true] {
        let (lifecycle, service) = (lifecycle(0, 300), Slow::default());
        let (addr, task) = match ours {
            true => by_us(&lifecycle, service.clone()).await,
            false => by_tonic(&lifecycle, service.clone()).await,
        };
        let mut deaf = soon(client(addr).watch(asking("deaf"))).await.unwrap().into_inner();
        assert_eq!(soon(deaf.next()).await.unwrap().unwrap().status, 1);
        let began = Instant::now();
        lifecycle.drain();
        let drained = soon(task).await.unwrap();
        assert_eq!((drained.cut_calls, drained.cut_connections), (1, usize::from(ours)));
        assert!(began.elapsed() >= Duration::from_millis(300));
        if ours {
            assert!(soon(deaf.next()).await.unwrap().is_err());
        }
    }
}
