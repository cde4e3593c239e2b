//! The limit itself: one word for who is in and who waits, and a lock only for those who wait.

use std::{
    fmt,
    sync::{Arc, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    adaptive::Teller,
    queue::{Place, Queue, QueueOrder},
};
use crate::{
    call::{
        Label, LayerKind, Outcome, Rejected, RejectedKind, Token,
        sync::{
            Mutex, MutexGuard,
            atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        },
    },
    event,
};

/// One concurrency limit.
pub struct Limiter {
    /// `waiting << 32 | in flight`. With anybody waiting, nobody gets in but through the queue.
    word: AtomicU64,
    limit: AtomicU32,
    adaptive: Option<Teller>,
    queue: Mutex<Queue>,
    longest_queue: AtomicU32,
    longest_wait_ms: AtomicU64,
    retry_after_ms: AtomicU64,
    to_the_head_only: AtomicBool,
    full: AtomicU64,
    waited_too_long: AtomicU64,
    deadline_passed: AtomicU64,
    label: OnceLock<Arc<Label>>,
}

/// What comes of an attempt to wait.
pub(super) enum Entry {
    /// A place has become free instead.
    In(Token),
    Waits(Place),
}

const ONE_IN: u64 = 1;
const ONE_WAITING: u64 = 1 << 32;

fn in_flight(word: u64) -> u32 {
    word as u32
}

fn waiting(word: u64) -> u32 {
    (word >> 32) as u32
}

impl Limiter {
    pub(super) fn new(limit: u32, adaptive: Option<Teller>) -> Self {
        Self {
            word: AtomicU64::new(0),
            limit: AtomicU32::new(limit),
            adaptive,
            queue: Mutex::new(Queue::default()),
            longest_queue: AtomicU32::new(0),
            longest_wait_ms: AtomicU64::new(0),
            retry_after_ms: AtomicU64::new(1000),
            to_the_head_only: AtomicBool::new(false),
            full: AtomicU64::new(0),
            waited_too_long: AtomicU64::new(0),
            deadline_passed: AtomicU64::new(0),
            label: OnceLock::new(),
        }
    }

    // ===== Settings =====

    #[inline]
    pub(super) fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// A higher limit lets waiters in at once; a lower one takes effect as calls end.
    pub(super) fn set_limit(&self, limit: u32) {
        match &self.adaptive {
            None => self.store(limit),
            Some(adaptive) => adaptive.set_limit(limit, |limit| self.store(limit)),
        }
        self.hand_over();
    }

    fn store(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }

    pub(super) fn adaptive(&self) -> Option<&Teller> {
        self.adaptive.as_ref()
    }

    pub(super) fn set_queue(&self, length: u32, longest_wait: Duration) {
        let ms = u64::try_from(longest_wait.as_millis()).unwrap_or(u64::MAX);
        self.longest_wait_ms.store(ms, Ordering::Relaxed);
        self.longest_queue.store(length, Ordering::Relaxed);
    }

    pub(super) fn set_order(&self, order: QueueOrder) {
        self.lock().set_order(order);
    }

    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_millis(self.longest_wait_ms.load(Ordering::Relaxed))
    }

    pub(super) fn set_retry_after(&self, after: Duration) {
        let ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        self.retry_after_ms.store(ms, Ordering::Relaxed);
    }

    pub(super) fn release_at_head(&self) {
        self.to_the_head_only.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn releases_at_head(&self) -> bool {
        self.to_the_head_only.load(Ordering::Relaxed)
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
    }

    // ===== Looking =====

    pub(super) fn in_flight(&self) -> u32 {
        in_flight(self.word.load(Ordering::Acquire))
    }

    pub(super) fn waiting(&self) -> u32 {
        waiting(self.word.load(Ordering::Acquire))
    }

    /// How many were refused as this kind.
    pub(super) fn refused(&self, kind: RejectedKind) -> u64 {
        self.counter(kind).load(Ordering::Relaxed)
    }

    fn counter(&self, kind: RejectedKind) -> &AtomicU64 {
        match kind {
            RejectedKind::WaitedTooLong => &self.waited_too_long,
            RejectedKind::DeadlinePassed => &self.deadline_passed,
            _ => &self.full,
        }
    }

    // ===== Getting in =====

    /// Whether a call would get in now.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        let word = self.word.load(Ordering::Relaxed);
        waiting(word) == 0 && in_flight(word) < self.limit()
    }

    /// Gets in if there is room and nobody waits.
    #[inline]
    pub(super) fn enter(&self) -> Option<Token> {
        let mut word = self.word.load(Ordering::Relaxed);
        while waiting(word) == 0 && in_flight(word) < self.limit() {
            match self.word.compare_exchange_weak(
                word,
                word + ONE_IN,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(self.begin(in_flight(word) + 1)),
                Err(now) => word = now,
            }
        }
        None
    }

    /// What a call remembers that is let in as one of so many: nothing, where nobody learns from it.
    #[inline]
    pub(super) fn begin(&self, in_flight: u32) -> Token {
        self.adaptive.as_ref().map_or(Token::default(), |adaptive| adaptive.started(in_flight))
    }

    /// Takes a place in the queue, if there is one to wait in.
    pub(super) fn join(&self) -> Result<Entry, RejectedKind> {
        let longest = self.longest_queue.load(Ordering::Relaxed);
        if longest == 0 || self.limit() == 0 {
            return Err(RejectedKind::Full);
        }
        let mut queue = self.lock();
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let room = waiting(word) == 0 && in_flight(word) < self.limit();
            if !room && waiting(word) >= longest {
                return Err(RejectedKind::Full);
            }
            let next = if room { word + ONE_IN } else { word + ONE_WAITING };
            match self.word.compare_exchange_weak(word, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) if room => return Ok(Entry::In(self.begin(in_flight(next)))),
                Ok(_) => return Ok(Entry::Waits(queue.join(Instant::now()))),
                Err(now) => word = now,
            }
        }
    }

    /// Whether it is this place's turn.
    pub(super) fn poll_turn(&self, place: Place, cx: &Context<'_>) -> Poll<()> {
        if self.lock().waits(place, cx.waker()) { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Gives a place up, also if its turn has just come.
    pub(super) fn leave(&self, place: Place) {
        let mut queue = self.lock();
        let waited = queue.leave(place);
        if waited {
            self.word.fetch_sub(ONE_WAITING, Ordering::AcqRel);
        }
        drop(queue);
        if !waited {
            self.exit();
        }
    }

    // ===== Getting out =====

    #[inline]
    pub(super) fn exit(&self) {
        let before = self.word.fetch_sub(ONE_IN, Ordering::AcqRel);
        if waiting(before) > 0 {
            self.hand_over();
        }
    }

    // ===== Learning =====

    /// The head of a call's response is here.
    #[inline]
    pub(super) fn heard_head(&self, token: &mut Token, so_far: Outcome) {
        if let Some(adaptive) = &self.adaptive {
            if adaptive.head(token, so_far, |limit| self.store(limit)) {
                self.hand_over();
            }
        }
    }

    /// A call has ended.
    #[inline]
    pub(super) fn heard_end(&self, token: Token, outcome: Outcome) {
        if let Some(adaptive) = &self.adaptive {
            if adaptive.hear(token, outcome, |limit| self.store(limit)) {
                self.hand_over();
            }
        }
    }

    // ===== Handing over =====

    /// Lets in whoever waits while there is room. Each is woken once, outside of the lock.
    fn hand_over(&self) {
        loop {
            let mut queue = self.lock();
            let mut word = self.word.load(Ordering::Acquire);
            let turn = loop {
                if queue.len() == 0 || in_flight(word) >= self.limit() {
                    break None;
                }
                // One fewer waits, one more is in: in one step, so that nobody slips in between.
                match self.word.compare_exchange_weak(
                    word,
                    word - ONE_WAITING + ONE_IN,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                ) {
                    Ok(_) => break queue.next(Instant::now),
                    Err(now) => word = now,
                }
            };
            drop(queue);
            match turn {
                None => return,
                Some(waker) => waker.into_iter().for_each(Waker::wake),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing of a user's runs under it; were it poisoned, the queue is still whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn refuse(&self, kind: RejectedKind) -> Rejected {
        self.counter(kind).fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, reason = kind.as_str(), "call shed");
        let rejected =
            Rejected::by(LayerKind::ConcurrencyLimit, kind).labelled(self.label.get().cloned());
        if kind == RejectedKind::DeadlinePassed {
            // Coming back helps nobody: the answer was needed by now.
            return rejected;
        }
        rejected
            .with_retry_after(Duration::from_millis(self.retry_after_ms.load(Ordering::Relaxed)))
    }
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter")
            .field("limit", &self.limit())
            .field("in_flight", &self.in_flight())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_models {
    use std::{sync::atomic::AtomicUsize, task::Wake};

    use loom::{sync::Arc as Both, thread};

    use super::*;

    /// Counts how often somebody was told.
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
            limiter.poll_turn(self.place, &Context::from_waker(&waker)).is_ready()
        }

        fn told(&self) -> usize {
            self.told.0.load(Ordering::Relaxed)
        }
    }

    /// Everything is taken, and so many wait.
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

    /// One leaves while another comes: that one is in at once, or waits and is told.
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

    /// The next in line gives up just when its turn comes: it goes to the one after.
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

    /// A higher limit and a free place at once: each waiter gets one of them, told once.
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
}
