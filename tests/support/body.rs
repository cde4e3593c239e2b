use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::Oops;

/// The result of one poll of a scripted body.
#[derive(Clone, Debug)]
pub enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    Error,
    Panic,
    /// Pending without end.
    Stuck,
    /// Pending for this time.
    Pause(Duration),
    /// Data without end.
    Endless(Bytes),
}

impl Piece {
    pub fn data(text: &'static str) -> Self {
        Self::Data(Bytes::from_static(text.as_bytes()))
    }
}

/// Counts the frames and bytes that were read of a body. The `Arc` has no other owner after the body is dropped.
#[derive(Debug, Default)]
pub struct BodyReads {
    pub frames: AtomicU32,
    pub bytes: AtomicU32,
}

/// A body that plays a script. It reports its end and its exact size, unless [`without_hints`](Self::without_hints)
/// disables this. Panics if it is polled after its end.
#[derive(Debug)]
pub struct ScriptBody {
    pieces: VecDeque<Piece>,
    has_hints: bool,
    is_over: bool,
    pause: Option<Pin<Box<Sleep>>>,
    reads: Arc<BodyReads>,
}

impl ScriptBody {
    pub fn new(pieces: impl IntoIterator<Item = Piece>) -> Self {
        Self {
            pieces: pieces.into_iter().collect(),
            has_hints: true,
            is_over: false,
            pause: None,
            reads: Arc::default(),
        }
    }

    pub fn empty() -> Self {
        Self::new([])
    }

    pub fn text(text: &'static str) -> Self {
        Self::new([Piece::data(text)])
    }

    /// Disables `is_end_stream` and the exact size hint.
    pub fn without_hints(mut self) -> Self {
        self.has_hints = false;
        self
    }

    /// Returns the counters of this body.
    pub fn reads(&self) -> Arc<BodyReads> {
        self.reads.clone()
    }
}

impl Body for ScriptBody {
    type Data = Bytes;
    type Error = Oops;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Oops>>> {
        assert!(!self.is_over, "polled after its end");
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        loop {
            let frame = match self.pieces.pop_front() {
                None => {
                    self.is_over = true;
                    return Poll::Ready(None);
                }
                Some(Piece::Data(data)) => Frame::data(data),
                Some(Piece::Trailers(trailers)) => Frame::trailers(trailers),
                Some(Piece::Error) => {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(Oops("body"))));
                }
                Some(Piece::Panic) => panic!("scripted panic in a body"),
                Some(Piece::Stuck) => {
                    self.pieces.push_front(Piece::Stuck);
                    return Poll::Pending;
                }
                Some(Piece::Pause(time)) => {
                    let mut pause = Box::pin(sleep(time));
                    if pause.as_mut().poll(cx).is_pending() {
                        self.pause = Some(pause);
                        return Poll::Pending;
                    }
                    continue;
                }
                Some(Piece::Endless(data)) => {
                    self.pieces.push_front(Piece::Endless(data.clone()));
                    Frame::data(data)
                }
            };
            self.reads.frames.fetch_add(1, SeqCst);
            let length = frame.data_ref().map_or(0, Bytes::len);
            self.reads.bytes.fetch_add(u32::try_from(length).unwrap(), SeqCst);
            return Poll::Ready(Some(Ok(frame)));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_hints && self.pieces.is_empty() && self.pause.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let size = self.pieces.iter().try_fold(0, |sum, piece| match piece {
            Piece::Data(data) => Some(sum + data.len() as u64),
            Piece::Trailers(_) | Piece::Pause(_) => Some(sum),
            _ => None,
        });
        match size {
            Some(size) if self.has_hints => SizeHint::with_exact(size),
            _ => SizeHint::default(),
        }
    }
}
