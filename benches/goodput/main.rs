//! The effect of a layer on a service: with the layers of this crate, with those of each peer, and without a layer.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench goodput                 # all cases
//! cargo bench -p buttress-benches --bench goodput -- hedge        # cases with "hedge" in their name
//! cargo bench -p buttress-benches --bench goodput -- --quick      # shorter runs, within a minute
//! cargo bench -p buttress-benches --bench goodput -- --ours       # without the peers
//! cargo bench -p buttress-benches --bench goodput -- --markdown   # tables in Markdown
//! ```
//!
//! Time is virtual and random numbers are seeded: minutes of traffic take seconds, and every run has the same figures.
//! Some peers read the system clock, which cannot be paused. Their runs use the wall clock, on separate threads, and
//! have a star in the tables. The bench fails if this crate misses one of its bounds. The bench prints tables, and
//! writes pictures and `figures.json` to `target/goodput/`.

mod cases;
mod ours;
mod peers;
mod picture;
mod report;
mod server;
mod traffic;
mod world;

use std::{env, error::Error, fs, path::PathBuf, process::ExitCode, thread};

use report::{Case, OURS, Play, Seen};
use world::Clock;

struct Options {
    filter: String,
    quick: bool,
    ours: bool,
    markdown: bool,
}

fn options() -> Options {
    let mut options = Options { filter: String::new(), quick: false, ours: false, markdown: false };
    for arg in env::args().skip(1) {
        match arg.as_str() {
            "--quick" => options.quick = true,
            "--ours" => options.ours = true,
            "--markdown" => options.markdown = true,
            // `cargo bench` passes this argument.
            "--bench" => {}
            name => name.clone_into(&mut options.filter),
        }
    }
    options
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let options = options();
    let mut cases = cases::all(options.quick);
    cases.retain(|case| case.name.contains(&options.filter));
    if options.ours {
        cases.iter_mut().for_each(|case| case.rows.retain(|row| row.who.starts_with(OURS)));
    }
    let played = play(cases);

    let mut broken = Vec::new();
    for case in &played {
        println!("{}", case.table(options.markdown));
        if !options.markdown {
            for (name, value, unit) in case.figures() {
                println!("figure {name} {value:.4} {unit}");
            }
            println!();
        }
        broken.extend(case.broken());
    }
    if played.iter().any(|case| case.rows.iter().any(|row| row.clock == Clock::Wall)) {
        println!("* on the wall clock: the crate reads the system clock, which cannot be paused\n");
    }
    let path = write(&played)?;
    if !options.markdown {
        println!("pictures and figures: {}", path.display());
    }
    for line in &broken {
        eprintln!("bound missed: {line}");
    }
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

enum Part {
    Later(Play),
    Under(thread::JoinHandle<Seen>),
    Done(Seen),
}

/// Runs all candidates. Those on the wall clock run on a thread each, at the same time as the others, because they
/// mostly sleep.
fn play(cases: Vec<Case<Play>>) -> Vec<Case<Seen>> {
    let begin = |clock, play| match clock {
        Clock::Wall => Part::Under(thread::spawn(play)),
        Clock::Virtual => Part::Later(play),
    };
    let under: Vec<_> = cases.into_iter().map(|case| case.map(begin)).collect();
    let virtually = |_, part| match part {
        Part::Later(play) => Part::Done(play()),
        part => part,
    };
    let half: Vec<_> = under.into_iter().map(|case| case.map(virtually)).collect();
    let end = |_, part| match part {
        Part::Later(play) => play(),
        Part::Under(thread) => thread.join().expect("no panic"),
        Part::Done(seen) => seen,
    };
    half.into_iter().map(|case| case.map(end)).collect()
}

fn write(played: &[Case<Seen>]) -> Result<PathBuf, Box<dyn Error>> {
    // The program is in target/release/deps.
    let exe = env::current_exe()?;
    let target = exe.ancestors().nth(3).ok_or("this program is in no target directory")?;
    let path = target.join("goodput");
    fs::create_dir_all(&path)?;
    for case in played.iter().filter(|case| !case.charts.is_empty()) {
        let charts: Vec<_> = case
            .charts
            .iter()
            .enumerate()
            .map(|(nth, chart)| {
                let lines =
                    case.rows.iter().filter_map(|row| Some((row.who, &**row.part.lines.get(nth)?)));
                (chart, lines.collect())
            })
            .collect();
        fs::write(path.join(format!("{}.svg", case.name)), picture::draw(&charts))?;
    }
    let command = "cargo bench -p buttress-benches --bench goodput";
    fs::write(path.join("figures.json"), report::json(played, command, &today()))?;
    Ok(path)
}

/// Returns the date in the format of HTTP, for which a dependency exists.
fn today() -> String {
    httpdate::fmt_http_date(std::time::SystemTime::now())
}
