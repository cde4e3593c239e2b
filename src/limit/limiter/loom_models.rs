//! Loom models of acquiring, releasing and passing on permits: they check every interleaving.

use std::{
    sync::{Arc, atomic::AtomicUsize},
    task::Wake,
};

use loom::{sync::Arc as Both, thread};

use super::super::partition::CallClass;
use super::*;

/// Counts how often the waker was woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct QueuedWaiter {
    entry: EntryId,
    wakes: Arc<Wakes>,
}

impl QueuedWaiter {
    fn new(limiter: &Limiter, entry: EntryId) -> Self {
        let waiter = Self { entry, wakes: Arc::default() };
        let _ = waiter.has_permit(limiter);
        waiter
    }

    fn has_permit(&self, limiter: &Limiter) -> bool {
        let waker = Waker::from(self.wakes.clone());
        limiter.poll_position(self.entry, true, &Context::from_waker(&waker)) == Position::Granted
    }

    fn wakes(&self) -> usize {
        self.wakes.0.load(Ordering::Relaxed)
    }
}

/// Returns a limiter whose only permit is in use, with `N` calls in the queue.
fn full<const N: usize>() -> (Both<Limiter>, [QueuedWaiter; N]) {
    let limiter = Both::new(Limiter::new(1, None));
    limiter.set_queue(8, Duration::from_secs(1));
    assert!(limiter.try_acquire().is_some());
    let waiters = std::array::from_fn(|_| match limiter.join_queue() {
        Ok(Acquisition::Queued(entry)) => QueuedWaiter::new(&limiter, entry),
        _ => panic!("does not wait"),
    });
    (limiter, waiters)
}

/// A permit is released while a new call arrives: the call is admitted at once, or it waits and is woken.
#[test]
fn loom_new_call_never_waits_for_free_permit() {
    loom::model(|| {
        let (limiter, []) = full();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.release_permit());
        let waits = match limiter.try_acquire() {
            Some(_) => None,
            None => match limiter.join_queue() {
                Ok(Acquisition::Admitted(_)) => None,
                Ok(Acquisition::Queued(entry)) => Some(QueuedWaiter::new(&limiter, entry)),
                Err(kind) => panic!("{kind:?}"),
            },
        };
        leaver.join().unwrap();
        if let Some(waiter) = waits {
            assert!(waiter.has_permit(&limiter));
            assert!(waiter.wakes() <= 1);
        }
        assert_eq!((limiter.in_flight(), limiter.waiting()), (1, 0));
    });
}

/// Two calls compete for one permit: exactly one acquires it, and it is free again after its release.
#[test]
fn loom_permit_is_acquired_once() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(1, None));
        let other = limiter.clone();
        let other = thread::spawn(move || other.try_acquire());
        let (mine, theirs) = (limiter.try_acquire(), other.join().unwrap());
        assert_eq!(u32::from(mine.is_some()) + u32::from(theirs.is_some()), 1);
        assert_eq!(limiter.in_flight(), 1);
        limiter.release_permit();
        assert!(limiter.try_acquire().is_some());
    });
}

/// There are never more calls at once than permits: no call is rejected, whatever other calls do meanwhile.
#[test]
fn loom_calls_within_limit_are_never_rejected() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(2, None));
        let other = limiter.clone();
        let other = thread::spawn(move || {
            for _ in 0..2 {
                assert!(other.try_acquire().is_some());
                other.release_permit();
            }
        });
        assert!(limiter.try_acquire().is_some());
        limiter.release_permit();
        other.join().unwrap();
        assert_eq!(limiter.in_flight(), 0);
    });
}

/// The first queue entry is dropped while it receives a permit: the permit passes to the next entry.
#[test]
fn loom_permit_of_dropped_entry_passes_to_next() {
    loom::model(|| {
        let (limiter, [gone, stays]) = full();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.release_permit());
        limiter.leave_queue(gone.entry);
        leaver.join().unwrap();
        assert!(stays.has_permit(&limiter));
        assert_eq!((stays.wakes(), gone.wakes() <= 1), (1, true));
        assert_eq!((limiter.in_flight(), limiter.waiting()), (1, 0));
    });
}

