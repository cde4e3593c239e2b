//! A fair semaphore whose limit can change while permits are in use.
//!
//! tokio's semaphore cannot shrink below the permits that are in use. If the limit is lowered, the free permits are
//! therefore forgotten at once, and `owed` records the number of permits in use that are still to be forgotten.
//! Releasing a permit decreases `owed` if it is above zero, and frees the permit otherwise. Freeing a permit wakes a
//! caller, and wakers are user code, so no lock may be held there.
//!
//! `release` reads `owed`, adds a permit, and reads `owed` again. `resize` and `settle` raise `owed`, and then read the
//! number of free permits. On both sides a `SeqCst` fence is between the write and the read, so at least one side
//! observes the write of the other, and corrects the sum. A change must preserve this order. Otherwise a permit stays
//! free beyond the limit.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst, fence},
};

use crate::sync::{Mutex, MutexGuard};
use tokio::sync::Semaphore;

/// The number of permits that means no limit.
pub(super) const NO_LIMIT: usize = Semaphore::MAX_PERMITS / 2;

/// A semaphore that can shrink. Callers get permits first come, first served. A caller that stops waiting passes the
/// permit that it may have been assigned to the next one.
#[derive(Debug)]
pub(super) struct ShrinkableSemaphore {
    permits: Semaphore,
    /// The number of permits in use that are forgotten on release instead of becoming free.
    owed: AtomicUsize,
    /// Serialises the changes of the limit. No waker runs under this lock.
    limit: Mutex<usize>,
}

impl ShrinkableSemaphore {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        let limit = limit.min(NO_LIMIT);
        let (permits, owed) = (Semaphore::new(limit), AtomicUsize::new(0));
        Arc::new(Self { permits, owed, limit: Mutex::new(limit) })
    }

    /// Acquires a permit if one is free. A released permit goes to a caller in the queue first, so this does not
    /// overtake.
    pub(super) fn try_acquire(self: &Arc<Self>) -> Option<SemaphorePermit> {
        self.permits.try_acquire().ok()?.forget();
        Some(SemaphorePermit { semaphore: self.clone(), is_forgotten: false })
    }

    /// Returns whether a permit is free.
    pub(super) fn has_free(&self) -> bool {
        self.permits.available_permits() > 0
    }

    /// Waits for a permit.
    pub(super) async fn acquire(self: &Arc<Self>) -> SemaphorePermit {
        // The semaphore is never closed, so `acquire` does not fail.
        if let Ok(permit) = self.permits.acquire().await {
            permit.forget();
        }
        SemaphorePermit { semaphore: self.clone(), is_forgotten: false }
    }

    /// Releases a permit that was [forgotten](SemaphorePermit::forget).
    pub(super) fn release(&self) {
        if self.reduce_owed(1) == 0 {
            self.add(1);
        }
    }

    /// Decreases `owed` by this number of permits, but not below zero. Returns the decrease.
    fn reduce_owed(&self, permits: usize) -> usize {
        let reduce = |owed: usize| (owed > 0).then(|| owed - owed.min(permits));
        self.owed.fetch_update(SeqCst, SeqCst, reduce).map_or(0, |owed| owed.min(permits))
    }

    /// Frees permits and wakes the callers that get them.
    fn add(&self, permits: usize) {
        self.permits.add_permits(permits);
        fence(SeqCst);
        if self.owed.load(SeqCst) > 0 {
            // The limit was lowered meanwhile.
            self.settle(&self.limit());
        }
    }

    /// Forgets as many free permits as are owed. The guard serialises this with [`resize`](Self::resize).
    fn settle(&self, _limit: &MutexGuard<'_, usize>) {
        while self.reduce_owed(1) == 1 {
            if self.permits.forget_permits(1) == 1 {
                continue;
            }
            // After `owed` was decreased, a released permit may have become free instead of decreasing it.
            self.owed.fetch_add(1, SeqCst);
            fence(SeqCst);
            if self.permits.available_permits() == 0 {
                return;
            }
        }
    }

    fn limit(&self) -> MutexGuard<'_, usize> {
        self.limit.lock()
    }

    /// Changes the limit. A higher limit frees permits at once. A lower limit forgets the free permits at once and the
    /// ones in use on release.
    pub(super) fn resize(&self, limit: usize) {
        let new = limit.min(NO_LIMIT);
        let mut limit = self.limit();
        let before = std::mem::replace(&mut *limit, new);
        if new <= before {
            let fewer = before - new;
            let forgotten = self.permits.forget_permits(fewer);
            self.owed.fetch_add(fewer - forgotten, SeqCst);
            fence(SeqCst);
            if self.permits.available_permits() > 0 {
                self.settle(&limit);
            }
            return;
        }
        let added = new - before - self.reduce_owed(new - before);
        drop(limit);
        if added > 0 {
            self.add(added);
        }
    }
}

