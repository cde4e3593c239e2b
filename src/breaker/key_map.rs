//! A bounded map from keys to circuits in which the work under each lock is bounded.
//!
//! # Mechanism
//!
//! The entries are divided among *shards* by the hash of their keys. A shard is a list of at most [`MAX_SHARD_LEN`]
//! entries behind its own lock. No operation holds a lock while it touches the entries of more than one shard, except
//! that a split also locks the empty shard that it fills. Therefore a call that waits for a lock waits for at most
//! [`MAX_SHARD_LEN`] entries, however many there are in total.
//!
//! The map grows by *linear hashing*: it splits one shard into two when the entries exceed [`MEAN_SHARD_LEN`] per
//! shard. Shards are split in the order of their index, so a hash leads to its shard by the number of shards alone (see
//! [`shard_index`]). There is no rehash of the whole map. Shards never merge: an empty shard costs 128 bytes.
//!
//! A new key in a map that is full replaces the least recently used entry that is [idle](Evict::idle_for). The search
//! reads up to [`MAX_SEARCH`] entries, shard by shard, and continues where the previous search ended. It reads all
//! entries of a map that is not larger than that. The age of an entry is an *epoch*: the number of keys that were added
//! before its last use. So a call on a known key reads no clock, and writes only if a key was added since the previous
//! call on that key. Two uses between the same two additions have the same age; of these, the search prefers the
//! circuit that has been idle for longer.
//!
//! # Locks and orderings
//!
//! - A thread holds the lock of at most one shard, except in a split. A split locks the shard with the lower index
//!   first. `splitting` is taken with `try_lock` only, so no thread waits for a split to begin. Therefore there is no
//!   deadlock.
//! - `shards` is stored with `Release` and loaded with `Acquire`: a thread that has loaded a number finds the levels of
//!   all these shards allocated.
//! - The second load of `shards` in [`KeyMap::read_shard`] and [`KeyMap::write_shard`] detects a split: the thread that
//!   split this shard stored the new number before it released the lock that the reader holds now.
//! - `last_use`, `epoch` and `search_at` use `Relaxed`. They only select the entry to evict. The value of `last_use`
//!   that [`remove`] compares is exact, because uses store it under the read lock and `remove` has the write lock.
//! - `len` uses `Relaxed`. It is changed by atomic read-modify-write operations and protects no other data.
//!
//! # User code
//!
//! Keys are a type of the user. `Hash`, `Clone` and `Drop` of a key run without any lock, and so do the creation, the
//! naming and the destruction of a circuit. `Eq` runs under the lock of a shard, only for two keys with the same 64-bit
//! hash, and before the shard is changed: a panic leaves the map intact.
//!
//! # Invariants
//!
//! - An entry is in the shard that [`shard_index`] returns for its hash and the current number of shards. A split moves
//!   entries and publishes the new number while it holds the locks of both shards. A reader computes the index again
//!   after it has locked the shard, and starts again if the index has changed.
//! - [`KeyMap::len`] counts the entries and the reservations for entries that are about to be inserted, and never
//!   exceeds the maximum at the time of the reservation.
//! - An entry is removed only under the write lock of its shard, after `Arc::get_mut` and [`Evict::is_unused`] have
//!   proved that no other thread uses it. Another thread can get a reference only under that lock.
//! - A search identifies the entry that it has found by its address. An address can be reused, so the removal checks
//!   the age and the idle state of the entry again.

