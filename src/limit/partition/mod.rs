//! A limit that distinguishes calls: exempt calls, partitions with a share of the limit each, and priorities.
//!
//! ```
//! use axum::{Router, extract::Request, routing::get};
//! use buttress::{limit::partition::{CallClass, Priority}, ConcurrencyLimitLayer};
//!
//! const LIVE: u8 = 0;
//! const BATCH: u8 = 1;
//!
//! let limit = ConcurrencyLimitLayer::new(512)
//!     .classify_by(|request: &Request| {
//!         let priority = Priority::NORMAL.with_trace_key(request.headers());
//!         match request.uri().path() {
//!             "/livez" | "/metrics" => CallClass::exempt(),
//!             path if path.starts_with("/batch") => {
//!                 CallClass::from(Priority::SHEDDABLE).partition(BATCH)
//!             }
//!             _ => CallClass::from(priority).partition(LIVE),
//!         }
//!     })
//!     .partitions(&[0.7, 0.3])
//!     .reject_by_priority()
//!     .respond();
//! let app: Router = Router::new().route("/search", get(|| async { "…" })).layer(limit);
//! ```
//!
//! To exempt a few paths from the limit:
//!
//! ```
//! use buttress::ConcurrencyLimitLayer;
//!
//! let limit = ConcurrencyLimitLayer::new(512).exempt_paths(["/livez", "/metrics"]).respond();
//! ```
//!
//! # Partitions
//!
//! Each partition has a share of the limit, in whole permits, rounded down. The calls in flight of all partitions
//! together never exceed the limit:
//!
//! | a call | acquires a permit |
//! |---|---|
//! | of a partition that uses less than its share | if any permit is free |
//! | of another partition, or without a share | if more permits are free than are reserved for other partitions |
//!
//! So the other partitions borrow the part of a share that is not in use. If a call of a partition is rejected although
//! the partition uses less than its share, a permit is reserved for this partition for 1 s: it acquires the next
//! permits that are released, up to the number of such rejections. Of the partitions with waiting calls, the one that
//! uses the smallest part of its share acquires the next permit.
//!
//! # Priorities
//!
//! [`reject_by_priority`](PartitionedLimitLayer::reject_by_priority) maintains a priority threshold: calls whose
//! priority is below it are rejected before they can queue. The threshold is recomputed once per second, or after 2000
//! calls if that is earlier:
//!
//! - If more than a twentieth of the calls above the threshold found no permit, the threshold is set so that the number
//!   of calls above it equals the number of calls that were admitted.
//! - Otherwise it is lowered, so that 2 % more calls than were admitted are above it. The percentage doubles each time
//!   that this case repeats.
//! - With fewer than 20 calls, there is no threshold.
//!
//! Between the recomputations, a call that finds the queue full displaces the queue entry of the lowest priority in its
//! partition, if that priority is lower than its own. Of several entries with this priority it displaces the latest.
//!
//! # Cost
//!
//! With partitions or priorities each call takes a lock and reads the clock once. A call of a
//! partition costs two more atomic operations. An exempt call takes no lock and reads no clock.

mod class;
mod layer;
mod shares;
mod threshold;

pub use self::{
    class::{CallClass, ClassifyCall, ExemptPaths, Priority},
    layer::{
        Partition, PartitionedLimit, PartitionedLimitFuture, PartitionedLimitHandle,
        PartitionedLimitLayer,
    },
};
pub(super) use self::{
    layer::PartitionedPolicy,
    shares::{PartitionIndex, RESERVATION, Shares},
    threshold::PriorityThreshold,
};
