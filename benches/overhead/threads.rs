//! Two threads on clones of one service against one alone, each on a processor of its own.

use std::{hint::black_box, sync::Barrier, thread, time::Instant};

use core_affinity::CoreId;
use tokio::runtime::Handle;

use crate::{calls::Run, candidates::Candidate};

/// Calls of each thread in one round: as many as fit this long, and a few.
const ROUND_NANOS: f64 = 5e6;
const FEW: u64 = 200;

/// Below that, two threads are no two threads.
const TWO: f64 = 1.6;

pub fn table(candidates: &[Candidate], quick: bool) {
    let rounds = if quick { 3 } else { 15 };
    let Some(cores) = cores() else {
        println!("two threads: this machine has one processor, and says nothing about them\n");
        return;
    };
    // What shares nothing at all.
    let machine = scaling(cores, &mut spin(), &mut spin(), rounds).2;
    println!("figure overhead/machine/scaling {machine:.2} of_2");
    if machine < TWO {
        println!(
            "two threads: this machine gives them {machine:.2} times what one has, busy as it is: read what follows \
             against that, or not at all"
        );
    }
    println!(
        "\n{:34} {:>10} {:>10} {:>8} {:>12}",
        "two threads", "one ns", "two ns", "scaling", "of machine's"
    );
    println!("{:34} {:>10} {:>10} {machine:>8.2} {:>12.2}", "(sharing nothing)", "", "", 1.0);
    for candidate in candidates {
        // Its window makes no difference once it is full.
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

/// The best of one's time and of two's, and how much more two do.
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

/// Each on its processor, all at once: nanoseconds a call.
fn on<const N: usize>(calls: u64, runs: [(CoreId, &mut Run); N]) -> [f64; N] {
    let (start, runtime) = (Barrier::new(N), Handle::current());
    let timed = |core: CoreId, run: &mut Run| {
        // Where it is not allowed, the scheduler decides.
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
