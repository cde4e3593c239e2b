//! What a layer adds to a call: ours beside the peers', in one process, in one run.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench overhead               # times, allocations, sizes
//! cargo bench -p buttress-benches --bench overhead -- breaker    # those whose name has "breaker" in it
//! cargo bench -p buttress-benches --bench overhead -- --quick    # the same within a minute
//! cargo bench -p buttress-benches --bench overhead -- --count    # instructions, atomics, clock reads
//! ```
//!
//! Times are of interleaved rounds over all candidates; a candidate's added time is the median over the
//! rounds of its time less the bare service's in the same round. `--count` needs valgrind and objdump, and
//! compares with `benches/overhead/baseline.txt`: atomics, clock reads and allocations exactly,
//! instructions within 20 %. `--save` writes that file.

mod candidates;
mod count;
mod threads;

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use candidates::{Candidate, Made};

struct Options {
    filter: Option<String>,
    quick: bool,
    count: bool,
    save: bool,
    one: Option<String>,
}

fn options() -> Options {
    let mut options = Options { filter: None, quick: false, count: false, save: false, one: None };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--count" => options.count = true,
            "--save" => options.save = true,
            "--one" => options.one = args.next(),
            // What cargo itself passes on.
            "--bench" => {}
            name => options.filter = Some(name.to_owned()),
        }
    }
    options
}

fn main() -> ExitCode {
    let options = options();
    // Some peers make timers as they are called.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime can be built");
    let _guard = runtime.enter();

    if let Some(name) = options.one {
        return one(&name);
    }
    let mut candidates = candidates::all();
    if let Some(filter) = &options.filter {
        let wanted: Vec<_> = candidates
            .iter()
            .filter(|candidate| candidate.name.contains(filter.as_str()))
            .flat_map(|candidate| {
                candidate.peers.iter().copied().chain([candidate.over, candidate.name])
            })
            .collect();
        candidates.retain(|candidate| wanted.contains(&candidate.name));
    }
    if options.count {
        counts(&candidates, options.save)
    } else {
        times(&candidates, options.quick)
    }
}

/// The child's part: one candidate, warm, under the counter.
fn one(name: &str) -> ExitCode {
    let Some(candidate) = candidates::all().into_iter().find(|found| found.name == name) else {
        eprintln!("no candidate is called {name}");
        return ExitCode::FAILURE;
    };
    let mut made = (candidate.make)();
    (made.run)(100);
    count::watched(&mut *made.run, count::CALLS);
    ExitCode::SUCCESS
}

// ===== Times =====

/// One batch takes about this long.
const BATCH_NANOS: f64 = 200_000.0;

