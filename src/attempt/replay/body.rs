//! Request bodies that can be replayed.
//!
//! The [`Reel`] of a request holds the user's body and the data that was read from it. The saved request has it as a
//! [`Tape`], and the body of each attempt has a [`Reader`] of it. A reader first returns the saved data. Then it polls
//! the user's body and saves the new data for later attempts.
//!
//! Only the newest reader may read. `Reel::turn` is its number, and each reader has its own in `Reader::turn`. A
//! claim or a replay increases `Reel::turn`, which cuts off all earlier readers: they stay pending, since the transport
//! may still poll the body of an attempt that has ended.
//!
//! The user's body is polled without the lock: a reader takes it out ([`Rest::Polled`]) and puts it back with
//! [`PolledBody::put_back`]. If a new reader begins meanwhile, the frame of the old reader is saved for the new one.
//!
//! Invariants:
//!
//! - User code runs without the lock: the polls, the size hint and the drop of the body, and the wakers.
//! - `PolledBody` puts the body back on every path, also during a panic. A reader that waits for it is always woken.
//! - If data or an error is lost, `Reel::torn` is set. The body is never replayed then.
//! - `Reel::in_use` is changed only by the newest reader and by the reel's owner, never by a reader that was cut off.

use std::{
    fmt, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::super::verdict::BodyReplay;
use super::buffer::Sent;
use crate::outcome::SentMark;

pin_project! {
    /// A request body that can be sent again.
    ///
    /// It saves the data that it sends, up to a maximum. A longer body is sent to its end, but is no longer saved and
    /// cannot be replayed. Trailers are replayed too.
    pub struct ReplayBody<B> {
        #[pin]
        kind: Kind<B>,
        progress: ProgressReporter,
    }
}

/// Reports the progress of the body to the layers that measure the call.
struct ProgressReporter(Option<SentMark>);

impl ProgressReporter {
    const UNREPORTED: Self = Self(None);

    fn report<T, E>(&mut self, polled: &Poll<Option<Result<T, E>>>, is_over: bool) {
        let Some(mark) = &self.0 else { return };
        match polled {
            Poll::Pending => mark.waits_for_frame(),
            Poll::Ready(Some(Ok(_))) if !is_over => mark.frame_taken(),
            Poll::Ready(_) => {
                mark.sent();
                self.0 = None;
            }
        }
    }
}

impl Drop for ProgressReporter {
    fn drop(&mut self) {
        if let Some(mark) = &self.0 {
            mark.dropped();
        }
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<B> {
        Empty,
        Through { #[pin] body: B },
        Taped { reader: Reader<B> },
    }
}

/// The saved part of a body, from which later attempts replay it.
pub(crate) enum Tape<B> {
    /// The body is empty.
    Empty,
    /// The data that has been read, and the rest of the body.
    Taped(Arc<Mutex<Reel<B>>>),
}

pub(crate) struct Reel<B> {
    rest: Rest<B>,
    /// The size hint of `rest`, read after each frame.
    rest_hint: SizeHint,
    sent: Sent,
    trailers: Option<Box<HeaderMap>>,
    size: u64,
    cap: u64,
    /// Data was read and not saved, or the body failed: the body cannot be replayed.
    torn: bool,
    /// The current reader may read more.
    in_use: bool,
    /// The number of the current reader. Each claim and each replay increases it, which cuts off the readers before.
    turn: u32,
}

/// The part of a body that has not been read.
enum Rest<B> {
    /// Boxed, because it moves in and out of the lock and need not be `Unpin`. It outlives the attempt that polls it.
    Unread(Pin<Box<B>>),
    /// A reader polls the body without the lock, because the body is user code. Another reader finds this state only if
    /// it has replaced that reader, which is inside of `poll_frame` on another thread. It leaves its waker here, which
    /// is woken when the body is back.
    Polled(Option<Waker>),
    /// The body failed while a reader polled it that had been cut off, so that no reader returned the error. A later
    /// reader has no error to return and must not end as if the body were complete. It stays pending.
    Failed,
    Ended,
}

struct Reader<B> {
    reel: Arc<Mutex<Reel<B>>>,
    next: usize,
    turn: u32,
    /// The reader has returned the end, the trailers, the last data or an error.
    done: bool,
    /// True for the first reader before its first poll. Its body has not ended then, so that `is_end_stream` needs no
    /// lock.
    is_fresh: bool,
}

fn lock<B>(reel: &Mutex<Reel<B>>) -> MutexGuard<'_, Reel<B>> {
    // No user code runs under the lock, so that a poisoned lock still protects a consistent state.
    reel.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Body> ReplayBody<B> {
    /// Returns the body of the first attempt, and its saved part for the next attempts. With a `cap` of 0 no data is
    /// saved, and the body can be replayed only if no data has been read.
    pub(crate) fn new(body: B, cap: u64) -> (Self, Tape<B>) {
        if body.is_end_stream() {
            return (Self::of(Kind::Empty), Tape::Empty);
        }
        // A body that exceeds the cap is not saved at all. It can be replayed as long as no data has been read.
        let rest_hint = body.size_hint();
        let cap = if rest_hint.lower() > cap { 0 } else { cap };
        let reel = Arc::new(Mutex::new(Reel {
            rest: Rest::Unread(Box::pin(body)),
            rest_hint,
            sent: Sent::default(),
            trailers: None,
            size: 0,
            cap,
            torn: false,
            in_use: true,
            turn: 0,
        }));
        let reader = Reader { reel: reel.clone(), next: 0, turn: 0, done: false, is_fresh: true };
        (Self::of(Kind::Taped { reader }), Tape::Taped(reel))
    }

    /// Returns a body that is sent once and not saved.
    pub(crate) fn once(body: B) -> Self {
        Self::of(Kind::Through { body })
    }
}

impl<B> ReplayBody<B> {
    fn of(kind: Kind<B>) -> Self {
        Self { kind, progress: ProgressReporter::UNREPORTED }
    }

    /// Makes the body report its progress to this mark.
    pub(crate) fn marked(mut self, mark: Option<SentMark>) -> Self {
        self.progress = ProgressReporter(mark);
        self
    }
}

impl<B> Tape<B> {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    pub(crate) fn repeatable(&self) -> BodyReplay {
        match self {
            Self::Empty => BodyReplay::Yes,
            Self::Taped(reel) => {
                let reel = lock(reel);
                match (reel.torn, reel.in_use) {
                    (true, _) => BodyReplay::No,
                    (false, true) => BodyReplay::Streaming,
                    (false, false) => BodyReplay::Yes,
                }
            }
        }
    }

    /// Cuts off the current reader. Returns `false` if the body cannot be replayed.
    ///
    /// The transport may still poll the body of an attempt that has ended. Without the claim, it could read beyond the
    /// cap during the delay before the next attempt, and the body could no longer be replayed.
    pub(crate) fn claim(&self) -> bool {
        let Self::Taped(reel) = self else { return true };
        let mut reel = lock(reel);
        reel.turn = reel.turn.wrapping_add(1);
        reel.in_use = false;
        !reel.torn
    }

    /// Returns the body of the next attempt, and cuts off the current reader. The body must be
    /// [`repeatable`](Self::repeatable), or its reader must belong to an attempt that has ended.
    pub(crate) fn replay(&self) -> ReplayBody<B> {
        let kind = match self {
            Self::Empty => Kind::Empty,
            Self::Taped(reel) => {
                let turn = {
                    let mut reel = lock(reel);
                    reel.sent.rewind();
                    reel.in_use = true;
                    reel.turn = reel.turn.wrapping_add(1);
                    reel.turn
                };
                let reel = reel.clone();
                Kind::Taped { reader: Reader { reel, next: 0, turn, done: false, is_fresh: false } }
            }
        };
        ReplayBody::of(kind)
    }
}

// ===== Reading =====

impl<B> Drop for Reader<B> {
    fn drop(&mut self) {
        if !self.done {
            let mut reel = lock(&self.reel);
            reel.in_use &= reel.turn != self.turn;
        }
    }
}

impl<B: Body> Reader<B> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.done {
            return Poll::Ready(None);
        }
        self.is_fresh = false;
        let mut reel = lock(&self.reel);
        if reel.turn != self.turn {
            // The reader is cut off. An end would make half a body look complete, and there is no error of the body to
            // return.
            return Poll::Pending;
        }
        if let Some(data) = reel.sent.get(self.next) {
            let data = data.clone();
            self.next += 1;
            self.done = reel.is_over(self.next);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let body = match mem::replace(&mut reel.rest, Rest::Polled(None)) {
            Rest::Unread(body) => body,
            Rest::Ended => {
                // All data has been sent. Only the trailers remain.
                reel.rest = Rest::Ended;
                self.done = reel.end();
                return Poll::Ready(
                    reel.trailers.clone().map(|trailers| Ok(Frame::trailers(*trailers))),
                );
            }
            Rest::Failed => {
                reel.rest = Rest::Failed;
                return Poll::Pending;
            }
            polled @ Rest::Polled(_) => {
                reel.rest = polled;
                drop(reel);
                return self.wait_for_body(cx);
            }
        };
        drop(reel);
        let mut polled = PolledBody { reel: &self.reel, turn: self.turn, body: Some(body) };
        let next = polled.poll_frame(cx);
        let Poll::Ready(next) = next else {
            polled.put_back(false, |_, _| ());
            return Poll::Pending;
        };
        let frame = match next {
            Some(Ok(frame)) => frame,
            ended => {
                let error = ended.and_then(Result::err);
                let is_cut_off = polled.put_back(true, |reel, is_cut_off| {
                    reel.torn |= error.is_some();
                    if is_cut_off && error.is_some() {
                        reel.rest = Rest::Failed;
                    }
                    is_cut_off
                });
                self.done = true;
                // A reader that was cut off belongs to an attempt that has ended, so its result is dropped.
                return if is_cut_off { Poll::Pending } else { Poll::Ready(error.map(Err)) };
            }
        };
        let (is_cut_off, frame) = match frame.into_data() {
            Ok(mut data) => {
                let data = data.copy_to_bytes(data.remaining());
                let (is_last, rest_hint) = polled.look();
                let (is_cut_off, next, forgotten) = polled.put_back(is_last, |reel, is_cut_off| {
                    reel.rest_hint = rest_hint;
                    let forgotten = reel.keep(&data, is_cut_off);
                    (is_cut_off, reel.sent.len(), forgotten)
                });
                drop(forgotten);
                self.next = next;
                // Read here, because one more poll would need the lock again.
                self.done = is_last;
                (is_cut_off, Frame::data(data))
            }
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => {
                    let copy = Box::new(trailers.clone());
                    let is_cut_off = polled.put_back(true, |reel, is_cut_off| {
                        if !reel.torn {
                            reel.trailers = Some(copy);
                        }
                        is_cut_off
                    });
                    self.done = true;
                    (is_cut_off, Frame::trailers(trailers))
                }
                Err(_) => {
                    // Skip a frame of a kind that is unknown today. It is not saved, so the body cannot be replayed.
                    polled.put_back(false, |reel, _| reel.torn = true);
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            },
        };
        if is_cut_off { Poll::Pending } else { Poll::Ready(Some(Ok(frame))) }
    }

    /// Waits until the reader that this one replaces has put the body back. The body may come back before the waker is
    /// registered. Then the task is woken at once.
    #[cold]
    fn wait_for_body(&self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let waker = cx.waker().clone();
        let mut reel = lock(&self.reel);
        let before = match &mut reel.rest {
            Rest::Polled(waiting) => waiting.replace(waker),
            _ => Some(waker),
        };
        let is_back = !matches!(reel.rest, Rest::Polled(_));
        drop(reel);
        drop(before);
        if is_back {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        if self.done {
            return true;
        }
        if self.is_fresh {
            return false;
        }
        let reel = lock(&self.reel);
        reel.turn == self.turn
            && self.next >= reel.sent.len()
            && reel.trailers.is_none()
            && reel.has_ended()
    }

    fn size_hint(&self) -> SizeHint {
        if self.done {
            return SizeHint::with_exact(0);
        }
        let reel = lock(&self.reel);
        let kept = reel.sent.bytes_from(self.next);
        let rest = if reel.has_ended() { SizeHint::with_exact(0) } else { reel.rest_hint };
        let mut hint = SizeHint::new();
        // Set the upper bound first, because `set_lower` panics above it.
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(kept));
        }
        hint.set_lower(rest.lower().saturating_add(kept));
        hint
    }
}

type PolledFrame<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

/// A body that a reader polls without the lock. Dropping it puts the body back, also while a panic of the body unwinds.
/// The body then cannot be replayed.
struct PolledBody<'a, B> {
    reel: &'a Mutex<Reel<B>>,
    /// The number of the reader.
    turn: u32,
    body: Option<Pin<Box<B>>>,
}