/// A permit of a host and a permit of the total.
pub(super) type PermitPair = (SemaphorePermit, SemaphorePermit);

/// A permit, released on drop.
#[derive(Debug)]
pub(super) struct SemaphorePermit {
    semaphore: Arc<ShrinkableSemaphore>,
    is_forgotten: bool,
}

impl SemaphorePermit {
    /// Leaves the release to a later call of [`ShrinkableSemaphore::release`].
    pub(super) fn forget(mut self) {
        self.is_forgotten = true;
    }
}

impl Drop for SemaphorePermit {
    fn drop(&mut self) {
        if !self.is_forgotten {
            self.semaphore.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio_test::{assert_pending, assert_ready, task::spawn};

    use super::*;

    #[test]
    fn lower_limit_applies_as_permits_are_released_and_higher_limit_at_once() {
        let semaphore = ShrinkableSemaphore::new(3);
        let mut taken: Vec<_> = (0..3).map_while(|_| semaphore.try_acquire()).collect();
        semaphore.resize(1);
        taken.pop();
        taken.pop();
        assert!(semaphore.try_acquire().is_none(), "one permit is in use, which is the limit");
        semaphore.resize(2);
        taken.push(semaphore.try_acquire().unwrap());
        assert!(semaphore.try_acquire().is_none());
        drop(taken);
        let taken: Vec<_> = (0..9).map_while(|_| semaphore.try_acquire()).collect();
        assert_eq!(taken.len(), 2);
    }

    #[test]
    fn limit_set_while_permits_are_in_use_counts_them() {
        let semaphore = ShrinkableSemaphore::new(NO_LIMIT);
        let taken: Vec<_> = (0..5).map_while(|_| semaphore.try_acquire()).collect();
        semaphore.resize(3);
        assert!(semaphore.try_acquire().is_none());
        drop(taken);
        assert_eq!((0..9).map_while(|_| semaphore.try_acquire()).collect::<Vec<_>>().len(), 3);
        semaphore.resize(usize::MAX);
        assert!(semaphore.try_acquire().is_some());
    }

    #[test]
    fn dropped_waiter_passes_its_permit_on_and_no_caller_overtakes() {
        let semaphore = ShrinkableSemaphore::new(1);
        let permit = semaphore.try_acquire().unwrap();
        let mut gone = spawn(semaphore.acquire());
        assert_pending!(gone.poll());
        let mut next = spawn(semaphore.acquire());
        assert_pending!(next.poll());
        drop(permit);
        // The permit is assigned to the first caller of the queue, which is dropped without another poll.
        assert!(semaphore.try_acquire().is_none());
        assert_pending!(next.poll());
        drop(gone);
        let permit = assert_ready!(next.poll());
        assert!(semaphore.try_acquire().is_none());
        drop((permit, pin!(next)));
        assert!(semaphore.try_acquire().is_some());
    }

    #[test]
    fn limit_holds_after_it_was_changed_while_permits_were_released() {
        for _ in 0..200 {
            let semaphore = ShrinkableSemaphore::new(8);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for _ in 0..50 {
                            drop((semaphore.try_acquire(), semaphore.try_acquire()));
                        }
                    });
                }
                scope.spawn(|| (0..50).for_each(|nth| semaphore.resize([1, 8, 3, 5][nth % 4])));
            });
            semaphore.resize(2);
            assert_eq!(semaphore.owed.load(SeqCst), 0, "no permit is in use");
            let taken: Vec<_> = (0..9).map_while(|_| semaphore.try_acquire()).collect();
            assert_eq!(taken.len(), 2);
        }
    }

    /// A waker that uses the semaphore.
    struct UsesSemaphore(Arc<ShrinkableSemaphore>);

    impl std::task::Wake for UsesSemaphore {
        fn wake(self: Arc<Self>) {
            self.0.resize(5);
            self.0.resize(2);
            drop(self.0.try_acquire());
            assert!(self.0.owed.load(SeqCst) < 5);
        }
    }

    #[test]
    fn waker_may_use_the_semaphore_that_wakes_it() {
        let (ended, end) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let semaphore = ShrinkableSemaphore::new(1);
            let waker = Arc::new(UsesSemaphore(semaphore.clone())).into();
            let mut cx = std::task::Context::from_waker(&waker);
            for free in [false, true] {
                let permit = semaphore.try_acquire().expect("free");
                let mut queued = pin!(semaphore.acquire());
                assert!(queued.as_mut().poll(&mut cx).is_pending());
                if free {
                    drop(permit);
                } else {
                    semaphore.resize(2);
                    drop(permit);
                }
                assert!(queued.as_mut().poll(&mut cx).is_ready());
                semaphore.resize(1);
            }
            let _ = ended.send(());
        });
        end.recv_timeout(std::time::Duration::from_secs(30)).expect("no deadlock");
    }
}
