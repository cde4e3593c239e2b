//! Request bodies that can be replayed.
//!
//! The [`ReplayState`] of a request holds the user's body and the data that was read from it. The saved request has it
//! as a [`ReplayHandle`], and the body of each attempt has a [`ReplayReader`] of it. A reader first returns the saved
//! data. Then it polls the user's body and saves the new data for later attempts.
//!
//! Only the newest reader may read. `ReplayState::reader` is its number, and each reader has its own in
//! `ReplayReader::number`. `take_over` and `replay` increase `ReplayState::reader`, which cuts off all earlier readers:
//! they stay pending, since the transport may still poll the body of an attempt that has ended.
//!
//! The user's body is polled without the lock: a reader takes it out ([`UnreadBody::Polled`]) and puts it back with
//! [`PolledBody::put_back`]. If a new reader begins meanwhile, the frame of the old reader is saved for the new one.
//!
//! Invariants:
//!
//! - User code runs without the lock: the polls, the size hint and the drop of the body, and the wakers. A poisoned
//!   lock therefore still protects a consistent state.
//! - `PolledBody` puts the body back on every path, also during a panic. A reader that waits for it is always woken.
//! - If data or an error is lost, `ReplayState::is_truncated` is set. The body is never replayed then.
//! - `ReplayState::is_reading` is changed only by the newest reader and by the handle, never by a reader that was cut
//!   off.

