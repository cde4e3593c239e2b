//! `grpc.health.v1` from the health registry that also serves `/readyz`. A client watches two dependencies fail and
//! recover, and the server drains at the end.
//!
//! cargo run -p tonic-examples --bin grpc_health

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{ConcurrencyLimitLayer, Health, Lifecycle, health::Check};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::transport::{Channel, Endpoint, Server, server::TcpIncoming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

fn asking(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

/// Prints the messages of a watch until its end, and returns their number.
async fn watch(
    mut client: HealthClient<Channel>,
    service: &'static str,
) -> Result<usize, tonic::Status> {
    let mut told = client.watch(asking(service)).await?.into_inner();
    let mut messages = 0;
    while let Some(message) = told.message().await? {
        messages += 1;
        println!("  watch {:12} {:?}", format!("{service:?}"), message.status());
    }
    println!("  watch {:12} ended", format!("{service:?}"));
    Ok(messages)
}

async fn check(client: &mut HealthClient<Channel>, service: &str) {
    let said = match client.check(asking(service)).await {
        Ok(answer) => format!("{:?}", answer.into_inner().status()),
        Err(status) => format!("{:?}", status.code()),
    };
    println!("  check {:12} {said}", format!("{service:?}"));
}

fn failing_when(down: &Arc<AtomicBool>, name: &str) -> Check {
    let down = down.clone();
    let ask = move || {
        let down = down.load(SeqCst);
        async move { if down { Err("connection refused") } else { Ok(()) } }
    };
    Check::new(name, ask).every(Duration::from_millis(50)).thresholds(2, 3)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let health = Health::new();
    let lifecycle = Lifecycle::new(&health)?
        .drain_delay(Duration::from_millis(300))
        .drain_timeout(Duration::from_secs(5));
    let (db, cache) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    health.add(failing_when(&db, "db"))?;
    health.add(failing_when(&cache, "cache").degrading())?;

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    // The limit exempts the health calls: the two watchers below would take all its permits otherwise.
    let limit = ConcurrencyLimitLayer::new(2);
    let permits = limit.handle();
    let server = Server::builder()
        .layer(lifecycle.layer())
        .layer(limit.respond())
        .add_service(health.grpc().service("shop.Orders").into_server())
        .serve_with_incoming_shutdown(TcpIncoming::from(listener), lifecycle.stopping());
    let running = lifecycle.clone();
    let server = tokio::spawn(async move { running.run(server).await });

    let channel = Endpoint::from_shared(format!("http://{addr}"))?.connect().await?;
    let mut client = HealthClient::new(channel);
    println!("starting");
    let watches: Vec<JoinHandle<_>> =
        ["shop.Orders", "cache"].map(|service| tokio::spawn(watch(client.clone(), service))).into();
    tokio::time::sleep(Duration::from_millis(100)).await;

    println!("ready");
    lifecycle.ready();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for service in ["", "liveness", "db", "nobody"] {
        check(&mut client, service).await;
    }

    for (what, dependency, down) in [
        ("the cache fails, which only degrades the service", &cache, true),
        ("the database fails", &db, true),
        ("both recover", &db, false),
    ] {
        println!("{what}");
        dependency.store(down, SeqCst);
        if !down {
            cache.store(false, SeqCst);
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        check(&mut client, "").await;
    }

    println!("draining");
    lifecycle.drain();
    tokio::time::sleep(Duration::from_millis(50)).await;
    check(&mut client, "").await;
    let mut told = 0;
    for watch in watches {
        told += watch.await??;
    }
    drop(client);
    let drained = server.await??;
    println!("ended: {} calls cut, {told} messages watched", drained.cut_calls);
    assert_eq!((drained.cut_calls, told), (0, 8));
    assert_eq!(permits.snapshot().rejected(), 0);
    Ok(())
}
