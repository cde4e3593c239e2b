//! The table that compares the two sides.

use std::{collections::BTreeSet, fmt::Display};

use crate::{
    live::Ms,
    run::{Run, Side},
    script::{self, Phase},
    tally::{self, Call},
};

pub fn print(run: &Run) {
    let sides = [&run.bare, &run.protected];
    row("", ["bare", "protected"]);
    for phase in Phase::ALL {
        let seconds = (phase.ends() - phase.begins()).as_secs_f64();
        row(
            &format!("goodput, {}", phase.name()),
            sides.map(|side| goodput(&tally::made_in(&side.calls, phase), seconds)),
        );
    }
    let seconds = script::length().as_secs_f64();
    row("goodput, the whole run", sides.map(|side| goodput(&side.calls, seconds)));
    for phase in Phase::ALL {
        row(
            &format!("p99 of all calls, {}", phase.name()),
            sides.map(|side| Ms(tally::percentile(&tally::made_in(&side.calls, phase), 0.99))),
        );
    }
    row("calls made", sides.map(|side| side.calls.len()));
    row("sent, per call made", sides.map(|side| per_call(side, sent(side))));
    row("reached the upstream, per call made", sides.map(|side| per_call(side, reached(side))));
    row("maximum of requests at the upstream", sides.map(|side| side.meter.most_held()));
    row(
        "time to recover",
        sides.map(|side| match tally::time_to_recover(&side.calls) {
            Some(time) => format!("{:.2} s", time.as_secs_f64()),
            None => "not within the run".into(),
        }),
    );
    let errors = sides.map(|side| tally::errors(&side.calls));
    let kinds: BTreeSet<_> = errors.iter().flat_map(|errors| errors.keys()).collect();
    for kind in kinds {
        row(kind, [&errors[0], &errors[1]].map(|errors| errors.get(kind).copied().unwrap_or(0)));
    }
    let (circuit, retry) = (run.guards.breaker.snapshot(), run.guards.retry.snapshot());
    row("retries", ["-".into(), retry.retries.to_string()]);
    row("retries denied by the budget", ["-".into(), retry.budget_denied.to_string()]);
    row("times the circuit opened", ["-".into(), circuit.opened.to_string()]);
    if let Some(why) = circuit.last_trip {
        println!("  the last time: {why}");
    }
}

fn row(name: &str, [bare, protected]: [impl Display; 2]) {
    println!("{name:<38} {:>20} {:>20}", bare.to_string(), protected.to_string());
}

fn goodput(calls: &[Call], seconds: f64) -> String {
    let good = tally::good(calls) as f64;
    let share = 100.0 * good / calls.len().max(1) as f64;
    format!("{:.1}/s ({share:.0} %)", good / seconds)
}

fn per_call(side: &Side, count: usize) -> String {
    format!("{:.2}", count as f64 / side.calls.len().max(1) as f64)
}

fn sent(side: &Side) -> usize {
    Phase::ALL.into_iter().map(|phase| side.tally.sent(phase)).sum()
}

fn reached(side: &Side) -> usize {
    Phase::ALL.into_iter().map(|phase| side.meter.reached(phase)).sum()
}
