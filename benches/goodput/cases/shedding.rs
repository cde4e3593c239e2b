//! Tasks of several calls at a server that receives twice the load of its capacity, with a limit per call or per task.

use std::time::Duration;

use http::StatusCode;
use tokio::time::sleep;

use crate::{
    ours::adaptive,
    peers::none,
    report::{Case, Play, Seen, less, more, row},
    server::{Server, Spread},
    traffic::{Traffic, goodput, offer, quantile},
    world::{Call, Client, Clock, Upstream, ms, play, secs, status},
};

const SERVICE: Duration = ms(50);
const WORKERS: usize = 20;
/// The number of calls of a task, with pauses between them. A task fails if one of its calls is rejected.
const CALLS: usize = 5;
const PAUSE: Duration = ms(100);
/// Tasks per second.
const CAPACITY: f64 = 80.0;
const OFFERED: f64 = 2.0 * CAPACITY;

/// Returns the mean time of a task without contention.
fn shortest() -> Duration {
    SERVICE * CALLS as u32 + PAUSE * (CALLS as u32 - 1)
}

fn task(call: Call) -> Upstream {
    Upstream::new(move || {
        let call = call.clone();
        async move {
            for nth in 0..CALLS {
                if nth > 0 {
                    sleep(PAUSE.mul_f64(2.0 * fastrand::f64())).await;
                }
                match call().await {
                    Ok(response) if response.status().is_success() => {}
                    _ => return status(StatusCode::SERVICE_UNAVAILABLE),
                }
            }
            status(StatusCode::OK)
        }
    })
}

/// Admits every second user, by the number of the user. The share is configured, not measured.
fn half_of_the_users(upstream: Upstream) -> Call {
    let users = std::sync::atomic::AtomicU64::new(0);
    Upstream::new(move || {
        let user = users.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let call = (user % 2 == 0).then(|| (upstream.0)());
        async move {
            match call {
                Some(call) => {
                    call.await.unwrap_or_else(|_| status(StatusCode::SERVICE_UNAVAILABLE))
                }
                None => status(StatusCode::SERVICE_UNAVAILABLE),
            }
        }
    })
    .0
}

pub fn shedding(quick: bool) -> Case<Play> {
    let length = if quick { 30 } else { 120 };
    // The client around each call, and the client around the whole task.
    let rows: [(_, Client, Client); 4] = [
        ("buttress", none, adaptive),
        ("buttress_call", adaptive, none),
        ("half_of_users", none, half_of_the_users),
        ("none", none, none),
    ];
    let rows = rows.map(|(who, each, whole)| {
        row(who, Clock::Virtual, move || {
            let ended = play(Clock::Virtual, async {
                let server = Server::new(WORKERS, SERVICE, Spread::Even);
                let call = whole(task(each(server.upstream())));
                let patience = 20 * shortest();
                let length = secs(length);
                offer(&call, Traffic { per_second: OFFERED, length, patience, random: true }).await
            });
            let (from, to) = (10.0, length as f64);
            let p99 = quantile(&ended, 0.99, from, to) / shortest().as_secs_f64();
            let values = vec![100.0 * goodput(&ended, from, to) / CAPACITY, p99];
            Seen { values, lines: Vec::new() }
        })
    });
    Case {
        name: "shedding",
        about: format!(
            "{OFFERED} tasks/s of {CALLS} calls each, with pauses, at a server of {CAPACITY}/s. A task fails if one of its calls is rejected"
        ),
        note: "buttress has the adaptive limit around the whole task, buttress_call around each call. A rejection in the middle of a task wastes the earlier calls of the task. half_of_users admits half of the users, a share that is configured.",
        columns: vec![more("capacity", "%"), less("p99", "tasks")],
        rows: rows.into(),
        charts: Vec::new(),
    }
}
