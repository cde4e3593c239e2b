//! Nothing: see the benches.
