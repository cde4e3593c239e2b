//! The timeout layer, phase by phase.

mod body_rate;
mod contract;
mod forms;
mod model;
mod phases;
mod response_total;
mod settings;
mod stacks;
mod streams;