impl<B: Body> PolledBody<'_, B> {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> PolledFrame<B> {
        match &mut self.body {
            Some(body) => body.as_mut().poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    /// Returns whether the body has ended, and the size hint of the rest.
    fn look(&self) -> (bool, SizeHint) {
        self.body.as_ref().map_or((true, SizeHint::with_exact(0)), |body| {
            (body.is_end_stream(), body.size_hint())
        })
    }
}

impl<B> PolledBody<'_, B> {
    /// Puts the body back, or drops it if it has ended. `update` runs under the lock. Its argument states whether the
    /// reader was cut off during the poll. The body is dropped and a waiting reader is woken after the lock is
    /// released.
    fn put_back<T>(mut self, is_over: bool, update: impl FnOnce(&mut Reel<B>, bool) -> T) -> T {
        self.return_body(is_over, update)
    }

    fn return_body<T>(&mut self, is_over: bool, update: impl FnOnce(&mut Reel<B>, bool) -> T) -> T {
        let mut body = self.body.take();
        let mut reel = lock(self.reel);
        let rest = match body.take_if(|_| !is_over) {
            Some(body) => Rest::Unread(body),
            None => Rest::Ended,
        };
        let before = mem::replace(&mut reel.rest, rest);
        let is_cut_off = reel.turn != self.turn;
        if is_over && !is_cut_off {
            reel.in_use = false;
        }
        let updated = update(&mut reel, is_cut_off);
        drop(reel);
        drop(body);
        if let Rest::Polled(Some(waiting)) = before {
            waiting.wake();
        }
        updated
    }
}

