//! Parts that the capped listener and `Lifecycle::serve` share: the handling of failed accepts, the scanners for the
//! end of a request head, and the slot that a connection occupies in a capped listener.

mod accept;
mod scan;
mod slot;
mod timer;

pub(crate) use self::{
    accept::AcceptErrors,
    scan::{FirstHead, Frames, PREFACE},
    slot::Slots,
    timer::LazyTimer,
};
// Part of the public API of the features `listener` and `serve`.
pub use self::slot::Slot;
