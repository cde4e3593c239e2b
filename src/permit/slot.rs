//! Slots: leaked and reused words by which calls reach the state of their layer without a reference count.
//!
//! # Mechanism
//!
//! A call has to reach the state of its layer until it ends, and it may outlive the layer. A reference count
//! would keep the state alive, but two threads that write one count spend more time on it than on the rest of the call.
//! A [`Slot`] needs no count. It is a leaked allocation, so calls hold `&'static` references to it, with two parts:
//!
//! - The *word* ([`SlotOwner::Word`]) is the part of the state that each call reads or writes. Its layout belongs to
//!   the layer: the published state of a circuit, nothing at all for a timeout.
//! - The *registration* is a lock around a weak reference to the owner (the state of the layer) and the generation of
//!   the slot. A call uses it for the operations that the word does not cover.
//!
//! When the owner has been dropped, the slot returns to a [free list](FreeSlots), and the next owner of this type uses
//! it again. The memory in use is therefore bounded by the maximum number of owners that existed at one time.
//!
//! # Life of a slot
//!
//! 1. [`Slot::allocate`] takes a slot from the free list, or leaks a new one. Only the new owner and late calls can
//!    reach it. The word has the value that the previous owner left in it.
//! 2. The owner initialises the word.
//! 3. [`Slot::register`] stores the weak reference to the owner. An owner that its calls reach by counted references
//!    need not register.
//! 4. Calls use the word, and look up the owner with [`Slot::owner_if`] or [`SlotRef::owner`].
//! 5. [`Slot::unregister`] removes the weak reference and increments the generation.
//! 6. [`Slot::recycle`] puts the slot on the free list.
//!
//! There are two ways to take the last two steps. An [`OwnedSlot`] takes both when it is dropped: then late calls may
//! find the slot with another owner. Or the owner takes step 5 and leaves step 6 to its last call, if the word counts
//! the calls in flight: then there are no late calls.
//!
//! # Late calls
//!
//! A call that outlives the owner must not change the state of the next one. Two checks under the lock of the
//! registration prevent it:
//!
//! - A [`SlotRef`] contains the generation of the slot, and finds an owner only in this generation.
//! - [`Slot::owner_if`] lets the word decide, for words with a generation of their own that also changes with the state
//!   (a token contains that generation instead). Its generations must increase across owners: a new owner continues
//!   above the last generation that it finds in the word.
//!
//! # Invariants
//!
//! - A slot has at most one owner, and it is on the free list at most once. It is recycled by the thread that has
//!   unregistered its owner, or by the last call of that owner.
//! - An owner initialises the word before it registers, and unregisters before the slot is recycled.
//! - The owner is upgraded after the check, so a late call never keeps another owner alive. The last reference to an
//!   owner is dropped without the lock, because the drop locks the registration again.
//!
//! # Memory orderings
//!
//! - The lock of the registration orders the word of step 2 before each lookup that finds the owner of step 3. A lookup
//!   that finds another owner than that of its call therefore also finds the generation of that owner in the word, or a
//!   later one, and not the one of its call.
//! - The lock of the free list orders all accesses of the previous owner before those of the next one. If the last call
//!   recycles the slot, it has to acquire the writes of the other calls first, by a read-modify-write of the word that
//!   is both acquire and release.
//! - Accesses to the word without a lock are ordered by the word itself: see its type.
//!
//! # What a change must preserve
//!
//! - No path from a call to its word may write anything that other calls read, except the word.
//! - The check of a lookup runs under the lock and before the upgrade.
//! - The word is at a fixed offset of the slot and is not behind the lock.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use crate::{
    sealed::Sealed,
    sync::{Mutex, modelled},
};

/// A state that can own a [slot](self).
pub(crate) trait SlotOwner: Sized + Send + Sync + 'static {
    /// The part of the state that calls reach without a lookup. The default is the word of a new slot.
    type Word: Default + Send + Sync;

    /// Returns the free list of the slots of this type.
    fn free_slots() -> &'static FreeSlots<Self>;
}