impl<B> Drop for PolledBody<'_, B> {
    fn drop(&mut self) {
        if self.body.is_some() {
            self.return_body(false, |reel, _| reel.torn = true);
        }
    }
}

impl<B> Reel<B> {
    /// Saves data that has been read. Returns the saved data if the cap is exceeded, for a drop without the lock.
    ///
    /// With `is_cut_off`, a new reader replaces the reader of this data and must not miss it. The data is therefore
    /// saved also if it exceeds the cap, which can happen for one frame.
    fn keep(&mut self, data: &Bytes, is_cut_off: bool) -> Option<Sent> {
        if self.torn {
            return None;
        }
        self.size = self.size.saturating_add(data.len() as u64);
        if self.size > self.cap && !is_cut_off {
            self.torn = true;
            return Some(mem::take(&mut self.sent));
        }
        if !data.is_empty() {
            self.sent.push(data.clone());
            if is_cut_off {
                // Makes the data readable for the new reader, which has already begun: no later replay does it.
                self.sent.rewind();
            }
        }
        None
    }

    fn has_ended(&self) -> bool {
        matches!(self.rest, Rest::Ended)
    }

    /// Records that the current reader reads no more. Returns `true`.
    fn end(&mut self) -> bool {
        self.in_use = false;
        true
    }