/// The limit is raised while a permit is released: each of the two permits goes to one waiting call.
#[test]
fn loom_raised_limit_and_release_admit_two() {
    loom::model(|| {
        let (limiter, waiters) = full::<3>();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.release_permit());
        limiter.set_limit(2);
        leaver.join().unwrap();
        let permits = waiters.iter().map(|waiter| waiter.has_permit(&limiter));
        assert_eq!(permits.collect::<Vec<_>>(), [true, true, false]);
        assert!(waiters.iter().all(|waiter| waiter.wakes() <= 1));
        assert_eq!((limiter.in_flight(), limiter.waiting()), (2, 1));
    });
}

/// The same as the first model with partitions, while the limit is lowered.
#[test]
fn loom_new_call_of_partition_never_waits_for_free_permit() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(2, None));
        limiter.set_queue(8, Duration::from_secs(1));
        limiter.set_shares(&[0.5]);
        let class = CallClass::default().partition(0);
        let Ok(Acquisition::Admitted(first)) = limiter.acquire(class) else { panic!("has room") };
        assert!(matches!(limiter.acquire(CallClass::default()), Ok(Acquisition::Admitted(_))));
        let other = limiter.clone();
        let other = thread::spawn(move || {
            other.release(first);
            other.set_limit(1);
        });
        let waits = match limiter.acquire(class) {
            Ok(Acquisition::Admitted(token)) => {
                limiter.release(token);
                None
            }
            Ok(Acquisition::Queued(entry)) => Some(QueuedWaiter::new(&limiter, entry)),
            Err(kind) => panic!("{kind:?}"),
        };
        other.join().unwrap();
        limiter.release(Token::default());
        if let Some(waiter) = waits {
            assert!(waiter.has_permit(&limiter));
            assert!(waiter.wakes() <= 1);
            limiter.leave_queue(waiter.entry);
        }
        assert_eq!((limiter.in_flight(), limiter.waiting()), (0, 0));
        assert_eq!(limiter.partitions()[0].1, 0);
    });
}

/// The last calls end while the limit is abandoned: exactly one thread recycles the slot.
#[test]
fn loom_abandoned_word_is_recycled_once() {
    loom::model(|| {
        let word = Both::new(LimitWord::default());
        let calls = [word.try_acquire(|| 2), word.try_acquire(|| 2)];
        assert_eq!(calls, [Some(1), Some(2)]);
        let releases = calls.map(|_| {
            let word = word.clone();
            thread::spawn(move || word.release() == AfterRelease::Recycle)
        });
        let mut recycled = u32::from(word.abandon());
        for release in releases {
            recycled += u32::from(release.join().expect("no panic"));
        }
        assert_eq!(recycled, 1);
    });
}

/// A call that holds no reference to the limiter ends while the limiter is dropped with a waiting call: the call finds
/// the limiter and passes its permit on, or the limiter is gone.
#[test]
fn loom_release_may_meet_the_drop_of_the_limiter() {
    loom::model(|| {
        let limiter = Arc::new(Limiter::new(1, None));
        let slot = limiter.slot();
        slot.register(Arc::downgrade(&limiter));
        limiter.set_queue(8, Duration::from_secs(1));
        assert!(limiter.try_acquire().is_some());
        let Ok(Acquisition::Queued(entry)) = limiter.join_queue() else { panic!("does not wait") };
        let release = thread::spawn(move || Limiter::release_in(slot));
        limiter.leave_queue(entry);
        drop(limiter);
        release.join().expect("no panic");
        assert!(slot.owner().is_none());
        assert_eq!(
            (slot.word().counts().in_flight(), slot.word().counts().has_room(1)),
            (0, false)
        );
    });
}
