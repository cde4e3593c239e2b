//! Two threads on clones of one service against one alone.

use std::{sync::Barrier, thread, time::Instant};

use crate::candidates::{Candidate, Run};

/// Calls of each thread in one round.
const CALLS: u64 = 50_000;

pub fn table(candidates: &[Candidate], quick: bool) {
    let rounds = if quick { 3 } else { 15 };
    println!("\n{:34} {:>10} {:>10} {:>8}", "two threads", "one ns", "two ns", "scaling");
    for candidate in candidates {
        if candidate.name.contains("1000000") || candidate.name.contains("refused") {
            continue;
        }
        let made = (candidate.make)();
        let (mut first, Some(mut second)) = (made.run, made.clone) else { continue };
        let (mut one, mut two) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..rounds {
            let began = Instant::now();
            first(CALLS);
            one = one.min(began.elapsed().as_nanos() as f64 / CALLS as f64);
            let start = Barrier::new(2);
            let runtime = tokio::runtime::Handle::current();
            let timed = |run: &mut Run| {
                let _guard = runtime.enter();
                start.wait();
                let began = Instant::now();
                run(CALLS);
                began.elapsed().as_nanos() as f64 / CALLS as f64
            };
            let both = thread::scope(|scope| {
                let other = scope.spawn(|| timed(&mut second));
                let mine = timed(&mut first);
                other.join().map_or(f64::NAN, |other| mine.max(other))
            });
            two = two.min(both);
        }
        println!("{:34} {one:>10.1} {two:>10.1} {:>8.2}", candidate.name, 2.0 * one / two);
        if let Some(case) = candidate.case {
            println!("figure overhead/{case}/scaling {:.2} of_2", 2.0 * one / two);
        }
    }
}
