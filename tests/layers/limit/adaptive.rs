//! Adaptive limits in virtual time. Unless a test states otherwise, the server has 20 workers and needs 10 ms per call,
//! and calls arrive at twice the rate that it can serve, independent of its responses.

use std::time::Duration;

use buttress::limit::adaptive::{
    Aimd, Algorithm, ChangeReason, Fixed, Gradient2, Knee, Sample, Vegas,
};

use crate::layers::simulation::{
    Phase, STEADY, Second, Spread, World, goodput, mean_limit, quantile, run,
};

const FULL: f64 = 2000.0;
const MS: Duration = Duration::from_millis(1);

fn world(phases: &[Phase]) -> World {
    World { phases: phases.to_vec(), spread: Spread::Even, patience: None, seed: 1 }
}

fn knee(initial: usize) -> Option<Box<dyn Algorithm>> {
    Some(Box::new(Knee::new(initial, 1..=1000).unwrap()))
}

#[track_caller]
fn holds_up(seconds: &[Second]) {
    let (good, p99) = (goodput(seconds), quantile(seconds, 0.99));
    assert!(good >= 0.95 * FULL, "goodput {good}");
    assert!(p99 <= 30.0, "p99 {p99} ms");
}

/// The share of the calls that were rejected.
fn refused(seconds: &[Second]) -> f64 {
    let (all, refused) = seconds.iter().fold((0, 0), |(all, refused), second| {
        (all + second.good + second.refused, refused + second.refused)
    });
    f64::from(refused) / f64::from(all)
}

/// Checks the limit at the end of each second: it is between `low` and `high`, except that a drain may lower it to 5 in
/// one of ten seconds.
#[track_caller]
fn within(seconds: &[Second], low: u32, high: u32) {
    let out: Vec<_> = seconds
        .iter()
        .map(|second| second.limit)
        .filter(|limit| !(low..=high).contains(limit))
        .collect();
    assert!(out.len() * 10 <= seconds.len(), "{out:?} of {}", seconds.len());
    assert!(out.iter().all(|limit| (5..=high).contains(limit)), "{out:?}");
}

// ===== The default =====

#[test]
fn from_any_start_the_knee_is_found_in_ten_seconds() {
    for initial in [1, 10, 1000] {
        for seed in 1..=3 {
            let seconds = run(&World { seed, ..world(&[STEADY]) }, knee(initial), 40);
            assert!((15..=40).contains(&seconds[9].limit), "{initial}: {}", seconds[9].limit);
            within(&seconds[9..], 15, 40);
            holds_up(&seconds[10..]);
        }
    }
}

/// The same where the bounds allow a queue many times as long.
#[test]
fn a_start_in_a_queue_does_not_grow_into_a_longer_one() {
    for initial in [100, 1000] {
        let knee = Knee::new(initial, 1..=100_000).unwrap();
        let seconds = run(&world(&[STEADY]), Some(Box::new(knee)), 40);
        within(&seconds[9..], 15, 40);
        holds_up(&seconds[10..]);
    }
}

/// Single calls are poor samples here: some take ten times as long as others.
#[test]
fn the_knee_is_found_also_where_calls_differ_much() {
    for initial in [1, 10, 1000] {
        let world = World { spread: Spread::Exponential, ..world(&[STEADY]) };
        let seconds = run(&world, knee(initial), 60);
        within(&seconds[9..], 15, 45);
        assert!(goodput(&seconds[10..]) >= 0.95 * FULL);
    }
    let seconds = run(&World { spread: Spread::Misses, ..world(&[STEADY]) }, knee(20), 180);
    assert!(goodput(&seconds[30..]) >= 0.94 * FULL, "{}", goodput(&seconds[30..]));
}

/// The calls that end soon after a change are the quick ones, so they underestimate the duration of a call.
#[test]
fn calls_that_differ_much_are_not_a_queue() {
    let endless = Phase { from: 0.0, workers: 100_000, service: 100.0, offered: 2000.0 };
    for spread in [Spread::Even, Spread::Exponential, Spread::Misses] {
        let seconds = run(&World { spread, ..world(&[endless]) }, knee(20), 180);
        let refused = refused(&seconds[120..]);
        assert!(refused <= 0.001, "{spread:?}: {refused}");
    }
}

/// While a part of the limit is unused, calls do not wait for each other.
#[test]
fn hardly_any_call_is_rejected_while_capacity_is_free() {
    for (offered, most) in [(1000.0, 0.003), (1400.0, 0.003), (1800.0, 0.03)] {
        let light = Phase { offered, ..STEADY };
        let world = World { spread: Spread::Exponential, ..world(&[light]) };
        let refused = refused(&run(&world, knee(20), 300)[10..]);
        assert!(refused <= most, "{offered}/s: {refused}");
    }
}

/// A round lasts as long as a call, and only one of many rounds is a drain.
#[test]
fn calls_of_a_second_each_are_served_as_well() {
    let slow = Phase { service: 1000.0, offered: 40.0, ..STEADY };
    let seconds = run(&World { spread: Spread::Exponential, ..world(&[slow]) }, knee(20), 3600);
    assert!(goodput(&seconds[60..]) >= 19.0, "{}", goodput(&seconds[60..]));
}

