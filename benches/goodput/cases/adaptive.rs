//! Limits that find their own number, in front of a server that is asked for twice of what it can do.

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

/// What a call takes, and how many are done at once: 400/s.
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

/// Workers from each of these seconds on.
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
    // Nobody waits longer than twenty times what it takes.
    let traffic =
        Traffic { per_second, length: secs(length), patience: 20 * SERVICE, random: true };
    tokio::join!(offer(&call, traffic), script).0
}

fn percent_of(ended: &[Ended], workers: usize, from: u64, to: u64) -> f64 {
    100.0 * goodput(ended, from as f64, to as f64) / capacity(workers)
}

/// In services.
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
        chart("Good answers per second", most),
        chart("99th percentile of what they took, ms", 400.0),
    ]
}

pub fn overload(quick: bool) -> Case<Play> {
    // Ours also for twenty minutes.
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
        "{offered} calls/s at a server of {}/s; callers leave after {} ms; the first 10 s apart. The long run: its last minute of {}",
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
    // By the wall's clock, too: it must end in time.
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
        "{offered} calls/s at a server of {}/s, after {each} s of half of it, after {each} s of twice of it; 5 s after each step",
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