use std::{
    collections::hash_map::{DefaultHasher, RandomState},
    hash::{BuildHasher, Hash, Hasher},
    iter, mem,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::time::Instant;

use crate::time::Nanos;

/// The maximum number of entries that an operation touches under one lock.
pub(super) const MAX_SHARD_LEN: usize = 64;

/// The mean number of entries per shard above which the map splits a shard. With hashes that are distributed evenly, it
/// is very unlikely that a shard has four times as many.
const MEAN_SHARD_LEN: usize = 16;

/// The maximum number of entries that a search for an idle entry reads, unless the last shard exceeds it.
const MAX_SEARCH: usize = 1024;

/// The maximum number of searches for one new key. Another thread may use the entry that a search has found.
const MAX_SEARCHES: usize = 3;

/// The number of shards of the first level. Each further level doubles the number of shards.
const FIRST_LEVEL: usize = 16;

/// The number of levels: enough for 34 billion entries.
const LEVELS: usize = 28;

/// A value that can be evicted while it is idle.
pub(super) trait Evict: Clone {
    /// Returns for how long the value has been idle, or `None` if it must not be evicted. Never waits.
    fn idle_for(&self, now: Instant) -> Option<Nanos>;

    /// Returns whether there is no other reference to the value.
    fn is_unused(&mut self) -> bool;
}

/// A key and its value.
pub(super) struct MapEntry<Q, V> {
    pub(super) key: Q,
    pub(super) value: V,
}

/// An entry in a shard, with the fields that a search reads.
struct MapSlot<Q, V> {
    hash: u64,
    /// The epoch of the last use.
    last_use: AtomicU64,
    entry: Arc<MapEntry<Q, V>>,
}

/// The entries of a shard, in no order.
struct MapSlots<Q, V> {
    /// The highest byte of the hash of each slot. A lookup reads these bytes instead of all slots, which are in several
    /// cache lines.
    tags: [u8; MAX_SHARD_LEN],
    list: Vec<MapSlot<Q, V>>,
}

impl<Q, V> MapSlots<Q, V> {
    fn tag(hash: u64) -> u8 {
        (hash >> 56) as u8
    }

    /// Adds a slot. Requires that there are fewer than [`MAX_SHARD_LEN`].
    fn push(&mut self, slot: MapSlot<Q, V>) {
        if let Some(tag) = self.tags.get_mut(self.list.len()) {
            *tag = Self::tag(slot.hash);
            self.list.push(slot);
        }
    }

    fn swap_remove(&mut self, index: usize) -> MapSlot<Q, V> {
        let slot = self.list.swap_remove(index);
        self.tags[index] = self.tags[self.list.len()];
        slot
    }
}

impl<Q: Eq, V> MapSlots<Q, V> {
    #[inline]
    fn find(&self, hash: u64, key: &Q) -> Option<&MapSlot<Q, V>> {
        let tag = Self::tag(hash);
        let mut tagged = self.tags.iter().zip(&self.list).filter(|(other, _)| **other == tag);
        tagged.find_map(|(_, slot)| (slot.hash == hash && slot.entry.key == *key).then_some(slot))
    }
}

/// The lock of a part of the entries, in cache lines of its own.
#[repr(align(64))]
struct MapShard<Q, V>(RwLock<MapSlots<Q, V>>);

impl<Q, V> MapShard<Q, V> {
    fn read(&self) -> RwLockReadGuard<'_, MapSlots<Q, V>> {
        // A panic of a key's `Eq` poisons the lock before the shard is changed.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, MapSlots<Q, V>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Q, V> Default for MapShard<Q, V> {
    fn default() -> Self {
        Self(RwLock::new(MapSlots { tags: [0; MAX_SHARD_LEN], list: Vec::new() }))
    }
}

/// The shards of one level.
type Level<Q, V> = Box<[MapShard<Q, V>]>;

pub(super) struct KeyMap<Q, V> {
    /// Level 0 has the first [`FIRST_LEVEL`] shards, and each further level as many as all levels before it.
    levels: [OnceLock<Level<Q, V>>; LEVELS],
    /// The number of shards in use: 1 or more.
    shards: AtomicUsize,
    /// Locked by the thread that splits a shard. A thread that adds a key does not wait for it.
    splitting: Mutex<()>,
    len: AtomicUsize,
    epoch: AtomicU64,
    /// The index of the shard at which the next search starts.
    search_at: AtomicUsize,
    hasher: RandomState,
    /// The maximum number of entries that were touched under one lock.
    #[cfg(test)]
    max_touched: AtomicUsize,
}

/// The hash of a key, and the number of bytes that the key's `Hash` has written.
#[derive(Clone, Copy)]
pub(super) struct KeyHash {
    hash: u64,
    pub(super) bytes: usize,
}

/// The right to insert one entry.
pub(super) struct Reservation<'a>(&'a AtomicUsize);

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The entry that a search has found. The address is only compared, and the entry is checked again before its removal.
struct Candidate {
    hash: u64,
    last_use: u64,
    idle_for: Nanos,
    address: usize,
}

