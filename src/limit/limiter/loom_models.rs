//! Loom models of acquiring, releasing and passing on permits: they check every interleaving.

use std::{sync::atomic::AtomicUsize, task::Wake};

use loom::{sync::Arc as Both, thread};

use super::super::partition::CallClass;
use super::*;

/// Counts how often the waker was woken.
#[derive(Default)]
struct Told(AtomicUsize);

impl Wake for Told {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Waiter {
    place: Place,
    told: Arc<Told>,
}

impl Waiter {
    fn new(limiter: &Limiter, place: Place) -> Self {
        let waiter = Self { place, told: Arc::default() };
        let _ = waiter.has_turn(limiter);
        waiter
    }

    fn has_turn(&self, limiter: &Limiter) -> bool {
        let waker = Waker::from(self.told.clone());
        limiter.look(self.place, true, &Context::from_waker(&waker)) == Turn::Come
    }

    fn told(&self) -> usize {
        self.told.0.load(Ordering::Relaxed)
    }
}

/// Returns a limiter whose only permit is in use, with `N` calls in the queue.
fn full<const N: usize>() -> (Both<Limiter>, [Waiter; N]) {
    let limiter = Both::new(Limiter::new(1, None));
    limiter.set_queue(8, Duration::from_secs(1));
    assert!(limiter.enter().is_some());
    let waiters = std::array::from_fn(|_| match limiter.join() {
        Ok(Entry::Waits(place)) => Waiter::new(&limiter, place),
        _ => panic!("does not wait"),
    });
    (limiter, waiters)
}

/// A permit is released while a new call arrives: the call is admitted at once, or it waits and is woken.
#[test]
fn loom_a_newcomer_never_waits_for_a_place_that_is_free() {
    loom::model(|| {
        let (limiter, []) = full();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.exit());
        let waits = match limiter.enter() {
            Some(_) => None,
            None => match limiter.join() {
                Ok(Entry::In(_)) => None,
                Ok(Entry::Waits(place)) => Some(Waiter::new(&limiter, place)),
                Err(kind) => panic!("{kind:?}"),
            },
        };
        leaver.join().unwrap();
        if let Some(waiter) = waits {
            assert!(waiter.has_turn(&limiter));
            assert!(waiter.told() <= 1);
        }
        assert_eq!((limiter.in_flight(), limiter.waiting()), (1, 0));
    });
}

/// Two calls compete for one permit: exactly one acquires it, and it is free again after its release.
#[test]
fn loom_a_place_is_never_given_twice() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(1, None));
        let other = limiter.clone();
        let other = thread::spawn(move || other.enter());
        let (mine, theirs) = (limiter.enter(), other.join().unwrap());
        assert_eq!(u32::from(mine.is_some()) + u32::from(theirs.is_some()), 1);
        assert_eq!(limiter.in_flight(), 1);
        limiter.exit();
        assert!(limiter.enter().is_some());
    });
}

/// There are never more calls at once than permits: no call is rejected, whatever other calls do meanwhile.
#[test]
fn loom_who_is_one_of_few_enough_is_never_refused() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(2, None));
        let other = limiter.clone();
        let other = thread::spawn(move || {
            for _ in 0..2 {
                assert!(other.enter().is_some());
                other.exit();
            }
        });
        assert!(limiter.enter().is_some());
        limiter.exit();
        other.join().unwrap();
        assert_eq!(limiter.in_flight(), 0);
    });
}

/// The first queue entry is dropped while it receives a permit: the permit passes to the next entry.
#[test]
fn loom_a_turn_is_never_lost_with_its_waiter() {
    loom::model(|| {
        let (limiter, [gone, stays]) = full();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.exit());
        limiter.leave(gone.place);
        leaver.join().unwrap();
        assert!(stays.has_turn(&limiter));
        assert_eq!((stays.told(), gone.told() <= 1), (1, true));
        assert_eq!((limiter.in_flight(), limiter.waiting()), (1, 0));
    });
}

/// The limit is raised while a permit is released: each of the two permits goes to one waiting call.
#[test]
fn loom_resizing_and_leaving_let_in_as_many_as_may() {
    loom::model(|| {
        let (limiter, waiters) = full::<3>();
        let leaver = limiter.clone();
        let leaver = thread::spawn(move || leaver.exit());
        limiter.set_limit(2);
        leaver.join().unwrap();
        let turns = waiters.iter().map(|waiter| waiter.has_turn(&limiter));
        assert_eq!(turns.collect::<Vec<_>>(), [true, true, false]);
        assert!(waiters.iter().all(|waiter| waiter.told() <= 1));
        assert_eq!((limiter.in_flight(), limiter.waiting()), (2, 1));
    });
}

/// The same as the first model with partitions, while the limit is lowered.
#[test]
fn loom_a_newcomer_of_a_partition_never_waits_for_a_place_that_is_free() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(2, None));
        limiter.set_queue(8, Duration::from_secs(1));
        limiter.set_shares(&[0.5]);
        let asks = CallClass::default().partition(0);
        let Ok(Entry::In(first)) = limiter.enter_as(asks) else { panic!("has room") };
        assert!(matches!(limiter.enter_as(CallClass::default()), Ok(Entry::In(_))));
        let other = limiter.clone();
        let other = thread::spawn(move || {
            other.end(first);
            other.set_limit(1);
        });
        let waits = match limiter.enter_as(asks) {
            Ok(Entry::In(token)) => {
                limiter.end(token);
                None
            }
            Ok(Entry::Waits(place)) => Some(Waiter::new(&limiter, place)),
            Err(kind) => panic!("{kind:?}"),
        };
        other.join().unwrap();
        limiter.end(Token::default());
        if let Some(waiter) = waits {
            assert!(waiter.has_turn(&limiter));
            assert!(waiter.told() <= 1);
            limiter.leave(waiter.place);
        }
        assert_eq!((limiter.in_flight(), limiter.waiting()), (0, 0));
        assert_eq!(limiter.partitions()[0].1, 0);
    });
}

/// The last calls end while the limit is abandoned: exactly one of the threads finds it idle.
#[test]
fn loom_a_limit_that_is_given_up_is_idle_once() {
    loom::model(|| {
        let limiter = Both::new(Limiter::new(2, None));
        let (call, exempt) = (limiter.enter().unwrap_or_default(), limiter.enter_exempt());
        let ends = [call, exempt].map(|token| {
            let limiter = limiter.clone();
            thread::spawn(move || limiter.end(token))
        });
        limiter.abandon();
        for end in ends {
            end.join().expect("no panic");
        }
        assert_eq!(limiter.uses.load(Ordering::Relaxed), 0);
        assert_eq!(limiter.in_flight(), 0);
    });
}