fn time(made: &mut Made, calls: u64) -> f64 {
    let began = Instant::now();
    (made.run)(calls);
    began.elapsed().as_nanos() as f64 / calls as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Allocations per call.
fn allocs(made: &mut Made) -> f64 {
    (made.run)(100);
    let info = allocation_counter::measure(|| (made.run)(count::CALLS));
    info.count_total as f64 / count::CALLS as f64
}

fn times(candidates: &[Candidate], quick: bool) -> ExitCode {
    let rounds = if quick { 40 } else { 400 };
    let mut made: Vec<_> = candidates.iter().map(|candidate| (candidate.make)()).collect();
    let batches: Vec<u64> = made
        .iter_mut()
        .map(|made| ((BATCH_NANOS / time(made, 200).max(1.0)) as u64).clamp(20, 200_000))
        .collect();
    let mut seen = vec![Vec::new(); candidates.len()];
    for _ in 0..rounds {
        for (nth, made) in made.iter_mut().enumerate() {
            seen[nth].push(time(made, batches[nth]));
        }
    }
    let place = |name: &str| candidates.iter().position(|candidate| candidate.name == name);
    let added = |nth: usize| -> f64 {
        let Some(base) = place(candidates[nth].over) else { return f64::NAN };
        median(seen[nth].iter().zip(&seen[base]).map(|(with, bare)| with - bare).collect())
    };
    println!(
        "{:34} {:>10} {:>10} {:>10} {:>8} {:>9} {:>8}",
        "", "median ns", "min ns", "added ns", "allocs", "service", "future"
    );
    for (nth, candidate) in candidates.iter().enumerate() {
        println!(
            "{:34} {:>10.1} {:>10.1} {:>10.1} {:>8.2} {:>9} {:>8}",
            candidate.name,
            median(seen[nth].clone()),
            seen[nth].iter().copied().fold(f64::INFINITY, f64::min),
            added(nth),
            allocs(&mut made[nth]),
            made[nth].sizes.0,
            made[nth].sizes.1,
        );
    }
    println!();
    for (nth, candidate) in candidates.iter().enumerate() {
        let Some(case) = candidate.case else { continue };
        println!("figure overhead/{case}/added_ns {:.1} ns", added(nth));
        for peer in candidate.peers {
            let Some(other) = place(peer) else { continue };
            let name = peer.split('/').next().unwrap_or(peer).replace('-', "_");
            println!("figure overhead/{case}/vs_{name} {:.3} ratio", added(nth) / added(other));
        }
    }
    threads::table(candidates, quick);
    ExitCode::SUCCESS
}

// ===== Counts =====

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/overhead/baseline.txt");

fn counts(candidates: &[Candidate], save: bool) -> ExitCode {
    let locked = match count::Locked::read() {
        Ok(locked) => locked,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let before = baseline();
    let (mut lines, mut failures) = (Vec::new(), Vec::new());
    println!(
        "{:34} {:>13} {:>8} {:>12} {:>7}",
        "per call", "instructions", "atomics", "clock reads", "allocs"
    );
    for candidate in candidates {
        let name = candidate.name;
        let counted = match count::count(name, &locked) {
            Ok(counted) => counted,
            Err(error) => {
                eprintln!("{name}: {error}");
                return ExitCode::FAILURE;
            }
        };
        let allocs = allocs(&mut (candidate.make)());
        let now = [counted.instructions, counted.atomics, counted.clock_reads, allocs];
        println!("{name:34} {:>13.1} {:>8.2} {:>12.2} {:>7.2}", now[0], now[1], now[2], now[3]);
        if let Some(case) = candidate.case {
            for (what, value) in
                ["instructions", "atomics", "clock_reads", "allocs"].iter().zip(now)
            {
                println!("figure overhead/{case}/{what} {value:.2} per_call");
            }
            lines.push(format!("{case} {:.1} {:.2} {:.2} {:.2}", now[0], now[1], now[2], now[3]));
            if let Some(then) = before.get(case) {
                failures.extend(worse(case, then, &now));
            }
        }
    }
    if save {
        let head =
            "# case instructions atomics clock_reads allocs, per call; written by --count --save\n";
        if let Err(error) = std::fs::write(BASELINE, format!("{head}{}\n", lines.join("\n"))) {
            eprintln!("{BASELINE}: {error}");
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    for failure in &failures {
        eprintln!("{failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn baseline() -> BTreeMap<String, [f64; 4]> {
    let text = std::fs::read_to_string(BASELINE).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut parts = line.split_whitespace();
            let case = parts.next()?.to_owned();
            let values: Vec<f64> = parts.filter_map(|value| value.parse().ok()).collect();
            Some((case, values.try_into().ok()?))
        })
        .collect()
}

/// What is worse than it was: instructions by over a fifth, anything else at all.
fn worse(case: &str, then: &[f64; 4], now: &[f64; 4]) -> Vec<String> {
    let slack = [then[0] * 0.2, 0.01, 0.01, 0.01];
    ["instructions", "atomics", "clock reads", "allocations"]
        .iter()
        .enumerate()
        .filter(|(nth, _)| now[*nth] > then[*nth] + slack[*nth])
        .map(|(nth, what)| {
            format!("{case}: {what} per call {:.2}, were {:.2}", now[nth], then[nth])
        })
        .collect()
}
