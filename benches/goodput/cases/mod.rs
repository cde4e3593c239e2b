mod adaptive;
mod breaker;
mod hedge;
mod herd;
mod metastable;
mod retry;
mod shedding;

use crate::report::{Case, Play};

/// Returns all cases in the order in which they are printed.
pub fn all(quick: bool) -> Vec<Case<Play>> {
    vec![
        retry::total_failure(quick),
        retry::partial_failure(quick),
        retry::tiers(quick),
        herd::retry_after_herd(quick),
        metastable::metastable(quick),
        breaker::dead_upstream(),
        breaker::half_dead_upstream(),
        breaker::slow_upstream(),
        adaptive::overload(quick),
        adaptive::step(quick),
        shedding::shedding(quick),
        hedge::hedge(quick),
    ]
}