    /// Returns whether a reader that has read `next` pieces has read the whole body. If so, records the end.
    fn is_over(&mut self, next: usize) -> bool {
        let over = self.has_ended() && self.trailers.is_none() && next >= self.sent.len();
        over && self.end()
    }
}

impl<B: Body> Body for ReplayBody<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let (polled, is_over) = match this.kind.as_mut().project() {
            KindProj::Empty => (Poll::Ready(None), true),
            KindProj::Taped { reader } => (reader.poll(cx), reader.done),
            KindProj::Through { mut body } => {
                let polled = body.as_mut().poll_frame(cx).map(|next| {
                    next.map(|frame| {
                        frame.map(|frame| {
                            frame.map_data(|mut data| data.copy_to_bytes(data.remaining()))
                        })
                    })
                });
                (polled, body.is_end_stream())
            }
        };
        this.progress.report(&polled, is_over);
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Empty => true,
            Kind::Through { body } => body.is_end_stream(),
            Kind::Taped { reader } => reader.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Empty => SizeHint::with_exact(0),
            Kind::Through { body } => body.size_hint(),
            Kind::Taped { reader } => reader.size_hint(),
        }
    }
}

impl<B> Default for ReplayBody<B> {
    /// Returns an empty body, for example for a health probe inside of a retry.
    fn default() -> Self {
        Self::of(Kind::Empty)
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.kind {
            Kind::Empty => "ReplayBody(empty)",
            Kind::Through { .. } => "ReplayBody(through)",
            Kind::Taped { .. } => "ReplayBody(taped)",
        })
    }
}

