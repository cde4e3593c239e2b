//! Retries against an upstream that fails: the load that they add, and the calls that succeed because of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use http::StatusCode;
use tokio::time::sleep;

use crate::{
    ours::{self, retry, retry_default},
    peers::{naive_retry, none, tower_retry, tr_retry},
    picture::Chart,
    report::{Case, Play, Row, Seen, less, more, row},
    traffic::{How, Traffic, offer},
    world::{Client, Clock, Upstream, ms, play, secs, status},
};

const CLIENTS: [(&str, Clock, Client); 6] = [
    ("buttress", Clock::Virtual, retry),
    ("buttress_default", Clock::Virtual, retry_default),
    ("tower", Clock::Virtual, tower_retry),
    ("tower-resilience", Clock::Wall, tr_retry),
    ("naive", Clock::Virtual, naive_retry),
    ("none", Clock::Virtual, none),
];

/// Returns the attempts per call and the share of calls that succeed, if the share `failing` of the attempts fails.
async fn load(client: Client, failing: f64, per_second: f64, length: Duration) -> (f64, f64) {
    let attempts = Arc::new(AtomicU32::new(0));
    let count = attempts.clone();
    let upstream = Upstream::new(move || {
        count.fetch_add(1, Relaxed);
        async move {
            sleep(ms(5)).await;
            let fails = fastrand::f64() < failing;
            status(if fails { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK })
        }
    });
    let traffic = Traffic { per_second, length, patience: secs(30), random: false };
    let ended = offer(&client(upstream), traffic).await;
    let good = ended.iter().filter(|one| one.how == How::Good).count();
    let calls = ended.len() as f64;
    (f64::from(attempts.load(Relaxed)) / calls, good as f64 / calls)
}

const PER_SECOND: f64 = 500.0;

fn length(quick: bool) -> Duration {
    if quick { secs(10) } else { secs(60) }
}

pub fn total_failure(quick: bool) -> Case<Play> {
    let rows = CLIENTS.map(|(who, clock, client)| {
        row(who, clock, move || {
            let (attempts, _) = play(clock, load(client, 1.0, PER_SECOND, length(quick)));
            Seen { values: vec![attempts], ..Seen::default() }
        })
    });
    Case {
        name: "total_failure",
        about: format!(
            "Every attempt fails; {PER_SECOND} calls/s, at most three attempts per call"
        ),
        note: "buttress has a retry budget of 10 % of the calls without a reserve. In tower and tower-resilience only successes make deposits. Without successes, their budgets contain only the reserve of 10 retries/s.",
        columns: vec![less("attempts", "per_call").must(1.1)],
        rows: rows.into(),
        charts: Vec::new(),
    }
}

/// The shares of failures that the table contains. The charts contain more.
const SHOWN: [f64; 3] = [0.1, 0.3, 0.6];

pub fn partial_failure(quick: bool) -> Case<Play> {
    let rows = CLIENTS.map(|(who, clock, client)| {
        row(who, clock, move || {
            let shares: Vec<f64> = (0..=10).map(|tenth| f64::from(tenth) / 10.0).collect();
            let seen: Vec<(f64, f64)> = play(clock, async {
                // The runs are concurrent, because some candidates use the wall clock.
                let runs = shares
                    .iter()
                    .map(|share| tokio::spawn(load(client, *share, PER_SECOND, length(quick))));
                let mut seen = Vec::new();
                for run in runs.collect::<Vec<_>>() {
                    seen.push(run.await.expect("no panic"));
                }
                seen
            });
            let shown = shares.iter().zip(&seen).filter(|(share, _)| SHOWN.contains(share));
            let values = shown.flat_map(|(_, (attempts, good))| [100.0 * good, *attempts]);
            let line = |value: fn(&(f64, f64)) -> f64| {
                shares.iter().zip(&seen).map(|(share, seen)| (100.0 * share, value(seen))).collect()
            };
            Seen {
                values: values.collect(),
                lines: vec![line(|(attempts, _)| *attempts), line(|(_, good)| 100.0 * good)],
            }
        })
    });
    let chart = |title, most| Chart {
        title,
        subtitle: format!("{PER_SECOND} calls/s, at most three attempts per call"),
        x: "% of the attempts that fail",
        most,
    };
    Case {
        name: "partial_failure",
        about: "10, 30 and 60 % of the attempts fail: the share of calls that succeed, and the attempts per call".to_owned(),
        note: "With a larger retry budget more calls succeed, and the upstream receives more load. buttress has 10 % of the calls, buttress_default 20 %. In tower-resilience each success deposits a whole retry, so its budget is no bound until most calls fail.",
        columns: vec![
            more("success_10", "%"),
            less("attempts_10", "per_call"),
            more("success_30", "%"),
            less("attempts_30", "per_call"),
            more("success_60", "%"),
            less("attempts_60", "per_call"),
        ],
        rows: rows.into(),
        charts: vec![chart("Attempts per call", 3.0), chart("Calls that succeed, %", 100.0)],
    }
}

// ===== Tiers =====

const TIERS: usize = 5;

/// Each tier calls the next one and retries by itself. The last tier is down.
pub fn tiers(quick: bool) -> Case<Play> {
    let rows = CLIENTS.map(|(who, clock, client)| tiered(who, clock, client, quick));
    let with_breaker = tiered("buttress_breaker", Clock::Virtual, ours::client, quick);
    let mut rows = Vec::from(rows);
    rows.insert(1, with_breaker);
    Case {
        name: "tiers",
        about: format!(
            "{TIERS} tiers, each with a retry; the last one is down: calls that reach the last tier"
        ),
        note: "",
        columns: vec![less("attempts", "per_call")],
        rows,
        charts: Vec::new(),
    }
}

fn tiered(who: &'static str, clock: Clock, client: Client, quick: bool) -> Row<Play> {
    row(who, clock, move || {
        play(clock, async {
            let attempts = Arc::new(AtomicU32::new(0));
            let count = attempts.clone();
            let mut upstream = Upstream::new(move || {
                count.fetch_add(1, Relaxed);
                async {
                    sleep(ms(1)).await;
                    status(StatusCode::SERVICE_UNAVAILABLE)
                }
            });
            for _ in 0..TIERS {
                upstream = Upstream(client(upstream));
            }
            let traffic = Traffic {
                per_second: 100.0,
                length: if quick { secs(10) } else { secs(30) },
                patience: secs(60),
                random: false,
            };
            let calls = offer(&upstream.0, traffic).await.len();
            let attempts = f64::from(attempts.load(Relaxed)) / calls as f64;
            Seen { values: vec![attempts], ..Seen::default() }
        })
    })
}
