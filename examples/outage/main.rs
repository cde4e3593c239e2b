//! An outage, lived through twice at the same time: by a bare client and by a protected one.
//!
//! ```sh
//! cargo run --example outage
//! ```
//!
//! Two upstreams on loopback follow one script: healthy, slow, answering 503, refusing connections,
//! healthy again. The same open-loop load is driven at both. At the end: a table, the claims with what
//! was measured, and the path of a picture of the run. Exits with 0 only if every claim holds.

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
        "{} calls/s for {} s at each of two upstreams of {} requests/s; callers wait {} s.\n",
        script::CALLS_PER_SECOND,
        script::length().as_secs(),
        (script::WORKERS as f64 / script::FAST.as_secs_f64()) as u32,
        script::PATIENCE.as_secs(),
    );
    // Whatever goes wrong, it ends.
    let run = timeout(script::length() + Duration::from_secs(5), run::run()).await??;
    println!();
    table::print(&run);
    println!();
    let claims = claims::claims(&run);
    for claim in &claims {
        let verdict = if claim.holds { "ok    " } else { "FAILED" };
        println!("{verdict} {}\n       {}", claim.says, claim.measured);
    }
    // Beside the program, in the target directory.
    let path = std::env::current_exe()?.with_extension("svg");
    std::fs::write(&path, picture::draw(&run))?;
    println!("\nA picture of the run: {}", path.display());
    Ok(if claims.iter().all(|claim| claim.holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
