//! Adaptive limits in front of a server that receives twice the load of its capacity.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    ours::adaptive,
    peers::{none, shedder, tr_adaptive},
    picture::Chart,
    report::{Case, Play, Seen, less, more, row},
    server::{Server, Spread},
    traffic::{Ended, Traffic, by_second, goodput, offer, quantile},
    world::{Client, Clock, ms, play, secs},
};

/// The mean time of a call, and the number of calls that the server handles at a time. Together: 400 calls/s.
const SERVICE: Duration = ms(50);
const WORKERS: usize = 20;

fn capacity(workers: usize) -> f64 {
    workers as f64 / SERVICE.as_secs_f64()
}

const CANDIDATES: [(&str, Clock, Client); 4] = [
    ("buttress", Clock::Virtual, adaptive),
    ("tower-resilience", Clock::Wall, tr_adaptive),
    ("little-loadshedder", Clock::Wall, shedder),
    ("none", Clock::Virtual, none),
];

/// Runs a server whose number of workers changes at the seconds of `steps`.
async fn run(client: Client, steps: &[(u64, usize)], per_second: f64, length: u64) -> Vec<Ended> {
    let server = Server::new(WORKERS, SERVICE, Spread::Even);
    let call = client(server.upstream());
    let script = async {
        let mut now = 0;
        for (at, workers) in steps {
            sleep(secs(at - now)).await;
            now = *at;
            server.set_workers(*workers);
        }
    };
    // Callers give up after twenty times the mean time of a call.
    let traffic =
        Traffic { per_second, length: secs(length), patience: 20 * SERVICE, random: true };
    tokio::join!(offer(&call, traffic), script).0
}

fn percent_of(ended: &[Ended], workers: usize, from: u64, to: u64) -> f64 {
    100.0 * goodput(ended, from as f64, to as f64) / capacity(workers)
}

/// The 99th percentile of the latency of the successful calls, in multiples of the mean time of a call.
fn p99(ended: &[Ended], from: u64, to: u64) -> f64 {
    quantile(ended, 0.99, from as f64, to as f64) / SERVICE.as_secs_f64()
}

fn lines(ended: &[Ended], length: u64) -> Vec<Vec<(f64, f64)>> {
    vec![
        by_second(length as usize, |from, to| goodput(ended, from, to)),
        by_second(length as usize, |from, to| 1e3 * quantile(ended, 0.99, from, to)),
    ]
}

fn charts(subtitle: &str, most: f64) -> Vec<Chart> {
    let chart = |title, most| Chart { title, subtitle: subtitle.to_owned(), x: "seconds", most };
    vec![
        chart("Successful responses per second", most),
        chart("99th percentile of their latency, ms", 400.0),
    ]
}

pub fn overload(quick: bool) -> Case<Play> {
    // `buttress_long` runs for twenty minutes.
    let length = if quick { 25 } else { 60 };
    let long = if quick { 120 } else { 1200 };
    let offered = 2.0 * capacity(WORKERS);
    let mut rows: Vec<_> = CANDIDATES
        .map(|(who, clock, client)| {
            row(who, clock, move || {
                let ended = play(clock, run(client, &[], offered, length));
                Seen {
                    values: vec![
                        percent_of(&ended, WORKERS, 10, length),
                        p99(&ended, 10, length),
                        percent_of(&ended, WORKERS, 0, 10),
                    ],
                    lines: lines(&ended, length),
                }
            })
        })
        .into();
    rows.insert(
        1,
        row("buttress_long", Clock::Virtual, move || {
            let ended = play(Clock::Virtual, run(adaptive, &[], offered, long));
            Seen {
                values: vec![
                    percent_of(&ended, WORKERS, long - 60, long),
                    p99(&ended, long - 60, long),
                    f64::NAN,
                ],
                lines: Vec::new(),
            }
        }),
    );
    let about = format!(
        "{offered} calls/s at a server of {}/s; callers give up after {} ms. Without the first 10 s; buttress_long: the last of {} minutes",
        capacity(WORKERS),
        20 * SERVICE.as_millis(),
        long / 60
    );
    Case {
        name: "adaptive_overload",
        columns: vec![
            more("capacity", "%").must(95.0),
            less("p99", "services").must(3.0),
            more("first_10_s", "%"),
        ],
        rows,
        charts: charts(&about, 500.0),
        note: "",
        about,
    }
}

pub fn step(quick: bool) -> Case<Play> {
    // Some candidates use the wall clock, so the run must be short.
    let each: u64 = if quick { 12 } else { 30 };
    let offered = 1.2 * capacity(2 * WORKERS);
    let rows = CANDIDATES.map(|(who, clock, client)| {
        row(who, clock, move || {
            let steps = [(each, WORKERS / 2), (2 * each, 2 * WORKERS)];
            let ended = play(clock, run(client, &steps, offered, 3 * each));
            let (half, twice) = (each + 5, 2 * each + 5);
            Seen {
                values: vec![
                    percent_of(&ended, WORKERS / 2, half, 2 * each),
                    p99(&ended, half, 2 * each),
                    percent_of(&ended, 2 * WORKERS, twice, 3 * each),
                    p99(&ended, twice, 3 * each),
                ],
                lines: lines(&ended, 3 * each),
            }
        })
    });
    let about = format!(
        "{offered} calls/s at a server of {}/s; after {each} s at half of its capacity, after {each} s more at twice. Measured from 5 s after each step",
        capacity(WORKERS)
    );
    Case {
        name: "adaptive_step",
        columns: vec![
            more("half", "%"),
            less("half_p99", "services"),
            more("twice", "%"),
            less("twice_p99", "services"),
        ],
        rows: rows.into(),
        charts: charts(&about, 1000.0),
        note: "",
        about,
    }
}
