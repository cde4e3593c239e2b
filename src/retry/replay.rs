use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
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
    /// Boxed, so that bodies need not be `Unpin`: it outlives the attempt that polls it.
    rest: Option<Pin<Box<B>>>,
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

struct Reader<B> {
    reel: Arc<Mutex<Reel<B>>>,
    next: usize,
    turn: u32,
    /// Nothing more will come.
    done: bool,
}

fn lock<B>(reel: &Mutex<Reel<B>>) -> MutexGuard<'_, Reel<B>> {
    // A user's body may have panicked under it: then it is torn, which is all that matters here.
    reel.lock().unwrap_or_else(|poisoned: PoisonError<_>| {
        let mut reel = poisoned.into_inner();
        reel.torn = true;
        reel
    })
}

impl<B: Body> ReplayBody<B> {
    /// The first attempt's body, and what is kept for the next. A `cap` of 0 keeps nothing that has
    /// been sent: then only a body that was never touched can be sent again.
    pub(super) fn new(body: B, cap: u64) -> (Self, Tape<B>) {
        if body.is_end_stream() {
            return (Self::of(Kind::Empty), Tape::Empty);
        }
        // One that will not fit is not copied at all, but can be sent as long as it has not begun.
        let cap = if body.size_hint().lower() > cap { 0 } else { cap };
        let reel = Arc::new(Mutex::new(Reel {
            rest: Some(Box::pin(body)),
            sent: Sent::default(),
            trailers: None,
            size: 0,
            cap,
            torn: false,
            in_use: true,
            turn: 0,
        }));
        let reader = Reader { reel: reel.clone(), next: 0, turn: 0, done: false };
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
                Kind::Taped { reader: Reader { reel: reel.clone(), next: 0, turn, done: false } }
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
        let Some(rest) = &mut reel.rest else {
            // All of it has been sent before; the trailers are what is left.
            self.done = reel.end();
            return Poll::Ready(
                reel.trailers.clone().map(|trailers| Ok(Frame::trailers(*trailers))),
            );
        };
        let frame = match ready!(rest.as_mut().poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                reel.torn = true;
                self.done = reel.end();
                return Poll::Ready(Some(Err(error)));
            }
            None => {
                self.done = reel.end();
                return Poll::Ready(None);
            }
        };
        let last = rest.is_end_stream();
        let frame = match frame.into_data() {
            Ok(mut data) => {
                let data = data.copy_to_bytes(data.remaining());
                reel.keep(&data);
                self.next = reel.sent.len();
                // Asked here, and not by one more poll: then nothing is left that needs the lock.
                self.done = last && reel.end();
                Frame::data(data)
            }
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) => {
                    if !reel.torn {
                        reel.trailers = Some(Box::new(trailers.clone()));
                    }
                    self.done = reel.end();
                    Frame::trailers(trailers)
                }
                Err(_) => {
                    // A kind of frame that is not known today: passed over, and never sent again.
                    reel.torn = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            },
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        if self.done {
            return true;
        }
        let reel = lock(&self.reel);
        reel.turn == self.turn
            && self.next >= reel.sent.len()
            && reel.trailers.is_none()
            && reel.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        if self.done {
            return SizeHint::with_exact(0);
        }
        let reel = lock(&self.reel);
        let kept = reel.sent.bytes_from(self.next);
        let rest = reel.rest.as_ref().map_or(SizeHint::with_exact(0), |rest| rest.size_hint());
        let mut hint = SizeHint::new();
        // The upper bound first: a lower one above it would panic.
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(kept));
        }
        hint.set_lower(rest.lower().saturating_add(kept));
        hint
    }
}

impl<B> Reel<B> {
    fn keep(&mut self, data: &Bytes) {
        if self.torn {
            return;
        }
        self.size = self.size.saturating_add(data.len() as u64);
        if self.size > self.cap {
            self.torn = true;
            self.sent = Sent::default();
        } else if !data.is_empty() {
            self.sent.push(data.clone());
        }
    }

    /// Nothing more is to be read: true.
    fn end(&mut self) -> bool {
        self.rest = None;
        self.in_use = false;
        true
    }

    /// Whether one who has read so many pieces has read all there is; then it is over.
    fn is_over(&mut self, next: usize) -> bool {
        let over = self.rest.is_none() && self.trailers.is_none() && next >= self.sent.len();
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
