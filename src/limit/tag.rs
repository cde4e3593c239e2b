//! The layout of the tag in a [`Token`](crate::permit::Token) of a limit.
//!
//! ```text
//! bit 63        EXEMPT
//! bit 62        SHADOW
//! bit 61        HEALTH_WATCH
//! bit 60        HEALTH_CHECK
//! bits 59..40   READER_SLOT: the slot of a watched body, counted from 1; 0 is none
//! bits 39..32   the PartitionIndex; 0 is the calls without a share
//! bits 31..0    the number of calls in flight at the admission, for the algorithm of an adaptive limit; else 0
//! ```
//!
//! A call of a fixed limit without any of these has the tag 0, so that its release tests a single value.

use super::partition::PartitionIndex;

/// The bits that are not for the algorithm.
pub(super) const MARKS: u64 = !0 << PARTITION_SHIFT;
/// A call that needs no permit.
pub(super) const EXEMPT: u64 = 1 << 63;
/// A call that was admitted in shadow mode instead of being rejected. It has no permit.
pub(super) const SHADOW: u64 = 1 << 62;
/// An exempt `Watch` stream of `grpc.health.v1`.
pub(super) const HEALTH_WATCH: u64 = 1 << 61;
/// An exempt `Check` of `grpc.health.v1`.
pub(super) const HEALTH_CHECK: u64 = 1 << 60;
pub(super) const READER_SLOT: u64 = (1 << 60) - (1 << READER_SLOT_SHIFT);
pub(super) const READER_SLOT_SHIFT: u32 = 40;
const PARTITION_SHIFT: u32 = 32;
/// The bits of a call whose release needs the limiter, and not only its word.
pub(super) const NEEDS_LIMITER: u64 = EXEMPT | (PartitionIndex::MAX as u64) << PARTITION_SHIFT;

/// Returns the bits of a partition.
pub(super) fn of_partition(index: PartitionIndex) -> u64 {
    u64::from(index) << PARTITION_SHIFT
}

pub(super) fn partition(tag: u64) -> PartitionIndex {
    (tag >> PARTITION_SHIFT) as PartitionIndex
}