/// Returns the index of the shard of a hash, for this number of shards (1 or more).
///
/// With `2^k` shards the lowest `k` bits of the hash are the index. Between `2^k` and `2^(k+1)` shards, the first
/// `shards - 2^k` shards have been split, and one more bit decides for their entries.
fn shard_index(hash: u64, shards: usize) -> usize {
    let low = 1_usize << shards.max(1).ilog2();
    let index = hash as usize & (2 * low - 1);
    if index < shards { index } else { index & (low - 1) }
}

/// Returns the index of the shard that was split into this one.
fn parent(index: usize) -> Option<usize> {
    Some(index - (1 << index.checked_ilog2()?))
}

/// Returns the level of a shard, and its index in the level.
fn level(index: usize) -> (usize, usize) {
    if index < FIRST_LEVEL {
        return (0, index);
    }
    let bit = index.ilog2();
    ((bit - FIRST_LEVEL.ilog2()) as usize + 1, index - (1 << bit))
}

fn address<T>(entry: &Arc<T>) -> usize {
    Arc::as_ptr(entry).addr()
}

impl<Q, V> Default for KeyMap<Q, V> {
    fn default() -> Self {
        let map = Self {
            levels: [const { OnceLock::new() }; LEVELS],
            shards: AtomicUsize::new(1),
            splitting: Mutex::new(()),
            len: AtomicUsize::new(0),
            epoch: AtomicU64::new(0),
            search_at: AtomicUsize::new(0),
            hasher: RandomState::new(),
            #[cfg(test)]
            max_touched: AtomicUsize::new(0),
        };
        map.add_level(0);
        map
    }
}

impl<Q, V> KeyMap<Q, V> {
    /// The number of entries, including those that are being inserted.
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Allocates the shards of a level. Returns false if there is no such level.
    fn add_level(&self, level: usize) -> bool {
        let Some(cell) = self.levels.get(level) else { return false };
        let len = if level == 0 { FIRST_LEVEL } else { FIRST_LEVEL << (level - 1) };
        cell.get_or_init(|| (0..len).map(|_| MapShard::default()).collect());
        true
    }

    /// Returns the shard of this index. `None` only beyond the number of shards.
    #[inline]
    fn shard(&self, index: usize) -> Option<&MapShard<Q, V>> {
        let (level, index) = level(index);
        self.levels.get(level)?.get()?.get(index)
    }

