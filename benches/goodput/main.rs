//! What a layer does for a service: with ours, with each peer that has the part, and without anything.
//!
//! ```sh
//! cargo bench -p buttress-benches --bench goodput                 # all cases
//! cargo bench -p buttress-benches --bench goodput -- hedge        # those whose name has "hedge" in it
//! cargo bench -p buttress-benches --bench goodput -- --quick      # the same within a minute
//! cargo bench -p buttress-benches --bench goodput -- --ours       # without the peers
//! cargo bench -p buttress-benches --bench goodput -- --markdown   # tables for a page
//! ```
//!
//! Time is virtual and luck is seeded: minutes of traffic take seconds, and every run gives the same figures.
//! Some peers read the clock of the system, which cannot be paused; theirs are played on the wall's clock,
//! beside everything else, and have a star. The bench fails if ours do not hold what they promise. Tables are
//! printed; pictures and `figures.json` are written to `target/goodput/`.

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
            // What cargo itself passes on.
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
        println!("* by the clock on the wall: it reads the system's own, which cannot be paused\n");
    }
    let path = write(&played)?;
    if !options.markdown {
        println!("pictures and figures: {}", path.display());
    }
    for line in &broken {
        eprintln!("not held: {line}");
    }
    Ok(if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

enum Part {
    Later(Play),
    Under(thread::JoinHandle<Seen>),
    Done(Seen),
}

/// What goes by the wall's clock is played beside the rest, each on a thread of its own: it mostly sleeps.
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
        Part::Under(thread) => thread.join().expect("nobody panics"),
        Part::Done(seen) => seen,
    };
    half.into_iter().map(|case| case.map(end)).collect()
}

fn write(played: &[Case<Seen>]) -> Result<PathBuf, Box<dyn Error>> {
    // Beside what was built: target/release/deps is where this runs from.
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

/// As a date of HTTP has it, which is at hand.
fn today() -> String {
    httpdate::fmt_http_date(std::time::SystemTime::now())
}
