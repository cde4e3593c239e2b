//! A metastable outage: its cause is over, but the server stays overloaded, because it works on abandoned calls while
//! clients retry.

use std::time::Duration;

use tokio::time::sleep;

use crate::{
    ours::{adaptive, client},
    peers::{failsafe_breaker, naive_retry, none, recloser_breaker, tower_client, tr_client},
    picture::Chart,
    report::{Case, Play, Seen, less, more, row},
    server::{Server, Spread},
    traffic::{Traffic, by_second, goodput, offer},
    world::{Client, Clock, Upstream, ms, play, secs},
};

const WORKERS: usize = 30;
const OFFERED: f64 = 280.0;
/// The seconds before the outage, and the seconds of the first outage. The result depends on the time that a breaker
/// has spent in *open* when the outage ends. The case therefore runs several outages, each half a second longer.
const BEFORE: f64 = 8.0;
const OUTAGE: f64 = 10.0;
const OUTAGES: u32 = 6;

struct Run {
    /// The seconds from the end of the outage to the first five seconds with 95 % of the goodput before it.
    recovered: f64,
    /// The goodput from five seconds after the outage on, as a share of the goodput before it.
    later: f64,
    /// The goodput from the end of the outage on, as a share of the goodput before it.
    all: f64,
    line: Vec<(f64, f64)>,
}

async fn run([before_it, client]: [Client; 2], outage: f64, after: f64) -> Run {
    let server = Server::new(WORKERS, ms(100), Spread::Exponential);
    // The server continues to work on a call after its caller has given up.
    let call = client(Upstream(before_it(server.upstream())).within(secs(1)));
    let (over, end) = (BEFORE + outage, BEFORE + outage + after);
    let script = async {
        sleep(Duration::from_secs_f64(BEFORE)).await;
        server.set_workers(0);
        sleep(Duration::from_secs_f64(outage)).await;
        server.set_workers(WORKERS);
    };
    let length = Duration::from_secs_f64(end);
    let traffic = Traffic { per_second: OFFERED, length, patience: secs(5), random: true };
    let (ended, ()) = tokio::join!(offer(&call, traffic), script);
    let before = goodput(&ended, 2.0, BEFORE);
    let recovered = (0..)
        .map(|tenth| f64::from(tenth) / 10.0)
        .take_while(|after| over + after + 5.0 <= end)
        .find(|after| goodput(&ended, over + after, over + after + 5.0) >= 0.95 * before);
    Run {
        recovered: recovered.unwrap_or(after),
        later: goodput(&ended, over + 5.0, end) / before,
        all: goodput(&ended, over, end) / before,
        line: by_second(end as usize, |from, to| goodput(&ended, from, to)),
    }
}

/// Runs all outages. The first layer is around the server, the second is in the client.
async fn runs(layers: [Client; 2], after: f64) -> Seen {
    let outages = (0..OUTAGES).map(|nth| OUTAGE + f64::from(nth) / 2.0);
    let runs: Vec<_> = outages.map(|outage| tokio::spawn(run(layers, outage, after))).collect();
    let mut seen = Vec::new();
    for run in runs {
        seen.push(run.await.expect("no panic"));
    }
    let mean = |value: fn(&Run) -> f64| seen.iter().map(value).sum::<f64>() / f64::from(OUTAGES);
    Seen {
        values: vec![
            seen.iter().map(|run| run.recovered).fold(0.0, f64::max),
            mean(|run| run.recovered),
            100.0 * seen.iter().map(|run| run.later).fold(f64::MAX, f64::min),
            100.0 * mean(|run| run.all),
        ],
        lines: vec![seen.swap_remove(0).line],
    }
}

pub fn metastable(quick: bool) -> Case<Play> {
    // Some candidates use the wall clock, so the run must be short.
    let after = if quick { 18.0 } else { 90.0 };
    let rows: [(_, _, [Client; 2]); 8] = [
        ("buttress", Clock::Virtual, [none, client]),
        ("buttress_server", Clock::Virtual, [adaptive, naive_retry]),
        ("tower", Clock::Virtual, [none, tower_client]),
        ("tower-resilience", Clock::Wall, [none, tr_client]),
        ("failsafe", Clock::Wall, [none, failsafe_breaker]),
        ("recloser", Clock::Wall, [none, recloser_breaker]),
        ("naive", Clock::Virtual, [none, naive_retry]),
        ("none", Clock::Virtual, [none, none]),
    ];
    let rows =
        rows.map(|(who, clock, layers)| row(who, clock, move || play(clock, runs(layers, after))));
    let about = format!(
        "{OFFERED} calls/s at a server of {}/s, which stops for {OUTAGE} s. Callers give up after 1 s, and the server still works on their calls",
        WORKERS * 10
    );
    Case {
        name: "metastable",
        note: "Six outages, each half a second longer. recovered and after_5_s are those of the worst outage. Breakers are open for two seconds. buttress_server has an adaptive limit around the server, and the clients of naive.",
        columns: vec![
            less("recovered", "s").must(5.0),
            less("recovered_mean", "s"),
            more("after_5_s", "%").must(95.0),
            more("goodput", "%"),
        ],
        rows: rows.into(),
        charts: vec![Chart {
            title: "Successful responses per second, before, in and after an outage",
            subtitle: about.clone(),
            x: "seconds",
            most: 400.0,
        }],
        about,
    }
}
