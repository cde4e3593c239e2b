//! The cost of a layer per call: the layers of this crate and those of the peers, in one process and one run.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench overhead               # times, sizes, scaling on two threads, counts
//! cargo bench -p buttress-benches --bench overhead -- breaker    # candidates with "breaker" in their name
//! cargo bench -p buttress-benches --bench overhead -- --quick    # within a minute; counts only for this crate
//! cargo bench -p buttress-benches --bench overhead -- --count    # only counts, compared with the baseline
//! ```
//!
//! The rounds of all candidates are interleaved. The added time of a candidate is its time minus the time of the bare
//! service in the same round, as the median over the rounds. Counts need valgrind and objdump. `--count` compares the
//! counts with `benches/overhead/baseline.txt`: atomics, clock reads and allocations exactly, instructions within 20 %.
//! `--save` writes the counts to that file.

mod calls;
mod candidates;
mod count;
mod ours;
mod peers;
mod threads;
mod uploads;

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use calls::Made;
use candidates::Candidate;

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
            // `cargo bench` passes this argument.
            "--bench" => {}
            name => options.filter = Some(name.to_owned()),
        }
    }
    options
}

fn main() -> ExitCode {
    let options = options();
    // Some peers create timers in a call.
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

/// Runs one candidate in the child process that callgrind observes, after a warm-up.
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

/// The approximate duration of a batch.
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

/// Returns the allocations per call.
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
    let best = |nth: usize| -> f64 {
        let peers = candidates[nth].peers.iter().filter_map(|peer| place(peer)).map(added);
        added(nth) / peers.fold(f64::INFINITY, f64::min)
    };
    println!(
        "{:34} {:>10} {:>10} {:>10} {:>9} {:>8} {:>9} {:>8}",
        "", "median ns", "min ns", "added ns", "to best", "allocs", "service", "future"
    );
    let mut figures = Vec::new();
    for (nth, candidate) in candidates.iter().enumerate() {
        let (allocs, sizes) = (allocs(&mut made[nth]), made[nth].sizes);
        let size = |size: Option<usize>| size.map_or("-".to_owned(), |size| size.to_string());
        let ratio =
            if candidate.peers.is_empty() { "-".into() } else { format!("{:.2}", best(nth)) };
        println!(
            "{:34} {:>10.1} {:>10.1} {:>10.1} {ratio:>9} {allocs:>8.2} {:>9} {:>8}",
            candidate.name,
            median(seen[nth].clone()),
            seen[nth].iter().copied().fold(f64::INFINITY, f64::min),
            added(nth),
            size(sizes.map(|sizes| sizes.0)),
            size(sizes.map(|sizes| sizes.1)),
        );
        let Some(case) = candidate.case else { continue };
        let mut figure = |what: &str, value: f64, unit: &str| {
            figures.push(format!("figure overhead/{case}/{what} {value:.3} {unit}"));
        };
        figure("added_ns", added(nth), "ns");
        for peer in candidate.peers {
            let Some(other) = place(peer) else { continue };
            let name = peer.split('/').next().unwrap_or(peer).replace('-', "_");
            figure(&format!("vs_{name}"), added(nth) / added(other), "ratio");
        }
        figure("allocs", allocs, "per_call");
        if let Some((service, future)) = sizes {
            figure("service_size", service as f64, "bytes");
            figure("future_size", future as f64, "bytes");
        }
    }
    println!("\n{}\n", figures.join("\n"));
    for (nth, candidate) in candidates.iter().enumerate() {
        for (peer, place) in candidate.peers.iter().filter_map(|peer| Some((peer, place(peer)?))) {
            // A difference of 10 % or less is not reported.
            if added(nth) > 1.1 * added(place) {
                let (ours, theirs) = (added(nth), added(place));
                println!(
                    "better than ours: {peer} adds {theirs:.1} ns, {} {ours:.1}",
                    candidate.name
                );
            }
        }
    }
    println!();
    threads::table(candidates, quick);
    println!();
    if let Err(why) = counted(candidates.iter().filter(|one| !quick || one.case.is_some())) {
        println!("no counts of instructions, atomics and clock reads: {why}");
    }
    ExitCode::SUCCESS
}

