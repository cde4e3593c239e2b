//! A measured distribution of latencies with a heavy tail.

/// Returns the latency of one server among many, in milliseconds, for a random number above 0 and up to 1.
///
/// 98 of 100 responses arrive within 10 ms, and 999 of 1000 within 125 ms. Of a thousand queries that each need 100
/// responses, one takes about 1.7 s. The distribution is a Pareto distribution with two segments, fitted to the
/// measurements of Dean and Barroso ("The Tail at Scale", CACM 2013).
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
