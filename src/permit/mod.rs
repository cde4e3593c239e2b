//! TODO page

mod anchor;
mod body;
mod free_list;
mod permit;
mod sharded;
mod slot;
mod state_ref;
pub(crate) mod unread;

pub(crate) use self::anchor::Anchor;
pub use self::body::TrackedBody;
pub(crate) use self::free_list::Idle;
pub(crate) use self::sharded::{ShardedArc, ShardedRef};
pub(crate) use self::{
    body::EitherBody,
    slot::{FreeSlots, OwnedSlot, Slot, SlotOwner, SlotRef},
};
pub(crate) use self::{
    body::FromBytes,
    permit::{Measures, Permit, Release, ReleaseAt, Token},
    state_ref::Giver,
};