// ===== Counts =====

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/overhead/baseline.txt");

/// Counts each candidate and prints its counts at once.
fn counted<'a>(
    candidates: impl Iterator<Item = &'a Candidate>,
) -> Result<BTreeMap<&'static str, [f64; 4]>, String> {
    let locked = count::Locked::read()?;
    let mut all = BTreeMap::new();
    println!(
        "{:34} {:>13} {:>8} {:>12} {:>7}",
        "per call", "instructions", "atomics", "clock reads", "allocs"
    );
    for candidate in candidates {
        let name = candidate.name;
        let counted = count::count(name, &locked).map_err(|error| format!("{name}: {error}"))?;
        let allocs = allocs(&mut (candidate.make)());
        let now = [counted.instructions, counted.atomics, counted.clock_reads, allocs];
        println!("{name:34} {:>13.1} {:>8.2} {:>12.2} {:>7.2}", now[0], now[1], now[2], now[3]);
        all.insert(name, now);
        if let Some(case) = candidate.case {
            for (what, value) in ["instructions", "atomics", "clock_reads"].iter().zip(now) {
                println!("figure overhead/{case}/{what} {value:.2} per_call");
            }
        }
    }
    Ok(all)
}

fn counts(candidates: &[Candidate], save: bool) -> ExitCode {
    let now = match counted(candidates.iter()) {
        Ok(now) => now,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let cases: BTreeMap<&str, [f64; 4]> =
        candidates.iter().filter_map(|one| Some((one.case?, *now.get(one.name)?))).collect();
    let mut before = baseline();
    if save {
        before.extend(cases.into_iter().map(|(case, now)| (case.to_owned(), now)));
        return write(&before);
    }
    let mut holds = true;
    for (case, now) in &cases {
        println!("figure overhead/{case}/allocs {:.2} per_call", now[3]);
        let failures = match before.get(*case) {
            Some(then) => worse(case, then, now),
            None => vec![format!("{case}: not in the baseline; --save writes it there")],
        };
        failures.iter().for_each(|failure| eprintln!("{failure}"));
        holds &= failures.is_empty();
        if before.get(*case).is_some_and(|then| !worse(case, now, then).is_empty()) {
            println!("{case}: better than the baseline; --save writes it there");
        }
    }
    for (ours, theirs) in NO_MORE_THAN {
        if let (Some(ours_now), Some(theirs_now)) = (now.get(ours), now.get(theirs)) {
            for failure in worse(&format!("{ours} against {theirs}"), theirs_now, ours_now) {
                eprintln!("{failure}");
                holds = false;
            }
        }
    }
    if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Writes the baseline with all known cases, so that `--save` with a filter keeps the others.
fn write(cases: &BTreeMap<String, [f64; 4]>) -> ExitCode {
    let mut text = String::from(
        "# case instructions atomics clock_reads allocs, per call; written by --count --save\n",
    );
    for candidate in candidates::all() {
        let Some((case, now)) = candidate.case.and_then(|case| cases.get_key_value(case)) else {
            continue;
        };
        text += &format!("{case} {:.1} {:.2} {:.2} {:.2}\n", now[0], now[1], now[2], now[3]);
    }
    match std::fs::write(BASELINE, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{BASELINE}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Pairs of cases: the first must not cost more than the second. Uploads are not among them: the retry polls the body
/// of the application without its lock, which costs one more lock per frame.
const NO_MORE_THAN: [(&str, &str); 2] =
    [("buttress/retry", "tower/retry"), ("buttress/http_retry", "tower/http_retry")];

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

/// Returns the counts that are worse: instructions by more than 20 %, other counts by any amount.
fn worse(case: &str, then: &[f64; 4], now: &[f64; 4]) -> Vec<String> {
    let slack = [then[0] * 0.2, 0.01, 0.01, 0.01];
    ["instructions", "atomics", "clock reads", "allocations"]
        .iter()
        .enumerate()
        .filter(|(nth, _)| now[*nth] > then[*nth] + slack[*nth])
        .map(|(nth, what)| format!("{case}: {what} per call {:.2}, not {:.2}", now[nth], then[nth]))
        .collect()
}
