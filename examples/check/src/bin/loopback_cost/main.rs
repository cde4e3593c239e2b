//! The cost of the recommended layers for a real call: axum and hyper over loopback with 64 connections, with and
//! without the layers on both sides.
//!
//! ```text
//! cargo run --release -p check-examples --bin loopback_cost
//! ```
//!
//! Each pair of short runs has one run without layers and one with layers. The order alternates. Other load on the
//! machine affects both runs of a pair, so the result is the median of the ratios within the pairs. The CPU time is
//! that of the whole process, which contains both sides of the call.
//!
//! There are two handlers. One responds at once, so that the processor is the bottleneck and every instruction counts.
//! The other first waits, as for a database. The example ends after about 30 s.

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
/// The time for the pairs of one handler.
const TIME: Duration = Duration::from_secs(13);

fn main() -> Result<(), BoxError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // Ends the example also if a call hangs.
    runtime.block_on(async { timeout(TIME * 4, compare()).await? })
}

async fn compare() -> Result<(), BoxError> {
    println!("Pairs of runs of {RUN:?} over {CONNECTIONS} connections, without layers and with:");
    println!("  a server: {}", sides::SERVER);
    println!("  a client: {}", sides::CLIENT);
    let at_once = pairs("/").await?;
    at_once.print("A handler that responds at once", "at_once");
    let waits = pairs("/waits").await?;
    waits.print(&format!("A handler that waits for {:?}", sides::WAIT), "waits");

    // Other load on the machine affects one of the two runs at random, hence the standard error.
    let throughput = &waits.throughput;
    check(throughput.value + 2.0 * throughput.error >= 0.98, "at least 98 % of the throughput")?;
    check(waits.p99.value - 2.0 * waits.p99.error <= 1.05, "p99 within 5 %")
}

async fn pairs(path: &str) -> Result<Report, BoxError> {
    let (plain, layered) = (sides::plain(path).await?, sides::layered(path).await?);
    // The first runs include one-time costs and are not measured.
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
    println!("{} {claim}, if the handler waits", if holds { "ok:" } else { "NOT SO:" });
    if holds { Ok(()) } else { Err(claim.into()) }
}
