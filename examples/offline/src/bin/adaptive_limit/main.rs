//! Adaptive limits at twice the capacity of a server, in virtual time: `Knee` of this crate and known algorithms.
//! Prints a table and draws limit and latency over time.
//!
//! ```text
//! cargo run -p offline-examples --bin adaptive_limit
//! ```
//!
//! The same table with the limits of other crates: `cargo run -p buttress-benches --example adaptive_peers`.

mod picture;
#[path = "../../../../../tests/layers/simulation.rs"]
mod rig;
mod table;

use std::{env, error::Error, fs, time::Duration};

use buttress::limit::adaptive::{Aimd, Fixed, Gradient2, Knee, Vegas};
use table::Kind;

/// The name of each algorithm, and its constructor from an initial limit. The bounds are 1 and 1000.
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
    let drawn = table::print(&KINDS)?;
    // The picture is next to the program in the target directory.
    let path = env::current_exe()?.with_extension("svg");
    fs::write(&path, picture::draw(&drawn))?;
    println!("\nlimit and latency over time: {}", path.display());
    Ok(())
}
