//! The circuit breaker through its public API, on a paused clock.

mod balancers;
mod basics;
mod edge_cases;
mod fixtures;
mod handle;
mod hostile_input;
mod housekeeping;
mod keys;
mod lifetime;
mod many_keys;
mod model;
mod opening;
mod schedules;
mod vectors;
mod waiting;
