//! Limit and latency over time, as SVG.

use std::fmt::{self, Write};

use crate::rig::{Second, quantile};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 880.0;
const PANEL: f64 = 220.0;
const TOP: f64 = 90.0;
const GAP: f64 = 50.0;
const COLORS: [&str; 5] = ["#868e96", "#1864ab", "#d9480f", "#2b8a3e", "#862e9c"];

pub fn draw(runs: &[(&str, Vec<Second>)]) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut svg, runs);
    svg
}

fn write(svg: &mut String, runs: &[(&str, Vec<Second>)]) -> fmt::Result {
    let height = TOP + 2.0 * PANEL + GAP + 40.0;
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="system-ui, 'DejaVu Sans', sans-serif" font-size="12" fill="#212529">
<rect width="{WIDTH}" height="{height}" fill="white"/>
<text x="{LEFT}" y="28" font-size="18" font-weight="600">Adaptive limits over a server of 20, then 10, then 40 workers</text>
<text x="{LEFT}" y="48">10 ms a call, 8000 calls/s offered</text>"##
    )?;
    for (number, (name, _)) in runs.iter().enumerate() {
        let x = LEFT + 150.0 * number as f64;
        writeln!(
            svg,
            r#"<path d="M{x} 68h24" stroke="{}" stroke-width="3"/><text x="{}" y="72">{name}</text>"#,
            COLORS[number % COLORS.len()],
            x + 30.0
        )?;
    }
    panel(svg, runs, TOP, "limit", 120.0, |second| f64::from(second.limit))?;
    panel(svg, runs, TOP + PANEL + GAP, "p99, ms", 100.0, |second| {
        f64::from(quantile(std::slice::from_ref(second), 0.99))
    })?;
    svg.push_str("</svg>\n");
    Ok(())
}

/// Draws a line for each run. Values above `most` are drawn at the edge.
fn panel(
    svg: &mut String,
    runs: &[(&str, Vec<Second>)],
    top: f64,
    title: &str,
    most: f64,
    value: impl Fn(&Second) -> f64,
) -> fmt::Result {
    let bottom = top + PANEL;
    writeln!(svg, r#"<text x="{LEFT}" y="{}" font-weight="600">{title}</text>"#, top - 6.0)?;
    for part in 0..=4 {
        let y = bottom - PANEL * f64::from(part) / 4.0;
        writeln!(
            svg,
            r##"<path d="M{LEFT} {y}H{RIGHT}" stroke="#dee2e6"/><text x="{}" y="{}" text-anchor="end">{:.0}</text>"##,
            LEFT - 8.0,
            y + 4.0,
            most * f64::from(part) / 4.0
        )?;
    }
    for (number, (_, seconds)) in runs.iter().enumerate() {
        let step = (RIGHT - LEFT) / seconds.len() as f64;
        let points: Vec<String> = seconds
            .iter()
            .enumerate()
            .map(|(at, second)| {
                let x = LEFT + step * (at as f64 + 1.0);
                format!("{x:.1},{:.1}", bottom - PANEL * (value(second).min(most) / most))
            })
            .collect();
        writeln!(
            svg,
            r#"<polyline fill="none" stroke="{}" stroke-width="2" points="{}"/>"#,
            COLORS[number % COLORS.len()],
            points.join(" ")
        )?;
    }
    let seconds = runs.first().map_or(0, |(_, seconds)| seconds.len());
    for at in (0..=seconds).step_by(10) {
        let x = LEFT + (RIGHT - LEFT) * at as f64 / seconds.max(1) as f64;
        writeln!(svg, r#"<text x="{x}" y="{}" text-anchor="middle">{at} s</text>"#, bottom + 18.0)?;
    }
    Ok(())
}
