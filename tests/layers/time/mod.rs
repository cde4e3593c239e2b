//! Timeouts and deadlines through their public API, on a paused clock.

mod deadline;
mod fixtures;
mod timeout;
