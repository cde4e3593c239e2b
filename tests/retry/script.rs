//! A scripted body.

use std::{
    collections::VecDeque,
    fmt,
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
use http_body_util::BodyExt;
use tokio::time::{Sleep, sleep};

use crate::kit::Oops;

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

pub fn data(text: &'static str) -> Piece {
    Piece::Data(Bytes::from_static(text.as_bytes()))
}

pub fn trailers(pairs: &[(&'static str, &'static str)]) -> Piece {
    Piece::Trailers(map(pairs))
}

pub fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

/// Counts the frames and bytes that were read of a body. The `Arc` has no other owner after the body is dropped.
#[derive(Debug, Default)]
pub struct Watched {
    pub frames: AtomicU32,
    pub bytes: AtomicU32,
}

/// A body that plays a script. Panics if it is polled after its end.
#[derive(Debug)]
pub struct Script {
    pieces: VecDeque<Piece>,
    tells: bool,
    over: bool,
    pause: Option<Pin<Box<Sleep>>>,
    watched: Arc<Watched>,
}

impl Script {
    pub fn new(pieces: impl IntoIterator<Item = Piece>) -> Self {
        Self {
            pieces: pieces.into_iter().collect(),
            tells: true,
            over: false,
            pause: None,
            watched: Arc::default(),
        }
    }

    pub fn empty() -> Self {
        Self::new([])
    }

    pub fn text(text: &'static str) -> Self {
        Self::new([data(text)])
    }

    /// Disables `is_end_stream` and the exact size hint.
    pub fn untold(mut self) -> Self {
        self.tells = false;
        self
    }

    pub fn watch(&self) -> Arc<Watched> {
        self.watched.clone()
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = Oops;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Oops>>> {
        assert!(!self.over, "polled after its end");
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        loop {
            let frame = match self.pieces.pop_front() {
                None => {
                    self.over = true;
                    return Poll::Ready(None);
                }
                Some(Piece::Data(data)) => Frame::data(data),
                Some(Piece::Trailers(trailers)) => Frame::trailers(trailers),
                Some(Piece::Error) => {
                    self.over = true;
                    return Poll::Ready(Some(Err(Oops("body"))));
                }
                Some(Piece::Panic) => panic!("scripted panic"),
                Some(Piece::Stuck) => {
                    self.pieces.push_front(Piece::Stuck);
                    return Poll::Pending;
                }
                Some(Piece::Pause(long)) => {
                    let mut pause = Box::pin(sleep(long));
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
            self.watched.frames.fetch_add(1, SeqCst);
            let length = frame.data_ref().map_or(0, Bytes::len);
            self.watched.bytes.fetch_add(u32::try_from(length).unwrap(), SeqCst);
            return Poll::Ready(Some(Ok(frame)));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.tells && self.pieces.is_empty() && self.pause.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let size = self.pieces.iter().try_fold(0, |sum, piece| match piece {
            Piece::Data(data) => Some(sum + data.len() as u64),
            Piece::Trailers(_) | Piece::Pause(_) => Some(sum),
            _ => None,
        });
        match size {
            Some(size) if self.tells => SizeHint::with_exact(size),
            _ => SizeHint::default(),
        }
    }
}

/// Reads a body to its end. Returns its data and its trailers.
pub async fn read<B: Body<Error: fmt::Debug>>(body: B) -> (Bytes, Option<HeaderMap>) {
    let body = body.collect().await.unwrap();
    let trailers = body.trailers().cloned();
    (body.to_bytes(), trailers)
}