    #[inline]
    fn read_shard(&self, hash: u64) -> Option<RwLockReadGuard<'_, MapSlots<Q, V>>> {
        loop {
            let shards = self.shards.load(Ordering::Acquire);
            let index = shard_index(hash, shards);
            let shard = self.shard(index)?.read();
            if index == shard_index(hash, self.shards.load(Ordering::Acquire)) {
                return Some(shard);
            }
        }
    }

    fn write_shard(&self, hash: u64) -> Option<RwLockWriteGuard<'_, MapSlots<Q, V>>> {
        loop {
            let index = shard_index(hash, self.shards.load(Ordering::Acquire));
            let shard = self.shard(index)?.write();
            if index == shard_index(hash, self.shards.load(Ordering::Acquire)) {
                return Some(shard);
            }
        }
    }

    /// Records in tests that the current lock holder touches this many entries.
    #[inline]
    fn touches(&self, entries: usize) {
        #[cfg(test)]
        self.max_touched.fetch_max(entries, Ordering::Relaxed);
        let _ = entries;
    }

    /// Returns the right to insert one entry, unless the map is full.
    pub(super) fn reserve(&self, max_len: usize) -> Option<Reservation<'_>> {
        let one_more = |len| (len < max_len).then(|| len + 1);
        self.len.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        Some(Reservation(&self.len))
    }

    /// Splits the next shard into two if the shards are full on average. Does nothing if another thread splits one.
    fn split(&self) {
        let Ok(_splitting) = self.splitting.try_lock() else { return };
        let shards = self.shards.load(Ordering::Acquire);
        if self.len() / MEAN_SHARD_LEN < shards || !self.add_level(level(shards).0) {
            return;
        }
        let from = parent(shards).and_then(|parent| self.shard(parent));
        let (Some(from), Some(to)) = (from, self.shard(shards)) else { return };
        let (mut from, mut to) = (from.write(), to.write());
        self.touches(from.list.len() + to.list.len());
        let mut index = 0;
        while let Some(slot) = from.list.get(index) {
            if shard_index(slot.hash, shards + 1) == shards {
                to.push(from.swap_remove(index));
            } else {
                index += 1;
            }
        }
        // Published before the locks are released: see the invariants.
        self.shards.store(shards + 1, Ordering::Release);
    }

    /// Returns all entries, in no order. Entries that are added meanwhile may be missing.
    pub(super) fn entries(&self) -> Vec<Arc<MapEntry<Q, V>>> {
        let mut entries = Vec::with_capacity(self.len());
        self.for_each(|entry| entries.push(entry));
        entries
    }

    /// Runs a closure for each entry, without a lock and in no order. Entries that are added meanwhile may be missing.
    /// It has references to the entries of one shard at a time: an entry with a reference cannot be evicted.
    ///
    /// A split during this call moves entries to a shard that is read later. An entry has been returned already if it
    /// was in an ancestor of its shard (a shard that was split into it) when that ancestor was read. So the function
    /// records the number of shards at which it has read each shard.
    pub(super) fn for_each(&self, mut each: impl FnMut(Arc<MapEntry<Q, V>>)) {
        let mut read_at = Vec::new();
        let mut found = Vec::with_capacity(MAX_SHARD_LEN);
        while let Some(shard) = self.shard(read_at.len()) {
            let shard = shard.read();
            let shards = self.shards.load(Ordering::Acquire);
            if read_at.len() >= shards {
                break;
            }
            self.touches(shard.list.len());
            found.extend(shard.list.iter().map(|slot| (slot.hash, slot.entry.clone())));
            drop(shard);
            let index = read_at.len();
            read_at.push(shards);
            for (hash, entry) in found.drain(..) {
                let was_in = |shard: usize| shard_index(hash, read_at[shard]) == shard;
                let mut ancestors = iter::successors(parent(index), |index| parent(*index));
                if !ancestors.any(was_in) {
                    each(entry);
                }
            }
        }
    }
}

impl<Q: Hash, V> KeyMap<Q, V> {
    /// Hashes a key. Stops at `max_bytes`, because a longer key is never in the map.
    #[inline]
    pub(super) fn hash(&self, key: &Q, max_bytes: usize) -> KeyHash {
        let mut hasher = CountingHasher { hasher: self.hasher.build_hasher(), bytes: 0, max_bytes };
        key.hash(&mut hasher);
        KeyHash { hash: hasher.hasher.finish(), bytes: hasher.bytes }
    }
}

impl<Q: Eq, V: Evict> KeyMap<Q, V> {
    /// Returns the value of a key, and records the use.
    #[inline]
    pub(super) fn get(&self, hash: KeyHash, key: &Q) -> Option<V> {
        let shard = self.read_shard(hash.hash)?;
        self.touches(shard.list.len());
        let slot = shard.find(hash.hash, key)?;
        let epoch = self.epoch.load(Ordering::Relaxed);
        if slot.last_use.load(Ordering::Relaxed) != epoch {
            slot.last_use.store(epoch, Ordering::Relaxed);
        }
        Some(slot.entry.value.clone())
    }

    /// Inserts an entry and returns its value. Returns the value that another thread has inserted meanwhile, and `None`
    /// if the shard is full of entries that must not be evicted.
    pub(super) fn insert(
        &self,
        reservation: Reservation<'_>,
        hash: KeyHash,
        key: Q,
        value: V,
        now: Instant,
    ) -> Option<V> {
        let new = Arc::new(MapEntry { key, value });
        // Declared before the guard, so that the evicted entry is dropped without the lock.
        let evicted;
        {
            let mut shard = self.write_shard(hash.hash)?;
            self.touches(shard.list.len());
            if let Some(known) = shard.find(hash.hash, &new.key) {
                return Some(known.entry.value.clone());
            }
            evicted = if shard.list.len() >= MAX_SHARD_LEN {
                let mut oldest = None;
                shard.list.iter().for_each(|slot| slot.compare(&mut oldest, now));
                Some(remove(&mut shard, &oldest?, now)?)
            } else {
                None
            };
            let last_use = AtomicU64::new(self.epoch.fetch_add(1, Ordering::Relaxed));
            shard.push(MapSlot { hash: hash.hash, last_use, entry: new.clone() });
        }
        if evicted.is_none() {
            // The entry keeps its reservation. An insertion that has evicted an entry needs none.
            mem::forget(reservation);
        }
        if self.len() / MEAN_SHARD_LEN >= self.shards.load(Ordering::Relaxed) {
            self.split();
        }
        Some(new.value.clone())
    }

