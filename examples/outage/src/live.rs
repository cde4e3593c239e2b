//! The output during the run: a line every half second.

use std::{fmt, time::Duration};

use buttress::{breaker::CircuitState, health::ProbeState};

use crate::{
    clients::Guards,
    run::Side,
    script::{self, Clock, Phase},
    tally::{self, Call},
};

const STEP: Duration = Duration::from_millis(50);
const STEPS_PER_LINE: u32 = 10;

/// The values that must be sampled during the run.
#[derive(Debug, Default)]
pub struct History {
    /// The states of the circuit, each with the time at which it was first observed.
    pub breaker: Vec<(Duration, CircuitState)>,
    /// The states of the health probe, likewise.
    pub probe: Vec<(Duration, ProbeState)>,
    /// The requests that the two upstreams held.
    pub held: Vec<(Duration, [usize; 2])>,
}

/// Samples and prints until the end of the script.
pub async fn watch(bare: &Side, protected: &Side, guards: &Guards, clock: Clock) -> History {
    let mut history = History::default();
    let mut known = [0, 0];
    for step in 0.. {
        let planned = STEP * step;
        if planned > script::length() {
            break;
        }
        clock.wait_until(planned).await;
        let now = clock.now();
        let (state, health) = (guards.breaker.state(), guards.probe.state());
        note(&mut history.breaker, now, state);
        note(&mut history.probe, now, health);
        history.held.push((now, [bare.meter.held(), protected.meter.held()]));
        if step == 0 {
            println!("{:21} │ {:<27} │ protected", "", "bare");
            println!(
                "{:>6}  {:<13} │ {:>6} {:>6} {:>6} {:>6} │ {:>6} {:>6} {:>6} {:>6}  {:<9} {:<7} {:>7} {:>7}",
                "time",
                "phase",
                "good/s",
                "p50",
                "p99",
                "in fl.",
                "good/s",
                "p50",
                "p99",
                "in fl.",
                "breaker",
                "probe",
                "retries",
                "reject",
            );
        } else if step % STEPS_PER_LINE == 0 {
            // The line describes the last half second, with the phase at its beginning.
            let phase = Phase::at(planned.saturating_sub(STEP));
            println!(
                "{:>5.1}s  {:<13} │ {} │ {}  {:<9} {:<7} {:>7} {:>7}",
                planned.as_secs_f64(),
                phase.name(),
                half_second(bare, &mut known[0]),
                half_second(protected, &mut known[1]),
                state.as_str(),
                health.as_str(),
                guards.retries(),
                guards.refused(),
            );
        }
    }
    history
}

fn note<T: PartialEq>(seen: &mut Vec<(Duration, T)>, now: Duration, state: T) {
    if seen.last().is_none_or(|(_, last)| *last != state) {
        seen.push((now, state));
    }
}

fn half_second(side: &Side, known: &mut usize) -> String {
    let ended: Vec<Call> = side.tally.since(*known);
    *known += ended.len();
    let per_second = tally::good(&ended) as f64 / (STEP * STEPS_PER_LINE).as_secs_f64();
    format!(
        "{per_second:>6.0} {:>6} {:>6} {:>6}",
        Ms(tally::percentile(&ended, 0.5)).to_string(),
        Ms(tally::percentile(&ended, 0.99)).to_string(),
        side.tally.in_flight(),
    )
}

/// Formats a duration with three significant digits.
pub struct Ms(pub Duration);

impl fmt::Display for Ms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs_f64() {
            s if s >= 1.0 => write!(f, "{s:.2}s"),
            s if s >= 0.001 => write!(f, "{:.0}ms", s * 1000.0),
            _ => f.write_str("<1ms"),
        }
    }
}
