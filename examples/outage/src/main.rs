//! One outage with two clients at the same time: a bare client and a client with layers.
//!
//! ```sh
//! cargo run -p outage
//! ```
//!
//! Two upstreams on loopback follow one script: healthy, slow, responding with 503, refusing connections, healthy
//! again. Both receive the same open-loop load. At the end the example prints a table, the claims with the measured
//! values, and the path of a picture of the run. The exit code is 0 only if every claim holds.

mod claims;
mod clients;
mod live;
mod load;
mod panel;
mod picture;
mod run;
mod script;
mod table;
mod tally;
mod upstream;

use std::{io, process::ExitCode, time::Duration};

use tokio::time::timeout;

#[tokio::main]
async fn main() -> io::Result<ExitCode> {
    println!(
        "{} calls/s for {} s at each of two upstreams of {} requests/s; callers give up after {} s.\n",
        script::CALLS_PER_SECOND,
        script::length().as_secs(),
        (script::WORKERS as f64 / script::FAST.as_secs_f64()) as u32,
        script::PATIENCE.as_secs(),
    );
    // Ends the example also if a call hangs.
    let run = timeout(script::length() + Duration::from_secs(5), run::run()).await??;
    println!();
    table::print(&run);
    println!();
    let claims = claims::claims(&run);
    for claim in &claims {
        let verdict = if claim.holds { "ok    " } else { "FAILED" };
        println!("{verdict} {}\n       {}", claim.says, claim.measured);
    }
    // The picture is next to the program in the target directory.
    let path = std::env::current_exe()?.with_extension("svg");
    std::fs::write(&path, picture::draw(&run))?;
    println!("\nA picture of the run: {}", path.display());
    Ok(if claims.iter().all(|claim| claim.holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
