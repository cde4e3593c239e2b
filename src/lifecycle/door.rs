//! Who is inside, and whether anybody else may come in: one word.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// `inside << 1 | closed`: who comes in is counted, and told whether that was too late, in one step. So whoever finds
/// it closed and empty is right for ever.
pub(super) struct Door(AtomicUsize);

const CLOSED: usize = 1;
const ONE: usize = 2;

impl Door {
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// One more is inside, to [`leave`](Self::leave) in any case. False: it came too late.
    pub(super) fn enter(&self) -> bool {
        self.0.fetch_add(ONE, SeqCst) & CLOSED == 0
    }

    pub(super) fn leave(&self) {
        self.0.fetch_sub(ONE, SeqCst);
    }

    pub(super) fn close(&self) {
        self.0.fetch_or(CLOSED, SeqCst);
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.load(SeqCst) & CLOSED == 0
    }

    pub(super) fn inside(&self) -> usize {
        self.0.load(SeqCst) / ONE
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, atomic::AtomicBool},
        thread,
    };

    use super::*;

    #[test]
    fn who_comes_too_late_is_told_so_and_leaves() {
        let door = Door::new();
        assert!(door.enter() && door.is_open());
        door.close();
        assert!(!door.enter() && !door.is_open());
        assert_eq!(door.inside(), 2);
        door.leave();
        door.leave();
        assert_eq!((door.inside(), door.is_open()), (0, false));
    }

    /// Whoever finds it closed and empty may throw everything away.
    #[test]
    fn nobody_is_inside_after_it_was_closed_and_empty() {
        const THREADS: usize = 4;
        for _ in 0..200 {
            let (door, gone, begin) =
                (Door::new(), AtomicBool::new(false), Barrier::new(THREADS + 1));
            let came = AtomicUsize::new(0);
            let comes_until_told = || {
                begin.wait();
                while door.enter() {
                    assert!(!gone.load(SeqCst), "let in after the end");
                    came.fetch_add(1, SeqCst);
                    door.leave();
                }
                door.leave();
            };
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(comes_until_told);
                }
                begin.wait();
                while came.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                door.close();
                while door.inside() > 0 {
                    thread::yield_now();
                }
                gone.store(true, SeqCst);
            });
            assert_eq!(door.inside(), 0);
        }
    }
}