/// A pause in the traffic during a drain must not look like a lower throughput.
#[test]
fn bursts_with_pauses_between_them_do_not_raise_the_limit() {
    for (every, long) in [(1, 0.2), (2, 1.0)] {
        let burst = (0..240 / every).flat_map(|nth| {
            let from = f64::from(nth * every);
            let pause = Phase { from: from + long, offered: 20.0, ..STEADY };
            [Phase { from, ..STEADY }, pause]
        });
        let seconds = run(&world(&burst.collect::<Vec<_>>()), knee(20), 240);
        let highest = seconds.iter().map(|second| second.highest).max();
        assert!(highest.is_some_and(|highest| highest <= 45), "{highest:?}");
        assert!(quantile(&seconds[30..], 0.99) <= 30.0);
    }
}

#[test]
fn twenty_minutes_of_overload_do_not_raise_the_baseline() {
    let seconds = run(&world(&[STEADY]), knee(20), 1200);
    within(&seconds[10..], 15, 40);
    for minute in seconds.chunks(60).skip(1) {
        holds_up(minute);
    }
}

#[test]
fn the_limit_follows_when_capacity_halves_or_doubles() {
    for (workers, low, high) in [(10, 7, 20), (40, 30, 80)] {
        let heavy = Phase { offered: 8000.0, ..STEADY };
        let change = Phase { from: 20.0, workers, ..heavy };
        for seed in 1..=3 {
            let seconds = run(&World { seed, ..world(&[heavy, change]) }, knee(20), 60);
            within(&seconds[24..], low, high);
            let full = workers as f64 * 100.0;
            let good = goodput(&seconds[24..]);
            assert!(good >= 0.95 * full, "{good} of {full}");
        }
    }
}

/// Slower calls look like a queue. A lower limit then lowers the throughput, which shows that there is none.
#[test]
fn calls_that_become_slower_are_not_a_queue() {
    let change = Phase { from: 20.0, service: 20.0, ..STEADY };
    let seconds = run(&world(&[STEADY, change]), knee(20), 60);
    within(&seconds[24..], 15, 40);
    assert!(goodput(&seconds[24..]) >= 0.95 * FULL / 2.0);
}

#[test]
fn an_idle_hour_does_not_change_the_limit() {
    let idle = Phase { from: 20.0, offered: 5.0, ..STEADY };
    let back = Phase { from: 3620.0, ..STEADY };
    let seconds = run(&world(&[STEADY, idle, back]), knee(20), 3640);
    assert_eq!(seconds[3619].limit, seconds[21].limit, "an idle limit does not change");
    within(&seconds[3620..], 15, 40);
    holds_up(&seconds[3620..]);
}

#[test]
fn an_unused_limit_does_not_grow() {
    let light = Phase { offered: 500.0, ..STEADY };
    let seconds = run(&world(&[light]), knee(20), 60);
    assert!(seconds.iter().all(|second| second.limit == 20 && second.refused == 0));
}

/// 280 of 300 possible calls per second, an outage of ten seconds, and callers that retry. Without a limit the server
/// keeps working on calls whose callers have given up.
#[test]
fn goodput_recovers_after_an_outage() {
    let before = Phase { from: 0.0, workers: 30, service: 100.0, offered: 280.0 };
    let outage = Phase { from: 60.0, workers: 0, ..before };
    let after = Phase { from: 70.0, ..before };
    let world = World { patience: Some(1.0), ..world(&[before, outage, after]) };
    for (algorithm, recovers) in [(knee(20), true), (None, false)] {
        let seconds = run(&world, algorithm, 110);
        let (was, is) = (goodput(&seconds[20..60]), goodput(&seconds[90..110]));
        assert!(was > 250.0, "{was}");
        assert_eq!(is >= 0.95 * was, recovers, "{was} before, {is} after");
    }
}

fn calls(
    algorithm: &mut dyn Algorithm,
    from_ms: u64,
    dropped: impl Fn(u64) -> bool,
) -> Vec<ChangeReason> {
    (0..2000)
        .filter_map(|number| {
            let now = Duration::from_millis(from_ms + number);
            let sample = Sample::new(now, Duration::from_millis(10), algorithm.limit());
            let sample = if dropped(number) { sample.dropped() } else { sample };
            algorithm.on_sample(&sample).map(|change| change.reason)
        })
        .collect()
}

#[test]
fn drops_cut_once_a_round_trip_and_growth_is_careful_for_a_while() {
    let mut knee = Knee::new(100, 10..=200).unwrap();
    let cuts = calls(&mut knee, 0, |number| number % 10 == 0);
    assert!(cuts.iter().all(|reason| *reason == ChangeReason::Dropped), "{cuts:?}");
    assert!((3..40).contains(&cuts.len()), "{}", cuts.len());
    // The round in progress still contains drops.
    let _ = calls(&mut knee, 2000, |_| false);
    let limit = knee.limit();
    let grown = calls(&mut knee, 4000, |_| false);
    assert!(grown.iter().all(|reason| *reason == ChangeReason::Headroom), "{grown:?}");
    assert_eq!(knee.limit() as usize, limit as usize + grown.len(), "each change adds one");
}