/// A leaked word with a weak reference to its owner: see the [module](self). Aligned to a cache line, so that an owner
/// that often changes its word does not slow down the calls of others.
#[repr(align(64))]
pub(crate) struct Slot<O: SlotOwner> {
    word: O::Word,
    registration: modelled::Mutex<Registration<O>>,
}

impl<O: SlotOwner> Sealed for Slot<O> {}

struct Registration<O: SlotOwner> {
    /// The number of owners that have unregistered.
    generation: u64,
    /// `None` while the slot is free or its owner has not registered.
    owner: Option<Weak<O>>,
    /// The reference that the free list gets: a permit reaches the slot by a reference of unknown lifetime. Set once.
    this: Option<&'static Slot<O>>,
}

impl<O: SlotOwner> Slot<O> {
    /// Returns a slot that has no owner.
    pub(crate) fn allocate() -> &'static Self {
        // Nothing outlives a loom model, so each model has slots of its own.
        let free = if cfg!(buttress_loom) { None } else { O::free_slots().pop() };
        free.unwrap_or_else(|| {
            let registration = Registration { generation: 0, owner: None, this: None };
            let registration = modelled::Mutex::new(registration);
            let slot: &'static Self =
                Box::leak(Box::new(Self { word: O::Word::default(), registration }));
            slot.registration.lock().this = Some(slot);
            slot
        })
    }

    /// Returns the slot with the lifetime of the process.
    pub(crate) fn leaked(&self) -> &'static Self {
        let leaked = self.registration.lock().this;
        leaked.unwrap_or_else(|| unreachable!("set when the slot is made"))
    }

    /// Registers the owner. Requires that the owner has initialised the word.
    pub(crate) fn register(&self, owner: Weak<O>) {
        self.registration.lock().owner = Some(owner);
    }

    /// Ends the registration, if there is one. No lookup finds the owner after that.
    pub(crate) fn unregister(&self) {
        let mut registration = self.registration.lock();
        registration.generation += 1;
        let owner = registration.owner.take();
        drop(registration);
        drop(owner);
    }

    /// Puts the slot on the free list. Requires that no owner is registered.
    pub(crate) fn recycle(&self) {
        let this = self.registration.lock().this;
        O::free_slots().0.lock().extend(this);
    }

    #[inline]
    pub(crate) fn word(&self) -> &O::Word {
        &self.word
    }

    /// Returns the registered owner, if it still exists and `is_current` is true of the word. Runs `is_current` under
    /// the lock of the registration.
    pub(crate) fn owner_if(&self, is_current: impl FnOnce(&O::Word) -> bool) -> Option<Arc<O>> {
        self.find(|_| is_current(&self.word))
    }

    /// Returns the registered owner, if it still exists.
    #[cfg(feature = "limit")]
    pub(crate) fn owner(&self) -> Option<Arc<O>> {
        self.find(|_| true)
    }

    fn find(&self, is_current: impl FnOnce(&Registration<O>) -> bool) -> Option<Arc<O>> {
        let registration = self.registration.lock();
        let current = is_current(&registration).then_some(&registration.owner);
        let owner = current.and_then(|owner| owner.as_ref()?.upgrade());
        // Before the return: if this is the last reference, its drop locks the registration again.
        drop(registration);
        owner
    }
}

impl<O: SlotOwner<Word: fmt::Debug>> fmt::Debug for Slot<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot").field("word", &self.word).finish_non_exhaustive()
    }
}

// ===== References =====

