//! The scaling from one thread to two that call clones of one service. Each thread is pinned to a processor.

use std::{hint::black_box, sync::Barrier, thread, time::Instant};

use core_affinity::CoreId;
use tokio::runtime::Handle;

use crate::{calls::Run, candidates::Candidate};

/// The duration of a round in nanoseconds, and the minimum number of calls of each thread in it.
const ROUND_NANOS: f64 = 5e6;
const FEW: u64 = 200;

/// The minimum scaling of the machine with which the results are valid.
const TWO: f64 = 1.6;

pub fn table(candidates: &[Candidate], quick: bool) {
    let rounds = if quick { 3 } else { 15 };
    let Some(cores) = cores() else {
        println!("two threads: not measured, because this machine has one processor\n");
        return;
    };
    // Two threads that share nothing.
    let machine = scaling(cores, &mut spin(), &mut spin(), rounds).2;
    println!("figure overhead/machine/scaling {machine:.2} of_2");
    if machine < TWO {
        println!(
            "two threads: this machine is busy and scales to {machine:.2} only, so the following results are not \
             reliable"
        );
    }
    println!(
        "\n{:34} {:>10} {:>10} {:>8} {:>12}",
        "two threads", "one ns", "two ns", "scaling", "of machine's"
    );
    println!("{:34} {:>10} {:>10} {machine:>8.2} {:>12.2}", "(sharing nothing)", "", "", 1.0);
    for candidate in candidates {
        // The size of the window makes no difference.
        if candidate.name.contains("1000000") {
            continue;
        }
        let made = (candidate.make)();
        let (mut first, Some(mut second)) = (made.run, made.clone) else { continue };
        let (one, two, scaling) = scaling(cores, &mut first, &mut second, rounds);
        let share = scaling / machine;
        println!("{:34} {one:>10.1} {two:>10.1} {scaling:>8.2} {share:>12.2}", candidate.name);
        if let Some(case) = candidate.case {
            println!("figure overhead/{case}/scaling {scaling:.2} of_2");
        }
    }
}

fn cores() -> Option<[CoreId; 2]> {
    let cores = core_affinity::get_core_ids()?;
    Some([*cores.first()?, *cores.get(1)?])
}

fn spin() -> Run {
    Box::new(|calls| {
        let mut state = 1u64;
        for _ in 0..calls * 20 {
            state = black_box(state).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ state >> 7;
        }
        black_box(state);
    })
}

/// Returns the best times per call with one thread and with two, and the scaling.
fn scaling(cores: [CoreId; 2], first: &mut Run, second: &mut Run, rounds: u32) -> (f64, f64, f64) {
    let (mut one, mut two) = (f64::INFINITY, f64::INFINITY);
    let calls = ROUND_NANOS / on(FEW, [(cores[0], &mut *first)])[0].max(1.0);
    let calls = (calls as u64).max(FEW);
    for _ in 0..rounds {
        one = one.min(on(calls, [(cores[0], &mut *first)])[0]);
        let both = on(calls, [(cores[0], &mut *first), (cores[1], &mut *second)]);
        two = two.min(both[0].max(both[1]));
    }
    (one, two, 2.0 * one / two)
}

/// Runs all at once, each on its processor, and returns the nanoseconds per call.
fn on<const N: usize>(calls: u64, runs: [(CoreId, &mut Run); N]) -> [f64; N] {
    let (start, runtime) = (Barrier::new(N), Handle::current());
    let timed = |core: CoreId, run: &mut Run| {
        // If pinning is not permitted, the scheduler selects the processor.
        core_affinity::set_for_current(core);
        let _guard = runtime.enter();
        start.wait();
        let began = Instant::now();
        run(calls);
        began.elapsed().as_nanos() as f64 / calls as f64
    };
    thread::scope(|scope| {
        let threads = runs.map(|(core, run)| scope.spawn(move || timed(core, run)));
        threads.map(|thread| thread.join().expect("no panic"))
    })
}