use std::{
    fmt, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use super::super::verdict::BodyReplay;
use super::buffer::SavedData;
use crate::outcome::SentMark;
use crate::sync::Mutex;

pin_project! {
    /// A request body that can be sent again.
    ///
    /// It saves the data that it sends, up to a maximum. A longer body is sent to its end, but is no longer saved and
    /// cannot be replayed. Trailers are replayed too.
    pub struct ReplayBody<B> {
        #[pin]
        kind: ReplayKind<B>,
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
    #[project = ReplayKindProj]
    enum ReplayKind<B> {
        Empty,
        PassThrough { #[pin] body: B },
        Replayable { reader: ReplayReader<B> },
    }
}

/// The saved part of a body, from which later attempts replay it.
pub(crate) enum ReplayHandle<B> {
    /// The body is empty.
    Empty,
    /// The data that has been read, and the rest of the body.
    Replayable(Arc<Mutex<ReplayState<B>>>),
}

pub(crate) struct ReplayState<B> {
    rest: UnreadBody<B>,
    /// The size hint of `rest`, read after each frame.
    rest_hint: SizeHint,
    saved: SavedData,
    trailers: Option<Box<HeaderMap>>,
    size: u64,
    cap: u64,
    /// Data was read and not saved, or the body failed: the body cannot be replayed.
    is_truncated: bool,
    /// The current reader may read more.
    is_reading: bool,
    /// The number of the current reader. Each take-over and each replay increases it, which cuts off the readers
    /// before.
    reader: u32,
}

/// The part of a body that has not been read.
enum UnreadBody<B> {
    /// Boxed, because it moves in and out of the lock and need not be `Unpin`. It outlives the attempt that polls it.
    Unread(Pin<Box<B>>),
    /// A reader polls the body without the lock, because the body is user code. Another reader finds this state only if
    /// it has replaced that reader, which is inside of `poll_frame` on another thread. It leaves its waker here, which
    /// is woken when the body is back.
    Polled(Option<Waker>),
    /// The body failed while a reader that had been cut off polled it, so that no reader returned the error. A later
    /// reader stays pending: it has no error to return, and an end would make the body look complete.
    Failed,
    Ended,
}

struct ReplayReader<B> {
    state: Arc<Mutex<ReplayState<B>>>,
    next: usize,
    number: u32,
    /// The reader has returned the end, the trailers, the last data or an error.
    done: bool,
    /// True for the first reader before its first poll. Its body has not ended then, so that `is_end_stream` needs no
    /// lock.
    is_fresh: bool,
}

impl<B: Body> ReplayBody<B> {
    /// Returns the body of the first attempt, and its saved part for the next attempts. With a `cap` of 0 no data is
    /// saved, and the body can be replayed only if no data has been read.
    pub(crate) fn new(body: B, cap: u64) -> (Self, ReplayHandle<B>) {
        if body.is_end_stream() {
            return (Self::of(ReplayKind::Empty), ReplayHandle::Empty);
        }
        // A body that exceeds the cap is not saved at all. It can be replayed as long as no data has been read.
        let rest_hint = body.size_hint();
        let cap = if rest_hint.lower() > cap { 0 } else { cap };
        let state = Arc::new(Mutex::new(ReplayState {
            rest: UnreadBody::Unread(Box::pin(body)),
            rest_hint,
            saved: SavedData::default(),
            trailers: None,
            size: 0,
            cap,
            is_truncated: false,
            is_reading: true,
            reader: 0,
        }));
        let reader =
            ReplayReader { state: state.clone(), next: 0, number: 0, done: false, is_fresh: true };
        (Self::of(ReplayKind::Replayable { reader }), ReplayHandle::Replayable(state))
    }

    /// Returns a body that is sent once and not saved.
    pub(crate) fn once(body: B) -> Self {
        Self::of(ReplayKind::PassThrough { body })
    }
}

impl<B> ReplayBody<B> {
    fn of(kind: ReplayKind<B>) -> Self {
        Self { kind, progress: ProgressReporter::UNREPORTED }
    }

    /// Makes the body report its progress to this mark.
    pub(crate) fn marked(mut self, mark: Option<SentMark>) -> Self {
        self.progress = ProgressReporter(mark);
        self
    }
}

impl<B> ReplayHandle<B> {
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    pub(crate) fn body_replay(&self) -> BodyReplay {
        match self {
            Self::Empty => BodyReplay::Yes,
            Self::Replayable(state) => {
                let state = state.lock();
                match (state.is_truncated, state.is_reading) {
                    (true, _) => BodyReplay::No,
                    (false, true) => BodyReplay::Streaming,
                    (false, false) => BodyReplay::Yes,
                }
            }
        }
    }

    /// Cuts off the current reader. Returns `false` if the body cannot be replayed.
    ///
    /// The transport may still poll the body of an attempt that has ended. Without the take-over, it could read beyond
    /// the cap during the delay before the next attempt, and the body could no longer be replayed.
    pub(crate) fn take_over(&self) -> bool {
        let Self::Replayable(state) = self else { return true };
        let mut state = state.lock();
        state.reader = state.reader.wrapping_add(1);
        state.is_reading = false;
        !state.is_truncated
    }

    /// Returns the body of the next attempt, and cuts off the current reader. [`body_replay`](Self::body_replay)
    /// must return `Yes`, or the reader must belong to an attempt that has ended.
    pub(crate) fn replay(&self) -> ReplayBody<B> {
        let kind = match self {
            Self::Empty => ReplayKind::Empty,
            Self::Replayable(state) => {
                let number = {
                    let mut state = state.lock();
                    state.saved.reset();
                    state.is_reading = true;
                    state.reader = state.reader.wrapping_add(1);
                    state.reader
                };
                let state = state.clone();
                ReplayKind::Replayable {
                    reader: ReplayReader { state, next: 0, number, done: false, is_fresh: false },
                }
            }
        };
        ReplayBody::of(kind)
    }
}

// ===== Reading =====

impl<B> Drop for ReplayReader<B> {
    fn drop(&mut self) {
        if !self.done {
            let mut state = self.state.lock();
            state.is_reading &= state.reader != self.number;
        }
    }
}

impl<B: Body> ReplayReader<B> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if self.done {
            return Poll::Ready(None);
        }
        self.is_fresh = false;
        let mut state = self.state.lock();
        if state.reader != self.number {
            // The reader is cut off. An end would make half a body look complete, and there is no error of the body to
            // return.
            return Poll::Pending;
        }
        if let Some(data) = state.saved.get(self.next) {
            let data = data.clone();
            self.next += 1;
            self.done = state.is_over(self.next);
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let body = match mem::replace(&mut state.rest, UnreadBody::Polled(None)) {
            UnreadBody::Unread(body) => body,
            UnreadBody::Ended => {
                // All data has been sent. Only the trailers remain.
                state.rest = UnreadBody::Ended;
                self.done = state.end();
                return Poll::Ready(
                    state.trailers.clone().map(|trailers| Ok(Frame::trailers(*trailers))),
                );
            }
            UnreadBody::Failed => {
                state.rest = UnreadBody::Failed;
                return Poll::Pending;
            }
            polled @ UnreadBody::Polled(_) => {
                state.rest = polled;
                drop(state);
                return self.wait_for_body(cx);
            }
        };
        drop(state);
        let mut polled = PolledBody { state: &self.state, number: self.number, body: Some(body) };
        let next = polled.poll_frame(cx);
        let Poll::Ready(next) = next else {
            polled.put_back(false, |_, _| ());
            return Poll::Pending;
        };
        let frame = match next {
            Some(Ok(frame)) => frame,
            ended => {
                let error = ended.and_then(Result::err);
                let is_cut_off = polled.put_back(true, |state, is_cut_off| {
                    state.is_truncated |= error.is_some();
                    if is_cut_off && error.is_some() {
                        state.rest = UnreadBody::Failed;
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
                let (is_last, rest_hint) = polled.end_and_hint();
                let (is_cut_off, next, forgotten) =
                    polled.put_back(is_last, |state, is_cut_off| {
                        state.rest_hint = rest_hint;
                        let forgotten = state.save(&data, is_cut_off);
                        (is_cut_off, state.saved.len(), forgotten)
                    });
                drop(forgotten);
                self.next = next;
                // Set here, because one more poll would need the lock again.
                self.done = is_last;
                (is_cut_off, Frame::data(data))
            }
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => {
                    let copy = Box::new(trailers.clone());
                    let is_cut_off = polled.put_back(true, |state, is_cut_off| {
                        if !state.is_truncated {
                            state.trailers = Some(copy);
                        }
                        is_cut_off
                    });
                    self.done = true;
                    (is_cut_off, Frame::trailers(trailers))
                }
                Err(_) => {
                    // Skip a frame of a kind that is unknown today. It is not saved, so the body cannot be replayed.
                    polled.put_back(false, |state, _| state.is_truncated = true);
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
        let mut state = self.state.lock();
        let before = match &mut state.rest {
            UnreadBody::Polled(waiting) => waiting.replace(waker),
            _ => Some(waker),
        };
        let is_back = !matches!(state.rest, UnreadBody::Polled(_));
        drop(state);
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
        let state = self.state.lock();
        state.reader == self.number
            && self.next >= state.saved.len()
            && state.trailers.is_none()
            && state.has_ended()
    }

    fn size_hint(&self) -> SizeHint {
        if self.done {
            return SizeHint::with_exact(0);
        }
        let state = self.state.lock();
        let saved = state.saved.bytes_from(self.next);
        let rest = if state.has_ended() { SizeHint::with_exact(0) } else { state.rest_hint };
        let mut hint = SizeHint::new();
        // Set the upper bound first, because `set_lower` panics above it.
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(saved));
        }
        hint.set_lower(rest.lower().saturating_add(saved));
        hint
    }
}

type PolledFrame<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

/// A body that a reader polls without the lock. Dropping it puts the body back, also while a panic of the body unwinds.
/// The body then cannot be replayed.
struct PolledBody<'a, B> {
    state: &'a Mutex<ReplayState<B>>,
    /// The number of the reader.
    number: u32,
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
    fn end_and_hint(&self) -> (bool, SizeHint) {
        self.body.as_ref().map_or((true, SizeHint::with_exact(0)), |body| {
            (body.is_end_stream(), body.size_hint())
        })
    }
}

impl<B> PolledBody<'_, B> {
    /// Puts the body back, or drops it if it has ended. `update` runs under the lock. Its argument states whether the
    /// reader was cut off during the poll. The body is dropped and a waiting reader is woken after the lock is
    /// released.
    fn put_back<T>(
        mut self,
        is_over: bool,
        update: impl FnOnce(&mut ReplayState<B>, bool) -> T,
    ) -> T {
        self.return_body(is_over, update)
    }

    fn return_body<T>(
        &mut self,
        is_over: bool,
        update: impl FnOnce(&mut ReplayState<B>, bool) -> T,
    ) -> T {
        let mut body = self.body.take();
        let mut state = self.state.lock();
        let rest = match body.take_if(|_| !is_over) {
            Some(body) => UnreadBody::Unread(body),
            None => UnreadBody::Ended,
        };
        let before = mem::replace(&mut state.rest, rest);
        let is_cut_off = state.reader != self.number;
        if is_over && !is_cut_off {
            state.is_reading = false;
        }
        let updated = update(&mut state, is_cut_off);
        drop(state);
        drop(body);
        if let UnreadBody::Polled(Some(waiting)) = before {
            waiting.wake();
        }
        updated
    }
}

impl<B> Drop for PolledBody<'_, B> {
    fn drop(&mut self) {
        if self.body.is_some() {
            self.return_body(false, |state, _| state.is_truncated = true);
        }
    }
}

impl<B> ReplayState<B> {
    /// Saves data that has been read. Returns the saved data if the cap is exceeded, for a drop without the lock.
    ///
    /// With `is_cut_off`, a new reader replaces the reader of this data and must not miss it. The data is therefore
    /// saved also if it exceeds the cap, which can happen for one frame.
    fn save(&mut self, data: &Bytes, is_cut_off: bool) -> Option<SavedData> {
        if self.is_truncated {
            return None;
        }
        self.size = self.size.saturating_add(data.len() as u64);
        if self.size > self.cap && !is_cut_off {
            self.is_truncated = true;
            return Some(mem::take(&mut self.saved));
        }
        if !data.is_empty() {
            self.saved.push(data.clone());
            if is_cut_off {
                // Makes the data readable for the new reader, which has already begun: no later replay does it.
                self.saved.reset();
            }
        }
        None
    }

    fn has_ended(&self) -> bool {
        matches!(self.rest, UnreadBody::Ended)
    }

    /// Records that the current reader reads no more. Returns `true`.
    fn end(&mut self) -> bool {
        self.is_reading = false;
        true
    }

    /// Returns whether a reader that has read `next` pieces has read the whole body. If so, records the end.
    fn is_over(&mut self, next: usize) -> bool {
        let over = self.has_ended() && self.trailers.is_none() && next >= self.saved.len();
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
            ReplayKindProj::Empty => (Poll::Ready(None), true),
            ReplayKindProj::Replayable { reader } => (reader.poll(cx), reader.done),
            ReplayKindProj::PassThrough { mut body } => {
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
            ReplayKind::Empty => true,
            ReplayKind::PassThrough { body } => body.is_end_stream(),
            ReplayKind::Replayable { reader } => reader.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            ReplayKind::Empty => SizeHint::with_exact(0),
            ReplayKind::PassThrough { body } => body.size_hint(),
            ReplayKind::Replayable { reader } => reader.size_hint(),
        }
    }
}

impl<B> Default for ReplayBody<B> {
    /// Returns an empty body, for example for a health probe inside of a retry.
    fn default() -> Self {
        Self::of(ReplayKind::Empty)
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.kind {
            ReplayKind::Empty => "ReplayBody(empty)",
            ReplayKind::PassThrough { .. } => "ReplayBody(pass_through)",
            ReplayKind::Replayable { .. } => "ReplayBody(replayable)",
        })
    }
}

impl<B> fmt::Debug for ReplayHandle<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReplayHandle({:?})", self.body_replay())
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

    struct CountWakes(mpsc::Sender<()>);

    impl Wake for CountWakes {
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
            let (mut first, handle) = ReplayBody::new(Blocking { polled, frames }, cap);
            let transport = thread::spawn(move || {
                assert!(next(&mut first, Waker::noop()).is_pending(), "the reader is cut off");
                assert!(next(&mut first, Waker::noop()).is_pending());
            });
            polls.recv_timeout(Duration::from_secs(30)).expect("polled");
            assert_eq!(handle.body_replay(), BodyReplay::Streaming);
            assert!(handle.take_over());
            let mut second = handle.replay();
            assert!(!second.is_end_stream() && second.size_hint().exact().is_none());
            let (wake, woken) = mpsc::channel();
            let waker = Arc::new(CountWakes(wake)).into();
            assert!(next(&mut second, &waker).is_pending());
            give.send(Some("first")).expect("polled");
            woken.recv_timeout(Duration::from_secs(30)).expect("woken when the body is back");
            assert_eq!(next(&mut second, &waker), Poll::Ready(Some("first".into())));
            give.send(Some("second")).expect("a body");
            give.send(None).expect("a body");
            assert_eq!(next(&mut second, &waker), Poll::Ready(Some("second".into())));
            assert_eq!(next(&mut second, &waker), Poll::Ready(None));
            assert_eq!(handle.body_replay() == BodyReplay::Yes, cap == 1000);
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
        let (mut body, handle) = ReplayBody::new(Panics, 1000);
        let transport = thread::spawn(move || {
            let _ = Pin::new(&mut body).poll_frame(&mut Context::from_waker(Waker::noop()));
        });
        assert!(transport.join().is_err());
        assert!(handle.body_replay() == BodyReplay::No && !handle.take_over());
    }
}
