//! A heavy tail, as it was measured.

/// Of one server among many, in milliseconds: 98 of 100 answers within 10 ms, 999 of 1000 within 125 ms,
/// and one of a thousand queries that need 100 of them waits for about 1.7 s.
///
/// Fitted to what Dean and Barroso measured ("The Tail at Scale", CACM 2013): a Pareto of two segments.
pub fn latency(random: f64) -> f64 {
    let knee = 10f64.powf(-2.5);
    if random < knee {
        64.0 * (knee / random).powf(1.0 / 1.726)
    } else if random < 0.02 {
        10.0 * (0.02 / random).powf(1.0 / 0.994)
    } else {
        1.0 + 9.0 * (random - 0.02) / 0.98
    }
}