    /// Removes the least recently used entry that is idle, of those that the search reads. The caller drops it.
    pub(super) fn evict(&self, now: Instant) -> Option<Arc<MapEntry<Q, V>>> {
        for _ in 0..MAX_SEARCHES {
            let oldest = self.search(now)?;
            let mut shard = self.write_shard(oldest.hash)?;
            self.touches(shard.list.len());
            let evicted = remove(&mut shard, &oldest, now);
            drop(shard);
            if evicted.is_some() {
                self.len.fetch_sub(1, Ordering::Relaxed);
                return evicted;
            }
        }
        None
    }

    fn search(&self, now: Instant) -> Option<Candidate> {
        let shards = self.shards.load(Ordering::Acquire);
        let (mut oldest, mut read) = (None, 0);
        for _ in 0..shards {
            let index = self.search_at.fetch_add(1, Ordering::Relaxed) % shards;
            let shard = self.shard(index)?.read();
            self.touches(shard.list.len());
            shard.list.iter().for_each(|slot| slot.compare(&mut oldest, now));
            // A read of an empty shard counts as one entry, because it costs time, too.
            read += shard.list.len().max(1);
            if read >= MAX_SEARCH {
                break;
            }
        }
        oldest
    }
}

impl<Q, V: Evict> MapSlot<Q, V> {
    /// Replaces the candidate if this entry is idle and its last use is earlier.
    fn compare(&self, oldest: &mut Option<Candidate>, now: Instant) {
        let last_use = self.last_use.load(Ordering::Relaxed);
        if oldest.as_ref().is_some_and(|oldest| oldest.last_use < last_use) {
            return;
        }
        // An entry that is being read cannot be removed. Another one is nearly as old.
        if Arc::strong_count(&self.entry) > 1 {
            return;
        }
        let Some(idle_for) = self.entry.value.idle_for(now) else { return };
        let is_older =
            |oldest: &Candidate| last_use < oldest.last_use || idle_for > oldest.idle_for;
        if oldest.as_ref().is_none_or(is_older) {
            let (hash, address) = (self.hash, address(&self.entry));
            *oldest = Some(Candidate { hash, last_use, idle_for, address });
        }
    }
}

/// Removes an entry from its shard unless it has been used since the search.
fn remove<Q, V: Evict>(
    shard: &mut MapSlots<Q, V>,
    found: &Candidate,
    now: Instant,
) -> Option<Arc<MapEntry<Q, V>>> {
    let is_found = |slot: &MapSlot<Q, V>| address(&slot.entry) == found.address;
    let index = shard.list.iter().position(is_found)?;
    let slot = shard.list.get_mut(index)?;
    let is_same_age = *slot.last_use.get_mut() == found.last_use;
    let entry = Arc::get_mut(&mut slot.entry)?;
    let can_go = is_same_age && entry.value.is_unused() && entry.value.idle_for(now).is_some();
    can_go.then(|| shard.swap_remove(index).entry)
}

/// Counts the bytes of a key, and ignores those beyond a maximum.
struct CountingHasher {
    hasher: DefaultHasher,
    bytes: usize,
    max_bytes: usize,
}

