//! A soak test: many kinds of failures at once, and then a check for leaks.
//!
//! ```text
//! cargo run --release -p check-examples --bin soak -- --seconds 60 --seed 1
//! ```
//!
//! The example runs a server and two clients (HTTP/1 and HTTP/2) with all layers over real sockets. Callers hang up at
//! any point. Bodies fail and panic. Handlers panic, hang and end responses early. Vandals send incomplete requests and
//! reset their connections. A task changes limits and maximums, forces circuits and recycles connections.
//!
//! At the same time untrusted clients call a gateway in front of a healthy upstream. They hang up, set short deadlines,
//! send slowly, read slowly or not at all, send nothing, half a head or a trickled body, and send strange keys. The
//! upstream closes connections while calls arrive. The gateway must serve the visitors that call it meanwhile, and its
//! circuit must stay closed.
//!
//! At the end every permit, probe slot, gauge and task must be released, and the memory must not have grown since the
//! warm-up. The exit code states the result.

mod callers;
mod clients;
mod gateway;
mod server;
mod shaker;
mod tally;
mod untrusted;
mod upstream;
mod vandals;
mod verdict;

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::BoxError;
use fastrand::Rng;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use gateway::Gateway;
use server::Server;
use tally::Tally;
use untrusted::Kind;
use verdict::{Memory, Verdict, back_to};

/// The number of callers of each protocol.
const CALLERS: usize = 64;
const VANDALS: usize = 16;
/// Number of untrusted clients of each kind, and of visitors, at each gateway.
const UNTRUSTED: usize = 2;
const VISITORS: usize = 4;

fn main() -> Result<ExitCode, BoxError> {
    let (time, seed) = arguments()?;
    println!("{time:?}, seed {seed}: {CALLERS} callers over each protocol, {VANDALS} vandals");
    let surprises = verdict::expect_panics();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut verdict = Verdict::default();
    runtime.block_on(async {
        // Ends the example also if a call hangs.
        timeout(time + Duration::from_secs(60), soak(time, seed, &mut verdict)).await?
    })?;

    let tasks = runtime.metrics();
    runtime.block_on(back_to(|| tasks.num_alive_tasks() == 0));
    verdict.zero("tasks still alive", tasks.num_alive_tasks());
    verdict.zero("unexpected panics", surprises.load(SeqCst));
    Ok(verdict.tell())
}

async fn soak(time: Duration, seed: u64, verdict: &mut Verdict) -> Result<(), BoxError> {
    let (server, tally) = (Server::start().await?, Arc::new(Tally::default()));
    let over = Arc::new(AtomicBool::new(false));
    let mut random = Rng::with_seed(seed);
    let [(http1, guards1), (http2, guards2)] =
        [clients::client(server.addr, false)?, clients::client(server.addr, true)?];

    let mut storm = JoinSet::new();
    for client in [&http1, &http2] {
        for _ in 0..CALLERS {
            let (client, tally, random) = (client.clone(), tally.clone(), random.fork());
            storm.spawn(callers::call_on(client, server.addr, random, tally, over.clone()));
        }
    }
    for _ in 0..VANDALS {
        storm.spawn(vandals::rage(server.addr, random.fork(), tally.clone(), over.clone()));
    }
    let gateways = [Gateway::start(false).await?, Gateway::start(true).await?];
    for gateway in &gateways {
        for kind in Kind::ALL.into_iter().cycle().take(UNTRUSTED * Kind::ALL.len()) {
            let (random, tally) = (random.fork(), tally.clone());
            storm.spawn(untrusted::attack(kind, gateway.addr, random, tally, over.clone()));
        }
        for _ in 0..VISITORS {
            storm.spawn(untrusted::visit(gateway.addr, tally.clone(), over.clone()));
        }
    }
    let guards = vec![guards1, guards2];
    storm.spawn(shaker::shake(server.clone(), guards.clone(), random.fork(), over.clone()));

    let memory = Memory::watch(time).await;
    over.store(true, SeqCst);
    let storm = async {
        while let Some(ended) = storm.join_next().await {
            ended?;
        }
        Ok::<_, BoxError>(())
    };
    timeout(Duration::from_secs(20), storm).await.map_err(|_| "a task hangs")??;
    println!("\n{tally}");
    tally.judge(verdict);
    memory.judge(verdict);

    // Late calls may have opened a circuit. Calls in flight at the server end by the times of the server.
    server.restore()?;
    guards.iter().try_for_each(|guards| guards.calm_down())?;
    back_to(|| server.is_quiet() && guards.iter().all(|guards| guards.are_quiet())).await;
    server.judge(verdict);
    for (guards, protocol) in guards.iter().zip(["HTTP/1", "HTTP/2"]) {
        guards.judge(protocol, verdict);
    }
    for gateway in gateways {
        back_to(|| gateway.is_quiet()).await;
        gateway.judge(verdict);
        let (drained, connections) = gateway.end().await?;
        verdict.zero("calls of a gateway cut by its drain", drained.cut_calls);
        back_to(|| connections.snapshot().open == 0).await;
        verdict.zero("connections of a gateway open at its end", connections.snapshot().open);
    }
    // Everything must work as at the beginning.
    let most = calm(&http1, &guards[0], &server, verdict).await?;
    verdict.that(most == clients::CAP, format!("{most} connections of {}", clients::CAP));
    calm(&http2, &guards[1], &server, verdict).await?;

    let connections: Vec<_> = guards.iter().map(|guards| guards.connections.clone()).collect();
    drop((http1, http2, guards));
    let open = || connections.iter().map(|all| all.snapshot().open).sum::<usize>();
    back_to(|| open() == 0).await;
    verdict.zero("connections open after the end of the clients", open());
    let drained = server.end().await?;
    verdict.zero("calls cut by the drain", drained.cut_calls);
    verdict.zero("connections cut by the drain", drained.cut_connections);
    Ok(())
}

/// Makes as many calls at once as the limit allows. Each must succeed. Returns the maximum number of connections.
async fn calm(
    client: &impl clients::Calls,
    guards: &clients::Guards,
    server: &Server,
    verdict: &mut Verdict,
) -> Result<usize, BoxError> {
    back_to(|| guards.is_well()).await;
    let (start, mut calls, mut lost, mut most) = (Instant::now(), JoinSet::new(), 0, 0);
    while start.elapsed() < Duration::from_secs(1) {
        while calls.len() < clients::LIMIT {
            calls.spawn(callers::get(client.clone(), server.addr));
        }
        if let Some(Err(error)) = calls.join_next().await.transpose()? {
            println!("lost: {error}");
            lost += 1;
        }
        most = most.max(guards.connections.snapshot().open);
    }
    while let Some(call) = calls.join_next().await {
        lost += usize::from(call?.is_err());
    }
    verdict.zero("calls lost in the calm after the storm", lost);
    Ok(most)
}

fn arguments() -> Result<(Duration, u64), BoxError> {
    let (mut seconds, mut seed) = (60, 1);
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().ok_or("a value is missing")?.parse()?;
        match name.as_str() {
            "--seconds" => seconds = value,
            "--seed" => seed = value,
            other => return Err(format!("unknown: {other}; --seconds N, --seed N").into()),
        }
    }
    Ok((Duration::from_secs(seconds.max(10)), seed))
}
