//! The report: a table per case, the figures, and the bounds that this crate must meet.

use std::fmt::Write;

use crate::{picture::Chart, world::Clock};

/// Whether the smaller or the greater of two values is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    Less,
    More,
    /// Neither is better in itself.
    Neither,
}

#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: Better,
    /// The bound that this crate must meet.
    pub must: Option<f64>,
}

pub const fn less(name: &'static str, unit: &'static str) -> Column {
    Column { name, unit, better: Better::Less, must: None }
}

pub const fn more(name: &'static str, unit: &'static str) -> Column {
    Column { name, unit, better: Better::More, must: None }
}

pub const fn plain(name: &'static str, unit: &'static str) -> Column {
    Column { name, unit, better: Better::Neither, must: None }
}

impl Column {
    pub const fn must(mut self, bound: f64) -> Self {
        self.must = Some(bound);
        self
    }

    fn is_better(&self, one: f64, other: f64) -> bool {
        match self.better {
            Better::Less => one < other,
            Better::More => one > other,
            Better::Neither => false,
        }
    }
}

/// The result of a candidate: one value per column (NaN if there is none), and the lines of the charts.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub values: Vec<f64>,
    pub lines: Vec<Vec<(f64, f64)>>,
}

/// The candidate to which the bounds apply. The names of its variants begin with this name.
pub const OURS: &str = "buttress";

/// Runs a candidate.
pub type Play = Box<dyn FnOnce() -> Seen + Send>;

pub struct Row<T> {
    pub who: &'static str,
    pub clock: Clock,
    pub part: T,
}

pub fn row(
    who: &'static str,
    clock: Clock,
    play: impl FnOnce() -> Seen + Send + 'static,
) -> Row<Play> {
    Row { who, clock, part: Box::new(play) }
}

/// A case: before its run (`Case<Play>`) or after it (`Case<Seen>`).
pub struct Case<T> {
    pub name: &'static str,
    pub about: String,
    /// The explanation of the table, for example why a peer is better. May be empty.
    pub note: &'static str,
    pub columns: Vec<Column>,
    pub rows: Vec<Row<T>>,
    /// One chart for each entry of [`Seen::lines`].
    pub charts: Vec<Chart>,
}

impl<T> Case<T> {
    /// Maps the part of each row.
    pub fn map<U>(self, mut turn: impl FnMut(Clock, T) -> U) -> Case<U> {
        let Self { name, about, note, columns, rows, charts } = self;
        let turn = |Row { who, clock, part }| Row { who, clock, part: turn(clock, part) };
        Case { name, about, note, columns, rows: rows.into_iter().map(turn).collect(), charts }
    }
}

