//! The parts of the picture: a time axis, panels with lines, bands of states.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use crate::script;

pub const LEFT: f64 = 70.0;
pub const RIGHT: f64 = 976.0;

pub const GOOD: &str = "#69b87b";
pub const UNSURE: &str = "#f2b632";
pub const BAD: &str = "#e0533d";
pub const INK: &str = "#212529";
pub const FAINT: &str = "#868e96";

/// Returns the position of a moment on the time axis.
pub fn x(at: Duration) -> f64 {
    LEFT + (RIGHT - LEFT) * (at.as_secs_f64() / script::length().as_secs_f64()).min(1.0)
}

pub struct Panel {
    pub top: f64,
    pub bottom: f64,
    /// The value at the top. The value at the bottom is zero.
    pub most: f64,
}

impl Panel {
    fn y(&self, value: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * (value / self.most).min(1.0)
    }

    pub fn frame(&self, svg: &mut String, title: &str, step: f64, unit: &str) -> fmt::Result {
        writeln!(
            svg,
            r#"<text x="{}" y="{:.1}" font-weight="600">{title}</text>"#,
            LEFT + 8.0,
            self.top - 8.0
        )?;
        let mut value = 0.0;
        while value <= self.most {
            let y = self.y(value);
            writeln!(
                svg,
                r##"<path d="M{LEFT} {y:.1}H{RIGHT}" stroke="#ced4da" stroke-width="{}"/><text x="{}" y="{:.1}" text-anchor="end" fill="{FAINT}">{value}{unit}</text>"##,
                if value == 0.0 { 1.5 } else { 0.5 },
                LEFT - 8.0,
                y + 4.0
            )?;
            value += step;
        }
        Ok(())
    }

    /// Draws a dashed horizontal line, with its name to the left of this moment.
    pub fn mark(&self, svg: &mut String, value: f64, name: &str, until: Duration) -> fmt::Result {
        let y = self.y(value);
        writeln!(
            svg,
            r#"<path d="M{LEFT} {y:.1}H{RIGHT}" stroke="{FAINT}" stroke-dasharray="5 4"/><text x="{}" y="{:.1}" text-anchor="end" font-size="11" fill="{FAINT}">{name}</text>"#,
            x(until) - 6.0,
            y - 5.0
        )
    }

    /// Draws a line, with gaps where there is no value.
    pub fn line(
        &self,
        svg: &mut String,
        color: &str,
        points: impl IntoIterator<Item = (Duration, Option<f64>)>,
    ) -> fmt::Result {
        let mut path = String::new();
        let mut pen = 'M';
        for (at, value) in points {
            match value {
                Some(value) => {
                    write!(path, "{pen}{:.1} {:.1}", x(at), self.y(value))?;
                    pen = 'L';
                }
                None => pen = 'M',
            }
        }
        writeln!(
            svg,
            r#"<path d="{path}" fill="none" stroke="{color}" stroke-width="2.2" stroke-linejoin="round" stroke-linecap="round"/>"#
        )
    }
}

/// Draws the states over time as a band with a legend.
pub fn band<T: PartialEq>(
    svg: &mut String,
    top: f64,
    title: &str,
    seen: &[(Duration, T)],
    states: &[(T, &str, &str)],
) -> fmt::Result {
    writeln!(
        svg,
        r#"<text x="{}" y="{}" font-weight="600">{title}</text>"#,
        LEFT + 8.0,
        top - 8.0
    )?;
    for (index, (_, color, name)) in states.iter().enumerate() {
        let from = LEFT + 140.0 + 90.0 * index as f64;
        writeln!(
            svg,
            r#"<rect x="{from}" y="{}" width="11" height="11" rx="2" fill="{color}"/><text x="{}" y="{}" font-size="11">{name}</text>"#,
            top - 18.0,
            from + 16.0,
            top - 8.0
        )?;
    }
    for (index, (begins, state)) in seen.iter().enumerate() {
        let ends = seen.get(index + 1).map_or(script::length(), |(ends, _)| *ends);
        let color = states.iter().find(|(s, ..)| s == state).map_or(FAINT, |(_, color, _)| color);
        writeln!(
            svg,
            r#"<rect x="{:.1}" y="{top}" width="{:.1}" height="18" fill="{color}"/>"#,
            x(*begins),
            x(ends) - x(*begins)
        )?;
    }
    Ok(())
}
