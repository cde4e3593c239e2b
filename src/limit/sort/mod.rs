//! Calls that are told apart: exempt ones, partitions with a share each, priorities.
//!
//! ```
//! use axum::{Router, extract::Request, routing::get};
//! use buttress::{ConcurrencyLimitLayer, limit::sort::{Claim, Priority}};
//!
//! const LIVE: u8 = 0;
//! const BATCH: u8 = 1;
//!
//! let limit = ConcurrencyLimitLayer::new(512)
//!     .sorted_by(|request: &Request| {
//!         let priority = Priority::NORMAL.lot_of_trace(request.headers());
//!         match request.uri().path() {
//!             "/livez" | "/metrics" => Claim::exempt(),
//!             path if path.starts_with("/batch") => {
//!                 Claim::from(Priority::SHEDDABLE).partition(BATCH)
//!             }
//!             _ => Claim::from(priority).partition(LIVE),
//!         }
//!     })
//!     .partitions(&[0.7, 0.3])
//!     .shed_by_priority()
//!     .respond();
//! let app: Router = Router::new().route("/search", get(|| async { "…" })).layer(limit);
//! ```
//!
//! Where only a few paths are to be let through in any case:
//!
//! ```
//! use buttress::ConcurrencyLimitLayer;
//!
//! let limit = ConcurrencyLimitLayer::new(512).exempt_paths(["/livez", "/metrics"]).respond();
//! ```
//!
//! # Partitions
//!
//! Each has a share of the limit, whole places, rounded down. There are never more calls in flight than the
//! limit allows:
//!
//! | a call | gets in |
//! |---|---|
//! | of a partition within its share | if any place is free |
//! | of one beyond it, or without a share | if more are free than are owed to others |
//!
//! So what a partition does not use is lent to the others. One that comes back and finds its share lent is
//! owed as many places as it was refused, for a second, and gets the next that become free; of those who wait,
//! who has least of his share goes first.
//!
//! # Priorities
//!
//! With [`shed_by_priority`](SortedLimitLayer::shed_by_priority) there is a priority below which calls are
//! refused, before they could wait. Once a second, or after 2000 calls, it moves: up to where the calls above
//! it are as many as got in, if more than a twentieth of those worth enough found no room; else down, by 2 % at
//! first, twice as much each time. With less than 20 calls there is none. Meanwhile, where the queue is full, a
//! call takes the place of whoever is worth least of its partition, if that is less: of those the one that came last.
//!
//! Partitions and priorities take a lock and read the clock once a call; exempt paths do not.

mod claim;
mod cutoff;
mod layer;
mod shares;

pub use self::{
    claim::{Claim, ExemptPaths, Priority, Sort},
    layer::{Partition, SortedLimit, SortedLimitHandle, SortedLimitLayer},
};
pub(super) use self::{cutoff::Cutoff, layer::Sorted, shares::KEPT, shares::Line, shares::Shares};
