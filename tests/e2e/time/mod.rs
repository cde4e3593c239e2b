//! Deadlines and timeouts over real sockets.

mod body_rate;
mod deadline;
mod grpc_deadline;
mod reqwest_timeouts;
mod timeout;
mod unread;
