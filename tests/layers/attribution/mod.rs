//! Which side caused an outcome: a failure counts against the upstream only if the upstream caused it.

mod client_waits;
mod deadlines;
mod fixtures;
mod half_open;
mod uploads;
