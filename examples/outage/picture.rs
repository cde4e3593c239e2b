//! The run as a picture: SVG, written by hand.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use buttress::{breaker::State, health::ProbeState};

use crate::{
    clients::LIMIT,
    run::{Run, Side},
    script::{self, CALLS_PER_SECOND, PATIENCE, Phase},
    tally::{self, Call},
};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 808.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 976.0;
/// Where the stripes of the phases begin, and where they end.
const TOP: f64 = 92.0;
const BOTTOM: f64 = 772.0;
/// How much time one point of a line stands for.
const BIN: Duration = Duration::from_millis(500);

const BARE: &str = "#d9480f";
const PROTECTED: &str = "#1864ab";
const GOOD: &str = "#69b87b";
const UNSURE: &str = "#f2b632";
const BAD: &str = "#e0533d";
const INK: &str = "#212529";
const FAINT: &str = "#868e96";

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
<text x="{LEFT}" y="52" fill="{FAINT}">{CALLS_PER_SECOND} calls/s at each, whatever becomes of them; callers give up after {} s</text>"#,
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

fn x(at: Duration) -> f64 {
    LEFT + (RIGHT - LEFT) * at.as_secs_f64() / script::length().as_secs_f64()
}

// ===== Panels =====

struct Panel {
    top: f64,
    bottom: f64,
    most: f64,
}

impl Panel {
    fn y(&self, value: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * (value / self.most).min(1.0)
    }

    fn frame(&self, svg: &mut String, title: &str, step: f64, unit: &str) -> fmt::Result {
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

    /// A dashed line across, with its name to the left of this moment.
    fn mark(&self, svg: &mut String, value: f64, name: &str, until: Duration) -> fmt::Result {
        let y = self.y(value);
        writeln!(
            svg,
            r#"<path d="M{LEFT} {y:.1}H{RIGHT}" stroke="{FAINT}" stroke-dasharray="5 4"/><text x="{}" y="{:.1}" text-anchor="end" font-size="11" fill="{FAINT}">{name}</text>"#,
            x(until) - 6.0,
            y - 5.0
        )
    }

    /// A line with gaps where there is no value.
    fn line(
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

fn goodput(svg: &mut String, run: &Run) -> fmt::Result {
    let per_second = |ended: &[Call]| Some(tally::good(ended) as f64 / BIN.as_secs_f64());
    let lines =
        sides(run).map(|(side, color)| (color, binned(side, per_second).collect::<Vec<_>>()));
    let most = lines.iter().flat_map(|(_, points)| points).filter_map(|(_, value)| *value);
    let most = most.fold(CALLS_PER_SECOND, f64::max);
    let panel = Panel { top: 122.0, bottom: 290.0, most: (most / 50.0).ceil() * 50.0 };
    panel.frame(svg, "Good answers per second", 50.0, "/s")?;
    panel.mark(svg, CALLS_PER_SECOND, "calls made", Phase::Refusing.ends())?;
    for (color, points) in lines {
        panel.line(svg, color, points)?;
    }
    Ok(())
}

fn latency(svg: &mut String, run: &Run) -> fmt::Result {
    let panel = Panel { top: 336.0, bottom: 486.0, most: 2.4 };
    panel.frame(svg, "Time to an answer of any kind, p99", 0.5, " s")?;
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
    panel.frame(svg, "Requests that the upstream holds, queued or in work", step, "")?;
    for (index, (_, color)) in sides(run).into_iter().enumerate() {
        let held = run.history.held.iter().map(|(at, held)| (*at, Some(held[index] as f64)));
        panel.line(svg, color, held)?;
    }
    panel.mark(svg, LIMIT as f64, &format!("limit {LIMIT}"), script::length())
}

fn breaker(svg: &mut String, run: &Run) -> fmt::Result {
    let states = [
        (State::Closed, GOOD, "closed"),
        (State::HalfOpen, UNSURE, "half-open"),
        (State::Open, BAD, "open"),
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

/// What state something was in, as a band with its own legend.
fn band<T: PartialEq>(
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
        let begins = (*begins).min(script::length());
        let ends = seen.get(index + 1).map_or(script::length(), |(ends, _)| *ends);
        let color = states.iter().find(|(s, ..)| s == state).map_or(FAINT, |(_, color, _)| color);
        writeln!(
            svg,
            r#"<rect x="{:.1}" y="{top}" width="{:.1}" height="18" fill="{color}"/>"#,
            x(begins),
            x(ends.clamp(begins, script::length())) - x(begins)
        )?;
    }
    Ok(())
}

// ===== What the lines are made of =====

fn sides(run: &Run) -> [(&Side, &'static str); 2] {
    [(&run.bare, BARE), (&run.protected, PROTECTED)]
}

/// One point for the calls that ended within each bin, at the middle of it.
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
