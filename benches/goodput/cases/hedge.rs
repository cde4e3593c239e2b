//! Hedge attempts against an upstream whose latency has a heavy tail.

#[path = "../../../tests/layers/hedge/latency_distribution.rs"]
mod measured;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use measured::latency;
use tokio::time::{Instant, sleep};

use crate::{
    ours::{hedge as ours, hedge_percentile},
    peers::{none, tower_hedge, tr_hedge},
    picture::Chart,
    report::{Case, Play, Seen, less, more, row},
    world::{Client, Clock, Upstream, play, status},
};

const FAN_OUT: u64 = 100;
/// The number of first queries that are not measured. The percentiles of some candidates need them as samples.
const WARM: u64 = 1000;

/// Returns the latencies of the queries in milliseconds, sorted, and the number of attempts per call.
async fn tail(client: Client, queries: u64) -> (Vec<f64>, f64) {
    let calls = Arc::new(AtomicU64::new(0));
    let (count, dice) = (calls.clone(), Mutex::new(fastrand::Rng::with_seed(2)));
    let call = client(Upstream::new(move || {
        count.fetch_add(1, Relaxed);
        // The latency for 0 is infinite.
        let random = 1.0 - dice.lock().expect("not poisoned").f64();
        async move {
            sleep(Duration::from_secs_f64(latency(random) / 1000.0)).await;
            status(StatusCode::OK)
        }
    }));
    let mut took = Vec::new();
    for query in 0..WARM + queries {
        if query == WARM {
            calls.store(0, Relaxed);
        }
        let start = Instant::now();
        let answers: Vec<_> = (0..FAN_OUT).map(|_| tokio::spawn(call())).collect();
        for answer in answers {
            answer.await.expect("no panic").expect("no rejection");
        }
        took.push(1e3 * start.elapsed().as_secs_f64());
    }
    took.drain(..WARM as usize);
    took.sort_by(f64::total_cmp);
    (took, calls.load(Relaxed) as f64 / (FAN_OUT * queries) as f64)
}

fn at(took: &[f64], share: f64) -> f64 {
    took[((took.len() - 1) as f64 * share).round() as usize]
}

pub fn hedge(quick: bool) -> Case<Play> {
    let queries = if quick { 2000 } else { 5000 };
    let plain = Arc::new(std::sync::OnceLock::new());
    let rows = [
        ("buttress", ours as Client),
        ("buttress_percentile", hedge_percentile),
        ("tower", tower_hedge),
        ("tower-resilience", tr_hedge),
        ("none", none),
    ]
    .map(|(who, client)| {
        let plain = plain.clone();
        row(who, Clock::Virtual, move || {
            let without =
                *plain.get_or_init(|| at(&play(Clock::Virtual, tail(none, queries)).0, 0.999));
            let (took, load) = play(Clock::Virtual, tail(client, queries));
            let line = (900..1000)
                .map(|share| (f64::from(share) / 10.0, at(&took, f64::from(share) / 1000.0)));
            Seen {
                values: vec![
                    without / at(&took, 0.999),
                    100.0 * (load - 1.0),
                    at(&took, 0.5),
                    at(&took, 0.99),
                    at(&took, 0.999),
                ],
                lines: vec![line.collect()],
            }
        })
    });
    let about = format!(
        "{queries} queries of {FAN_OUT} calls each. The slowest call determines the latency of the query"
    );
    Case {
        name: "hedge",
        columns: vec![
            more("p999_better", "times").must(10.0),
            less("more_load", "%").must(3.0),
            less("p50", "ms"),
            less("p99", "ms"),
            less("p999", "ms"),
        ],
        rows: rows.into(),
        charts: vec![Chart {
            title: "Latency of a query, ms",
            subtitle: about.clone(),
            x: "percentile",
            most: 500.0,
        }],
        note: "",
        about,
    }
}
