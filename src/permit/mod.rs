//! The right to make one call, and how its release reaches the state of the layer.
//!
//! # Terms
//!
//! - A **permit** (`Permit`) is the right to make one call. It is released exactly once, with the outcome of the call.
//!   The future of the call holds it, then the response body ([`TrackedBody`]).
//! - A **token** (`Token`) is the record of the admission that the permit carries: the generation
//!   with flags of the state that issued it, and the clock that measures the upstream. It is plain data, so a permit
//!   can be type-erased.
//! - A **state** implements `Release`: a circuit, a limit, a registry of calls. It issues tokens, and receives each of
//!   them with an outcome.
//! - A **generation** is a counter that increases with each change of the state, or with each reuse of a slot. The
//!   token contains the generation in which the call was admitted. A release with an older generation changes nothing.
//! - A **state reference** (`StateRef`) is the part of the permit that leads to the state. It is one of the two below.
//!
//! # Two ways to the state
//!
//! A call outlives its service and may outlive its layer, so its permit needs a reference to the state. A reference
//! count would be the largest cost of most calls: two threads that write one cache line delay each other by more than
//! the rest of the call takes. There are two mechanisms:
//!
//! | mechanism | cost per call | for |
//! |---|---|---|
//! | a count: `ShardedArc`, a reference count in **shards** that threads rarely share, or one `Arc` | two atomic writes | calls that need the whole state at their release: probes, calls that change a circuit, adaptive limits, keyed circuits, attempts |
//! | a **slot**: a leaked and reused word (`Slot`) with a weak reference to the state | none | calls whose release needs the word only: calls of a closed circuit, calls of a fixed limit, timed calls |
//!
//! ```text
//!              counted                                  leaked
//!  layer ─▶ ShardedArc ─▶ state ◀──────────────────┐ weak
//!                ▲                                 │
//!  permit ─▶ ShardedRef (one of several counts)    │
//!  permit ───────────────────────────────────────▶ Slot { word, registration }
//! ```
//!
//! The generation makes the leaked mechanism safe: the slot may belong to another layer when a call ends, and the
//! generation in the token, or in the `SlotRef`, does not match that of the new owner.
//!
//! # A call, step by step
//!
//! 1. The policy admits the call and returns a token. For a closed circuit this is one load of the word.
//! 2. The policy makes the permit of the token and a state reference: the slot if the word suffices for the release, a
//!    shard otherwise.
//! 3. The permit records the wait for the upstream and the response head.
//! 4. The permit is released at the head or at the end of the body, as `Release::release_at` states. A
//!    drop releases it at any time.
//! 5. `Release::release` receives the token. A slot either handles it by its word, or looks up the state under its
//!    lock, with the generation.
//!
//! Each file begins with its explanation: `permit` explains the life of a permit, `release` the interface of a state,
//! `sharded` the shards, `slot` the slots and their memory orderings, `state_ref` the two kinds of references, and
//! `body` the end of responses.

mod body;
#[allow(clippy::module_inception)] // The file of the type that the module is named for.
mod permit;
mod release;
mod sharded;
mod slot;
mod state_ref;
pub(crate) mod unread;

pub(crate) use self::{
    body::{DataStream, EitherBody},
    sharded::{ShardedArc, ShardedRef},
    slot::{FreeSlots, OwnedSlot, Slot, SlotOwner, SlotRef},
    state_ref::ShardOrSlot,
};
pub use self::{
    body::{FromBytes, TrackedBody},
    permit::Permit,
    release::{Measures, Release, ReleaseAt, Token},
    state_ref::{DynStateRef, StateRef},
};
