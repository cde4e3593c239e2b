use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use http::Response;
use tokio::sync::oneshot;
use tower::Service;

use super::{Oops, ScriptBody, hello};

/// The result of a call.
#[derive(Debug)]
pub enum Then<Res = Response<ScriptBody>> {
    Answer(Res),
    Fail(Oops),
    /// Pending until [`Watch::end`] sets the result.
    Hold,
    PanicInCall,
    PanicInPoll,
}

/// An inner service that enforces the Tower contract. It panics if it is called without readiness. A clone is never
/// ready. Readiness is a reservation, which [`Seen::reserved`] counts.
#[derive(Debug)]
pub struct Strict<Res = Response<ScriptBody>> {
    shared: Arc<Mutex<Shared<Res>>>,
    reserved: bool,
}

/// Observes a [`Strict`] and all its clones, and scripts their results.
#[derive(Debug)]
pub struct Watch<Res = Response<ScriptBody>>(Arc<Mutex<Shared<Res>>>);

struct Shared<Res> {
    script: VecDeque<Then<Res>>,
    then: Box<dyn FnMut() -> Then<Res> + Send>,
    ready: Result<bool, Oops>,
    waiting: Vec<Waker>,
    held: BTreeMap<usize, oneshot::Sender<Result<Res, Oops>>>,
    seen: Seen,
}

/// Counts the polls and calls of the service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub polls: usize,
    pub calls: usize,
    pub without_ready: usize,
    pub in_flight: usize,
    pub peak: usize,
    pub cancelled: usize,
    /// Instances that were polled ready and neither called nor dropped since.
    pub reserved: usize,
}

impl<Res> std::fmt::Debug for Shared<Res> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.seen.fmt(f)
    }
}

fn lock<Res>(shared: &Mutex<Shared<Res>>) -> MutexGuard<'_, Shared<Res>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Strict {
    /// Returns a service that is ready immediately. Calls without a scripted result receive [`hello`].
    pub fn new() -> (Self, Watch) {
        Self::answering(|| Then::Answer(hello()))
    }

    /// Returns a service that is ready immediately. Calls without a scripted result are held.
    pub fn holding() -> (Self, Watch) {
        Self::answering(|| Then::Hold)
    }

    /// Returns a service that is ready immediately. Calls without a scripted result receive the result of the closure.
    pub fn answering(then: impl FnMut() -> Then + Send + 'static) -> (Self, Watch) {
        Self::of(then)
    }
}

impl<Res> Strict<Res> {
    /// [`answering`](Strict::answering) with responses of any type.
    pub fn of(then: impl FnMut() -> Then<Res> + Send + 'static) -> (Self, Watch<Res>) {
        let shared = Arc::new(Mutex::new(Shared {
            script: VecDeque::new(),
            then: Box::new(then),
            ready: Ok(true),
            waiting: Vec::new(),
            held: BTreeMap::new(),
            seen: Seen::default(),
        }));
        (Self { shared: shared.clone(), reserved: false }, Watch(shared))
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.reserved) {
            lock(&self.shared).seen.reserved -= 1;
        }
    }
}

impl<Res> Clone for Strict<Res> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), reserved: false }
    }
}

impl<Res> Drop for Strict<Res> {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl<Res> Clone for Watch<Res> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Res> Watch<Res> {
    pub fn seen(&self) -> Seen {
        lock(&self.0).seen
    }

    /// Sets the results of the next calls. Calls after these receive results of the closure.
    pub fn script(&self, then: impl IntoIterator<Item = Then<Res>>) {
        lock(&self.0).script.extend(then);
    }

    /// Discards the scripted results that no call has received.
    pub fn unscript(&self) {
        lock(&self.0).script.clear();
    }

    /// Ends the held call with this number. The first call has the number 0. Returns `false` if the call is no longer
    /// held.
    pub fn end(&self, call: usize, with: Result<Res, Oops>) -> bool {
        let held = lock(&self.0).held.remove(&call);
        held.is_some_and(|held| held.send(with).is_ok())
    }

    /// Sets whether `poll_ready` is ready or pending, and wakes the waiters.
    pub fn set_ready(&self, ready: bool) {
        self.readiness(Ok(ready));
    }

    /// Makes `poll_ready` fail, and wakes the waiters.
    pub fn break_readiness(&self) {
        self.readiness(Err(Oops("never ready again")));
    }

    fn readiness(&self, ready: Result<bool, Oops>) {
        let waiting = {
            let mut shared = lock(&self.0);
            shared.ready = ready;
            std::mem::take(&mut shared.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl<Req, Res> Service<Req> for Strict<Res> {
    type Response = Res;
    type Error = Oops;
    type Future = Flight<Res>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Oops>> {
        let mut shared = lock(&self.shared);
        shared.seen.polls += 1;
        match shared.ready {
            _ if self.reserved => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error)),
            Ok(true) => {
                shared.seen.reserved += 1;
                self.reserved = true;
                Poll::Ready(Ok(()))
            }
            Ok(false) => {
                shared.waiting.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn call(&mut self, _: Req) -> Flight<Res> {
        if !self.reserved {
            lock(&self.shared).seen.without_ready += 1;
            panic!("called without readiness");
        }
        self.give_back();
        let mut shared = lock(&self.shared);
        let number = shared.seen.calls;
        shared.seen.calls += 1;
        let then = shared.script.pop_front().unwrap_or_else(|| (shared.then)());
        let then = match then {
            Then::PanicInCall => {
                drop(shared);
                panic!("scripted panic in call");
            }
            Then::PanicInPoll => Doing::Panic,
            Then::Answer(answer) => Doing::Give(Some(Ok(answer))),
            Then::Fail(error) => Doing::Give(Some(Err(error))),
            Then::Hold => {
                let (end, held) = oneshot::channel();
                shared.held.insert(number, end);
                Doing::Wait(held)
            }
        };
        shared.seen.in_flight += 1;
        shared.seen.peak = shared.seen.peak.max(shared.seen.in_flight);
        drop(shared);
        Flight { doing: then, shared: Some(self.shared.clone()), number }
    }
}

/// One call of a [`Strict`].
pub struct Flight<Res> {
    doing: Doing<Res>,
    shared: Option<Arc<Mutex<Shared<Res>>>>,
    number: usize,
}

enum Doing<Res> {
    Give(Option<Result<Res, Oops>>),
    Wait(oneshot::Receiver<Result<Res, Oops>>),
    Panic,
}

impl<Res> Unpin for Flight<Res> {}

impl<Res> Future for Flight<Res> {
    type Output = Result<Res, Oops>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let given = match &mut self.doing {
            Doing::Give(given) => given.take().expect("polled after completion"),
            Doing::Panic => panic!("scripted panic in a future"),
            Doing::Wait(held) => match Pin::new(held).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(given) => given.unwrap_or(Err(Oops("the watch was dropped"))),
            },
        };
        if let Some(shared) = self.shared.take() {
            lock(&shared).seen.in_flight -= 1;
        }
        Poll::Ready(given)
    }
}

impl<Res> Drop for Flight<Res> {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            let mut shared = lock(&shared);
            shared.seen.in_flight -= 1;
            shared.seen.cancelled += 1;
            shared.held.remove(&self.number);
        }
    }
}