impl Case<Seen> {
    /// Returns the name, value and unit of every figure.
    pub fn figures(&self) -> impl Iterator<Item = (String, f64, &'static str)> + '_ {
        self.rows.iter().flat_map(move |Row { who, part: seen, .. }| {
            let known = self.columns.iter().zip(&seen.values).filter(|(_, value)| !value.is_nan());
            known.map(move |(column, value)| {
                let of = if *who == OURS { String::new() } else { format!("@{who}") };
                (format!("goodput/{}/{}{of}", self.name, column.name), *value, column.unit)
            })
        })
    }

    fn ours(&self) -> Option<&Seen> {
        self.rows.iter().find(|row| row.who == OURS).map(|row| &row.part)
    }

    /// Returns the bounds that this crate missed.
    pub fn broken(&self) -> Vec<String> {
        let values = self.ours().map_or(&[][..], |seen| &seen.values);
        let broken = |(column, value): (&Column, &f64)| {
            let must = column.must?;
            let holds = *value == must || column.is_better(*value, must);
            let bound = if column.better == Better::Less { "at most" } else { "at least" };
            (!holds).then(|| {
                format!(
                    "{}/{}: {value:.4}, and must be {bound} {must} {}",
                    self.name, column.name, column.unit
                )
            })
        };
        self.columns.iter().zip(values).filter_map(broken).collect()
    }

    /// Returns the values in which a peer is better than all variants of this crate.
    fn beaten(&self) -> Vec<String> {
        let best = |at: usize, column: &Column| {
            let ours = self.rows.iter().filter(|row| row.who.starts_with(OURS));
            let known = ours.map(|row| row.part.values[at]).filter(|value| !value.is_nan());
            known.reduce(|one, other| if column.is_better(other, one) { other } else { one })
        };
        let mut lines = Vec::new();
        for Row { who, part, .. } in &self.rows {
            if who.starts_with(OURS) || ["naive", "none"].contains(who) {
                continue;
            }
            for (at, (column, theirs)) in self.columns.iter().zip(&part.values).enumerate() {
                let Some(ours) = best(at, column) else { continue };
                // A difference of 1 % or less is not reported.
                if (theirs - ours).abs() > 0.01 * ours.abs() && column.is_better(*theirs, ours) {
                    let (theirs, ours) = (number(*theirs), number(ours));
                    lines.push(format!(
                        "{who}: {} {theirs} {}, ours {ours}",
                        column.name, column.unit
                    ));
                }
            }
        }
        lines
    }

    /// Returns the table as plain text or as Markdown.
    pub fn table(&self, markdown: bool) -> String {
        let mut text = if markdown {
            format!("### {}\n\n{}.\n\n", self.name, self.about)
        } else {
            format!("{}: {}\n\n", self.name, self.about)
        };
        let heads = self.columns.iter().map(|column| match column.unit {
            "" => column.name.to_owned(),
            unit => format!("{}, {unit}", column.name),
        });
        let mut lines = vec![std::iter::once(String::new()).chain(heads).collect::<Vec<_>>()];
        for Row { who, clock, part: seen } in &self.rows {
            let star = if *clock == Clock::Wall { " *" } else { "" };
            let values = seen.values.iter().map(|value| number(*value));
            lines.push(std::iter::once(format!("{who}{star}")).chain(values).collect());
        }
        let width = |at: usize| lines.iter().map(|line| line[at].len()).max().unwrap_or(0);
        let widths: Vec<_> = (0..=self.columns.len()).map(width).collect();
        for (nth, line) in lines.iter().enumerate() {
            let cells = line.iter().zip(&widths).enumerate().map(|(at, (cell, width))| {
                if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            let cells: Vec<_> = cells.collect();
            // Writing to a string cannot fail.
            let _ = if markdown {
                writeln!(text, "| {} |", cells.join(" | "))
            } else {
                writeln!(text, "  {}", cells.join("  "))
            };
            if markdown && nth == 0 {
                let rules = (0..cells.len()).map(|at| if at == 0 { "---" } else { "--:" });
                let _ = writeln!(text, "|{}|", rules.collect::<Vec<_>>().join("|"));
            }
        }
        let beaten = self.beaten();
        if !beaten.is_empty() {
            let _ = writeln!(text, "\n{}Better than ours:", if markdown { "" } else { "  " });
            if markdown {
                text.push('\n');
            }
            for line in beaten {
                let _ = writeln!(text, "{}{line}", if markdown { "- " } else { "    " });
            }
        }
        if markdown && !self.charts.is_empty() {
            let _ = writeln!(text, "\n![{0}](goodput/{0}.svg)", self.name);
        }
        if !self.note.is_empty() {
            let _ = writeln!(text, "\n{}{}", if markdown { "" } else { "  " }, self.note);
        }
        text
    }
}

fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".to_owned(),
        value if value == value.trunc() && value.abs() < 1e9 => format!("{value}"),
        value if value.abs() >= 100.0 => format!("{value:.0}"),
        value if value.abs() >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}

/// Returns all figures as a JSON document.
pub fn json(played: &[Case<Seen>], command: &str, date: &str) -> String {
    let mut text =
        format!("{{\n  \"command\": {command:?},\n  \"date\": {date:?},\n  \"figures\": {{\n");
    let figures: Vec<_> = played.iter().flat_map(Case::figures).collect();
    for (nth, (name, value, unit)) in figures.iter().enumerate() {
        let comma = if nth + 1 == figures.len() { "" } else { "," };
        let _ = writeln!(text, "    {name:?}: {{ \"value\": {value}, \"unit\": {unit:?} }}{comma}");
    }
    text.push_str("  }\n}\n");
    text
}
