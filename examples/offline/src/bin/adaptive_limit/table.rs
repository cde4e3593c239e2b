//! A table with a row for each limit: its convergence from several initial limits, its behaviour under lasting overload
//! and after changes of the capacity, and its recovery from an outage.

use std::error::Error;

use buttress::{ConfigError, limit::adaptive::Algorithm};

use crate::rig::{Phase, STEADY, Second, Spread, World, goodput, mean_limit, quantile, run};

type Made = Option<Box<dyn Algorithm>>;
/// A name, and the constructor of the algorithm from an initial limit.
pub type Kind = (&'static str, fn(usize) -> Result<Made, ConfigError>);

/// A name, and the seconds of a run.
pub type Drawn = (&'static str, Vec<Second>);

const WIDTH: usize = 22;

/// Prints the table. Returns for each limit but `no limit` the minute in which the capacity halves and doubles.
pub fn print(kinds: &[Kind]) -> Result<Vec<Drawn>, Box<dyn Error>> {
    let heavy = Phase { offered: 8000.0, ..STEADY };
    let half = Phase { from: 20.0, workers: 10, ..heavy };
    let double = Phase { from: 40.0, workers: 40, ..heavy };
    let healthy = Phase { workers: 30, service: 100.0, offered: 280.0, ..STEADY };
    let outage =
        [healthy, Phase { from: 60.0, workers: 0, ..healthy }, Phase { from: 70.0, ..healthy }];
    let even = |phases: &[Phase]| World {
        phases: phases.to_vec(),
        spread: Spread::Even,
        patience: None,
        seed: 1,
    };

    println!(
        "20 workers, 10 ms a call: 2000/s; 4000/s offered. The limit after 10 s from 1, 10 and 1000."
    );
    println!(
        "From 20: goodput, p99 and mean limit of the second minute and of the twentieth minute."
    );
    println!(
        "At 8000/s: the limit after 5 s with 10 workers, and after 5 s with 40. outage: the goodput"
    );
    println!("20 s after an outage of 10 s, relative to before (280 of 300/s, callers retry).");
    println!(
        "uneven: the goodput per second if one call in ten takes 91 times as long as the others."
    );
    println!();
    println!(
        "{:<WIDTH$} | {:>14} | {:>24} | {:>24} | {:>4} {:>5} | {:>6} | {:>6}",
        "",
        "from 1/10/1000",
        "2nd minute /s, ms, limit",
        "20th minute",
        "half",
        "twice",
        "outage",
        "uneven"
    );
    let mut drawn = Vec::new();
    for (name, make) in kinds {
        let mut starts = Vec::new();
        for from in [1, 10, 1000] {
            starts.push(limit_of(&run(&even(&[STEADY]), make(from)?, 10)[9]));
        }
        // Without a limit the queue of calls and the memory grow without bound.
        let minutes = if *name == "no limit" { 2 } else { 20 };
        let long = run(&even(&[STEADY]), make(20)?, minutes * 60);
        let follows = run(&even(&[heavy, half, double]), make(20)?, 60);
        let stands = World { patience: Some(1.0), spread: Spread::Exponential, ..even(&outage) };
        let over = run(&stands, make(20)?, 110);
        let uneven = World { spread: Spread::Misses, ..even(&[STEADY]) };
        let differs = run(&uneven, make(20)?, 120);
        println!(
            "{name:<WIDTH$} | {:>14} | {} | {} | {:>4} {:>5} | {:>4.0} % | {:>6.0}",
            starts.join("/"),
            minute(&long[60..120]),
            if minutes == 20 { minute(&long[1140..]) } else { " ".repeat(24) },
            limit_of(&follows[24]),
            limit_of(&follows[44]),
            100.0 * goodput(&over[90..]) / goodput(&over[20..60]),
            goodput(&differs[60..]),
        );
        if *name != "no limit" {
            drawn.push((*name, follows));
        }
    }
    Ok(drawn)
}

fn limit_of(second: &Second) -> String {
    if second.limit == u32::MAX { "-".to_owned() } else { second.limit.to_string() }
}

fn minute(seconds: &[Second]) -> String {
    let limit = mean_limit(seconds);
    let limit = if limit > 1e6 { "-".to_owned() } else { format!("{limit:.0}") };
    format!("{:>8.0} {:>9.1} {limit:>5}", goodput(seconds), quantile(seconds, 0.99))
}
