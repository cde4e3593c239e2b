//! Layers whose settings change after they are in use, and slots that change their owners.

mod config;
mod drain;
mod forks;
mod limit;
mod live;
mod retry;
mod slots;
