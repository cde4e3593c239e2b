//! The results of the pairs of runs.

use crate::load::Run;

pub struct Report {
    /// The runs without layers, and with layers.
    pairs: Vec<(Run, Run)>,
    /// With layers, as a share of without.
    pub throughput: Median,
    pub p99: Median,
    /// The added CPU time in µs per request.
    added: Median,
}

impl Report {
    pub fn of(pairs: Vec<(Run, Run)>) -> Self {
        let ratio = |of: fn(&Run) -> f64| {
            Median::of(pairs.iter().map(|(without, with)| of(with) / of(without)))
        };
        Self {
            throughput: ratio(|run| run.per_second),
            p99: ratio(|run| run.p99),
            added: Median::of(pairs.iter().map(|(without, with)| with.cpu - without.cpu)),
            pairs,
        }
    }

    pub fn print(&self, title: &str, name: &str) {
        let Self { pairs, throughput, p99, added } = self;
        println!("\n{title}: medians of {} pairs", pairs.len());
        println!("{:<20}{:>12}{:>12}", "", "without", "with");
        let line = |what: &str, of: fn(&Run) -> f64| {
            let without = Median::of(pairs.iter().map(|(without, _)| of(without)));
            let with = Median::of(pairs.iter().map(|(_, with)| of(with)));
            println!("{what:<20}{:>12.1}{:>12.1}", without.value, with.value);
        };
        line("requests/s", |run| run.per_second);
        line("p50, µs", |run| run.p50);
        line("p99, µs", |run| run.p99);
        line("CPU per request, µs", |run| run.cpu);
        println!("added CPU per request: {:.2} µs, ± {:.2}", added.value, added.error);
        println!(
            "throughput with layers / without: {:.3}, ± {:.3}",
            throughput.value, throughput.error
        );
        println!("p99 with layers / without: {:.3}, ± {:.3}", p99.value, p99.error);
        println!("figure loopback/{name}/added_cpu {:.2} us", added.value);
        println!("figure loopback/{name}/throughput_ratio {:.4} ratio", throughput.value);
        println!("figure loopback/{name}/p99_ratio {:.4} ratio", p99.value);
    }
}

/// A median, and its standard error.
pub struct Median {
    pub value: f64,
    pub error: f64,
}

impl Median {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values[(share * (values.len() - 1) as f64) as usize];
        // The standard deviation of a normal distribution with these quartiles.
        let deviation = (at(0.75) - at(0.25)) / 1.349;
        Self { value: at(0.5), error: 1.253 * deviation / (values.len() as f64).sqrt() }
    }
}
