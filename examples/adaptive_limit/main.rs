//! Limits that find their own number, at twice of what a server can do: ours and those known from
//! elsewhere, in virtual time. Prints a table and draws limit and latency over time.
//!
//! ```text
//! cargo run --example adaptive_limit
//! ```

mod picture;
#[path = "../../tests/rig/mod.rs"]
mod rig;

use std::{error::Error, fs, path::PathBuf, time::Duration};

use buttress::limit::adaptive::{Aimd, Algorithm, Fixed, Gradient2, Knee, Vegas};
use rig::{Phase, STEADY, Second, Spread, World, goodput, mean_limit, quantile, run};

type Made = Option<Box<dyn Algorithm>>;
type Kind = (&'static str, fn(usize) -> Result<Made, buttress::ConfigError>);

/// Each from a limit of its choice, within 1 to 1000.
const KINDS: [Kind; 6] = [
    ("no limit", |_| Ok(None)),
    ("fixed 28", |_| Ok(Some(Box::new(Fixed::new(28)?)))),
    ("knee (ours)", |from| Ok(Some(Box::new(Knee::new(from, 1..=1000)?)))),
    ("aimd, 30 ms", |from| {
        Ok(Some(Box::new(Aimd::new(from, 1..=1000)?.timeout(Duration::from_millis(30))?)))
    }),
    ("vegas", |from| Ok(Some(Box::new(Vegas::new(from, 1..=1000)?)))),
    ("gradient2", |from| Ok(Some(Box::new(Gradient2::new(from, 1..=1000)?)))),
];

fn main() -> Result<(), Box<dyn Error>> {
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
        "20 workers, 10 ms a call: 2000/s; 4000/s offered. Limit after 10 s from 1, 10 and 1000;"
    );
    println!("goodput, p99 and mean limit of the second minute, and of the twentieth, from 20.");
    println!(
        "Then 8000/s: after 5 s with 10 workers, after 5 s with 40. Last, the share of what was"
    );
    println!(
        "answered before an outage of 10 s that is 20 s after it (280 of 300/s, callers try again)."
    );
    println!();
    println!(
        "{:<12} | {:>14} | {:>24} | {:>24} | {:>4} {:>5} | {:>6}",
        "", "from 1/10/1000", "2nd minute /s, ms, limit", "20th minute", "half", "twice", "outage"
    );
    let mut drawn = Vec::new();
    for (name, make) in KINDS {
        let mut starts = Vec::new();
        for from in [1, 10, 1000] {
            starts.push(limit_of(&run(&even(&[STEADY]), make(from)?, 10)[9]));
        }
        // Without a limit the line of calls grows for ever, and so would the memory.
        let minutes = if name == "no limit" { 2 } else { 20 };
        let long = run(&even(&[STEADY]), make(20)?, minutes * 60);
        let follows = run(&even(&[heavy, half, double]), make(20)?, 60);
        let stands = World { patience: Some(1.0), spread: Spread::Exponential, ..even(&outage) };
        let over = run(&stands, make(20)?, 110);
        println!(
            "{name:<12} | {:>14} | {} | {} | {:>4} {:>5} | {:>4.0} %",
            starts.join("/"),
            minute(&long[60..120]),
            if minutes == 20 { minute(&long[1140..]) } else { " ".repeat(24) },
            limit_of(&follows[24]),
            limit_of(&follows[44]),
            100.0 * goodput(&over[90..]) / goodput(&over[20..60]),
        );
        if name != "no limit" {
            drawn.push((name, follows));
        }
    }
    let path = target().join("adaptive_limit.svg");
    fs::write(&path, picture::draw(&drawn))?;
    println!("\nlimit and latency over time: {}", path.display());
    Ok(())
}

fn limit_of(second: &Second) -> String {
    if second.limit == u32::MAX { "-".to_owned() } else { second.limit.to_string() }
}

fn minute(seconds: &[Second]) -> String {
    let limit = mean_limit(seconds);
    let limit = if limit > 1e6 { "-".to_owned() } else { format!("{limit:.0}") };
    format!("{:>8.0} {:>9.1} {limit:>5}", goodput(seconds), quantile(seconds, 0.99))
}

/// Beside what was built.
fn target() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.parent()?.parent()?.to_path_buf()))
        .unwrap_or_else(std::env::temp_dir)
}
