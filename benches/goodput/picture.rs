//! Line charts as SVG.

use std::fmt::{self, Write};

#[derive(Clone, Debug)]
pub struct Chart {
    pub title: &'static str,
    pub subtitle: String,
    pub x: &'static str,
    /// The maximum of the vertical axis. Greater values are drawn at the edge.
    pub most: f64,
}

const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 880.0;
const TOP: f64 = 100.0;
const BOTTOM: f64 = 340.0;

/// Returns the color of a candidate, which is the same in every picture.
fn color(who: &str) -> &'static str {
    match who {
        "buttress" => "#1864ab",
        "none" => "#adb5bd",
        "naive" => "#495057",
        "tower" => "#d9480f",
        "tower-resilience" => "#2b8a3e",
        "failsafe" => "#862e9c",
        "recloser" => "#a61e4d",
        "little-loadshedder" => "#5c940d",
        _ => "#4dabf7",
    }
}

/// Returns a round step for an axis of this length: at most ten steps fit.
fn step(length: f64) -> f64 {
    let rough = length / 10.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|one| one * power)
        .find(|one| *one >= rough)
        .unwrap_or(10.0 * power)
}

/// The name and the points of a candidate.
pub type Line<'a> = (&'a str, &'a [(f64, f64)]);

/// Draws charts of the same candidates, one below the other.
pub fn draw(charts: &[(&Chart, Vec<Line<'_>>)]) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut svg, charts);
    svg
}

fn write(svg: &mut String, charts: &[(&Chart, Vec<Line<'_>>)]) -> fmt::Result {
    const EACH: f64 = BOTTOM + 50.0;
    let height = EACH * charts.len() as f64;
    writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="system-ui, 'DejaVu Sans', sans-serif" font-size="12" fill="#212529">
<rect width="{WIDTH}" height="{height}" fill="white"/>"##
    )?;
    for (nth, (chart, lines)) in charts.iter().enumerate() {
        writeln!(svg, r#"<g transform="translate(0 {})">"#, EACH * nth as f64)?;
        panel(svg, chart, lines)?;
        writeln!(svg, "</g>")?;
    }
    writeln!(svg, "</svg>")
}

fn panel(svg: &mut String, chart: &Chart, lines: &[Line<'_>]) -> fmt::Result {
    writeln!(
        svg,
        r#"<text x="{LEFT}" y="28" font-size="18" font-weight="600">{}</text><text x="{LEFT}" y="48">{}</text>"#,
        chart.title, chart.subtitle
    )?;
    let mut x = LEFT;
    for (name, _) in lines {
        writeln!(
            svg,
            r#"<path d="M{x:.0} 70h20" stroke="{}" stroke-width="3"/><text x="{:.0}" y="74">{name}</text>"#,
            color(name),
            x + 26.0
        )?;
        x += 44.0 + 7.0 * name.len() as f64;
    }
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * (value.clamp(0.0, chart.most) / chart.most);
    for part in 0..=4 {
        let value = chart.most * f64::from(part) / 4.0;
        writeln!(
            svg,
            r##"<path d="M{LEFT} {at:.1}H{RIGHT}" stroke="#dee2e6"/><text x="{}" y="{:.1}" text-anchor="end">{}</text>"##,
            LEFT - 8.0,
            y(value) + 4.0,
            (value * 100.0).round() / 100.0,
            at = y(value)
        )?;
    }
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let from = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let to = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    if to <= from {
        return Ok(());
    }
    let x = |at: f64| LEFT + (RIGHT - LEFT) * (at - from) / (to - from);
    let step = step(to - from);
    let first = (from / step).ceil() as i64;
    for at in (first..).map(|nth| nth as f64 * step).take_while(|at| *at <= to) {
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{}" text-anchor="middle">{}</text>"#,
            x(at),
            BOTTOM + 18.0,
            (at * 100.0).round() / 100.0
        )?;
    }
    writeln!(
        svg,
        r#"<text x="{RIGHT}" y="{}" text-anchor="end">{}</text>"#,
        BOTTOM + 34.0,
        chart.x
    )?;
    // The first candidate is drawn last, above the others.
    for (name, points) in lines.iter().rev() {
        let known = points.iter().filter(|(_, value)| !value.is_nan());
        let points: Vec<_> =
            known.map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value))).collect();
        writeln!(
            svg,
            r#"<polyline fill="none" stroke="{}" stroke-width="2" points="{}"/>"#,
            color(name),
            points.join(" ")
        )?;
    }
    Ok(())
}
