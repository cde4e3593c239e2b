//! Clients that all receive the same `Retry-After` at the same time.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use http::{StatusCode, header::RETRY_AFTER};
use tokio::time::{Instant, sleep};

use crate::{
    ours::{retry_default, retry_wide},
    peers::naive_retry,
    picture::Chart,
    report::{Case, Play, Seen, less, plain, row},
    world::{Call, Client, Clock, Upstream, play, secs, status},
};

const HINT: u64 = 2;

/// Retries exactly at the time of the hint.
fn obedient(upstream: Upstream) -> Call {
    Arc::new(move || {
        let upstream = upstream.clone();
        Box::pin(async move {
            let _told = (upstream.0)().await?;
            sleep(secs(HINT)).await;
            (upstream.0)().await
        })
    })
}

/// Returns the seconds after the rejection at which each client retries, sorted.
async fn arrivals(client: Client, clients: usize) -> Vec<f64> {
    let arrivals = Arc::new(Mutex::new(Vec::new()));
    let start = Instant::now();
    let calls = (0..clients).map(|_| {
        let (told, arrivals) = (AtomicBool::new(false), arrivals.clone());
        let upstream = Upstream::new(move || {
            let mut response = status(StatusCode::OK);
            if told.swap(true, Relaxed) {
                arrivals.lock().expect("not poisoned").push(start.elapsed().as_secs_f64());
            } else {
                response = status(StatusCode::SERVICE_UNAVAILABLE);
                response.headers_mut().insert(RETRY_AFTER, HINT.into());
            }
            async { response }
        });
        // Each client has its own layer. Clients share no state.
        let call = client(upstream);
        tokio::spawn(async move { call().await.map(|_| ()) })
    });
    for call in calls.collect::<Vec<_>>() {
        let _ = call.await;
    }
    let mut arrivals = std::mem::take(&mut *arrivals.lock().expect("not poisoned"));
    arrivals.sort_by(f64::total_cmp);
    arrivals
}

pub fn retry_after_herd(quick: bool) -> Case<Play> {
    let clients = if quick { 2_000 } else { 10_000 };
    let clients_by_name = [
        ("buttress", retry_default as Client),
        ("buttress_wide", retry_wide),
        ("tower", naive_retry),
        ("none", obedient),
    ];
    let rows = clients_by_name.map(|(who, client)| {
        row(who, Clock::Virtual, move || {
            let arrivals = play(Clock::Virtual, arrivals(client, clients));
            let before = |at: f64| arrivals.partition_point(|other| *other < at);
            let percent = |count: usize| 100.0 * count as f64 / clients as f64;
            let peak = arrivals.iter().map(|at| before(at + 0.1) - before(*at)).max();
            let bins = (0..240).map(|bin| f64::from(bin) / 20.0);
            let line = bins.map(|at| (at, percent(before(at + 0.05) - before(at))));
            Seen {
                values: vec![
                    percent(peak.unwrap_or(0)),
                    percent(before(HINT as f64)),
                    arrivals.last().copied().unwrap_or(f64::NAN),
                ],
                lines: vec![line.collect()],
            }
        })
    });
    Case {
        name: "retry_after_herd",
        about: format!(
            "{clients} clients receive `Retry-After: {HINT}`. peak: the maximum share that retries within 100 ms. early: retries before the hint. last: the last retry"
        ),
        note: "buttress_wide is `hint_jitter(5.0)`: the maximum jitter is five times the hint instead of half of it. With tower's retry the policy of the user sets the delay, and the policy here does not read the hint. tower-resilience's retry does not pass the response to its backoff.",
        columns: vec![less("peak", "%"), less("early", "%"), plain("last", "s")],
        rows: rows.into(),
        charts: vec![Chart {
            title: "Clients that retry, % of all within 50 ms",
            subtitle: format!("all receive Retry-After: {HINT}"),
            x: "seconds",
            most: 10.0,
        }],
    }
}
