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

use super::{policy::Repeatable, sent::Sent};
use crate::call::SentMark;

pin_project! {
    /// A request body that can be sent again.
    ///
    /// It copies what it sends, lazily and up to a cap; beyond the cap it goes on streaming and only
    /// loses its retries. Trailers are sent again too. A body that is empty is not wrapped at all.
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

/// What is kept of a body to send it again.
pub(super) enum Tape<B> {
    /// There is nothing to send.
    Empty,
    /// What has been sent so far, and the rest.
    Taped(Arc<Mutex<Reel<B>>>),
}

pub(super) struct Reel<B> {
    rest: Rest<B>,
    /// The size hint of `rest`, read after each frame.
    rest_hint: SizeHint,
    sent: Sent,
    trailers: Option<Box<HeaderMap>>,
    size: u64,
    cap: u64,
    /// A part has been forgotten.
    torn: bool,
    /// An attempt is reading.
    in_use: bool,
    /// Whose turn it is to read.
    turn: u32,
}

/// The part of a body that has not been read.
enum Rest<B> {
    /// Boxed, so that bodies need not be `Unpin`: the body outlives the attempt that polls it.
    Unread(Pin<Box<B>>),
    /// A reader polls the body. The body is user code, so the reader takes it out and releases the lock. Another
    /// reader can find this only if it replaces a reader that is inside of `poll_frame` on another thread. Its waker
    /// is woken when the body is back.
    Polled(Option<Waker>),
    /// The body failed while a reader polled it that was cut off, so the error was dropped. A later reader has no error
    /// to return, and must not end as if the body were complete, so it stays pending.
    Failed,
    Ended,
}

struct Reader<B> {
    reel: Arc<Mutex<Reel<B>>>,
    next: usize,
    turn: u32,
    /// Nothing more will come.
    done: bool,
    /// The first reader before its first poll: its body has not ended, so that `is_end_stream` needs no lock.
    is_fresh: bool,
}

fn lock<B>(reel: &Mutex<Reel<B>>) -> MutexGuard<'_, Reel<B>> {
    // No user code runs under the lock, so a poisoned lock protects a consistent state.
    reel.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Body> ReplayBody<B> {
    /// The first attempt's body, and what is kept for the next. A `cap` of 0 keeps nothing that has
    /// been sent: then only a body that was never touched can be sent again.
    pub(super) fn new(body: B, cap: u64) -> (Self, Tape<B>) {
        if body.is_end_stream() {
            return (Self::of(Kind::Empty), Tape::Empty);
        }
        // One that will not fit is not copied at all, but can be sent as long as it has not begun.
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

    /// A body that is passed through, once.
    pub(super) fn once(body: B) -> Self {
        Self::of(Kind::Through { body })
    }
}

impl<B> ReplayBody<B> {
    fn of(kind: Kind<B>) -> Self {
        Self { kind, progress: ProgressReporter::UNREPORTED }
    }

    /// Makes the body report its progress to this mark.
    pub(super) fn marked(mut self, mark: Option<SentMark>) -> Self {
        self.progress = ProgressReporter(mark);
        self
    }
}

impl<B> Tape<B> {
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    pub(super) fn repeatable(&self) -> Repeatable {
        match self {
            Self::Empty => Repeatable::Yes,
            Self::Taped(reel) => {
                let reel = lock(reel);
                match (reel.torn, reel.in_use) {
                    (true, _) => Repeatable::No,
                    (false, true) => Repeatable::Streaming,
                    (false, false) => Repeatable::Yes,
                }
            }
        }
    }

    /// Cuts off whoever still reads it: what an attempt that is over read during the wait for the next
    /// could be more than is kept. False if it has been already.
    pub(super) fn claim(&self) -> bool {
        let Self::Taped(reel) = self else { return true };
        let mut reel = lock(reel);
        reel.turn = reel.turn.wrapping_add(1);
        reel.in_use = false;
        !reel.torn
    }

    /// The next attempt's body. Only asked when it is [`repeatable`](Self::repeatable), or what was reading
    /// it is known to be dead: that reader is cut off.
    pub(super) fn replay(&self) -> ReplayBody<B> {
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
            // Cut off. Its end would make half a body look whole, and there is no error to make.
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
                // The attempt of a reader that was cut off is over.
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
                // Read here instead of by one more poll, which would need the lock.
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
                    // A kind of frame that is unknown today is skipped, and the body is not replayed.
                    polled.put_back(false, |reel, _| reel.torn = true);
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            },
        };
        if is_cut_off { Poll::Pending } else { Poll::Ready(Some(Ok(frame))) }
    }

    /// Waits until the reader that this one replaces has put the body back.
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
        // The upper bound first: a lower one above it would panic.
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(kept));
        }
        hint.set_lower(rest.lower().saturating_add(kept));
        hint
    }
}

type PolledFrame<B> = Poll<Option<Result<Frame<<B as Body>::Data>, <B as Body>::Error>>>;

/// A body that a reader polls without the lock. Its drop puts the body back, also during a panic of the body.
struct PolledBody<'a, B> {
    reel: &'a Mutex<Reel<B>>,
    /// The turn of the reader.
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
    /// Puts the body back, or drops it if it is over. `update` runs under the lock, with whether the reader was cut
    /// off meanwhile. The body is dropped, and a waiting reader is woken, without the lock.
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
    /// Saves data that has been read. Returns saved data that is dropped because it exceeds the cap.
    ///
    /// `is_cut_off`: another reader replaces the reader of this data, and may not miss it. One frame beyond the cap is
    /// therefore saved.
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
                // The next reader has begun, so that no other reader makes the data readable.
                self.sent.rewind();
            }
        }
        None
    }

    fn has_ended(&self) -> bool {
        matches!(self.rest, Rest::Ended)
    }

    /// Records that nothing more is to be read. Returns `true`.
    fn end(&mut self) -> bool {
        self.in_use = false;
        true
    }

    /// Whether one who has read so many pieces has read all there is; then it is over.
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
    /// An empty body: what a health probe within a retry sends.
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
            assert_eq!(tape.repeatable(), Repeatable::Streaming);
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
            assert_eq!(tape.repeatable() == Repeatable::Yes, cap == 1000);
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
        assert!(tape.repeatable() == Repeatable::No && !tape.claim());
    }
}
