//! Counts instructions, atomic operations and clock reads per call with valgrind's callgrind. Unlike times, the counts
//! have no noise. `objdump` provides the addresses of the atomic instructions: those with a `lock` prefix, and `xchg`
//! with memory, which is atomic without the prefix.

use std::{
    collections::{HashMap, HashSet},
    env, fs,
    process::Command,
};

/// The counts of one call of a candidate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Count {
    pub instructions: f64,
    pub atomics: f64,
    pub clock_reads: f64,
}

/// The number of calls that are counted.
pub const CALLS: u64 = 1000;

/// The function that callgrind observes. The parent process starts a child for each candidate, which calls it once.
#[inline(never)]
pub fn watched(run: &mut dyn FnMut(u64), calls: u64) {
    run(calls);
}

/// Runs this program under callgrind for one candidate.
pub fn count(name: &str, locked: &Locked) -> Result<Count, String> {
    let program = env::current_exe().map_err(|error| error.to_string())?;
    let out = env::temp_dir().join(format!(
        "callgrind.{}.{}",
        std::process::id(),
        name.replace('/', ".")
    ));
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--dump-instr=yes", "--collect-atstart=no", "-q"])
        .arg("--toggle-collect=*overhead*count*watched*")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(&program)
        .args(["--one", name])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    if !status.status.success() {
        return Err(format!("valgrind: {}", String::from_utf8_lossy(&status.stderr)));
    }
    let text = fs::read_to_string(&out).map_err(|error| error.to_string())?;
    let _ = fs::remove_file(&out);
    Ok(parse(&text, locked))
}

/// The addresses of the atomic instructions of this program, as linked.
pub struct Locked {
    at: HashSet<u64>,
    /// The address of [`watched`].
    watched: u64,
}

impl Locked {
    pub fn read() -> Result<Self, String> {
        let program = env::current_exe().map_err(|error| error.to_string())?;
        let output = Command::new("objdump")
            .args(["-d", "--no-show-raw-insn", "-C"])
            .arg(&program)
            .output()
            .map_err(|error| format!("objdump: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let (mut at, mut watched) = (HashSet::new(), None);
        for line in text.lines() {
            if line.ends_with(">:") && line.contains("count::watched") {
                watched = u64::from_str_radix(line.split(' ').next().unwrap_or_default(), 16).ok();
            }
            let Some((address, code)) = line.trim_start().split_once(":\t") else { continue };
            let memory_swap = code.starts_with("xchg") && code.contains('(');
            if code.starts_with("lock ") || memory_swap {
                at.extend(u64::from_str_radix(address, 16).ok());
            }
        }
        let watched = watched.ok_or("objdump: the watched function was not found")?;
        Ok(Self { at, watched })
    }
}

/// Parses the output of callgrind: `fn=`, `calls=` and lines of `0xaddress line cost`.
fn parse(text: &str, locked: &Locked) -> Count {
    let mut names: HashMap<String, String> = HashMap::new();
    let mut name_of = |spec: &str| -> String {
        match spec.split_once(' ') {
            Some((id, name)) => {
                names.insert(id.to_owned(), name.to_owned());
                name.to_owned()
            }
            None => names.get(spec).cloned().unwrap_or_else(|| spec.to_owned()),
        }
    };
    let mut function = String::new();
    // Each object has its own addresses. Those of libc are excluded.
    let (mut object, mut ours) = ("", "");
    let mut costs: Vec<(&str, u64, u64)> = Vec::new();
    let (mut first_watched, mut entry, mut after_calls) = (None::<u64>, None::<(u64, u64)>, false);
    let mut address = 0u64;
    for line in text.lines() {
        if let Some(spec) = line.strip_prefix("ob=") {
            object = spec.split(' ').next().unwrap_or(spec);
        } else if let Some(spec) = line.strip_prefix("fn=") {
            function = name_of(spec);
        } else if let Some(spec) = line.strip_prefix("cfn=") {
            // The call stores the name for later lines that contain only the id.
            name_of(spec);
        } else if line.starts_with("calls=") {
            after_calls = true;
        } else if line.starts_with("0x")
            || line.starts_with('+')
            || line.starts_with('-')
            || line.starts_with('*')
        {
            let mut parts = line.split(' ');
            let spot = parts.next().unwrap_or_default();
            address = match spot.split_at(1) {
                ("+", by) => address.wrapping_add(hex(by)),
                ("-", by) => address.wrapping_sub(hex(by)),
                ("*", _) => address,
                _ => hex(spot),
            };
            let cost = parts.nth(1).and_then(|cost| cost.parse().ok()).unwrap_or(0);
            // The line after `calls=` is the cost of the callee, which its own lines contain, too.
            if !std::mem::take(&mut after_calls) {
                costs.push((object, address, cost));
                // The lowest address of the function is its entry, which runs once per call of it.
                if function.starts_with("clock_gettime") {
                    entry = entry.filter(|(at, _)| *at < address).or(Some((address, cost)));
                }
                if function.contains("count::watched") {
                    ours = object;
                    first_watched = Some(first_watched.map_or(address, |least| least.min(address)));
                }
            }
        }
    }
    // The load address of the program differs from the linked address.
    let moved = first_watched.unwrap_or(locked.watched).wrapping_sub(locked.watched);
    let per_call = |sum: u64| sum as f64 / CALLS as f64;
    let atomics: u64 = costs
        .iter()
        .filter(|(object, address, _)| {
            *object == ours && locked.at.contains(&address.wrapping_sub(moved))
        })
        .map(|(.., cost)| cost)
        .sum();
    Count {
        instructions: per_call(costs.iter().map(|(.., cost)| cost).sum()),
        atomics: per_call(atomics),
        clock_reads: per_call(entry.map_or(0, |(_, cost)| cost)),
    }
}

fn hex(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap_or(0),
        None => text.parse().unwrap_or(0),
    }
}
