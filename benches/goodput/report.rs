//! What was found: a table a case, its figures, and whether ours hold what they promise.

use std::fmt::Write;

use crate::{picture::Chart, world::Clock};

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    Less,
    More,
    /// It depends.
    Neither,
}

#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: Better,
    /// What ours must not be worse than.
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

/// What a candidate did: one value a column (NaN: it says nothing), and lines to draw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub values: Vec<f64>,
    pub lines: Vec<Vec<(f64, f64)>>,
}

/// Ours as the bounds are about; its variants and its peers have other names.
pub const OURS: &str = "buttress";

/// What is to be done with a candidate.
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

/// A case: to be played, or played.
pub struct Case<T> {
    pub name: &'static str,
    pub about: String,
    /// Why a peer does better, where that wants a word.
    pub note: &'static str,
    pub columns: Vec<Column>,
    pub rows: Vec<Row<T>>,
    /// One for each of the lines of what is seen.
    pub charts: Vec<Chart>,
}

impl<T> Case<T> {
    /// The same with something else in its rows.
    pub fn map<U>(self, mut turn: impl FnMut(Clock, T) -> U) -> Case<U> {
        let Self { name, about, note, columns, rows, charts } = self;
        let turn = |Row { who, clock, part }| Row { who, clock, part: turn(clock, part) };
        Case { name, about, note, columns, rows: rows.into_iter().map(turn).collect(), charts }
    }
}

impl Case<Seen> {
    /// Name, value and unit of every figure.
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

    /// What ours do not hold.
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

    /// Where a peer does better than any of ours.
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
                // Less than a hundredth is no difference.
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

    /// As text; in Markdown if wanted.
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

/// All figures, as one JSON document.
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