impl<B> fmt::Debug for Tape<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tape({:?})", self.repeatable())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible, panic::panic_any, sync::mpsc, task::Wake, thread, time::Duration,
    };

    use super::*;

    /// A body whose `poll_frame` blocks until it receives a frame.
    struct Blocking {
        polled: mpsc::Sender<()>,
        frames: mpsc::Receiver<Option<&'static str>>,
    }

    impl Body for Blocking {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.polled.send(()).expect("the test goes on");
            let frame = self.frames.recv().expect("a frame");
            Poll::Ready(frame.map(|data| Ok(Frame::data(data.into()))))
        }
    }

    struct Counts(mpsc::Sender<()>);

    impl Wake for Counts {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
        }
    }

    fn next(body: &mut ReplayBody<Blocking>, waker: &Waker) -> Poll<Option<Bytes>> {
        let polled = Pin::new(body).poll_frame(&mut Context::from_waker(waker));
        polled.map(|frame| frame.map(|frame| frame.expect("infallible").into_data().expect("data")))
    }

    /// The transport polls the body of an attempt on its own thread. A retry that begins meanwhile must not wait for
    /// the user's `poll_frame`, and must not miss the frame.
    #[test]
    fn retry_that_begins_while_the_body_is_polled_neither_blocks_nor_misses_a_frame() {
        for cap in [0, 3, 1000] {
            let ((polled, polls), (give, frames)) = (mpsc::channel(), mpsc::channel());
            let (mut first, tape) = ReplayBody::new(Blocking { polled, frames }, cap);
            let transport = thread::spawn(move || {
                assert!(next(&mut first, Waker::noop()).is_pending(), "it was cut off");
                assert!(next(&mut first, Waker::noop()).is_pending());
            });
            polls.recv_timeout(Duration::from_secs(30)).expect("polled");
            assert_eq!(tape.repeatable(), BodyReplay::Streaming);
            assert!(tape.claim());
            let mut second = tape.replay();
            assert!(!second.is_end_stream() && second.size_hint().exact().is_none());
            let (wake, woken) = mpsc::channel();
            let waker = Arc::new(Counts(wake)).into();
            assert!(next(&mut second, &waker).is_pending());
            give.send(Some("first")).expect("polled");
            woken.recv_timeout(Duration::from_secs(30)).expect("woken when the body is back");
            assert_eq!(next(&mut second, &waker), Poll::Ready(Some("first".into())));
            give.send(Some("second")).expect("a body");
            give.send(None).expect("a body");
            assert_eq!(next(&mut second, &waker), Poll::Ready(Some("second".into())));
            assert_eq!(next(&mut second, &waker), Poll::Ready(None));
            assert_eq!(tape.repeatable() == BodyReplay::Yes, cap == 1000);
            transport.join().expect("no panic");
        }
    }

    struct Panics;

    impl Body for Panics {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            panic_any("a body that panics");
        }
    }

    #[test]
    fn body_that_panics_is_not_replayed() {
        let (mut body, tape) = ReplayBody::new(Panics, 1000);
        let transport = thread::spawn(move || {
            let _ = Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop()));
        });
        assert!(transport.join().is_err());
        assert!(tape.repeatable() == BodyReplay::No && !tape.claim());
    }
}
