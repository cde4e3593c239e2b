//! The retry layer through its public API, on a paused clock and without sockets.

mod attempt_timeout;
mod bodies;
mod budget;
mod contract;
mod deadline;
mod delays;
mod discard;
mod fixtures;
mod grpc;
mod housekeeping;
mod load;
mod overrides;
mod precedence;
mod state;
mod types;
mod unprocessed;
mod vectors;
mod wire;
