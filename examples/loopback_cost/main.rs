//! What the recommended layers cost a real call: axum and hyper over loopback, 64 connections, with and without
//! them on both sides.
//!
//! ```text
//! cargo run --release --example loopback_cost
//! ```
//!
//! Each pair of short runs is one without layers and one with; which comes first changes. What else the machine does
//! falls on both, so that only ratios within a pair are trusted, and of these the median. CPU time is what the whole
//! process used, both sides of the call together.
//!
//! Two handlers: one that answers at once, where the processor is all there is to run out of and every instruction
//! shows, and one that first waits, as for a database. It ends by itself, after some 30 s.

mod load;
mod report;
mod sides;

use std::time::Duration;

use buttress::BoxError;
use tokio::time::{Instant, timeout};

use load::run;
use report::Report;

const CONNECTIONS: usize = 64;
const RUN: Duration = Duration::from_millis(100);
/// For the pairs of one handler.
const TIME: Duration = Duration::from_secs(13);

fn main() -> Result<(), BoxError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // It ends by itself, whatever goes wrong.
    runtime.block_on(async { timeout(TIME * 4, compare()).await? })
}

async fn compare() -> Result<(), BoxError> {
    println!("Pairs of runs of {RUN:?} over {CONNECTIONS} connections, without layers and with:");
    println!("  a server: {}", sides::SERVER);
    println!("  a client: {}", sides::CLIENT);
    let at_once = pairs("/").await?;
    at_once.print("A handler that answers at once", "at_once");
    let waits = pairs("/waits").await?;
    waits.print(&format!("A handler that waits for {:?}", sides::WAIT), "waits");

    // What else this machine does falls on one of the two by chance.
    let throughput = &waits.throughput;
    check(throughput.value + 2.0 * throughput.error >= 0.98, "98 % of the throughput and more")?;
    check(waits.p99.value - 2.0 * waits.p99.error <= 1.05, "p99 within 5 %")
}

async fn pairs(path: &str) -> Result<Report, BoxError> {
    let (plain, layered) = (sides::plain(path).await?, sides::layered(path).await?);
    // Neither is to pay for what is done once.
    for _ in 0..5 {
        run(&plain).await?;
        run(&layered).await?;
    }
    let (start, mut pairs) = (Instant::now(), Vec::new());
    while start.elapsed() < TIME {
        pairs.push(if pairs.len() % 2 == 0 {
            let without = run(&plain).await?;
            (without, run(&layered).await?)
        } else {
            let with = run(&layered).await?;
            (run(&plain).await?, with)
        });
    }
    Ok(Report::of(pairs))
}

fn check(holds: bool, claim: &str) -> Result<(), BoxError> {
    println!("{} {claim}, where the handler waits", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