impl Hasher for CountingHasher {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        self.bytes = self.bytes.saturating_add(bytes.len());
        if self.bytes <= self.max_bytes {
            self.hasher.write(bytes);
        }
    }

    fn finish(&self) -> u64 {
        self.hasher.finish()
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::{collections::BTreeMap, thread, time::Duration};

    use proptest::prelude::*;

    use super::*;

    /// A value that is idle from a given instant.
    #[derive(Clone, Debug)]
    struct Fake(Arc<AtomicU64>, Instant);

    impl Fake {
        fn new(since: Instant) -> Self {
            Self(Arc::default(), since)
        }
    }

    impl Evict for Fake {
        fn idle_for(&self, now: Instant) -> Option<Nanos> {
            let now = now.saturating_duration_since(self.1).as_nanos() as u64;
            now.checked_sub(self.0.load(Ordering::Relaxed))
                .filter(|_| Arc::strong_count(&self.0) == 1)
        }

        fn is_unused(&mut self) -> bool {
            Arc::get_mut(&mut self.0).is_some()
        }
    }

    const MAX_BYTES: usize = 8;

    fn add<V: Evict>(
        map: &KeyMap<u64, V>,
        key: u64,
        value: V,
        max: usize,
        now: Instant,
    ) -> Option<V> {
        let hash = map.hash(&key, MAX_BYTES);
        map.get(hash, &key).or_else(|| map.insert(map.reserve(max)?, hash, key, value, now))
    }

    fn keys<V: Evict>(map: &KeyMap<u64, V>) -> Vec<u64> {
        let mut keys: Vec<_> = map.entries().iter().map(|entry| entry.key).collect();
        keys.sort_unstable();
        keys
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// Uses this key, whose value is busy for this time, and holds the value or not.
        Use(u64, u64, bool),
        Release(u64),
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..60_u64, 0..100_u64, prop::bool::weighted(0.1)).prop_map(|(key, busy, held)| Step::Use(key, busy, held)),
            2 => (0..60_u64).prop_map(Step::Release),
            2 => (0..50_u64).prop_map(Step::Advance),
        ]
    }

    #[derive(Debug)]
    struct Model {
        last_use: usize,
        idle_from: u64,
        held: Option<Fake>,
    }

    proptest! {
        /// Compares the map with a list of all keys. The map is smaller than one search, so the order of evictions is
        /// exact.
        #[test]
        fn evicts_what_a_list_of_all_keys_evicts(steps in prop::collection::vec(step(), 1..400), max in 1..40_usize) {
            let (map, began) = (KeyMap::<u64, Fake>::default(), Instant::now());
            let (mut model, mut time, mut added) = (BTreeMap::<u64, Model>::new(), 0, 0);
            for step in steps {
                let now = began + Duration::from_nanos(time);
                match step {
                    Step::Advance(by) => time += by,
                    Step::Release(key) => {
                        if let Some(known) = model.get_mut(&key) {
                            known.held = None;
                        }
                    }
                    Step::Use(key, busy, held) => {
                        let is_known = model.contains_key(&key);
                        if !is_known && model.len() == max {
                            let rank = |model: &Model| {
                                (model.held.is_none() && time >= model.idle_from)
                                    .then_some((model.last_use, model.idle_from))
                            };
                            let oldest = model.values().filter_map(rank).min();
                            let evicted = map.evict(now).map(|entry| entry.key);
                            prop_assert_eq!(evicted.is_some(), oldest.is_some());
                            if let Some(evicted) = evicted {
                                let evicted = model.remove(&evicted).expect("a known key");
                                prop_assert_eq!(rank(&evicted), oldest);
                            }
                        }
                        let value = add(&map, key, Fake::new(began), max, now);
                        prop_assert_eq!(value.is_some(), is_known || model.len() < max);
                        if let Some(value) = value {
                            added += usize::from(!is_known);
                            // An insertion counts as older than each use after it.
                            let last_use = if is_known { added } else { added - 1 };
                            value.0.store(time + busy, Ordering::Relaxed);
                            let held = held.then_some(value);
                            model.insert(key, Model { last_use, idle_from: time + busy, held });
                        }
                    }
                }
                prop_assert!(map.len() <= max);
                prop_assert_eq!(keys(&map), model.keys().copied().collect::<Vec<_>>());
            }
        }

        #[test]
        fn hash_leads_to_the_same_shard_until_that_shard_is_split(hash in any::<u64>(), shards in 1..5000_usize) {
            let (before, after) = (shard_index(hash, shards), shard_index(hash, shards + 1));
            prop_assert!(before < shards);
            let split = parent(shards).expect("not the first");
            prop_assert!(after == before || before == split && after == shards);
        }
    }

    #[test]
    fn each_shard_has_an_index_in_a_level() {
        let mut expected = (0, 0);
        for index in 0..10_000 {
            assert_eq!(level(index), expected);
            let len = if expected.0 == 0 { FIRST_LEVEL } else { FIRST_LEVEL << (expected.0 - 1) };
            expected = if expected.1 + 1 == len {
                (expected.0 + 1, 0)
            } else {
                (expected.0, expected.1 + 1)
            };
        }
    }

    /// Covers growth, use, listing, eviction and the search of a map that has no idle entry.
    #[test]
    fn no_lock_holder_touches_more_than_64_entries() {
        const MAX: usize = 50_000;
        let (map, now) = (KeyMap::<u64, Fake>::default(), Instant::now());
        for key in 0..200_000 {
            if map.len() == MAX {
                drop(map.evict(now).expect("all entries are idle"));
            }
            assert!(add(&map, key, Fake::new(now), MAX, now).is_some());
        }
        assert_eq!((map.len(), map.entries().len()), (MAX, MAX));
        let held: Vec<_> = map.entries().iter().map(|entry| entry.value.clone()).collect();
        assert!((0..100).all(|_| map.evict(now).is_none()));
        drop(held);
        let touched = map.max_touched.load(Ordering::Relaxed);
        assert!((MEAN_SHARD_LEN..=MAX_SHARD_LEN).contains(&touched), "{touched}");
    }

    /// A search reads a part of a large map, and the next search continues there.
    #[test]
    fn only_idle_entry_of_a_large_map_is_found() {
        const MAX: usize = 20_000;
        let (map, now) = (KeyMap::<u64, Fake>::default(), Instant::now());
        let mut held: Vec<_> = (0..MAX as u64)
            .map(|key| add(&map, key, Fake::new(now), MAX, now).expect("there is room"))
            .collect();
        held.swap_remove(7777);
        let evicted = (0..100).find_map(|_| map.evict(now)).expect("one entry is idle");
        assert_eq!(evicted.key, 7777);
    }

    #[test]
    fn keys_are_found_while_other_threads_split_shards() {
        const KEYS: u64 = 20_000;
        let (map, now) = (KeyMap::<u64, Fake>::default(), Instant::now());
        thread::scope(|scope| {
            for thread in 0..4 {
                let map = &map;
                scope.spawn(move || {
                    for key in (thread..KEYS).step_by(4) {
                        assert!(add(map, key, Fake::new(now), usize::MAX, now).is_some());
                        for known in (0..20).map_while(|back| key.checked_sub(4 * back)) {
                            assert!(map.get(map.hash(&known, MAX_BYTES), &known).is_some());
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..50 {
                    let keys = keys(&map);
                    assert!(keys.windows(2).all(|pair| pair[0] < pair[1]), "no key twice");
                }
            });
        });
        assert_eq!(keys(&map), (0..KEYS).collect::<Vec<_>>());
        assert_eq!(map.len() as u64, KEYS);
    }

    #[test]
    fn cap_holds_while_threads_add_and_evict() {
        const MAX: usize = 100;
        let (map, now) = (KeyMap::<u64, Fake>::default(), Instant::now());
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let map = &map;
                scope.spawn(move || {
                    for n in 0..5000 {
                        let key = (n * 31 + thread * 17) % 500;
                        if add(map, key, Fake::new(now), MAX, now).is_none() {
                            drop(map.evict(now));
                        }
                        assert!(map.len() <= MAX);
                    }
                });
            }
        });
        assert_eq!(map.len(), map.entries().len());
    }

    #[test]
    fn large_key_is_counted_and_hashed_up_to_the_maximum() {
        let map = KeyMap::<String, Fake>::default();
        assert_eq!(map.hash(&"x".repeat(99), 100).bytes, 100);
        let (one, two) = (map.hash(&"x".repeat(100), 100), map.hash(&"y".repeat(60_000), 100));
        assert_eq!((one.bytes, two.bytes), (101, 60_001));
    }
}
