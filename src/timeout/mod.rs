//! Timeouts in phases, which never cut a healthy stream.

mod body;
mod exchange;
mod layer;
mod sending;
mod service;
mod settings;
mod stall;
mod watch;

pub use self::{
    body::TimedBody,
    exchange::AsIs,
    layer::TimeoutLayer,
    sending::SendingBody,
    service::{ResponseFuture, Timeout},
    settings::{TimeoutHandle, TimeoutSnapshot, Timeouts},
};
pub use crate::call::Phase;