/// The slot of an owner that contains it. Its drop ends the registration and recycles the slot.
pub(crate) struct OwnedSlot<O: SlotOwner>(&'static Slot<O>);

impl<O: SlotOwner> OwnedSlot<O> {
    pub(crate) fn allocate() -> Self {
        Self(Slot::allocate())
    }

    /// Returns the ownership of a slot that the caller has removed from the free list.
    #[cfg(test)]
    pub(crate) fn of(slot: &'static Slot<O>) -> Self {
        Self(slot)
    }

    /// Returns the slot. The reference may outlive the ownership.
    pub(crate) fn get(&self) -> &'static Slot<O> {
        self.0
    }

    /// Returns a reference by which the owner is found until it is dropped.
    pub(crate) fn reference(&self) -> SlotRef<O> {
        SlotRef { slot: self.0, generation: self.0.registration.lock().generation }
    }
}

impl<O: SlotOwner> std::ops::Deref for OwnedSlot<O> {
    type Target = Slot<O>;

    #[inline]
    fn deref(&self) -> &Slot<O> {
        self.0
    }
}

impl<O: SlotOwner> Drop for OwnedSlot<O> {
    fn drop(&mut self) {
        self.0.unregister();
        self.0.recycle();
    }
}

/// A weak reference to an owner, for calls that rarely use it. It is `Copy`: a clone and a drop of an `Arc` would be
/// two atomic writes per call to a word that all threads share.
pub(crate) struct SlotRef<O: SlotOwner> {
    slot: &'static Slot<O>,
    generation: u64,
}

impl<O: SlotOwner> SlotRef<O> {
    /// Returns the owner, or `None` if it has been dropped. Takes the lock of the registration.
    pub(crate) fn owner(&self) -> Option<Arc<O>> {
        self.slot.find(|registration| registration.generation == self.generation)
    }
}

impl<O: SlotOwner> Clone for SlotRef<O> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<O: SlotOwner> Copy for SlotRef<O> {}

impl<O: SlotOwner> fmt::Debug for SlotRef<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SlotRef")
    }
}

// ===== The free list =====

/// The slots of one type of owner that have no owner.
pub(crate) struct FreeSlots<O: SlotOwner>(Mutex<Vec<&'static Slot<O>>>);

impl<O: SlotOwner> FreeSlots<O> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    fn pop(&self) -> Option<&'static Slot<O>> {
        self.0.lock().pop()
    }

    /// Removes this slot from the list. Returns whether it was on the list.
    #[cfg(test)]
    pub(crate) fn remove(&self, wanted: &'static Slot<O>) -> bool {
        let mut list = self.0.lock();
        let at = list.iter().position(|slot| std::ptr::eq(*slot, wanted));
        at.map(|at| list.remove(at)).is_some()
    }
}

impl<O: SlotOwner> fmt::Debug for FreeSlots<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FreeSlots").field(&self.0.lock().len()).finish()
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;

    struct Numbered {
        number: u32,
        slot: OwnedSlot<Self>,
    }

    static FREE: FreeSlots<Numbered> = FreeSlots::new();

    impl SlotOwner for Numbered {
        type Word = ();

        fn free_slots() -> &'static FreeSlots<Self> {
            &FREE
        }
    }

    fn numbered(number: u32) -> Arc<Numbered> {
        let owner = Arc::new(Numbered { number, slot: OwnedSlot::allocate() });
        owner.slot.register(Arc::downgrade(&owner));
        owner
    }

    #[test]
    fn reference_finds_its_owner_and_never_the_next_owner_of_the_slot() {
        let one = numbered(1);
        let reference = one.slot.reference();
        assert_eq!(reference.owner().map(|owner| owner.number), Some(1));
        drop(one);
        assert!(reference.owner().is_none());
        // One of these owners may use the slot of the first one. Other tests use slots, too.
        let more: Vec<_> = (2..20).map(numbered).collect();
        assert!(reference.owner().is_none());
        assert!(more.iter().all(|owner| owner.slot.reference().owner().is_some()));
    }

    #[test]
    fn last_reference_to_an_owner_can_come_from_a_lookup() {
        let one = numbered(1);
        let reference = one.slot.reference();
        let found = reference.owner();
        drop(one);
        // Dropped outside of the lock of the registration, so this does not deadlock.
        drop(found);
        assert!(reference.owner().is_none());
    }
}
