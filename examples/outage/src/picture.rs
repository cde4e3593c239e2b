//! The picture of the run, as SVG.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use buttress::{breaker::CircuitState, health::ProbeState};

use crate::{
    clients::LIMIT,
    panel::{BAD, FAINT, GOOD, INK, LEFT, Panel, UNSURE, band, x},
    run::{Run, Side},
    script::{self, CALLS_PER_SECOND, PATIENCE, Phase},
    tally::{self, Call},
};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 808.0;
/// The vertical bounds of the stripes of the phases.
const TOP: f64 = 92.0;
const BOTTOM: f64 = 772.0;
/// The time that a point of a line represents.
const BIN: Duration = Duration::from_millis(500);

const BARE: &str = "#d9480f";
const PROTECTED: &str = "#1864ab";

pub fn draw(run: &Run) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut svg, run);
    svg
}

fn write(svg: &mut String, run: &Run) -> fmt::Result {
    writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="12" fill="{INK}">
<title>An outage, with a bare client and with a protected one</title>
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>"#
    )?;
    header(svg)?;
    phases(svg)?;
    goodput(svg, run)?;
    latency(svg, run)?;
    held(svg, run)?;
    breaker(svg, run)?;
    probe(svg, run)?;
    seconds(svg)?;
    svg.push_str("</svg>\n");
    Ok(())
}

// ===== Around the panels =====

fn header(svg: &mut String) -> fmt::Result {
    writeln!(
        svg,
        r#"<text x="{LEFT}" y="30" font-size="18" font-weight="600">One outage, two clients</text>
<text x="{LEFT}" y="52" fill="{FAINT}">{CALLS_PER_SECOND} calls/s at each, as an open loop; callers give up after {} s</text>"#,
        PATIENCE.as_secs()
    )?;
    for (x, color, name) in
        [(566.0, BARE, "bare client"), (690.0, PROTECTED, "retry + breaker + limit + health probe")]
    {
        writeln!(
            svg,
            r#"<path d="M{x} 26h24" stroke="{color}" stroke-width="3"/><text x="{}" y="30">{name}</text>"#,
            x + 30.0
        )?;
    }
    Ok(())
}

fn phases(svg: &mut String) -> fmt::Result {
    for phase in Phase::ALL {
        let (from, to) = (x(phase.begins()), x(phase.ends()));
        let fill = match phase {
            Phase::Healthy | Phase::Recovered => "#f4faf5",
            Phase::Slow => "#fff6db",
            Phase::Unavailable => "#ffe9e6",
            Phase::Refusing => "#eceef1",
        };
        writeln!(
            svg,
            r#"<rect x="{from:.1}" y="{}" width="{:.1}" height="{:.1}" fill="{fill}"/>
<text x="{:.1}" y="{}" text-anchor="middle" font-weight="600">{}</text>"#,
            TOP - 22.0,
            to - from,
            BOTTOM - TOP + 22.0,
            (from + to) / 2.0,
            TOP - 7.0,
            phase.name()
        )?;
    }
    Ok(())
}

fn seconds(svg: &mut String) -> fmt::Result {
    for second in (0..=script::length().as_secs()).step_by(2) {
        writeln!(
            svg,
            r#"<text x="{:.1}" y="{}" text-anchor="middle" fill="{FAINT}">{second} s</text>"#,
            x(Duration::from_secs(second)),
            BOTTOM + 20.0
        )?;
    }
    Ok(())
}

// ===== Panels =====

fn goodput(svg: &mut String, run: &Run) -> fmt::Result {
    let per_second = |ended: &[Call]| Some(tally::good(ended) as f64 / BIN.as_secs_f64());
    let lines =
        sides(run).map(|(side, color)| (color, binned(side, per_second).collect::<Vec<_>>()));
    let most = lines.iter().flat_map(|(_, points)| points).filter_map(|(_, value)| *value);
    let most = most.fold(CALLS_PER_SECOND, f64::max);
    let panel = Panel { top: 122.0, bottom: 290.0, most: (most / 50.0).ceil() * 50.0 };
    panel.frame(svg, "Successful responses per second", 50.0, "/s")?;
    panel.mark(svg, CALLS_PER_SECOND, "calls made", Phase::Refusing.ends())?;
    for (color, points) in lines {
        panel.line(svg, color, points)?;
    }
    Ok(())
}

fn latency(svg: &mut String, run: &Run) -> fmt::Result {
    let panel = Panel { top: 336.0, bottom: 486.0, most: 2.4 };
    panel.frame(svg, "Duration of a call with any result, p99", 0.5, " s")?;
    panel.mark(svg, PATIENCE.as_secs_f64(), "callers give up", script::length())?;
    for (side, color) in sides(run) {
        panel.line(
            svg,
            color,
            binned(side, |ended| {
                (!ended.is_empty()).then(|| tally::percentile(ended, 0.99).as_secs_f64())
            }),
        )?;
    }
    Ok(())
}

fn held(svg: &mut String, run: &Run) -> fmt::Result {
    let most = sides(run).map(|(side, _)| side.meter.most_held()).into_iter().max().unwrap_or(0);
    let step = (most as f64 / 4.0 / 20.0).ceil().max(1.0) * 20.0;
    let panel = Panel { top: 532.0, bottom: 662.0, most: step * 4.4 };
    panel.frame(svg, "Requests that the upstream holds, in its queue or in work", step, "")?;
    for (index, (_, color)) in sides(run).into_iter().enumerate() {
        let held = run.history.held.iter().map(|(at, held)| (*at, Some(held[index] as f64)));
        panel.line(svg, color, held)?;
    }
    panel.mark(svg, LIMIT as f64, &format!("limit {LIMIT}"), script::length())
}

fn breaker(svg: &mut String, run: &Run) -> fmt::Result {
    let states = [
        (CircuitState::Closed, GOOD, "closed"),
        (CircuitState::HalfOpen, UNSURE, "half-open"),
        (CircuitState::Open, BAD, "open"),
    ];
    band(svg, 700.0, "Circuit breaker", &run.history.breaker, &states)
}

fn probe(svg: &mut String, run: &Run) -> fmt::Result {
    let states = [
        (ProbeState::Up, GOOD, "up"),
        (ProbeState::Unknown, UNSURE, "unknown"),
        (ProbeState::Down, BAD, "down"),
    ];
    band(svg, 746.0, "Health probe", &run.history.probe, &states)
}

// ===== Data of the lines =====

fn sides(run: &Run) -> [(&Side, &'static str); 2] {
    [(&run.bare, BARE), (&run.protected, PROTECTED)]
}

/// Returns a point for the calls that ended within each bin, at the middle of the bin.
fn binned(
    side: &Side,
    value: impl Fn(&[Call]) -> Option<f64>,
) -> impl Iterator<Item = (Duration, Option<f64>)> {
    let bins = script::length().as_millis().div_ceil(BIN.as_millis()) as u32;
    (0..bins).map(move |bin| {
        let within = BIN * bin..BIN * (bin + 1);
        let ended: Vec<_> =
            side.calls.iter().filter(|call| within.contains(&call.ended)).copied().collect();
        (BIN * bin + BIN / 2, value(&ended))
    })
}