#[test]
fn a_single_drop_does_not_lower_the_limit() {
    let mut knee = Knee::new(100, 10..=100).unwrap();
    let changes = calls(&mut knee, 0, |number| number % 50 == 0);
    assert!(!changes.contains(&ChangeReason::Dropped), "{changes:?}");
}

// ===== All algorithms =====

#[test]
fn all_algorithms_stay_within_their_bounds() {
    let all: [Box<dyn Algorithm>; 4] = [
        Box::new(Knee::new(30, 20..=50).unwrap()),
        Box::new(Aimd::new(30, 20..=50).unwrap()),
        Box::new(Vegas::new(30, 20..=50).unwrap()),
        Box::new(Gradient2::new(30, 20..=50).unwrap()),
    ];
    for algorithm in all {
        let change = Phase { from: 5.0, workers: 1, ..STEADY };
        let seconds = run(&world(&[STEADY, change]), Some(algorithm), 10);
        assert!(seconds.iter().all(|second| second.lowest >= 20 && second.highest <= 50));
    }
}

/// Any samples, because the traits are public and clocks jump.
#[test]
fn any_samples_leave_a_valid_limit() {
    let wild = [0, 1, 999, 10_000_000, 20_000_000, 3_600_000_000_000, u64::MAX];
    let time = |dice: &mut fastrand::Rng| match dice.u8(..30) {
        0 => Duration::MAX,
        n => Duration::from_nanos(wild[usize::from(n) % wild.len()]),
    };
    let counts = [0, 1, 2, 30, 1000, u32::MAX];
    for seed in 0..200 {
        let all: [Box<dyn Algorithm>; 5] = [
            Box::new(Knee::default()),
            Box::new(Aimd::default()),
            Box::new(Vegas::default()),
            Box::new(Gradient2::default()),
            Box::new(Fixed::new(3).unwrap()),
        ];
        for mut algorithm in all {
            let mut dice = fastrand::Rng::with_seed(seed);
            let mut now = Duration::ZERO;
            for _ in 0..1000 {
                now =
                    if dice.u8(..100) == 0 { time(&mut dice) } else { now.saturating_add(9 * MS) };
                let count = counts[dice.usize(..counts.len())];
                let sample = Sample::new(now, time(&mut dice), count);
                let sample = if dice.u8(..20) == 0 { sample.dropped() } else { sample };
                let changed = algorithm.on_sample(&sample);
                match dice.u8(..200) {
                    0 => algorithm.set_limit(count),
                    1 => drop(algorithm.set_bounds(count..=counts[dice.usize(..counts.len())])),
                    _ => assert!(changed.is_none_or(|change| change.limit == algorithm.limit())),
                }
                assert!(algorithm.limit() >= 1, "{algorithm:?}");
            }
        }
    }
}

/// A single call takes an hour, such as a long poll, among many short ones.
#[test]
fn a_call_that_hangs_is_not_a_queue() {
    let mut knee = Knee::new(20, 1..=1000).unwrap();
    let _ = calls(&mut knee, 0, |_| false);
    let _ = knee.on_sample(&Sample::new(2000 * MS, 3600 * 1000 * MS, knee.limit()));
    for second in [2, 4, 6] {
        let changes = calls(&mut knee, second * 1000 + 1, |_| false);
        assert!(!changes.contains(&ChangeReason::Queued), "{changes:?}");
    }
}

#[test]
fn a_fixed_limit_stays() {
    let seconds = run(&world(&[STEADY]), Some(Box::new(Fixed::new(25).unwrap())), 5);
    assert!(seconds.iter().all(|second| second.lowest == 25 && second.highest == 25));
    holds_up(&seconds);
}

/// The reason why this algorithm is not the default.
#[test]
fn gradient2_adapts_to_the_latency_of_a_queue() {
    let world = World { spread: Spread::Exponential, ..world(&[STEADY]) };
    let seconds = run(&world, Some(Box::new(Gradient2::default())), 1200);
    let (early, late) = (mean_limit(&seconds[10..60]), mean_limit(&seconds[1140..]));
    assert!(late > 2.0 * early, "{early} early, {late} late");
}

#[test]
fn invalid_bounds_are_typed_errors() {
    for (made, field) in [
        (Knee::new(0, 1..=2).map(drop), "adaptive.initial"),
        (Knee::new(3, 1..=2).map(drop), "adaptive.initial"),
        (Aimd::new(1, 0..=2).map(drop), "limit"),
        #[allow(clippy::reversed_empty_ranges)] // The empty range is the subject of the test.
        (Vegas::new(1, 2..=1).map(drop), "adaptive.bounds"),
        (Gradient2::new(1, 2..=9).map(drop), "adaptive.initial"),
        (Aimd::default().timeout(Duration::ZERO).map(drop), "adaptive.timeout"),
        (Fixed::new(0).map(drop), "limit"),
    ] {
        assert_eq!(made.unwrap_err().field, field);
    }
}
