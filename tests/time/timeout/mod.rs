//! The layer, phase by phase.

mod contract;
mod forms;
mod model;
mod phases;
mod settings;
mod stacks;
mod streams;
